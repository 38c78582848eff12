"""What the stages take from the command line, the config and the work directory."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Container

import ml_collections

from covseg_jax import cpu
from covseg_jax.errors import InputError
from covseg_jax.manifest import fingerprint

Config = ml_collections.ConfigDict


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line names beside the config: paths, None where not given, and what predict
    is asked for."""

    input: pathlib.Path | None = None
    output: pathlib.Path | None = None
    reference: pathlib.Path | None = None
    model: str | None = None
    resume: bool = False
    preview: bool = False
    per_lung: bool = False
    probability: bool = False
    num_workers: int | None = None


def prepared_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.prepared or workdir / 'prepared')


def data_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    # Prepared cases note their files' paths: they should hold from another folder too.
    return pathlib.Path(config.data.folder or workdir / 'studies').absolute()


def prepare_settings(config: Config):
    from covseg_jax.prepare.prepare_studies import PrepareSettings

    return PrepareSettings(**config.prepare)


def num_workers(config: Config | None) -> int:
    """Processes for studies; where the config says nothing, one a core that this process has."""
    return (config and config.data.num_workers) or cpu.count_cores()


def prepared_cases(config: Config, workdir: pathlib.Path, only: Container[str] | None = None):
    from covseg_jax.prepare.cases import find_cases

    return find_cases(
        prepared_folder(config, workdir),
        subject_pattern=config.data.subject_pattern,
        healthy_pattern=config.data.healthy_pattern,
        only=only,
    )


def split_studies(config: Config, workdir: pathlib.Path):
    from covseg_jax.prepare.cases import split_cases

    cases, pattern = prepared_cases(config, workdir), config.data.healthy_pattern
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
    )


def pseudo_mask_folder(config: Config, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.pseudo_masks or workdir / 'pseudo_masks')


def pseudo_mask_reader(config: Config, workdir: pathlib.Path):
    from covseg_jax.gan.synthesize import read_pseudo_mask

    folder = pseudo_mask_folder(config, workdir)
    return lambda case: read_pseudo_mask(folder, case.study_id)


def pseudo_mask_cuts(config: Config):
    """How masks are cut from pseudo-masks."""
    from covseg_jax.gan.synthesize import PseudoMaskSettings

    cuts = PseudoMaskSettings(**config.synthesize).masks()
    return dataclasses.replace(cuts, min_component_ml=config.masks.min_component_ml)


def pseudo_probability_reader(config: Config, workdir: pathlib.Path):
    """Pseudo-masks as probabilities: a signed difference without what is below 0."""
    import numpy as np

    read = pseudo_mask_reader(config, workdir)
    return lambda case: np.clip(np.asarray(read(case), np.float32), 0, 1)


def given_cuts(config: Config):
    """The share of the maximum at which the config cuts masks; None where thresholds are found."""
    from covseg_jax.imaging.masks import MaskSettings

    return MaskSettings(**config.masks) if config.masks.share_of_max else None


def describe_cuts(masks) -> dict[str, float | None]:
    """MaskSettings as calibration.json and summary.json hold them, `load_masks` reads the first."""
    if masks.share_of_max:
        return {'threshold': None, 'share_of_max': masks.share_of_max}
    return {'threshold': masks.threshold, 'seed_threshold': masks.seed_threshold}


def load_masks(config: Config, workdir: pathlib.Path):
    """How the trained network's probabilities become masks, as train found it."""
    from covseg_jax.imaging.masks import MaskSettings

    calibration = workdir / 'transunet' / 'calibration.json'
    if not calibration.exists():
        raise InputError(
            f'{calibration}: no trained network in {workdir}; run the stages up to train first'
        )
    cuts = json.loads(calibration.read_text(encoding='utf-8'))
    if cuts.get('share_of_max'):
        return MaskSettings(
            min_component_ml=config.masks.min_component_ml, share_of_max=cuts['share_of_max']
        )
    return MaskSettings(
        cuts['threshold'],
        cuts.get('seed_threshold', cuts['threshold']),
        config.masks.min_component_ml,
    )


def load_model(config: Config, workdir: pathlib.Path, *, num_devices: int | None = None):
    """The trained network of a work directory, on all devices of this host or on the first ones,
    and its checkpoint's step."""
    import jax

    from covseg_jax.predict.model import Model
    from covseg_jax.segmentation.train import load_variables, make_probability

    masks = load_masks(config, workdir)
    network, variables, step = load_variables(config, workdir / 'transunet')
    model = Model(
        probabilities=tuple(
            make_probability(config, network, jax.device_put(variables, device))
            for device in jax.local_devices()[:num_devices]
        ),
        preparation=prepare_settings(config),
        masks=masks,
        identity=fingerprint(
            [config.network.to_dict(), config.predict.to_dict(), config.prepare.to_dict(),
             dataclasses.asdict(masks), step, str(workdir.resolve()),
             # another training of the same length
             (workdir / 'transunet' / 'calibration.json').stat().st_mtime_ns]
        ),
    )  # fmt: skip
    return model, step
