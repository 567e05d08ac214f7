"""What a run keeps on disk."""

import jax
import ml_collections

from dmm_jax.data.cache import CacheHeader
from dmm_jax.planning import memory


def needed(config: ml_collections.ConfigDict, state, batch) -> dict[str, int]:
    """Returns the bytes on disk of the checkpoints, at their most, and of the latent cache.

    Args:
      state, batch: as arrays or as shapes.
    """
    header = CacheHeader(
        vae="", tokenizer="", resolution=config.data.resolution, scaling_factor=1.0,
        latent_shape=batch.latents.shape[2:], num_tokens=batch.input_ids.shape[-1],
    )  # fmt: skip
    sizes = {"checkpoints": memory.whole(jax.tree.leaves(state)) * len(checkpoints(config))}
    if config.data.num_examples:
        return sizes | {"latent_cache": header.record_bytes * config.data.num_examples}
    return sizes | {"latent_cache_per_million_images": header.record_bytes * 1_000_000}


def checkpoints(config: ml_collections.ConfigDict) -> list[int]:
    """Returns the steps whose checkpoints lie there while the last is written, before which none is removed."""
    every, kept, kept_every = config.checkpoint_every, config.checkpoints_kept, config.checkpoints_kept_every
    saved = sorted({*(range(every, config.num_steps + 1, every) if every else ()), config.num_steps})
    last = saved[-(kept + 1) :] if kept else saved
    return sorted({*last, *(step for step in saved if kept_every and step % kept_every == 0)})
