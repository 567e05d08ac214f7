"""What an engine does before its first request: compile every program, time them, and fit the preview's colours."""

import time

import jax
import numpy as np

from dmm_jax.models import preview
from dmm_jax.models.preview import Preview
from dmm_jax.runtime import compilation
from dmm_jax.serve.pool import Pool


def warm_up(pool: Pool) -> None:
    """Compiles the programs of a pool, measures them and fits the preview; prints how long this takes."""
    (height, width), layers = pool.size, pool.pipeline.unet.merged().config["block_out_channels"]
    sizes = f"{width}x{height}, {len(pool.jobs)} slots, {len(pool.variants)} forms, {pool.pipeline.dtype}"
    with compilation.announced(f"the programs of {width}x{height}", f"serve: {layers}, {sizes}"):
        _warm_up(pool)


def _warm_up(pool: Pool) -> None:
    """Compiles the programs of a pool, measures an evaluation of each form, and fits the preview."""
    pool.reset()
    pool.preview = fit_preview(pool)
    pool.place_group([])
    for count in pool.decode_counts:
        jax.block_until_ready(pool.decode(np.zeros(count * pool.mesh.size, np.int32)))
    for variant in pool.variants:
        jax.block_until_ready(pool.run(variant))
        started = time.perf_counter()
        jax.block_until_ready(pool.run(variant))
        pool.step_s[variant] = time.perf_counter() - started
    pool.reset()


def fit_preview(pool: Pool) -> Preview:
    """Returns the map of the pool's previews; grey for a broken decoder."""
    latents = preview.patches(pool.slots.latents.shape)
    pool.slots = pool.slots._replace(latents=jax.device_put(latents, pool.slots.latents.sharding))
    images, finite = jax.device_get(pool.decode(np.zeros(pool.mesh.size, np.int32)))
    decoded = np.arange(pool.mesh.size) * pool.per_device
    return preview.fit_preview(latents[decoded], images) if finite.all() else pool.preview
