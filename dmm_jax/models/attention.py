"""Multi-head attention, the gated feed-forward layer, and the transformer block made of them."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models import flash_attention, layers

IMPLEMENTATIONS = ("xla", "cudnn", "flash")
FUSED_FROM_TOKENS = 256  # Fewer queries or keys, and XLA's plain products are as quick as cuDNN's fused kernel.
FUSED_HEAD_SIZES = 128  # At most, on GPUs before Hopper; larger heads come at few tokens only.


def attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    implementation: str = "xla",
) -> Float[Array, "B L N K"]:
    """Returns softmax(q k^T / sqrt(K)) v per head (arXiv:1706.03762, eq. 1); logits and softmax are float32.

    Args:
      implementation: "xla", or a fused kernel wherever it takes the shapes: "cudnn" (16-bit, NVIDIA only) or "flash"
        (TPU only).
    """
    if implementation == "flash" and flash_attention.takes(query, key):
        return flash_attention.flash_attention(query, key, value)
    fused = implementation == "cudnn" and _cudnn_takes(query, key)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn" if fused else "xla")


def _cudnn_takes(query, key) -> bool:
    many = min(query.shape[1], key.shape[1]) >= FUSED_FROM_TOKENS
    head_size = query.shape[-1]
    fits = head_size <= FUSED_HEAD_SIZES and head_size % 8 == 0
    return many and fits and query.dtype in (jnp.bfloat16, jnp.float16)


class Attention(nnx.Module):
    """Attention of `hidden` to itself, or to `context_width` wide states of another sequence."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, *, implementation: str = "xla", dtype, rngs: nnx.Rngs
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.num_heads, self.implementation = num_heads, implementation
        self.to_q = layers.linear(width, width, use_bias=False, **common)
        self.to_k = layers.linear(context_width, width, use_bias=False, **common)
        self.to_v = layers.linear(context_width, width, use_bias=False, **common)
        self.to_out = nnx.List([layers.linear(width, width, **common), layers.Identity()])

    def __call__(
        self, hidden: Float[Array, "B L D"], states: Float[Array, "B S C"] | None = None
    ) -> Float[Array, "B L D"]:
        """Returns what `hidden` gathers from `states`, or from itself."""
        states = hidden if states is None else states
        heads = (
            rearrange(projected, "B L (N K) -> B L N K", N=self.num_heads)
            for projected in (self.to_q(hidden), self.to_k(states), self.to_v(states))
        )
        return self.to_out[0](rearrange(attention(*heads, self.implementation), "B L N K -> B L (N K)"))


class GEGLU(nnx.Module):
    """A gated projection (arXiv:2002.05202): the first half is the value, the second the gate; its GELU is exact."""

    def __init__(self, width: int, out_width: int, *, dtype, rngs: nnx.Rngs):
        self.proj = layers.linear(width, 2 * out_width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L F"]:
        """Returns value times GELU(gate)."""
        value, gate = jnp.split(self.proj(hidden), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        gate = GEGLU(width, 4 * width, dtype=dtype, rngs=rngs)
        self.net = nnx.List([gate, layers.Identity(), layers.linear(4 * width, width, dtype=dtype, rngs=rngs)])

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns the layer's output, residual not included."""
        return self.net[2](self.net[0](hidden))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each behind a layer norm and added to its input."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, *, implementation: str = "xla", dtype, rngs: nnx.Rngs
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.layer_norm(width, rngs=rngs)
        self.attn1 = Attention(width, width, num_heads, implementation=implementation, **common)
        self.norm2 = layers.layer_norm(width, rngs=rngs)
        self.attn2 = Attention(width, context_width, num_heads, implementation=implementation, **common)
        self.norm3 = layers.layer_norm(width, rngs=rngs)
        self.ff = FeedForward(width, **common)

    def __call__(self, hidden: Float[Array, "B L D"], states: Float[Array, "B S C"]) -> Float[Array, "B L D"]:
        """Returns the residual stream, in the dtype of `hidden`."""
        hidden = hidden + self.attn1(self.norm1(hidden).astype(hidden.dtype))
        hidden = hidden + self.attn2(self.norm2(hidden).astype(hidden.dtype), states)
        return hidden + self.ff(self.norm3(hidden).astype(hidden.dtype))
