"""Evaluates a network, and the pseudo-masks it learned from, on every study with a true mask."""

import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from covseg_jax import hosts
from covseg_jax.data.cases import Case
from covseg_jax.evaluation import evaluate, report
from covseg_jax.imaging import geometry as geometries
from covseg_jax.imaging.nifti import read_volume
from covseg_jax.inference.masks import MaskSettings, StudyMask, mask_on_study_grid

PSEUDO_MASK_CUT = 0.5  # synthesize.py puts its threshold there


def _read_canonical(path: str) -> np.ndarray:
    volume = read_volume(path)
    return geometries.to_canonical(volume.data, volume.affine)


def _score(
    case: Case, probability: np.ndarray, found: StudyMask, truth: np.ndarray
) -> tuple[dict, list[dict]]:
    return evaluate.score_case(
        evaluate.CaseArrays(
            study_id=case.study_id,
            category=case.category,
            truth=truth,
            prediction=found.mask,
            lungs=found.lungs,
            spacing_mm=case.geometry.spacing_mm,
            truth_model=np.asarray(case.lesion()) > 0,
            probability_model=np.asarray(probability, np.float32),
            lungs_model=np.asarray(case.lungs()) > 0,
        )
    )


def evaluate_cohort(
    cases: Sequence[Case],
    predict: Callable[[Case], np.ndarray],
    read_pseudo_mask: Callable[[Case], np.ndarray] | None,
    settings: MaskSettings,
    folder: pathlib.Path,
    run: dict,
) -> dict:
    """Scores all cases in the three protocols and writes the tables, figures, report and summary.

    Args:
      cases: prepared cases with a true mask, none of which was trained on.
      predict: case -> its (D, H, W) lesion probability.
      read_pseudo_mask: case -> its (D, H, W) pseudo-mask in [0, 1]; None where there are none.
      settings: from the probability to a mask.
      folder: gets cases.csv, slices.csv, their pseudo_masks/ twins, figures/, report.html, and
        summary.json last.
      run: what else the summary and the report say: threshold, checkpoint_step, and so on.

    Returns:
      The content of summary.json.

    Raises:
      InputError: a true mask can no longer be read.
    """
    tables: dict[str, tuple[list[dict], list[dict]]] = {'network': ([], [])}
    if read_pseudo_mask is not None:
        tables['pseudo'] = ([], [])

    def masks_of(case: Case) -> dict[str, tuple[np.ndarray, StudyMask]]:
        lungs = np.asarray(case.lungs())
        found = predict(case)
        masks = {'network': (found, mask_on_study_grid(found, lungs, case.geometry, settings))}
        if read_pseudo_mask is not None:
            pseudo = np.asarray(read_pseudo_mask(case), np.float32)
            cut = MaskSettings(PSEUDO_MASK_CUT, min_component_ml=settings.min_component_ml)
            masks['pseudo'] = (pseudo, mask_on_study_grid(pseudo, lungs, case.geometry, cut))
        return masks

    def score(case: Case) -> dict[str, tuple[dict, list[dict]]]:
        truth = _read_canonical(case.description['lesion_mask']) > 0
        return {source: _score(case, *each, truth) for source, each in masks_of(case).items()}

    own = tqdm(hosts.share(cases), desc='evaluate', unit='study', disable=None)
    for scores in hosts.gather([score(case) for case in own], len(cases)):
        for source, (case_row, slice_rows) in scores.items():
            tables[source][0].append(case_row)
            tables[source][1].extend(slice_rows)

    case_rows, slice_rows = tables['network']
    summary = {
        'protocols': evaluate.summarise(case_rows, slice_rows),
        'pseudo_masks': evaluate.summarise(*tables['pseudo']) if 'pseudo' in tables else None,
        'strata': evaluate.stratify(case_rows),
        'studies': len(cases),
        **run,
    }

    def write() -> None:
        evaluate.write_tables(folder, case_rows, slice_rows)
        if 'pseudo' in tables:
            evaluate.write_tables(folder / 'pseudo_masks', *tables['pseudo'])
        figures = report.plot_against_infection(case_rows, slice_rows, folder)
        figures += report.plot_overlays(_choose_overlays(cases, case_rows, masks_of), folder)
        report.write_report(folder, summary, case_rows, figures, run)
        evaluate.write_summary(folder, summary)

    hosts.first_alone(write, 'the evaluation is written')
    return summary


def _choose_overlays(
    cases: Sequence[Case], case_rows: list[dict], masks_of: Callable[[Case], dict]
) -> dict[str, report.OverlayCase]:
    by_id = {case.study_id: case for case in cases}
    dice = {row['study_id']: row['dice'] for row in case_rows}
    overlays = {}
    for role, study_id in report.choose_cases(case_rows).items():
        case = by_id[study_id]
        masks = masks_of(case)
        overlays[role] = report.OverlayCase(
            study_id=study_id,
            dice=dice[study_id],
            image_hu=_read_canonical(case.description['image']),
            truth=_read_canonical(case.description['lesion_mask']) > 0,
            prediction=masks['network'][1].mask,
            pseudo_mask=masks['pseudo'][1].mask if 'pseudo' in masks else None,
            spacing_mm=case.geometry.spacing_mm,
        )
    return overlays


def format_summary(summary: dict) -> str:
    """The figures of summary.json as a few lines of text."""
    lines = []
    for title, protocols in (
        ('network', summary['protocols']),
        ('pseudo-masks', summary.get('pseudo_masks')),
    ):
        for protocol, metrics in (protocols or {}).items():
            figures = ', '.join(
                f'{name} {_percent(metrics[name])}'
                for name in ('dice', 'sensitivity', 'specificity_lung')
            )
            lines.append(f'{title:>12} | {protocol:<25} | {figures} (n = {metrics["dice"]["n"]})')
    return '\n'.join(lines)


def _percent(figures: dict) -> str:
    if figures['mean'] is None:
        return 'undefined'
    low, high = figures['ci95']
    interval = '' if low is None else f' [{low:.3f}, {high:.3f}]'
    return f'{figures["mean"]:.3f}{interval}'
