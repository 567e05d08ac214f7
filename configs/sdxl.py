"""Stable Diffusion XL: four teachers become one student at 1024 pixels.

    dmm-jax prepare --config=configs/sdxl.py
    dmm-jax train --config=configs/sdxl.py --workdir=runs/sdxl

The options are our defaults, not the paper's (arXiv:2504.12364, A.3): the student starts as the mean of the teachers
(paper: the base), the feature weight is 0.002 times the mean over SDXL's seven blocks (paper: 0.001 times the sum, or
0.007 times the mean), the adversarial term is off (paper: weight 0.01), and the batch is 32 (paper: 10 per GPU).

Hardware: eight GPUs with 80 GB; `dmm-jax plan` counts 39 GB on each. Two GPUs hold each teacher, and all eight share
the student with its moments (31 GB in float32). The base must be a folder, since a single file has no tokenizers. Not
run at this size: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
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
