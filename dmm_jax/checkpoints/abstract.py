"""Builds networks without values: the structure and the shapes that a config asks for, in a second at full size."""

import functools
import json
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from dmm_jax.models import layers
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
    return _abstract(component, json.dumps(dict(config), sort_keys=True), False, tuple(sorted(options.items())))[1]


def abstract_graph(component: str, config: Mapping, *, is_stacked: bool = False, **options) -> nnx.GraphDef:
    """Returns a network's structure without its parameters, from its config.

    Args:
      is_stacked: whether `jax.vmap` runs it as one of several frozen networks (`layers.for_stacks`).
      options: of the network's constructor, which win over the config.

    Raises:
      ValueError: the config has fields or values that our networks do not compute.
    """
    return _abstract(component, json.dumps(dict(config), sort_keys=True), is_stacked, tuple(sorted(options.items())))[0]


@functools.lru_cache(maxsize=32)
def _abstract(component, config, is_stacked, options) -> tuple[nnx.GraphDef, dict]:
    build, fields = COMPONENTS[component].from_config, json.loads(config)
    model = abstract_model(lambda rngs: build(fields, rngs=rngs, **dict(options)))
    graph, params = nnx.split(layers.for_stacks(model) if is_stacked else model)
    return graph, nnx.to_pure_dict(params.filter(nnx.Param))
