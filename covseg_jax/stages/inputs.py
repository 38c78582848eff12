"""What the stages take from the command line, the config and the work directory."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Container, Iterable

import ml_collections
import numpy as np
from isal import isal_zlib

from covseg_jax import bucket, cpu, hosts, manifest
from covseg_jax.errors import FileFault, InputError
from covseg_jax.gan.synthesize import PseudoMaskSettings, read_pseudo_mask
from covseg_jax.imaging import formats
from covseg_jax.imaging.masks import MaskSettings
from covseg_jax.imaging.study import Study
from covseg_jax.prepare.cases import Case, Splits, find_cases, split_cases
from covseg_jax.prepare.prepare_studies import PrepareSettings

Config = ml_collections.ConfigDict
_CALIBRATION = 'transunet/calibration.json'
# What an export, which needs no config, takes in its place.
NO_CONFIG = Config({
    'data': {
        'layout': 'auto', 'subject_pattern': '(.*)', 'healthy_pattern': '',
        'evaluation_pattern': '.*', 'on_bad_study': 'skip', 'num_workers': 0,
    },
    'prepare': {'lesion_labels': (1,)},
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line names beside the config; a path that is not given is None."""

    input: pathlib.Path | None = None
    output: pathlib.Path | None = None
    reference: pathlib.Path | None = None
    model: str | None = None
    resume: bool = False
    preview: bool = False
    per_lung: bool = False
    probability: bool = False
    report: bool = False
    dicom_seg: bool = False
    disagreement: bool = False
    num_workers: int | None = None


# A process takes at most so many times its scan, and so many bytes more:
# `tests/benchmarks/prepare_study.py --sizes`; and where it writes DICOM Segmentations, highdicom's
# tables, both masks, their stack, and its sum as 8 bytes a voxel.
_PROCESS_SCANS, _PROCESS_BYTES = 3, 300_000_000
_SEG_PROCESS_SCANS, _SEG_PROCESS_BYTES = 7, 600_000_000


def prepared_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.prepared or workdir / 'prepared')


def data_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    # Absolute: prepared cases note their files' paths, which must hold from another folder too.
    return bucket.local_path(config.data.folder or workdir / 'studies').absolute()


def pseudo_mask_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.pseudo_masks or workdir / 'pseudo_masks')


def num_workers(
    config: Config | None, studies: Iterable[Study] = (), *, dicom_seg: bool = False
) -> int:
    """Processes for studies; where the config says nothing, one for each core of this process, or
    as many as have room for the largest of the studies, to segment it and, where wanted, to write
    it as a DICOM Segmentation."""
    if config and config.data.num_workers:
        return config.data.num_workers
    sizes = (formats.stored_bytes(each.image, each.index, each.files) for each in studies)
    largest = max(sizes, default=0)
    available = cpu.available_memory()
    if not largest or available is None:
        return cpu.count_cores()
    scans, more = _PROCESS_SCANS, _PROCESS_BYTES
    if dicom_seg:
        scans, more = _SEG_PROCESS_SCANS, _SEG_PROCESS_BYTES
    return max(1, min(cpu.count_cores(), available // (scans * largest + more)))


def tell_stray(stage: str) -> Callable[[FileFault], None]:
    """Prints what `find_studies` found beside studies, on the first host."""

    def tell(stray: FileFault) -> None:
        if hosts.is_first():
            print(f'{stage}: note: {stray}')

    return tell


def prepared_cases(
    config: Config, prepared: pathlib.Path, only: Container[str] | None = None
) -> tuple[Case, ...]:
    return find_cases(
        prepared,
        subject_pattern=config.data.subject_pattern,
        healthy_pattern=config.data.healthy_pattern,
        only=only,
    )


def split_studies(config: Config, workdir: pathlib.Path, *, needs_covid: bool = True) -> Splits:
    """Which prepared studies serve for what. Where this run prepared them, only those that it found
    then: what else lies there, such as a study that was taken out since, serves for nothing."""
    prepared = prepared_folder(config, workdir)
    made = (path.parent.resolve() for path in manifest.read_outputs(workdir, 'prepare'))
    found = {folder.name for folder in made if folder.parent == prepared.resolve()}
    cases = prepared_cases(config, prepared, only=found or None)
    pattern = config.data.healthy_pattern
    if pattern and not any(re.fullmatch(pattern, case.study_id) for case in cases):
        raise InputError(
            f'data.healthy_pattern {pattern!r} matches no prepared study; it must match a whole '
            f'study id, such as {cases[0].study_id}'
        )
    return split_cases(
        cases,
        seed=config.seed,
        calibration_fraction=config.data.calibration_fraction,
        validation_fraction=config.data.validation_fraction,
        evaluation_pattern=config.data.evaluation_pattern,
        needs_covid=needs_covid,
    )


def pseudo_mask_reader(config: Config, workdir: pathlib.Path) -> Callable[[Case], np.ndarray]:
    folder = pseudo_mask_folder(config, workdir)
    return lambda case: read_pseudo_mask(folder, case.study_id)


def pseudo_probability_reader(
    config: Config, workdir: pathlib.Path
) -> Callable[[Case], np.ndarray]:
    """Pseudo-masks as probabilities: a signed difference without what is below 0."""
    read = pseudo_mask_reader(config, workdir)
    return lambda case: np.clip(np.asarray(read(case), np.float32), 0, 1)


def pseudo_mask_cuts(config: Config) -> MaskSettings:
    """How masks are cut from pseudo-masks."""
    cuts = PseudoMaskSettings(**config.synthesize).masks()
    return dataclasses.replace(cuts, min_component_ml=config.masks.min_component_ml)


def given_cuts(config: Config) -> MaskSettings | None:
    """The share of the maximum at which the config cuts masks; None where thresholds are found."""
    return MaskSettings(**config.masks) if config.masks.share_of_max else None


def describe_cuts(masks: MaskSettings) -> dict[str, float | None]:
    """As calibration.json, which `load_masks` reads, and summary.json hold them."""
    if masks.share_of_max:
        return {'threshold': None, 'share_of_max': masks.share_of_max}
    return {'threshold': masks.threshold, 'seed_threshold': masks.seed_threshold}


def read_calibration(workdir: pathlib.Path) -> dict | None:
    """What `train` wrote beside its network; None where it did not end yet."""
    path = workdir / _CALIBRATION
    return json.loads(path.read_text(encoding='utf-8')) if path.exists() else None


def describe_training_data(config: Config, workdir: pathlib.Path) -> dict | None:
    """What the network of a work directory was trained on; None where nobody knows, as of imported
    weights."""
    found = (read_calibration(workdir) or {}).get('training_data')
    return found and found | {'data_sets': name_data_sets(config, found['data_sets'])}


def name_data_sets(config: Config, names: list[str] | None) -> list[str] | None:
    """The names of a run's data sets: phantoms lie in MosMedData's layout, and are called by it."""
    return ['phantoms'] if config.phantom.make else names


def load_masks(config: Config, workdir: pathlib.Path) -> MaskSettings:
    """How the trained network's probabilities become masks, as train found it."""
    cuts = read_calibration(workdir)
    if cuts is None:
        raise InputError(
            f'{workdir / _CALIBRATION}: no trained network in {workdir}; run the stages up to '
            'train first'
        )
    least = config.masks.min_component_ml
    if cuts.get('share_of_max'):
        return MaskSettings(min_component_ml=least, share_of_max=cuts['share_of_max'])
    return MaskSettings(cuts['threshold'], cuts.get('seed_threshold', cuts['threshold']), least)


def load_model(config: Config, workdir: pathlib.Path, *, num_devices: int | None = None):
    """The trained network of a work directory as a `predict.model.Model`, on all devices of this
    host or on the first `num_devices`, and its checkpoint's step."""
    import jax

    from covseg_jax.predict.model import Model, Origin
    from covseg_jax.segmentation.train import load_variables, make_probability, volume_settings

    masks = load_masks(config, workdir)
    network, variables, step = load_variables(config, workdir / 'transunet')
    weights = 0  # their checksum: the same wherever the work directory lies
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        weights = isal_zlib.crc32(leaf.tobytes(), weights)
    model = Model(
        probabilities=tuple(
            make_probability(config, network, jax.device_put(variables, device))
            for device in jax.local_devices()[:num_devices]
        ),
        preparation=PrepareSettings(**config.prepare),
        masks=masks,
        identity=manifest.fingerprint(
            [config.network.to_dict(), config.predict.to_dict(), config.prepare.to_dict(),
             dataclasses.asdict(masks), step, weights]
        ),
        origins=(
            Origin(
                str(workdir), config.network.name, volume_settings(config),
                f'{config.name}:{config.variant}', step, describe_training_data(config, workdir),
                pixels=tuple(config.prepare.grid[1:]),
            ),
        ),
    )  # fmt: skip
    return model, step


def case_predictor(model) -> Callable[[Case], np.ndarray]:
    """case → (D, H, W) lesion probability by a `predict.model.Model`, on its first device."""
    return lambda case: model.probabilities[0](np.asarray(case.image()), np.asarray(case.lungs()))
