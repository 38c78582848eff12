"""The segmentation network's run: taken from the config, fed with painted scans and pseudo-masks,
trained."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from covseg_jax import hosts
from covseg_jax.data import feeds
from covseg_jax.data.augment import Augmentation, add_dependent_density, augment_slices
from covseg_jax.data.opacities import opacity_model, paint_scans, paint_slices
from covseg_jax.data.streams import stream_seed
from covseg_jax.errors import InputError
from covseg_jax.models.transunet import ProjectionHead
from covseg_jax.prepare.cases import Case, Splits
from covseg_jax.segmentation import steps
from covseg_jax.segmentation.adaptation import evaluate_adapted, make_adapt
from covseg_jax.segmentation.network import build_network, make_predict
from covseg_jax.segmentation.schedule import terms_by_step
from covseg_jax.segmentation.steps import SegmentationParts, SegmentationState
from covseg_jax.segmentation.targets import (
    ReadTarget,
    Round,
    choose_targets,
    learned_cases,
    plan_rounds,
    refine_targets,
)
from covseg_jax.segmentation.volumes import (
    Probability,
    VolumeSettings,
    predict_volumes,
    with_pixels,
)
from covseg_jax.training import loop, sharding
from covseg_jax.training.checkpoint import restore_for_inference
from covseg_jax.training.flat import unflatten
from covseg_jax.training.logging import image_strip
from covseg_jax.training.optim import make_adam, reduce_on_plateau
from covseg_jax.training.parts import make_learning_rate


def make_network(config: ml_collections.ConfigDict) -> nn.Module:
    """The TransUNet or U-Net of a config.

    Raises:
      InputError: another name.
    """
    fields = config.network.to_dict()
    if fields['name'] == 'unet':
        fields = {'name': 'unet', **config.unet}
    return build_network(fields | {'dtype': config.train.compute_dtype})


def build_segmentation(
    config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh | None = None
) -> SegmentationParts:
    """Network and optimizer, on all devices or the given mesh; nothing is computed yet.

    Raises:
      InputError: a setting is not one that exists.
    """
    train = config.train
    learning_rate = make_learning_rate('train', train, [each.end for each in _plan_rounds(config)])
    return SegmentationParts(
        seed=config.seed,
        mesh=mesh or sharding.make_mesh(),
        learning_rate=learning_rate,
        network=make_network(config),
        projection=ProjectionHead(dim=train.projection_dim),
        optimizer=make_adam(learning_rate, clip_norm=train.clip_norm),
        plateau=reduce_on_plateau(
            patience=train.plateau_patience, factor=train.plateau_factor, min_scale=1e-3
        ),
        image_size=tuple(config.prepare.grid[1:]),
    )


def check_train_batch(
    config: ml_collections.ConfigDict, batch_size: int, mesh: jax.sharding.Mesh
) -> None:
    """Raises an InputError where a batch cannot be split over devices and into micro-batches, each
    with as many high- as low-infection slices."""
    parts = config.train.micro_batches
    if parts < 1 or batch_size % (2 * parts):
        raise InputError(
            f'train.batch_size={batch_size} cannot be split into train.micro_batches={parts} '
            f'balanced parts; make it a multiple of {2 * max(parts, 1)}'
        )
    sharding.check_batch_size(batch_size // parts, mesh, 'train.batch_size / train.micro_batches')


def segmentation_batch_shapes(
    config: ml_collections.ConfigDict, batch_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a training batch, as it is read."""
    shape = (batch_size, *config.prepare.grid[1:], 1)
    image = jax.ShapeDtypeStruct(shape, jnp.float16)
    return dict.fromkeys((feeds.IMAGE, feeds.TARGET), image) | {
        feeds.LUNGS: jax.ShapeDtypeStruct(shape, jnp.uint8),
        feeds.LABEL: jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        feeds.HEALTHY: jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    }


def _plan_rounds(config: ml_collections.ConfigDict) -> list[Round]:
    train = config.train
    return plan_rounds(train.rounds, train.round_shares, train.num_steps)


def _training_slices(
    config: ml_collections.ConfigDict, splits: Splits, read_target: ReadTarget, kind: str
) -> feeds.Slices:
    if kind == 'synthetic':
        healthy = splits.healthy_train
        return feeds.spread_healthy(feeds.all_slices(healthy, [None] * len(healthy)))
    cases = list(splits.train)
    targets: list[np.ndarray | None] = [read_target(case) for case in cases]
    if config.train.use_healthy:
        cases += splits.healthy_train
        targets += [None] * len(splits.healthy_train)
    slices = feeds.all_slices(cases, targets)
    ranked = feeds.rank_slices(
        slices,
        by=config.train.labels,
        cut=0.5 if config.train.losses.binary_targets else None,
        high_percent=config.train.high_percent,
    )
    # Painting gives a healthy slice its label, on the device.
    return feeds.spread_healthy(ranked) if config.train.synthetic_share else ranked


def _augmentation(config: ml_collections.ConfigDict):
    """(key, batch) -> batch: dependent density, synthetic opacities, then what any slice may go
    through."""
    train = config.train
    opacities = opacity_model(config)
    changes = Augmentation(**train.augment)

    def augment(key: jax.Array, batch: dict) -> dict:
        vary_key, paint_key, change_key = jax.random.split(key, 3)
        if changes.enabled and opacities.dependent_density:
            volumes = (batch[name][:, None] for name in (feeds.IMAGE, feeds.LUNGS))
            varied = add_dependent_density(vary_key, *volumes, opacities.dependent_density)
            batch = batch | {feeds.IMAGE: varied[:, 0]}
        if train.synthetic_share:
            batch = paint_slices(paint_key, batch, opacities, train.synthetic_share)
        return augment_slices(change_key, batch, changes) if changes.enabled else batch

    return augment


def choose_segmentation_step(
    config: ml_collections.ConfigDict, parts: SegmentationParts
) -> Callable[[int], Callable]:
    """Step number -> compiled step, of the losses that `schedule.terms_by_step` gives.

    Raises:
      InputError: a setting does not exist, or some step has no loss with a weight.
    """
    train = config.train
    settings, terms_at = steps.SegmentationLosses(**train.losses), terms_by_step(train)

    @functools.cache
    def make(terms: tuple[str, ...]) -> Callable:
        return steps.make_segmentation_step(
            parts,
            settings,
            _augmentation(config),
            terms=terms,
            ema_decay=train.ema_decay,
            micro_batches=train.micro_batches,
            unroll=parts.mesh.devices.flat[0].platform == 'cpu',
        )

    return lambda step: make(terms_at(step))


def train_segmentation(
    config: ml_collections.ConfigDict,
    splits: Splits,
    read_pseudo_mask: ReadTarget,
    folder: pathlib.Path,
    initial: Any = None,
) -> None:
    """Trains the network, from the newest checkpoint in `folder` where there is one.

    `read_pseudo_mask` gives a case's (D, H, W) pseudo-mask in [0, 1], or a signed difference.
    `initial` are the variables that it begins with, a nested dict; None: new ones.

    Raises:
      InputError: a setting does not exist, batch and devices do not fit, no high- or no
        low-infection slice is there, no mask to learn from, or the loss is not finite.
      Stopped: asked to stop; saved.
    """
    train = config.train
    parts = build_segmentation(config)
    check_train_batch(config, train.batch_size, parts.mesh)
    splits, read_target = choose_targets(train.targets, splits, read_pseudo_mask)
    rounds = _plan_rounds(config)
    step_at = choose_segmentation_step(config, parts)
    kinds = {each.kind for each in rounds}
    evaluations = _make_evaluations(config, parts, splits, read_target, kinds)
    if train.statistics == 'scans':
        adapt = make_adapt(parts, config.predict.smoothing_pixels, config.prepare.grid[1:])
        scans = _scans_to_adapt_to(config, splits, hosts.index(), hosts.count())
        evaluations = {
            kind: evaluate_adapted(adapt, scans, each) for kind, each in evaluations.items()
        }
    state = parts.make_state() if initial is None else parts.start_from(initial)
    for number, each in enumerate(rounds):
        if each.kind == 'refined':
            read_target = refine_targets(
                splits.train,
                read_target,
                # What a network learned to lessen would be lessened once more in its prediction.
                make_probability(config, parts.network, _variables_of(state), border_factor=1.0),
                folder / 'targets' / f'round_{number + 1}',
                keep_human=train.targets != 'pseudo',
                is_done=int(state.step) > each.start,
            )
        feed = feeds.balanced_feed(
            _training_slices(config, splits, read_target, each.kind),
            batch_size=train.batch_size,
            seed=stream_seed(config.seed, 'train', number),
            host=hosts.index(),
            num_hosts=hosts.count(),
        )
        state = loop.run(
            name=f'train, {each.kind}',
            folder=folder,
            state=state,
            abstract_state=parts.abstract_state,
            feed=feed,
            step_at=step_at,
            evaluate=evaluations[each.kind],
            schedule=loop.Schedule.of(train, num_steps=each.end),
            first_step=each.start,
        )


def adapt_to_scans(
    config: ml_collections.ConfigDict,
    splits: Splits,
    initials: Sequence[Any],
    pixels: Sequence[tuple[int, int]],
) -> tuple[Probability, ...]:
    """The networks of the variables `initials`, nested dicts, each adapted to the scans that a
    training goes on with, to the same batches as the network that is trained. Of `pixels`, H × W,
    each has its own; the functions are of slices of the config's."""
    feed = _scans_to_adapt_to(config, splits)
    adapters = {each: _make_adapter(config, feed, each) for each in pixels}
    return tuple(adapters[each](initial) for initial, each in zip(initials, pixels, strict=True))


def _make_adapter(
    config: ml_collections.ConfigDict, feed: feeds.Feed, pixels: tuple[int, int]
) -> Callable[[Any], Probability]:
    """Of variables, of a network of H × W `pixels`."""
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.prepare.grid = (config.prepare.grid[0], *pixels)
    parts = build_segmentation(own, sharding.make_local_mesh())
    check_train_batch(own, own.train.batch_size, parts.mesh)
    adapt = make_adapt(parts, own.predict.smoothing_pixels, pixels)

    def adapter(initial: Any) -> Probability:
        state = adapt(parts.start_from(initial), feed)
        return with_pixels(make_probability(own, parts.network, _variables_of(state)), pixels)

    return adapter


def _scans_to_adapt_to(
    config: ml_collections.ConfigDict, splits: Splits, host: int = 0, num_hosts: int = 1
) -> feeds.Feed:
    """Every slice that shows lung, one as often as another, of the scans that are learned from in
    some round: records name these."""
    train = config.train
    covid = learned_cases(train.rounds, train.targets, dataclasses.replace(splits, validation=()))
    cases = (*covid, *splits.healthy_train)
    return feeds.balanced_feed(
        feeds.spread_healthy(feeds.all_slices(cases, [None] * len(cases))),
        batch_size=train.batch_size,
        seed=stream_seed(config.seed, 'adaptation'),
        host=host,
        num_hosts=num_hosts,
    )


def _painted_volumes(config: ml_collections.ConfigDict, splits: Splits) -> list[feeds.Volume]:
    """Held-out healthy scans with painted opacities, in memory."""
    healthy = splits.healthy_calibration or splits.healthy_train[:1]
    painted = paint_scans(healthy, opacity_model(config), config.seed)
    return [(scan.image, scan.mask, np.array(scan.lungs)) for scan in painted]


def _make_evaluations(
    config: ml_collections.ConfigDict,
    parts: SegmentationParts,
    splits: Splits,
    read_target: ReadTarget,
    kinds: set[str],
) -> dict[str, loop.Evaluate]:
    """How each kind of round is validated: those of painted scans alone on held-out healthy scans
    with painted opacities, the others on the targets of held-out COVID scans. What the plateau
    schedule compares is of one kind: of painted scans only where there is nothing else.

    Raises:
      InputError: a target that a round needs is not there.
    """
    evaluate, is_plateau = _make_evaluation(config, parts), config.train.schedule == 'plateau'
    found, of_targets = {}, kinds - {'synthetic'}
    if 'synthetic' in kinds:
        painted = _painted_volumes(config, splits)
        steps_plateau = is_plateau and not of_targets
        found['synthetic'] = functools.partial(evaluate, lambda: painted, steps_plateau)
    if of_targets:
        cases = splits.validation or splits.train[:1]
        for case in (*splits.train, *cases):  # what is missing is missed before the first round
            _check_target(case, read_target(case))

        # Opened anew each time: the files of hundreds of scans would stay open.
        def open_volumes() -> Iterator[feeds.Volume]:
            return ((case.image(), read_target(case), case.lungs()) for case in cases)

        found |= dict.fromkeys(of_targets, functools.partial(evaluate, open_volumes, is_plateau))
    return found


def _check_target(case: Case, target: np.ndarray) -> None:
    shape = case.image().shape
    if target.shape != shape:
        raise InputError(
            f'the target of {case.study_id} has {target.shape} voxels, its prepared scan {shape}: '
            'it is of another preparation; make the pseudo-masks again with --stages=synthesize'
        )


def _make_evaluation(config: ml_collections.ConfigDict, parts: SegmentationParts) -> Callable:
    """(function that opens volumes, whether to step the plateau schedule, state) -> what
    `loop.Evaluate` gives, of the averaged network. Compiled once for all rounds."""
    predict = make_predict(parts.network, config.predict.output)
    evaluate_step = steps.make_evaluation_step(
        share_of_max=config.masks.share_of_max,
        target_share_of_max=config.synthesize.share_of_max,
    )

    @jax.jit
    def step_plateau(state: SegmentationState, value: jax.Array) -> SegmentationState:
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        _, plateau = parts.plateau.update(zeros, state.plateau, value=value)
        return state.replace(plateau=plateau)

    def evaluate(
        open_volumes: Callable[[], Iterable[feeds.Volume]],
        steps_plateau: bool,
        state: SegmentationState,
    ):
        collected, shown, most = [], None, -np.inf
        variables, size = _variables_of(state), config.predict.batch_size
        for batch in feeds.evaluation_batches(open_volumes(), batch_size=size):
            probability = predict(variables, batch[feeds.IMAGE])
            collected.append(evaluate_step(probability, batch))
            if batch[feeds.TARGET].sum() > most:
                shown, most = (batch, probability), batch[feeds.TARGET].sum()
        values = loop.mean_metrics(collected)
        if steps_plateau:
            state = step_plateau(state, 1.0 - np.nan_to_num(values['dice']))
        return state, values, {'slice_target_prediction': _strip(*shown)}

    return evaluate


def _strip(batch: dict[str, np.ndarray], probability: Any, rows: int = 4) -> np.ndarray:
    probability = np.asarray(probability)
    most = np.argsort(-batch[feeds.TARGET].sum((1, 2, 3)), kind='stable')[:rows]
    columns = (2 * batch[feeds.IMAGE], batch[feeds.TARGET], probability)
    return image_strip([[column[i, ..., 0] for column in columns] for i in most])


def load_variables(
    config: ml_collections.ConfigDict, folder: pathlib.Path
) -> tuple[nn.Module, Any, int]:
    """The trained network, its averaged variables on one device, and the checkpoint's step.

    Raises:
      InputError: there is no checkpoint that fits.
    """
    parts = build_segmentation(config, sharding.make_local_mesh())
    state, step = restore_for_inference(folder / 'checkpoints', parts.abstract_state)
    return parts.network, _variables_of(state), step


def _variables_of(state: SegmentationState) -> Any:
    """The averaged variables as a tree on one device, the same form for validation, refinement and
    prediction: one compiled program serves all three."""
    # Unflattened on the host, where its arrays are views.
    return sharding.copy_to_one_device(unflatten(jax.device_get(state.ema)))


def volume_settings(config: ml_collections.ConfigDict) -> VolumeSettings:
    """How slices become volumes."""
    return VolumeSettings(**config.predict)


def make_probability(
    config: ml_collections.ConfigDict, network: nn.Module, variables: Any, **changes: Any
) -> Probability:
    """A network as a function of volumes, where its variables are; `changes` are of the settings in
    `config.predict`."""
    settings = dataclasses.replace(volume_settings(config), **changes)
    predict = make_predict(network, settings.output)
    return predict_volumes(lambda slices: predict(variables, slices), settings)
