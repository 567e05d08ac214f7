"""The discriminator of a run: its structure, and what it starts from."""

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.models.discriminator import Discriminator, head


def define(unet_config: Mapping, num_styles: int, side: int, **options) -> nnx.Module:
    """Returns the discriminator with shapes in place of arrays; arguments are those of `Discriminator`."""
    return abstract_model(lambda rngs: Discriminator(unet_config, num_styles, side, rngs=rngs, **options))


def abstract_params(model: nnx.Module) -> dict:
    """Returns the shapes of its parameters: "backbone" and "head"."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def split(params: Mapping, train_backbone: bool) -> tuple[dict, dict]:
    """Returns what is trained of the discriminator, and what stays as it is: nothing, or the backbone."""
    fixed = () if train_backbone else ("backbone",)
    return (
        {name: part for name, part in params.items() if name not in fixed},
        {name: part for name, part in params.items() if name in fixed},
    )


def initial_params(unet_config: Mapping, num_styles: int, side: int, unet: Mapping, seed: int) -> dict:
    """Returns host parameters: of the backbone the base's, of the head PyTorch's initial ones.

    Args:
      side: cells of a side of the latents.
      unet: the base's parameters.
    """
    backbone = abstract_params(define(unet_config, num_styles, side))["backbone"]
    drawn = nnx.state(head(unet_config, num_styles, side, rngs=nnx.Rngs(seed)), nnx.Param)
    return {
        "backbone": {name: unet[name] for name in backbone},
        "head": jax.tree.map(np.asarray, nnx.to_pure_dict(drawn)),
    }
