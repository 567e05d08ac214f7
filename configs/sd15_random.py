"""Stable Diffusion 1.5's size with random weights: measures a machine before you download anything.

    python -m dmm_jax.world.random_checkpoints random --teachers 8 --images 1024
    dmm-jax prepare --config=configs/sd15_random.py
    dmm-jax train --config=configs/sd15_random.py --workdir=random/run
    dmm-jax export random/run random/export --format dmm,diffusers,single-file --style teacher_0 --verify

Hardware: one GPU with 80 GB. Time: 10 minutes on one H200. Expect 94 images/s or more, 70 GB at the peak, a training
loss that falls from 0.060 at step 10 to 0.008 at step 300, and exports that agree with diffusers to 3e-6
(docs/performance.md).
"""

import dmm_jax


def get_config():
    """Returns the config: a high learning rate, so that 300 steps show whether the student learns."""
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
