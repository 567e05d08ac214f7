"""The discriminator of a run: its structure and its first parameters."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.models.discriminator import Discriminator, head


def define(unet_config: Mapping, num_styles: int, side: int, **options) -> nnx.Module:
    """Returns the discriminator with shapes instead of arrays; arguments are those of `Discriminator`."""
    return abstract_model(lambda rngs: Discriminator(unet_config, num_styles, side, rngs=rngs, **options))


def abstract_params(model: nnx.Module) -> dict:
    """Returns the shapes of a discriminator's parameters: "backbone" and "head"."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def split(params: Mapping, train_backbone: bool) -> tuple[dict, dict]:
    """Returns the trained parameters of the discriminator and the frozen ones: none, or the backbone."""
    if train_backbone:
        return dict(params), {}
    return {"head": params["head"]}, {"backbone": params["backbone"]}


def initial_params(unet_config: Mapping, num_styles: int, side: int, unet: Mapping, seed: int) -> dict:
    """Returns host parameters: the base's for the backbone, PyTorch's initial ones for the head.

    Args:
      side: latent cells per side.
      unet: the base's parameters.
    """
    backbone = abstract_params(define(unet_config, num_styles, side))["backbone"]
    head_params = nnx.state(head(unet_config, num_styles, side, rngs=nnx.Rngs(seed)), nnx.Param)
    return {
        "backbone": {name: unet[name] for name in backbone},
        "head": jax.tree.map(np.asarray, nnx.to_pure_dict(head_params)),
    }
