"""Attention on TPUs without the scores in memory (arXiv:2205.14135), by JAX's splash attention kernel.

Plain products keep (B, N, 4096, 4096) float32 scores of a 64 x 64 self-attention: 8 GiB for 16 images.

A TPU stores the last axis of an array in rows of 128 numbers, so that heads of 40 would take three times their bytes.
The kernel therefore reads queries, keys and values with their tokens last, as the products before it write them.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float

LANES = 128  # The number of tokens is padded to a multiple.
BLOCK_SIZE = 512  # Queries and keys per block of scores, at most; in the backward pass half as many queries.
RESIDENT_KEYS = 64 * 4096  # Numbers of a head's keys in fast memory, at most: v5e and v5p have 16 MiB for a kernel.


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
    scaled = key * jnp.asarray(head_size**-0.5, key.dtype)  # Keys are scaled: a prompt has fewer keys than queries.
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
    if padded_keys > num_keys:  # Queries see their own segment: the keys that are not padding.
        segments = splash.SegmentIds(jnp.zeros(padded, jnp.int32), jnp.int32(jnp.arange(padded_keys) >= num_keys))
    attended = jax.vmap(lambda *image: kernel(*image, segment_ids=segments))(*heads)
    return attended[:, :, :length].swapaxes(1, 2)


def _heads_first_and_padded(array):
    padding = -array.shape[1] % LANES
    return jnp.pad(array.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))  # (B, N, 128 k, K)


def _block_sizes(length: int, num_keys: int, head_size: int) -> splash.BlockSizes:
    """Keeps all keys of a head resident if they fit: each block of keys writes its own gradient of the queries."""
    q, q_backward = (_largest_part(length, LANES, most) for most in (BLOCK_SIZE, BLOCK_SIZE // 2))
    keys = _largest_part(num_keys, LANES, BLOCK_SIZE)
    resident = _largest_part(num_keys, keys, max(RESIDENT_KEYS // -(-head_size // 64 * 64), keys))
    tokens_last = splash.QKVLayout.SEQ_MINOR
    return splash.BlockSizes(
        block_q=q, block_kv=resident, block_kv_compute=keys,
        block_q_dkv=q_backward, block_kv_dkv=resident, block_kv_dkv_compute=keys, use_fused_bwd_kernel=True,
        q_layout=tokens_last, k_layout=tokens_last, v_layout=tokens_last,
    )  # fmt: skip


def _largest_part(size: int, multiple: int, most: int) -> int:
    """Returns the largest multiple that divides a size and is not above `most`."""
    return max(part for part in range(multiple, min(size, most) + 1, multiple) if size % part == 0)
