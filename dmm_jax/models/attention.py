"""The transformer block: self-attention, cross-attention to the prompt, and a gated feed-forward layer."""

from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from dmm_jax.kernels.attention import attention
from dmm_jax.kernels.geglu import gated, geglu
from dmm_jax.kernels.shared_rows import per_prompt
from dmm_jax.models import layers


class Attention(nnx.Module):
    """Multi-head attention (arXiv:1706.03762, 3.2.2) of `hidden` to itself, or to `context_width` wide states."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, *, implementation: str = "xla", dtype, rngs: nnx.Rngs
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.num_heads, self.implementation = num_heads, implementation
        self.to_q = layers.Linear(width, width, use_bias=False, **common)
        self.to_k = layers.Linear(context_width, width, use_bias=False, **common)
        self.to_v = layers.Linear(context_width, width, use_bias=False, **common)
        self.to_out = nnx.List([layers.Linear(width, width, **common), layers.Identity()])  # diffusers: and Dropout.

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        states: Float[Array, "BP S C"] | None = None,
        num_states: Int[Array, " BP"] | None = None,
    ) -> Float[Array, "BP L D"]:
        """Returns the attended values, one row per prompt; each row of `hidden` serves P adjacent rows of `states`.

        Args:
          num_states: the number of states of each prompt, if padding follows them.
        """
        states = hidden if states is None else states
        query = per_prompt(self.to_q(hidden), len(states))
        query, key, value = (
            rearrange(projected, "B L (N K) -> B L N K", N=self.num_heads)
            for projected in (query, self.to_k(states), self.to_v(states))
        )
        attended = attention(query, key, value, self.implementation, num_keys=num_states)  # (B, L, N, K)
        return self.to_out[0](attended, num_axes=2)


class GEGLU(nnx.Module):
    """A gated projection (arXiv:2002.05202): the first half is the value, the second the gate; its GELU is exact."""

    def __init__(self, width: int, out_width: int, *, dtype, rngs: nnx.Rngs):
        self.proj = layers.Linear(width, 2 * out_width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L F"]:
        """Returns value * GELU(gate)."""
        if self.proj.lora_A is not None:
            return gated(self.proj(hidden))
        arrays = hidden, self.proj.kernel[...], self.proj.bias[...]
        return geglu(*self.proj.promote_dtype(arrays, dtype=self.proj.dtype))


class FeedForward(nnx.Module):
    """GEGLU to four times the width, and back."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        gate = GEGLU(width, 4 * width, dtype=dtype, rngs=rngs)
        self.net = nnx.List([gate, layers.Identity(), layers.Linear(4 * width, width, dtype=dtype, rngs=rngs)])

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """Returns the layer's output, residual not included."""
        return self.net[2](self.net[0](hidden))


class BasicTransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the prompt, feed-forward; each has a layer norm before it and a residual."""

    def __init__(
        self, width: int, context_width: int, num_heads: int, *, implementation: str = "xla", dtype, rngs: nnx.Rngs
    ):
        common = {"dtype": dtype, "rngs": rngs}
        self.norm1 = layers.LayerNorm(width, rngs=rngs)
        self.attn1 = Attention(width, width, num_heads, implementation=implementation, **common)
        self.norm2 = layers.LayerNorm(width, rngs=rngs)
        self.attn2 = Attention(width, context_width, num_heads, implementation=implementation, **common)
        self.norm3 = layers.LayerNorm(width, rngs=rngs)
        self.ff = FeedForward(width, **common)

    def __call__(
        self,
        hidden: Float[Array, "B L D"],
        states: Float[Array, "BP S C"],
        num_states: Int[Array, " BP"] | None = None,
    ) -> Float[Array, "BP L D"]:
        """Returns the residual stream, in the dtype of `hidden`, with one row per prompt; see `Attention`."""
        hidden = hidden + self.attn1(self.norm1(hidden))
        attended = self.attn2(self.norm2(hidden), states, num_states)
        hidden = per_prompt(hidden, len(attended)) + attended
        return hidden + self.ff(self.norm3(hidden))
