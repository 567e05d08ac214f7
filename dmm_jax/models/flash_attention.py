"""Attention on TPU that never holds the scores in memory (arXiv:2205.14135), by JAX's splash attention kernel.

The plain products of one 64 x 64 self-attention keep (B, N, 4096, 4096) float32 scores: 8 GiB for 16 images.

A TPU holds the last axis of an array in rows of 128: heads of 40 would take three times their bytes. So queries, keys
and values come to the kernel with their tokens last, as the products before it write them.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

LANES = 128  # Tokens are padded to a multiple of them.
AT_ONCE = 512  # Queries, and keys, whose scores are computed at once, at most; backwards half as many queries.
HELD = 64 * 4096  # Numbers of a head's keys in fast memory, at most: a kernel has 16 MiB of it on v5e and v5p.


def flash_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    interpret: bool = False,
) -> Float[Array, "B L N K"]:
    """Returns softmax(q k^T / sqrt(K)) v per head; logits and softmax are float32 inside the kernel.

    Args:
      interpret: runs the kernel step by step on any device, for tests.
    """
    length, num_keys, (num_heads, head_size) = query.shape[1], key.shape[1], query.shape[2:]
    scaled = key * jnp.asarray(head_size**-0.5, key.dtype)  # A prompt has fewer keys than there are queries.
    heads = [_heads_first_and_padded(array) for array in (query, scaled, value)]
    padded, padded_keys = heads[0].shape[2], heads[1].shape[2]
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((padded, padded_keys))] * num_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(padded, padded_keys, head_size),
        interpret=interpret,
    )
    segments = None
    if padded_keys > num_keys:  # Queries look at the keys of their own segment: at those that are no padding.
        segments = splash.SegmentIds(jnp.zeros(padded, jnp.int32), jnp.int32(jnp.arange(padded_keys) >= num_keys))
    attended = jax.vmap(lambda *one: kernel(*one, segment_ids=segments))(*heads)
    return attended[:, :, :length].swapaxes(1, 2)


def _heads_first_and_padded(array):
    missing = -array.shape[1] % LANES
    return jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))  # (B, N, 128 k, K)


def _block_sizes(length: int, num_keys: int, head_size: int) -> splash.BlockSizes:
    """Holds a head's keys whole where they fit: every part of them writes a gradient of the queries of its own."""
    q, q_backward = (_largest_part(length, LANES, most) for most in (AT_ONCE, AT_ONCE // 2))
    keys = _largest_part(num_keys, LANES, AT_ONCE)
    held = _largest_part(num_keys, keys, max(HELD // -(-head_size // 64 * 64), keys))
    tokens_last = splash.QKVLayout.SEQ_MINOR
    return splash.BlockSizes(
        block_q=q, block_kv=held, block_kv_compute=keys,
        block_q_dkv=q_backward, block_kv_dkv=held, block_kv_dkv_compute=keys, use_fused_bwd_kernel=True,
        q_layout=tokens_last, k_layout=tokens_last, v_layout=tokens_last,
    )  # fmt: skip


def _largest_part(size: int, multiple: int, most: int) -> int:
    """Returns the largest multiple that divides a size and is not above `most`."""
    return max(part for part in range(multiple, min(size, most) + 1, multiple) if size % part == 0)
