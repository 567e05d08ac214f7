"""Multi-head attention, the gated feed-forward layer, and the transformer block made of them."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from dmm_jax.models import flash_attention, layers, norms

IMPLEMENTATIONS = ("xla", "cudnn", "flash")
FUSED_FROM_QUERIES = 256  # Fewer, and XLA's plain products are as quick as a fused kernel.
KEYS_MULTIPLE = 16  # Of what the fused kernel takes in its backward pass; a prompt's 77 keys are padded and masked.
FUSED_HEAD_SIZE, FUSED_HEAD_SIZE_HOPPER = 128, 256  # At most.


def attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    implementation: str = "xla",
) -> Float[Array, "B L N K"]:
    """Returns softmax(q k^T / sqrt(K)) v per head (arXiv:1706.03762, eq. 1); logits and softmax are float32.

    Args:
      implementation: "xla", or a fused kernel wherever it takes the shapes: "cudnn" (16-bit, NVIDIA only) or "flash"
        (TPU only, and for programs that are traced and never run: a kernel where cuDNN's would be).
    """
    if implementation == "flash" and query.shape[1] >= FUSED_FROM_QUERIES:
        return flash_attention.flash_attention(query, key, value)
    if implementation == "cudnn" and _cudnn_takes(query):
        return _cudnn(query, key, value)
    return jax.nn.dot_product_attention(query, key, value, implementation="xla")


def _cudnn_takes(query) -> bool:
    head_size = query.shape[-1]
    fits = head_size <= _largest_fused_head() and head_size % 8 == 0
    return query.shape[1] >= FUSED_FROM_QUERIES and fits and query.dtype in (jnp.bfloat16, jnp.float16)


@functools.cache
def _largest_fused_head() -> int:
    hopper = float(getattr(jax.devices()[0], "compute_capability", None) or 0.0) >= 9.0
    return FUSED_HEAD_SIZE_HOPPER if hopper else FUSED_HEAD_SIZE


def _cudnn(query, key, value):
    num_queries, num_keys = query.shape[1], key.shape[1]
    missing, lengths = -num_keys % KEYS_MULTIPLE, {}
    if missing:
        key, value = (jnp.pad(states, ((0, 0), (0, missing), (0, 0), (0, 0))) for states in (key, value))
        zeros = 0 * query[:, 0, 0, 0].astype(jnp.int32)  # Of the queries: under `vmap` JAX takes lengths for batched.
        lengths = {"query_seq_lengths": zeros + num_queries, "key_value_seq_lengths": zeros + num_keys}
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **lengths)


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
        self, hidden: Float[Array, "B L D"], states: Float[Array, "B2 S C"] | None = None
    ) -> Float[Array, "B2 L D"]:
        """Returns what `hidden` gathers from `states`, each row from as many as there are to it, or from itself."""
        states = hidden if states is None else states
        query = layers.repeated(self.to_q(hidden), len(states))
        heads = (
            rearrange(projected, "B L (N K) -> B L N K", N=self.num_heads)
            for projected in (query, self.to_k(states), self.to_v(states))
        )
        return self.to_out[0].of_heads(attention(*heads, self.implementation))


class GEGLU(nnx.Module):
    """A gated projection (arXiv:2002.05202): the first half is the value, the second the gate; its GELU is exact."""

    def __init__(self, width: int, out_width: int, *, dtype, rngs: nnx.Rngs):
        self.proj = layers.linear(width, 2 * out_width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L F"]:
        """Returns value times GELU(gate)."""
        hidden, kernel, bias = self.proj.promote_dtype(
            (hidden, self.proj.kernel[...], self.proj.bias[...]), dtype=self.proj.dtype
        )
        return _geglu(hidden, kernel, bias)


@jax.custom_vjp
def _geglu(hidden, kernel, bias):
    return _geglu_forward(hidden, kernel, bias)[0]


def _geglu_forward(hidden, kernel, bias):
    projected = hidden @ kernel + jnp.expand_dims(bias, range(hidden.ndim - 1))
    value, gate = _halves(projected)
    return (value * gate * _below(gate)).astype(projected.dtype), (hidden, kernel, projected)


def _geglu_backward(kept, gradient):
    """Keeps the gradients of value and gate apart: two products read them, and nothing joins them."""
    hidden, kernel, projected = kept
    # The error function anew: else XLA would keep it, in float32, and from the forward pass on.
    projected, gradient = norms.read_again(projected, gradient)
    (value, gate), slope = _halves(projected), gradient.astype(jnp.float32)
    below, density = jax.jvp(_below, (gate,), (jnp.ones_like(gate),))
    parts = [slope * gate * below, slope * value * (below + gate * density)]
    parts = [part.astype(projected.dtype) for part in parts]
    back = sum(part @ half.T for part, half in zip(parts, jnp.split(kernel, 2, axis=1), strict=True))
    rows, parts = _rows(hidden), [_rows(part) for part in parts]
    return back, jnp.concatenate([rows.T @ part for part in parts], axis=1), jnp.concatenate([p.sum(0) for p in parts])


_geglu.defvjp(_geglu_forward, _geglu_backward)


def _halves(projected):
    """Splits first: the float32 of both would be written down by the TPU's compiler."""
    return [half.astype(jnp.float32) for half in jnp.split(projected, 2, axis=-1)]


def _rows(hidden):
    return hidden.reshape(-1, hidden.shape[-1])


def _below(gate):
    """The normal distribution's share below `gate`, GELU(gate) / gate; `jax.nn.gelu`, by erfc, takes twice as long."""
    return 0.5 * (1.0 + jax.lax.erf(gate * 0.5**0.5))


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

    def __call__(self, hidden: Float[Array, "B L D"], states: Float[Array, "B2 S C"]) -> Float[Array, "B2 L D"]:
        """Returns the residual stream, in the dtype of `hidden`."""
        hidden = hidden + self.attn1(layers.normed(self.norm1, hidden))
        gathered = self.attn2(layers.normed(self.norm2, hidden), states)
        hidden = layers.repeated(hidden, len(gathered)) + gathered
        return hidden + self.ff(layers.normed(self.norm3, hidden))
