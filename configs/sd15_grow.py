"""Stable Diffusion 1.5: a finished student learns two more checkpoints and keeps its styles (arXiv:2504.12364, 3.5).

    dmm-jax train --config=configs/sd15_grow.py --workdir=runs/sd15_grown

A third of every batch is the finished student teaching its own styles. Hardware: one GPU with 80 GB, as for sd15.py.
Not run at this size with real weights: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; set the paths to what you have."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.grow.student = "runs/sd15"  # Or the DMM folder that `dmm-jax export` wrote.
    config.grow.styles = ()  # All; or for example ("style_0", "portrait=style_3").
    config.teachers = tuple((f"new_{k}", f"checkpoints/new_{k}.safetensors") for k in range(2))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.num_steps = 20_000
    return config
