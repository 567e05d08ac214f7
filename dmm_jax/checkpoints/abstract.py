"""Builds networks without values: the structure and the shapes that a config asks for, in a second at full size."""

import functools
import json
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.text_encoders import CLASSES
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel

COMPONENTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, **CLASSES}


class OneKey(nnx.Rngs):
    """Random streams that always return the same key. For shapes this is enough, and it is ten times as fast.

    `nnx.Rngs` counts its keys. Under a trace, each count makes JAX compose an error message, for which it walks through
    everything traced before. So the time for a UNet is quadratic: 11 s for Stable Diffusion 1.5.
    """

    def params(self) -> jax.Array:
        """Returns the key."""
        return jax.random.key(0)


def abstract_model(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """Returns the network of `build(rngs)` with ShapeDtypeStructs instead of arrays."""
    return nnx.eval_shape(lambda: build(OneKey(0)))


def abstract_params(component: str, config: Mapping, **options) -> dict:
    """Returns a network's parameters as nested ShapeDtypeStructs, from its config; allocates nothing.

    Args:
      options: of the network's constructor, which win over the config.

    Raises:
      ValueError: the config has fields or values that our networks do not compute.
    """
    return _abstract_params(component, json.dumps(dict(config), sort_keys=True), tuple(sorted(options.items())))


@functools.lru_cache(maxsize=32)
def _abstract_params(component, config, options):
    build, fields = COMPONENTS[component].from_config, json.loads(config)
    model = abstract_model(lambda rngs: build(fields, rngs=rngs, **dict(options)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
