"""Stable Diffusion 1.5, the paper's whole loss and batch (arXiv:2504.12364, eq. 13, A.3): eight teachers, 16 devices.

    dmm-jax prepare --config=configs/sd15_paper.py
    dmm-jax train --config=configs/sd15_paper.py --workdir=runs/sd15_paper

The ninth row is the null style, which the paper does not have: what the student draws when no style is asked for.
Hardware: 16 accelerators; `dmm-jax plan --config=configs/sd15_paper.py --topology gpu:16x80GB` says what they hold. Not
run at this size with real weights: no hours or numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; set the paths to what you have."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.teachers = (*teachers, ("none", config.base))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.student_init = "base"
    config.feature_loss_weight = 0.009  # 0.001 times the sum over nine blocks.
    config.adversarial.weight = 0.01
    config.batch_size = 9 * 32
    return config
