"""Multi-head attention (arXiv:1706.03762, eq. 1): plain products, cuDNN's kernel, or the TPU's."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dmm_jax.kernels.flash_attention import flash_attention

IMPLEMENTATIONS = ("xla", "cudnn", "flash")
FUSED_FROM_QUERIES = 256  # For fewer queries, plain products are as quick as a fused kernel.
CUDNN_KEYS_MULTIPLE = 16  # cuDNN's backward pass takes no other number of keys; a prompt's 77 are padded and masked.
CUDNN_HEAD_SIZE, CUDNN_HEAD_SIZE_HOPPER = 128, 256  # The largest that cuDNN takes.


def choose_implementation(requested: str, dtype, platform: str = "", num_devices: int = 1) -> str:
    """Returns the implementation of attention for a program: cuDNN's, the TPU's ("flash"), or plain products ("xla").

    Args:
      requested: an implementation, or "auto".
      dtype: the compute dtype.
      platform: "cpu", "gpu" or "tpu"; this process's if empty.
      num_devices: the number of devices among which XLA divides the program; inside a `shard_map`, 1.
    """
    # The gains. "cudnn", forward / with gradient, in ms: 4,096 queries on 77 keys, heads of 40: 0.71 / 1.41 instead of
    # 1.61 / 2.66; 256 on 256, heads of 160: 0.17 / 0.62 instead of 0.31 / 0.81. "flash", a training step compiled for
    # v6e: 127 GiB moved instead of 328.
    automatic = {"gpu": "cudnn" if jnp.dtype(dtype) == jnp.bfloat16 else "xla", "tpu": "flash"}
    implementation = requested if requested != "auto" else automatic.get(platform or jax.default_backend(), "xla")
    # XLA cannot divide a TPU kernel among devices.
    return "xla" if implementation == "flash" and num_devices > 1 else implementation


def reference(query, key, value, is_causal=False):
    """Returns softmax(q k^T / sqrt(K)) v per head; logits and softmax are float32."""
    logits = jnp.einsum("blnk,bsnk->bnls", query, key, preferred_element_type=jnp.float32) / key.shape[-1] ** 0.5
    if is_causal:
        logits = jnp.where(jnp.tri(*logits.shape[2:], dtype=bool)[None, None], logits, -jnp.inf)
    return jnp.einsum("bnls,bsnk->blnk", jax.nn.softmax(logits).astype(value.dtype), value)


def attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    implementation: str = "xla",
    is_causal: bool = False,
    num_keys: Int[Array, " B"] | None = None,
) -> Float[Array, "B L N K"]:
    """Returns softmax(q k^T / sqrt(K)) v per head; logits and softmax are float32.

    Args:
      num_keys: the number of keys that each row attends to, from its first on; None: all. The TPU's kernel takes none.
      implementation: "xla"; or a fused kernel wherever it takes the shapes, without a causal mask: "cudnn" (16-bit,
        NVIDIA only) or "flash" (TPU only, and in programs that are traced and never run).
    """
    if not is_causal and query.shape[1] >= FUSED_FROM_QUERIES:
        if implementation == "flash" and num_keys is None:
            return flash_attention(query, key, value)
        if implementation == "cudnn" and _cudnn_takes(query):
            return _cudnn(query, key, value, num_keys)
    lengths = {} if num_keys is None else {"key_value_seq_lengths": num_keys}
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, implementation="xla", **lengths)


def _cudnn_takes(query) -> bool:
    head_size = query.shape[-1]
    fits = head_size <= _largest_cudnn_head() and head_size % 8 == 0
    return fits and query.dtype in (jnp.bfloat16, jnp.float16)


@functools.cache
def _largest_cudnn_head() -> int:
    hopper = float(getattr(jax.devices()[0], "compute_capability", None) or 0.0) >= 9.0
    return CUDNN_HEAD_SIZE_HOPPER if hopper else CUDNN_HEAD_SIZE


def _cudnn(query, key, value, num_keys):
    padding, lengths = -key.shape[1] % CUDNN_KEYS_MULTIPLE, {}
    if padding or num_keys is not None:
        zeros = 0 * query[:, 0, 0, 0].astype(jnp.int32)  # From the queries: under `vmap` JAX needs batched lengths.
        num_keys = zeros + key.shape[1] if num_keys is None else num_keys
        key, value = (jnp.pad(states, ((0, 0), (0, padding), (0, 0), (0, 0))) for states in (key, value))
        lengths = {"query_seq_lengths": zeros + query.shape[1], "key_value_seq_lengths": num_keys}
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **lengths)
