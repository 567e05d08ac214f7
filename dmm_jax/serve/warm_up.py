"""What an engine does before its first request: compile every program, time them, and fit the preview's colours."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from dmm_jax.serve import programs
from dmm_jax.serve.pool import Pool

PATCH = 4  # Latent cells along the side of a patch of one colour.


def warm_up(pool: Pool) -> None:
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


def fit_preview(pool: Pool) -> programs.Preview:
    """Returns the linear map that is nearest to the decoder on latents of random patches; grey for a broken decoder."""
    shape = pool.slots.latents.shape
    patches = np.random.default_rng(0).standard_normal(
        (shape[0], *(-(-side // PATCH) for side in shape[1:3]), shape[3])
    )
    latents = patches.repeat(PATCH, 1).repeat(PATCH, 2)[:, : shape[1], : shape[2]].astype(np.float32)
    pool.slots = pool.slots._replace(latents=jax.device_put(latents, pool.slots.latents.sharding))
    images, finite = jax.device_get(pool.decode(np.zeros(pool.mesh.size, np.int32)))
    decoded = np.arange(pool.mesh.size) * pool.per_device
    factor = images.shape[1] // shape[1]
    cells = images.reshape(len(images), shape[1], factor, shape[2], factor, 3).mean((2, 4)) / 255.0
    if not finite.all():
        return pool.preview
    inputs = latents[decoded].reshape(-1, shape[3])
    inputs = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    solution = np.linalg.lstsq(inputs, cells.reshape(-1, 3), rcond=None)[0]
    return programs.Preview(jnp.asarray(solution[:-1], jnp.float32), jnp.asarray(solution[-1], jnp.float32))
