"""Stable Diffusion 1.5 from prompts alone: the eight teachers draw 1,500 pictures each as training data.

    dmm-jax prepare --config=configs/sd15_prompts.py
    dmm-jax train --config=configs/sd15_prompts.py --workdir=runs/sd15_prompts

The same data serve as the paper's second stage (arXiv:2504.12364, A.3). For that, continue a run of configs/sd15.py in
its workdir for 10,000 steps with the new cache. The paper's batch is 10; it does not say whether per GPU. Here each
teacher has 10:

    dmm-jax prepare --config=configs/sd15_prompts.py
    dmm-jax train --config=configs/sd15.py --workdir=runs/sd15 --config.data.cache=data/cache_teachers_512 \\
        --config.batch_size=80 --config.num_steps=110000

Hardware: one GPU with 80 GB or more. Not run at this size: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.data.kind = "prompts"
    config.data.source = "data/prompts.txt"
    config.data.num_examples = 12_000
    config.data.cache = "data/cache_teachers_512"
    config.sampling.batch_size = 32
    config.num_steps = 10_000
    config.batch_size = 80
    return config
