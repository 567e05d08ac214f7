"""Stable Diffusion 1.5 from prompts alone: the eight teachers draw 1,500 pictures each (arXiv:2504.12364, A.3).

    dmm-jax prepare --config=configs/sd15_prompts.py
    dmm-jax train --config=configs/sd15_prompts.py --workdir=runs/sd15_prompts

As the paper's second stage, behind a run of configs/sd15.py: the same run, in the same workdir, reads another cache for
10,000 more steps (10 images a teacher: the paper does not say whether its batch of 10 is per GPU):

    dmm-jax prepare --config=configs/sd15_prompts.py
    dmm-jax train --config=configs/sd15.py --workdir=runs/sd15 --config.data.cache=data/cache_teachers_512 \\
        --config.batch_size=80 --config.num_steps=110000

Hardware: one GPU with 80 GB or more. Not run yet at this size: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; set the paths to what you have."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.data.source = "teachers"
    config.data.prompts = "data/prompts.txt"
    config.data.num_examples = 12_000
    config.data.cache = "data/cache_teachers_512"
    config.data.sampling.batch_size = 32
    config.num_steps = 10_000
    config.batch_size = 80
    return config
