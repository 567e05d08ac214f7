"""Stable Diffusion 1.5: eight teachers into one student, the paper's recipe (arXiv:2504.12364, A.3) on cached latents.

    dmm-jax prepare --config=configs/sd15.py
    dmm-jax train --config=configs/sd15.py --workdir=runs/sd15

The student starts as the mean of the teachers (docs/study.md); with `--config.student_init=base` as the base, as in the
paper.

Hardware: one GPU with 80 GB or more. Not run yet at this size with real weights: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; set the paths to what you have."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.batch_size = 48
    return config
