"""`dmm-jax bench sample`: whole samples, prompt to pixels."""

import time
from functools import partial

import numpy as np

from dmm_jax.bench import networks as bench_networks
from dmm_jax.bench import profile as bench_profile
from dmm_jax.bench import timing, work
from dmm_jax.runtime.metrics import peak_memory


def measure(config, size: str, num_steps: int, batch_size: int, profile: str = "") -> list[dict]:
    """Times images in one style, then images with a mix of styles each; arguments as in `jobs.bench`."""
    names = [name for name, _ in config.teachers]
    pipeline = bench_networks.random_pipeline(size, config)
    prompts = ["a large red circle"] * batch_size
    rng = np.random.default_rng(0)
    mixes = [dict(zip(names, rng.dirichlet(np.ones(len(names))).tolist(), strict=True)) for _ in prompts]
    tflop = batch_size * work.sample_tflop(bench_networks.abstract_checkpoint(size))
    rows = []
    for job, styles in (("sample", names[0]), ("sample, a mix per image", mixes)):
        draw = partial(pipeline, prompts, styles=styles, **bench_networks.SAMPLING)
        started = time.perf_counter()
        draw()
        first_s = time.perf_counter() - started
        sample_s = timing.median_s(draw, max(num_steps // 2, 1))
        row = {
            "job": job,
            "images_per_s": batch_size / sample_s,
            "tflop_per_s": tflop / sample_s,
            "step_s": sample_s,
            "compile_s": max(first_s - sample_s, 0.0),
            "batch": batch_size,
        }
        rows.append(row | peak_memory())
    bench_profile.report(draw, profile)
    return rows
