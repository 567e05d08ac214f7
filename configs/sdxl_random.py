"""Stable Diffusion XL's size with random weights: measures a machine before you download anything.

    python -m dmm_jax.world.random_checkpoints random_xl --architecture sdxl --teachers 4 --images 256
    dmm-jax prepare --config=configs/sdxl_random.py
    dmm-jax train --config=configs/sdxl_random.py --workdir=random_xl/run
    dmm-jax export random_xl/run random_xl/export --format dmm,diffusers,single-file --style teacher_0 --verify

Hardware: one GPU with 140 GB, 30 GB of disk. Not run yet: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config: a high learning rate, so that 300 steps show whether the student learns."""
    config = dmm_jax.get_config()
    config.base = "random_xl/base"
    config.teachers = tuple((f"teacher_{k}", f"random_xl/teacher_{k}.safetensors") for k in range(4))
    config.data.source = "random_xl/images"
    config.data.cache = "random_xl/cache"
    config.data.resolution = 1024
    config.batch_size = 8
    config.num_steps = 300
    config.learning_rate = 1e-4
    config.student_init = "base"
    config.style_learning_rate_scale = 10.0
    config.warmup_steps = 20
    config.log_every = 10
    config.validation_every = 50
    config.validation_size = 4
    config.checkpoint_every = 300
    return config
