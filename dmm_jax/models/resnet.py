"""Residual blocks and the changes of resolution between levels (arXiv:2006.11239, appendix B)."""

from flax import nnx
from jax.nn import silu
from jaxtyping import Array, Float

from dmm_jax.models import layers


class ResnetBlock2D(nnx.Module):
    """Norm, SiLU and convolution, twice, and a residual; the time embedding is added before the second norm."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None,
        num_groups: int,
        epsilon: float,
        dtype,
        rngs: nnx.Rngs,
    ):
        """Builds the block; with `temb_channels` None it takes no time embedding, as in the VAE."""
        common = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.GroupNorm(num_groups, in_channels, epsilon=epsilon, rngs=rngs)
        self.conv1 = layers.Conv(in_channels, out_channels, 3, **common)
        if temb_channels is not None:
            self.time_emb_proj = layers.Linear(temb_channels, out_channels, **common)
        self.norm2 = layers.GroupNorm(num_groups, out_channels, epsilon=epsilon, rngs=rngs)
        self.conv2 = layers.Conv(out_channels, out_channels, 3, **common)
        same_width = in_channels == out_channels
        self.conv_shortcut = layers.Identity() if same_width else layers.Conv(in_channels, out_channels, 1, **common)

    def __call__(
        self, hidden: Float[Array, "B h w C"], temb: Float[Array, "_B E"] | None = None
    ) -> Float[Array, "B h w C2"]:
        """Returns the block's output, in the dtype of `hidden`; several adjacent images may share a row of `temb`."""
        residual = self.conv1(self.norm1(hidden, activation=silu))
        time = None if temb is None else self.time_emb_proj(silu(temb))
        residual = self.conv2(self.norm2(residual, shift=time, activation=silu))
        return self.conv_shortcut(hidden) + residual


class Downsample2D(nnx.Module):
    """Halves the resolution by a strided convolution; PyTorch pads (1, 1), where "SAME" would pad (0, 1)."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = layers.Conv(channels, channels, 3, stride=2, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        """Returns a quarter of the cells."""
        return self.conv(hidden)


class Upsample2D(nnx.Module):
    """Doubles the resolution by nearest neighbours, then convolves."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = layers.UpsampleConv(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w C"]) -> Float[Array, "B h2 w2 C"]:
        """Returns four times the cells."""
        return self.conv(hidden)
