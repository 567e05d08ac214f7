"""The multi-class discriminator: a UNet's way down, and a convolutional head on its middle block.

(DMM, arXiv:2504.12364, A.2; the head is DMD2's, arXiv:2405.14867.)

It reads diffused clean latents with their timestep and prompt, but not their style, and tells their origin: class i is
teacher i, class N + i the student in style i.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from dmm_jax.models import layers
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel, UNet2DEncoder

KERNEL = 4  # Cells per side that a convolution of the head covers; the last convolution covers the whole picture.


class ConvNorm(nnx.Module):
    """A strided convolution, group norm, SiLU."""

    def __init__(
        self, channels: int, num_groups: int, kernel: int, padding: int, stride: int, *, dtype, rngs: nnx.Rngs
    ):
        padding = ((padding, padding),) * 2
        self.conv = layers.Conv(channels, channels, kernel, stride=stride, padding=padding, dtype=dtype, rngs=rngs)
        self.norm = layers.GroupNorm(num_groups, channels, epsilon=1e-5, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        """Returns fewer cells of as many channels."""
        return self.norm(self.conv(hidden), activation=jax.nn.silu)


class Head(nnx.Module):
    """Halves the picture until a kernel covers it, then reads the classes' logits from the last cell."""

    def __init__(self, channels: int, side: int, num_groups: int, num_classes: int, *, dtype, rngs: nnx.Rngs):
        """Builds the head.

        Args:
          side: cells per side of the middle block's output.
        """
        common = {"dtype": dtype, "rngs": rngs}
        blocks = []
        while side >= 2 * KERNEL:
            blocks.append(ConvNorm(channels, num_groups, KERNEL, 1, 2, **common))
            side //= 2
        kernel = min(KERNEL, side)
        blocks.append(ConvNorm(channels, num_groups, kernel, 0, kernel, **common))
        self.blocks = nnx.List(blocks)
        self.proj = layers.Conv(channels, num_classes, 1, **common)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B K"]:
        """Returns float32 logits, averaged if more than one cell is left."""
        for block in self.blocks:
            hidden = block(hidden)
        return jnp.mean(self.proj(hidden).astype(jnp.float32), axis=(1, 2))


def head(unet_config: Mapping, num_styles: int, side: int, *, dtype=jnp.float32, rngs: nnx.Rngs) -> Head:
    """Builds the head of a discriminator with these arguments."""
    arguments = UNet2DConditionModel.arguments(unet_config)
    widths, groups = arguments["block_out_channels"], arguments["norm_num_groups"]
    side >>= len(widths) - 1  # Every level but the last halves it.
    return Head(widths[-1], side, groups, 2 * num_styles, dtype=dtype, rngs=rngs)


class Discriminator(nnx.Module):
    """`backbone`, whose attributes are the UNet's keys, and `head`."""

    def __init__(
        self, unet_config: Mapping, num_styles: int, side: int, *, dtype=jnp.float32, rngs: nnx.Rngs, **options
    ):
        """Builds the discriminator.

        Args:
          unet_config: config.json of the base's UNet, from which the backbone starts.
          num_styles: N; there are 2 N classes.
          side: cells per side of the latents.
          options: arguments of `UNet2DConditionModel`: attention_implementation, remat.

        Raises:
          ValueError: the UNet cannot be built, or its levels cannot halve the latents.
        """
        self.backbone = UNet2DEncoder(UNet2DConditionModel.arguments(unet_config, **options), dtype=dtype, rngs=rngs)
        self.head = head(unet_config, num_styles, side, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "B h w C"],
        timesteps: Num[Array, " B"],
        encoder_hidden_states: Float[Array, "B L D"],
        added_cond: Mapping[str, Array] | None = None,
    ) -> Float[Array, "B K"]:
        """Returns the logits of 2 N classes for diffused latents, float32."""
        down = self.backbone.encode(latents, timesteps, encoder_hidden_states, added_cond=added_cond)
        return self.head(down.hidden)
