"""Disk space of a run: its checkpoints and its latent cache."""

import jax
import ml_collections

from dmm_jax.data.cache import CacheHeader
from dmm_jax.planning import memory


def needed(config: ml_collections.ConfigDict, state, batch) -> dict[str, int]:
    """Returns the bytes on disk of the latent cache, and of the checkpoints at their largest number.

    Args:
      state, batch: as arrays or as shapes.
    """
    header = CacheHeader(
        vae="", tokenizer="", resolution=config.data.resolution, scaling_factor=1.0,
        latent_shape=batch.latents.shape[2:], num_tokens=batch.input_ids.shape[-1],
    )  # fmt: skip
    sizes = {"checkpoints": memory.total(jax.tree.leaves(state)) * len(checkpoints(config))}
    if config.data.num_examples:
        return sizes | {"latent_cache": header.record_type().itemsize * config.data.num_examples}
    return sizes | {"latent_cache_per_million_images": header.record_type().itemsize * 1_000_000}


def checkpoints(config: ml_collections.ConfigDict) -> list[int]:
    """Returns the steps whose checkpoints exist during the last write; an old one is removed only after a write."""
    every, num_recent, kept_every = config.checkpoint_every, config.checkpoints_kept, config.checkpoints_kept_every
    saved = sorted({*(range(every, config.num_steps + 1, every) if every else ()), config.num_steps})
    recent = saved[-(num_recent + 1) :] if num_recent else saved
    return sorted({*recent, *(step for step in saved if kept_every and step % kept_every == 0)})
