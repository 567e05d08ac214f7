"""The levels of the UNet: resnets, each followed by a transformer if the level attends, then a resampling.

Shapes: B latents, each with P adjacent prompts (two for guidance). Up to the first cross-attention the prompts of a
latent share one row; from there on there are BP rows. `_B` is either. `num_states` is each prompt's number of states,
if padding follows them.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.kernels.shared_rows import per_prompt
from dmm_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from dmm_jax.models.transformer_2d import Transformer2DModel


def call(remat: bool, module: nnx.Module, *args):
    """Calls a module; with `remat` the backward pass computes its inner values again instead of keeping them."""
    return nnx.remat(lambda module, *args: module(*args))(module, *args) if remat else module(*args)


def attend(remat: bool, attention: Transformer2DModel, *args):
    """Calls a transformer as `call` does; the backward pass computes a loop's blocks again one by one."""
    return attention(*args, remat=remat) if attention.looped else call(remat, attention, *args)


class DownBlock(nnx.Module):
    """A level on the way down: diffusers' DownBlock2D, or CrossAttnDownBlock2D with `attention`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        resnet: dict,
        attention: dict | None,
        downsample: bool,
        *,
        remat: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the level.

        Args:
          resnet: arguments of `ResnetBlock2D` that all of them share.
          attention: arguments of `Transformer2DModel`, or None.
        """
        common = {"dtype": dtype, "rngs": rngs}
        self.remat = remat
        widths = [in_channels] + [out_channels] * (num_layers - 1)
        self.resnets = nnx.List(ResnetBlock2D(width, out_channels, **resnet, **common) for width in widths)
        if attention is not None:
            self.attentions = nnx.List(Transformer2DModel(out_channels, **attention, **common) for _ in widths)
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(out_channels, **common)])

    def __call__(
        self,
        hidden: Float[Array, "B h w C"],
        temb: Float[Array, "_B E"],
        states: Float[Array, "BP S D"],
        num_states: Int[Array, " BP"] | None = None,
    ) -> list[Float[Array, "_B _h _w _C"]]:
        """Returns the skips of this level, finest first; the last is its output."""
        skips = []
        for layer, resnet in enumerate(self.resnets):
            hidden = call(self.remat, resnet, hidden, temb)
            if hasattr(self, "attentions"):
                hidden = attend(self.remat, self.attentions[layer], hidden, states, num_states)
            skips.append(hidden)
        if hasattr(self, "downsamplers"):
            skips.append(self.downsamplers[0](hidden))
        return skips


class MidBlock(nnx.Module):
    """Resnet, transformer, resnet; diffusers' UNetMidBlock2DCrossAttn."""

    def __init__(self, channels: int, resnet: dict, attention: dict, *, remat: bool = False, dtype, rngs: nnx.Rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.remat = remat
        self.resnets = nnx.List(ResnetBlock2D(channels, channels, **resnet, **common) for _ in range(2))
        self.attentions = nnx.List([Transformer2DModel(channels, **attention, **common)])

    def __call__(
        self,
        hidden: Float[Array, "B h w C"],
        temb: Float[Array, "_B E"],
        states: Float[Array, "BP S D"],
        num_states: Int[Array, " BP"] | None = None,
    ) -> Float[Array, "BP h w C"]:
        """Returns the coarsest features."""
        hidden = call(self.remat, self.resnets[0], hidden, temb)
        hidden = attend(self.remat, self.attentions[0], hidden, states, num_states)
        return call(self.remat, self.resnets[1], hidden, temb)


class UpBlock(nnx.Module):
    """A level on the way up: diffusers' UpBlock2D, or CrossAttnUpBlock2D with `attention`."""

    def __init__(
        self,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        resnet: dict,
        attention: dict | None,
        upsample: bool,
        *,
        remat: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the level; `skip_channels` are the widths of the skips that its resnets take, in order."""
        common = {"dtype": dtype, "rngs": rngs}
        self.remat = remat
        widths = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        self.resnets = nnx.List(
            ResnetBlock2D(width + skip, out_channels, **resnet, **common)
            for width, skip in zip(widths, skip_channels, strict=True)
        )
        if attention is not None:
            self.attentions = nnx.List(Transformer2DModel(out_channels, **attention, **common) for _ in widths)
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(out_channels, **common)])

    def __call__(
        self,
        hidden: Float[Array, "B h w C"],
        skips: Sequence[Array],
        temb: Float[Array, "_B E"],
        states: Float[Array, "BP S D"],
        num_states: Int[Array, " BP"] | None = None,
    ) -> Float[Array, "BP h2 w2 C2"]:
        """Returns the level's output; takes one skip per resnet, in the order given."""
        for layer, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            joined = jnp.concatenate([hidden, per_prompt(skip, len(hidden))], axis=-1)
            hidden = call(self.remat, resnet, joined, temb)
            if hasattr(self, "attentions"):
                hidden = attend(self.remat, self.attentions[layer], hidden, states, num_states)
        return self.upsamplers[0](hidden) if hasattr(self, "upsamplers") else hidden
