"""Stable Diffusion 1.5: a finished student learns two more teachers and keeps its styles (arXiv:2504.12364, 3.5).

    dmm-jax train --config=configs/sd15_grow.py --workdir=runs/sd15_grown

The new run starts from the student in `grow.student` and adds one style per teacher. In each batch the two teachers and
the finished student have a third each; the finished student teaches its own styles, so that they are not forgotten.

Hardware: one GPU with 80 GB. Time: one fifth of the steps of configs/sd15.py. Not run with real weights: no numbers to
expect. In the embedded world a student that grew from four styles to eight is as good as one that learned all eight at
once (docs/study.md, row `4 + 4`).
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.grow.student = "runs/sd15"  # A workdir, or a DMM folder that `dmm-jax export` wrote.
    config.grow.styles = ()  # Keeps all styles. ("style_0", "portrait=style_3") keeps two and renames the second.
    config.teachers = tuple((f"new_{k}", f"checkpoints/new_{k}.safetensors") for k in range(2))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.num_steps = 20_000
    return config
