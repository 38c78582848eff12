"""Evaluates a network, and pseudo-masks where there are any, on every study with a true mask."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from covseg_jax import hosts
from covseg_jax.evaluation import figures, probabilities, report, scores, tensorboard
from covseg_jax.evaluation.metric_table import CaseArrays
from covseg_jax.imaging.masks import MaskSettings, StudyMask, mask_on_study_grid
from covseg_jax.imaging.study import Study
from covseg_jax.predict import viewer
from covseg_jax.prepare import study_files
from covseg_jax.prepare.cases import Case

MAX_VIEWS = 50  # worst cases that the report's viewer shows
_VIEWS_BYTES = 20_000_000  # of all of them in the report
_VIEW_BYTES = 500_000  # of one at most
_FINE_BINS = 8 * probabilities.NUM_BINS  # for precision against recall


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where a case's image, truth and masks come from.

    Attributes:
      studies: study id → the study itself, of each case.
      predict: case → its (D, H, W) lesion probability.
      settings: from the probability to a mask.
      lesion_labels: values of a true mask that are lesion.
      read_pseudo_mask: case → its (D, H, W) pseudo-mask in [0, 1]; None where there are none.
      pseudo_masks: from a pseudo-mask to a mask, where there are such.
    """

    studies: Mapping[str, Study]
    predict: Callable[[Case], np.ndarray]
    settings: MaskSettings
    lesion_labels: Sequence[int]
    read_pseudo_mask: Callable[[Case], np.ndarray] | None = None
    pseudo_masks: MaskSettings | None = None

    def masks_of(self, case: Case) -> dict[str, tuple[np.ndarray, StudyMask]]:
        lungs = np.asarray(case.lungs())
        found = self.predict(case)
        masks = {'network': (found, mask_on_study_grid(found, lungs, case.geometry, self.settings))}
        if self.read_pseudo_mask is not None:
            pseudo = np.asarray(self.read_pseudo_mask(case), np.float32)
            cut = mask_on_study_grid(pseudo, lungs, case.geometry, self.pseudo_masks)
            masks['pseudo'] = (pseudo, cut)
        return masks

    def read(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """The image in HU and the true mask, both on the study's grid."""
        study = self.studies[case.study_id]
        volume = study_files.read_image(study)
        truth = study_files.read_mask(study, 'lesion_mask', volume, self.lesion_labels)
        return volume.array, truth


def evaluate_cases(
    cases: Sequence[Case],
    sources: Sources,
    folder: pathlib.Path,
    run: dict,
    *,
    made_with: Mapping[str, Any],
    learning_curves: Sequence[pathlib.Path] = (),
) -> dict:
    """Scores all cases in the three protocols and writes the tables, figures, report and summary.

    Args:
      cases: prepared cases with a true mask, none of which was trained on.
      sources: what is scored, and against what.
      folder: gets cases.csv, slices.csv, their pseudo_masks/ twins, figures/, report.html,
        tensorboard/, and summary.json last.
      run: what else the summary and the report say: threshold, checkpoint_step, and so on.
      made_with: the run's settings, nested, for TensorBoard.
      learning_curves: pictures that the report ends with.

    Returns:
      The content of summary.json.

    Raises:
      InputError: a study or its true mask can no longer be read.
    """
    found = hosts.gather(_score_cases(cases, sources), len(cases))
    _keep_worst_views(found)
    tables: dict[str, tuple[list[dict], list[dict]]] = {}
    for each in found:
        for source, (case_row, slice_rows) in each['scores'].items():
            all_rows = tables.setdefault(source, ([], []))
            all_rows[0].append(case_row)
            all_rows[1].extend(slice_rows)
    curve = np.sum([each['curve'] for each in found], axis=0)
    case_rows = tables['network'][0]
    pseudo = scores.summarise(*tables['pseudo']) if 'pseudo' in tables else None
    summary = scores.make_summary(*tables['network'], pseudo_masks=pseudo) | run

    def write() -> None:
        for source, place in (('network', folder), ('pseudo', folder / 'pseudo_masks')):
            if source in tables:
                scores.write_tables(place, *tables[source])
        drawn = _draw(cases, sources, tables, curve, folder)
        tensorboard.write_board(folder, summary, curve, drawn, made_with)
        views = [each['view'] for each in found if 'view' in each]
        report.write_report(folder, summary, case_rows, [*drawn, *learning_curves], run, views)
        scores.write_summary(folder, summary)

    hosts.first_alone(write, 'the evaluation is written')
    return summary


def _score_cases(cases: Sequence[Case], sources: Sources) -> list[dict]:
    """This host's share: each case's scores and calibration curve, and views of the worst."""
    view_bytes = min(_VIEW_BYTES, _VIEWS_BYTES // min(max(len(cases), 1), MAX_VIEWS))
    own: list[dict] = []
    for case in tqdm(hosts.share(cases), desc='evaluate', unit='study', disable=None):
        image_hu, truth = sources.read(case)
        masks = sources.masks_of(case)
        scored = {
            source: scores.score_case(_case_arrays(case, truth, *each))
            for source, each in masks.items()
        }
        inside = np.asarray(case.lungs()) > 0
        curve = probabilities.calibration_curve(
            (np.asarray(case.lesion()) > 0)[inside], masks['network'][0][inside], _FINE_BINS
        )
        own.append({'scores': scored, 'curve': curve.tolist()})
        if _keep_worst_views(own):
            images = _images(case, scored['network'][0]['dice'], image_hu, truth, masks)
            own[-1]['view'] = draw_views(images, view_bytes)
    return own


def _case_arrays(
    case: Case, truth: np.ndarray, probability: np.ndarray, found: StudyMask
) -> CaseArrays:
    return CaseArrays(
        study_id=case.study_id,
        category=case.category,
        truth=truth,
        prediction=found.mask,
        lungs=found.lungs,
        spacing_mm=case.geometry.spacing_mm,
        voxel_ml=case.geometry.study_voxel_ml,
        truth_model=np.asarray(case.lesion()) > 0,
        probability_model=np.asarray(probability, np.float32),
        lungs_model=np.asarray(case.lungs()) > 0,
        subject=case.subject,
    )


def _draw(
    cases: Sequence[Case],
    sources: Sources,
    tables: Mapping,
    curve: np.ndarray,
    folder: pathlib.Path,
) -> list[pathlib.Path]:
    """The figures, and overlays of a few cases."""
    case_rows, slice_rows = tables['network']
    pseudo_rows = tables['pseudo'][0] if 'pseudo' in tables else []
    drawn = figures.plot_against_infection(case_rows, slice_rows, folder)
    drawn.append(figures.plot_agreement(case_rows, pseudo_rows, folder))
    coarse = curve.reshape(len(curve), probabilities.NUM_BINS, -1).sum(axis=-1)
    drawn.append(figures.plot_calibration(coarse, folder))
    dice = {row['study_id']: row['dice'] for row in case_rows}
    by_id = {case.study_id: case for case in cases}
    for role, study_id in figures.choose_cases(case_rows).items():
        case = by_id[study_id]
        images = _images(case, dice[study_id], *sources.read(case), sources.masks_of(case))
        drawn.append(figures.plot_overlay(role, images, folder))
    return drawn


def _images(
    case: Case,
    dice: float,
    image_hu: np.ndarray,
    truth: np.ndarray,
    masks: dict[str, tuple[np.ndarray, StudyMask]],
) -> figures.CaseImages:
    return figures.CaseImages(
        study_id=case.study_id,
        dice=dice,
        image_hu=image_hu,
        lungs=masks['network'][1].lungs,
        truth=truth,
        prediction=masks['network'][1].mask,
        pseudo_mask=masks['pseudo'][1].mask if 'pseudo' in masks else None,
        spacing_mm=case.geometry.spacing_mm,
    )


def draw_views(images: figures.CaseImages, max_bytes: int) -> dict:
    """A study's slices with its masks, for the report's viewer."""
    layers = {
        name: viewer.Layer(mask, figures.MASK_COLOURS[name]) for name, mask in images.masks.items()
    }
    return viewer.draw_views(
        images.study_id, images.image_hu, images.lungs, layers, images.spacing_mm,
        viewer.Limits(max_bytes), most_of=('truth', 'prediction'),
    )  # fmt: skip


def _keep_worst_views(found: list[dict]) -> bool:
    """Drops the views of all but the worst cases, so that memory and report stay small. Tells
    whether the newest case is one of the worst."""
    rows = [each['scores']['network'][0] for each in found]
    worst = {row['study_id'] for row in report.sort_worst_first(rows)[:MAX_VIEWS]}
    for each, row in zip(found, rows, strict=True):
        if row['study_id'] not in worst:
            each.pop('view', None)
    return rows[-1]['study_id'] in worst
