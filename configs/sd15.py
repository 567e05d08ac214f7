"""Stable Diffusion 1.5: eight teachers become one student, trained on cached latents of images with captions.

    dmm-jax prepare --config=configs/sd15.py
    dmm-jax train --config=configs/sd15.py --workdir=runs/sd15

The options are our defaults: the paper's optimiser and score loss (arXiv:2504.12364, A.3), and a student that starts
as the mean of the teachers (docs/study.md). `--config.student_init=base` starts from the base, as in the paper;
configs/sd15_paper.py has the paper's whole loss.

Hardware: one GPU with 80 GB. Time: 100,000 steps take about 11 hours on one H200, at the 0.394 s per step that random
weights take (docs/performance.md). Not run with real weights: no numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    config.teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.batch_size = 48
    return config
