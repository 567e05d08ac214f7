"""Stable Diffusion 1.5 on one card with 12 GB: three teachers become one student, which trains as a LoRA.

    dmm-jax plan --config=configs/sd15_12gb.py --topology gpu:1x12GB
    dmm-jax prepare --config=configs/sd15_12gb.py
    dmm-jax train --config=configs/sd15_12gb.py --workdir=runs/sd15_12gb
    dmm-jax export runs/sd15_12gb out --format single-file --all-styles

As configs/sd15_24gb.py, with three images per step, one of each teacher, and factors of rank 32 for convolutions.

Hardware: one GPU with 12 GB, as `dmm-jax plan --topology gpu:1x12GB` estimates (docs/plan.md). Not run on such a
card: no hours, no images/s and no quality to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(3))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.batch_size = 3
    config.lora.rank = 64
    config.lora.conv_rank = 32
    config.learning_rate = 1e-4
    config.remat = "all"
    return config
