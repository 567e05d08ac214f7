"""Networks without numbers: the structure and the shapes that a config asks for, in a second even at full size."""

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
    """Hands out one key for ever. Where only shapes are asked for that is enough, and it is ten times as fast.

    `nnx.Rngs` counts its keys. Under a trace each count makes JAX compose an error message that walks all that was
    traced before, so a UNet takes quadratic time: 11 s for Stable Diffusion 1.5.
    """

    def params(self) -> jax.Array:
        """Returns the key."""
        return jax.random.key(0)


def abstract_model(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """Returns what `build(rngs)` would build, with shapes and dtypes in place of arrays."""
    return nnx.eval_shape(lambda: build(OneKey(0)))


def abstract_params(component: str, config: Mapping) -> dict:
    """Returns the shapes of a network's parameters, from its config; nothing is allocated.

    Raises:
      ValueError: fields or values of the config that our port does not compute.
    """
    return _abstract_params(component, json.dumps(dict(config), sort_keys=True))


@functools.lru_cache(maxsize=32)
def _abstract_params(component, config):
    model = abstract_model(lambda rngs: COMPONENTS[component].from_config(json.loads(config), rngs=rngs))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
