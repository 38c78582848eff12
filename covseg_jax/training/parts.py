"""What the training of either network is made of."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import optax
from jax.sharding import Mesh

from covseg_jax.errors import InputError
from covseg_jax.training.flat import Flat, flatten
from covseg_jax.training.optim import restarting_schedule
from covseg_jax.training.sharding import place_state


@dataclasses.dataclass(frozen=True)
class Parts(abc.ABC):
    """Parts of a training, of which nothing is computed yet; subclasses add the networks."""

    seed: int  # of the weights and of everything random in the steps
    mesh: Mesh  # the devices that the state lives on, a copy on each
    learning_rate: optax.Schedule

    @abc.abstractmethod
    def init_state(self) -> Any:
        """The training's first state."""

    def to_hold(self, tree: Any) -> Flat | Any:
        """A tree of weights as the state holds it: as one vector on CPUs, else as it is. Of the
        default TransUNet's step on a TPU v5e the compiler says 29 ms with trees, 62 with vectors;
        on an H200 the GAN's step was a third faster with vectors, but the network's failed in
        cuBLAS, which takes no matrix at any offset."""
        return flatten(tree) if self.mesh.devices.flat[0].platform == 'cpu' else tree

    @functools.cached_property
    def _placed(self) -> tuple[Callable[[], Any], Any]:
        return place_state(self.init_state, self.mesh)

    def make_state(self) -> Any:
        """`init_state`, made on the mesh."""
        return self._placed[0]()

    @property
    def abstract_state(self) -> Any:
        """The state's shapes, types and shardings."""
        return self._placed[1]


def scale_rate(rate: float, group: ml_collections.ConfigDict) -> float:
    """A rate of a config's group for its batch size, where `learning_rate_batch_size` says that it
    is of another: times the square root of their ratio.

    That is the rule of adaptive optimizers, whose steps do not grow with the gradient: Malladi et
    al., On the SDEs and scaling rules for adaptive gradient algorithms, NeurIPS 2022, whose changes
    of Adam's own settings are left out, as is common. SGD's, linear with a warm-up (Goyal et al.,
    Accurate, large minibatch SGD, 2017), is too much for Adam.
    """
    of = group.learning_rate_batch_size
    return rate * math.sqrt(group.batch_size / of) if of else rate


def make_learning_rate(
    name: str, group: ml_collections.ConfigDict, ends: Sequence[int]
) -> optax.Schedule:
    """The learning rate of a config's group `name` over rounds that end before the steps `ends`.

    Raises:
      InputError: the schedule is not one that exists.
    """
    try:
        return restarting_schedule(
            peak=scale_rate(group.learning_rate, group),
            schedule=group.schedule,
            warmup_steps=group.warmup_steps,
            ends=ends,
        )
    except ValueError as error:
        raise InputError(f'{name}.schedule: {error}') from error
