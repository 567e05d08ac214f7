"""Stable Diffusion XL on one card with 24 GB: two teachers become one student, which trains as a LoRA, at 1024 pixels.

    dmm-jax plan --config=configs/sdxl_24gb.py --topology gpu:1x24GB --architecture sdxl
    dmm-jax prepare --config=configs/sdxl_24gb.py
    dmm-jax train --config=configs/sdxl_24gb.py --workdir=runs/sdxl_24gb
    dmm-jax export runs/sdxl_24gb out --format single-file --all-styles

The teachers are in the host's memory, and the card holds one at a time; the host needs 13 GiB for them. The student's
UNet is frozen, in bfloat16 as the teachers; factors of rank 64 next to attention and feed-forward layers, factors of
rank 32 next to convolutions, and the style path are trained. The backward pass computes the blocks' inner values again.

Hardware: one GPU with 24 GB, as `dmm-jax plan --topology gpu:1x24GB` estimates (docs/plan.md). Not run on such a
card: no hours, no images/s and no quality to expect. The base must be a folder, since a single file has no tokenizers.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-xl-base-1.0"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(2))
    config.data.source = "data/images"
    config.data.cache = "data/cache_1024"
    config.data.resolution = 1024
    config.batch_size = 4
    config.lora.rank = 64
    config.lora.conv_rank = 32
    config.learning_rate = 1e-4
    config.remat = "all"
    config.teachers_in_host_memory = True
    return config
