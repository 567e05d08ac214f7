"""Stable Diffusion 1.5 on one card with 24 GB: eight teachers become one student, which trains as a LoRA.

    dmm-jax plan --config=configs/sd15_24gb.py --topology gpu:1x24GB
    dmm-jax prepare --config=configs/sd15_24gb.py
    dmm-jax train --config=configs/sd15_24gb.py --workdir=runs/sd15_24gb
    dmm-jax export runs/sd15_24gb out --format single-file --all-styles

The student's UNet is frozen, in bfloat16 as the teachers; factors of rank 64 and the style path are trained. The
backward pass computes the blocks' inner values again.

Hardware: one GPU with 24 GB, as `dmm-jax plan --topology gpu:1x24GB` estimates (docs/plan.md). Not run on such a
card: no hours, no images/s and no quality to expect. The learning rate is usual for LoRAs and was not searched.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.batch_size = 8
    config.lora.rank = 64
    config.lora.conv_rank = 64
    config.learning_rate = 1e-4
    config.remat = "all"
    return config
