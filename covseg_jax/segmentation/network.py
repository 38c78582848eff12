"""The segmentation network, built from its fields, and as a function of slices.

What predicts needs no more of this folder than this and `volumes`, and none of the training's
packages.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from covseg_jax.errors import InputError
from covseg_jax.models.transunet import TransUNet
from covseg_jax.models.unet import UNet
from covseg_jax.training.flat import unflatten

_KINDS = {'transunet': TransUNet, 'unet': UNet}


def build_network(fields: Mapping[str, Any]) -> nn.Module:
    """The TransUNet or U-Net with these fields: JSON values, `name` ('transunet' or 'unet') and
    `dtype` among them.

    Raises:
      InputError: another name.
      TypeError: a field that this network does not have.
    """
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
    name, dtype = values.pop('name'), jnp.dtype(values.pop('dtype'))
    if name not in _KINDS:
        raise InputError(
            f"network.name={name!r} is not one of 'transunet', 'unet'; with 'none' leave train out "
            'of --stages'
        )
    return _KINDS[name](**values, dtype=dtype)


def describe_network(network: nn.Module) -> dict[str, Any]:
    """JSON values that `build_network` makes the network of again."""
    names = {field.name for field in dataclasses.fields(network)} - {'parent', 'name'}
    (kind,) = (name for name, each in _KINDS.items() if isinstance(network, each))
    fields = {name: getattr(network, name) for name in sorted(names)}
    return {'name': kind, **fields, 'dtype': jnp.dtype(network.dtype).name}


def make_predict(
    network: nn.Module, output: str = 'sigmoid'
) -> Callable[[Any, jax.Array], jax.Array]:
    """A jitted (variables, (B, H, W, 1) images) -> (B, H, W, classes) of what the network says of
    each pixel: with output 'sigmoid' its probability, with 'linear' the logit itself, as
    published. The variables are a tree, or Flats as a state has them."""

    @jax.jit
    def predict(variables: Any, image: jax.Array) -> jax.Array:
        logits = network.apply(unflatten(variables), image).logits
        return logits if output == 'linear' else jax.nn.sigmoid(logits)

    return predict
