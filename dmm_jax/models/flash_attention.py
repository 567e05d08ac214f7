"""Attention on TPU that never holds the scores in memory (arXiv:2205.14135), by JAX's splash attention kernel.

The plain products of one 64 x 64 self-attention keep (B, N, 4096, 4096) float32 scores: 8 GiB for 16 images.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

FROM_TOKENS = 1024  # Fewer, and the scores are small: XLA's products need no padding of the heads.
LANES = 128  # Heads are padded to a multiple of them, tokens must be one.
BLOCKS = (1024, 512, 256, 128)  # Tokens that the kernel holds at once: the largest that divides.


def takes(query: Float[Array, "B L N K"], key: Float[Array, "B S N K"]) -> bool:
    """Tells whether the kernel is meant for these shapes: long sequences that the blocks divide."""
    lengths = query.shape[1], key.shape[1]
    return min(lengths) >= FROM_TOKENS and not any(length % LANES for length in lengths)


def flash_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    interpret: bool = False,
) -> Float[Array, "B L N K"]:
    """Returns softmax(q k^T / sqrt(K)) v per head; logits and softmax are float32 inside the kernel.

    Args:
      interpret: runs the kernel step by step on any device, for tests.

    Raises:
      ValueError: lengths that are no multiples of 128.
    """
    length, num_heads, head_size = query.shape[1:]
    mask = masks.MultiHeadMask([masks.FullMask((length, key.shape[1]))] * num_heads)
    sizes = _block_sizes(length, key.shape[1])
    kernel = splash.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    # Zero columns add nothing to the logits; those of the values come out as zeros and are cut off.
    scaled = query * jnp.asarray(head_size**-0.5, query.dtype)
    attended = jax.vmap(kernel)(*map(_heads_first_and_padded, (scaled, key, value)))
    return attended.swapaxes(1, 2)[..., :head_size]


def _heads_first_and_padded(array):
    width = -array.shape[-1] % LANES
    return jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, width)))  # (B, N, L, 128 k)


def _block_sizes(length: int, key_length: int) -> splash.BlockSizes:
    q, kv = (next((block for block in BLOCKS if not size % block), None) for size in (length, key_length))
    if q is None or kv is None:
        raise ValueError(f"flash attention takes lengths that are multiples of {LANES}; got {length} and {key_length}.")
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=kv,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=kv, use_fused_bwd_kernel=True,
    )  # fmt: skip
