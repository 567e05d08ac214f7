"""The VAE between images and latents (arXiv:2112.10752, appendix G): the one of Stable Diffusion 1, 2 and XL.

A port of diffusers' AutoencoderKL. Latents here are unscaled: callers multiply them by `scaling_factor`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from dmm_jax.kernels.attention import attention
from dmm_jax.models import config_json, layers
from dmm_jax.models.resnet import ResnetBlock2D, Upsample2D
from dmm_jax.runtime.errors import UserError

EPSILON = 1e-6  # All norms of the VAE have it; the UNet's resnets have 1e-5.
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class DiagonalGaussian(NamedTuple):
    """The distribution of unscaled latents given an image, float32."""

    mean: Float[Array, "B h w C"]
    logvar: Float[Array, "B h w C"]  # In [-30, 20].

    @property
    def std(self) -> Float[Array, "B h w C"]:
        """The standard deviation of each latent value."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "B h w C"]:
        """Draws latents."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)


class Attention(nnx.Module):
    """Residual self-attention over all cells, one head as wide as the channels."""

    def __init__(self, channels: int, num_groups: int, *, dtype, rngs: nnx.Rngs):
        self.group_norm = layers.GroupNorm(num_groups, channels, epsilon=EPSILON, rngs=rngs)
        self.to_q = layers.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_k = layers.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_v = layers.Linear(channels, channels, dtype=dtype, rngs=rngs)
        self.to_out = nnx.List([layers.Linear(channels, channels, dtype=dtype, rngs=rngs)])

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Returns hidden plus the attended values of its cells."""
        cells = rearrange(self.group_norm(hidden), "B h w C -> B (h w) C")
        heads = (project(cells)[:, :, None] for project in (self.to_q, self.to_k, self.to_v))  # (B, L, 1, C) each
        return hidden + self.to_out[0](attention(*heads)[:, :, 0]).reshape(hidden.shape)


def resnets(widths: Sequence[int], num_groups: int, *, dtype, rngs: nnx.Rngs) -> list[ResnetBlock2D]:
    """Builds a chain of residual blocks, from each width to the next; none takes a time embedding."""
    settings = {"temb_channels": None, "num_groups": num_groups, "epsilon": EPSILON, "dtype": dtype, "rngs": rngs}
    return [ResnetBlock2D(*pair, **settings) for pair in itertools.pairwise(widths)]


class MidBlock(nnx.Module):
    """Resnet, attention, resnet at the coarsest level."""

    def __init__(self, channels: int, num_groups: int, add_attention: bool, *, dtype, rngs: nnx.Rngs):
        self.resnets = nnx.List(resnets([channels] * 3, num_groups, dtype=dtype, rngs=rngs))
        self.attentions = nnx.List([Attention(channels, num_groups, dtype=dtype, rngs=rngs)] if add_attention else [])

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
        """Returns hidden of the same shape."""
        hidden = self.resnets[0](hidden)
        for attend in self.attentions:
            hidden = attend(hidden)
        return self.resnets[1](hidden)


class AsymmetricDownsample2D(nnx.Module):
    """Halves height and width."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        # Right and bottom only: the UNet's downsampler pads all round, and would shift the image by a pixel.
        padding = ((0, 1), (0, 1))
        self.conv = layers.Conv(channels, channels, 3, stride=2, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        """Returns every second cell, convolved."""
        return self.conv(hidden)


class DownEncoderBlock2D(nnx.Module):
    """Resnets, then a downsampler unless this is the coarsest level."""

    def __init__(self, in_channels, out_channels, num_layers, num_groups, downsample: bool, *, dtype, rngs: nnx.Rngs):
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nnx.List(resnets(widths, num_groups, dtype=dtype, rngs=rngs))
        self.downsamplers = nnx.List()
        if downsample:
            self.downsamplers.append(AsymmetricDownsample2D(out_channels, dtype=dtype, rngs=rngs))

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        """Returns hidden at this level's width, at half the size if there is a next level."""
        for module in (*self.resnets, *self.downsamplers):
            hidden = module(hidden)
        return hidden


class UpDecoderBlock2D(nnx.Module):
    """Resnets, then an upsampler unless this is the finest level."""

    def __init__(self, in_channels, out_channels, num_layers, num_groups, upsample: bool, *, dtype, rngs: nnx.Rngs):
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nnx.List(resnets(widths, num_groups, dtype=dtype, rngs=rngs))
        self.upsamplers = nnx.List()
        if upsample:
            self.upsamplers.append(Upsample2D(out_channels, dtype=dtype, rngs=rngs))

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C2"]:
        """Returns hidden at this level's width, at twice the size if there is a next level."""
        for module in (*self.resnets, *self.upsamplers):
            hidden = module(hidden)
        return hidden


class Encoder(nnx.Module):
    """Images to the parameters of latents, before quant_conv."""

    def __init__(self, in_channels, out_channels, widths, num_layers, num_groups, mid_attention, *, dtype, rngs):
        common = {"dtype": dtype, "rngs": rngs}
        self.conv_in = layers.Conv(in_channels, widths[0], 3, **common)
        self.down_blocks = nnx.List(
            DownEncoderBlock2D(
                widths[max(level - 1, 0)], width, num_layers, num_groups, level + 1 < len(widths), **common
            )
            for level, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], num_groups, mid_attention, **common)
        self.conv_norm_out = layers.GroupNorm(num_groups, widths[-1], epsilon=EPSILON, rngs=rngs)
        self.conv_out = layers.Conv(widths[-1], out_channels, 3, **common)

    def __call__(self, images: Float[Array, "B H W C"]) -> Float[Array, "B h w C2"]:
        """Returns mean and logvar side by side on the channels."""
        hidden = self.conv_in(images)
        for block in (*self.down_blocks, self.mid_block):
            hidden = block(hidden)
        return self.conv_out(self.conv_norm_out(hidden, activation=jax.nn.silu))


class Decoder(nnx.Module):
    """Latents, after post_quant_conv, to images; each level has one resnet more than the encoder's."""

    def __init__(self, in_channels, out_channels, widths, num_layers, num_groups, mid_attention, *, dtype, rngs):
        common = {"dtype": dtype, "rngs": rngs}
        widths = widths[::-1]
        self.conv_in = layers.Conv(in_channels, widths[0], 3, **common)
        self.mid_block = MidBlock(widths[0], num_groups, mid_attention, **common)
        self.up_blocks = nnx.List(
            UpDecoderBlock2D(
                widths[max(level - 1, 0)], width, num_layers + 1, num_groups, level + 1 < len(widths), **common
            )
            for level, width in enumerate(widths)
        )
        self.conv_norm_out = layers.GroupNorm(num_groups, widths[-1], epsilon=EPSILON, rngs=rngs)
        self.conv_out = layers.Conv(widths[-1], out_channels, 3, **common)

    def __call__(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W C2"]:
        """Returns images, nominally in [-1, 1]; not clipped."""
        hidden = self.conv_in(latents)
        for block in (self.mid_block, *self.up_blocks):
            hidden = block(hidden)
        return self.conv_out(self.conv_norm_out(hidden, activation=jax.nn.silu))


class AutoencoderKL(nnx.Module):
    """The VAE; arguments are the fields of its config.json, attributes are its state dict's keys."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        scaling_factor: float = 0.18215,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Builds the VAE.

        Args:
          scaling_factor: gives the latents unit variance; callers apply it.
          force_upcast: computes in float32 instead of float16, which overflows.
          dtype: the dtype of the arithmetic.
        """
        if not 0.0 < scaling_factor < math.inf:
            raise UserError(
                f"scaling_factor of the VAE must be a positive number; got {scaling_factor}. Correct its config.json: "
                "0.18215 for Stable Diffusion 1 and 2, 0.13025 for XL."
            )
        dtype = jnp.float32 if force_upcast and jnp.dtype(dtype) == jnp.float16 else dtype
        self.scaling_factor = scaling_factor
        self.dtype = jnp.dtype(dtype)
        shape = (tuple(block_out_channels), layers_per_block, norm_num_groups, mid_block_add_attention)
        common = {"dtype": dtype, "rngs": rngs}
        self.encoder = Encoder(in_channels, 2 * latent_channels, *shape, **common)
        self.decoder = Decoder(latent_channels, out_channels, *shape, **common)
        if use_quant_conv:
            self.quant_conv = layers.Conv(2 * latent_channels, 2 * latent_channels, 1, **common)
        if use_post_quant_conv:
            self.post_quant_conv = layers.Conv(latent_channels, latent_channels, 1, **common)

    @classmethod
    def from_config(cls, config: Mapping, *, dtype=jnp.float32, rngs: nnx.Rngs) -> "AutoencoderKL":
        """Builds the VAE that a diffusers config.json describes.

        Raises:
          ValueError: fields or values that this port does not compute; all are named.
        """
        levels = len(config.get("block_out_channels", (64,)))
        inert = {
            "act_fn": ("silu", "swish"),
            "down_block_types": (["DownEncoderBlock2D"] * levels, ("DownEncoderBlock2D",) * levels),
            "up_block_types": (["UpDecoderBlock2D"] * levels, ("UpDecoderBlock2D",) * levels),
            "sample_size": (config.get("sample_size"),),  # Any value: it sizes diffusers' tiles.
        }
        return cls(**config_json.constructor_arguments(cls.__init__, config, inert), dtype=dtype, rngs=rngs)

    @property
    def downsampling(self) -> int:
        """Pixels along the side of one latent cell."""
        return 2 ** (len(self.encoder.down_blocks) - 1)

    def encode(self, images: Float[Array, "B H W C"]) -> DiagonalGaussian:
        """Encodes images in [-1, 1].

        Raises:
          ValueError: height or width is not a multiple of a latent cell's side.
        """
        height, width = images.shape[1:3]
        if height % self.downsampling or width % self.downsampling:
            raise UserError(
                f"height and width must be multiples of {self.downsampling} pixels; got {height} x {width}. "
                "Crop or resize the images."
            )
        moments = self.encoder(images.astype(self.dtype))
        if hasattr(self, "quant_conv"):
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)  # (B, h, w, C) each
        return DiagonalGaussian(mean, jnp.clip(logvar, LOGVAR_MIN, LOGVAR_MAX))

    def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W C2"]:
        """Decodes unscaled latents to float32 images, nominally in [-1, 1]; not clipped."""
        latents = latents.astype(self.dtype)
        if hasattr(self, "post_quant_conv"):
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)
