"""Stable Diffusion XL: four teachers into one student at 1024 pixels, the paper's settings (arXiv:2504.12364, A.3).

    dmm-jax prepare --config=configs/sdxl.py
    dmm-jax train --config=configs/sdxl.py --workdir=runs/sdxl

Hardware: eight GPUs with 80 GB or more (39 GB each, by `dmm-jax plan`), a teacher on every two; the student and its
moments (31 GB in float32) are divided among all. The base needs a folder, since a single file holds no tokenizers. Not
run yet at this size: no hours to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; set the paths to what you have."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-xl-base-1.0"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(4))
    config.data.source = "data/images"
    config.data.cache = "data/cache_1024"
    config.data.resolution = 1024
    config.batch_size = 32
    config.mesh.teacher = 4
    config.mesh.fsdp = 2
    return config
