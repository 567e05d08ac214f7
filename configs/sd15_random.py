"""Stable Diffusion 1.5's size with random weights: what the paper's recipe costs on a machine, before any download.

    python -m dmm_jax.world.random_checkpoints random --teachers 8 --images 1024
    dmm-jax prepare --config=configs/sd15_random.py
    dmm-jax train --config=configs/sd15_random.py --workdir=random/run
    dmm-jax export random/run random/export --format dmm,diffusers,single-file --style teacher_0 --verify

Hardware: one GPU with 80 GB or more. Figures: docs/performance.md.
"""

import dmm_jax


def get_config():
    """Returns the config: the paper's batch, and a quick learning rate, since 300 steps must show that it learns."""
    config = dmm_jax.get_config()
    config.base = "random/base"
    config.teachers = tuple((f"teacher_{k}", f"random/teacher_{k}.safetensors") for k in range(8))
    config.data.source = "random/images"
    config.data.cache = "random/cache"
    config.batch_size = 48
    config.num_steps = 300
    config.learning_rate = 1e-4
    config.student_init = "base"
    config.style_learning_rate_scale = 10.0
    config.warmup_steps = 20
    config.log_every = 10
    config.validation_every = 50
    config.validation_size = 6
    config.checkpoint_every = 300
    return config
