"""Stable Diffusion 1.5 with the paper's whole loss (arXiv:2504.12364, eq. 13): eight teachers and a null style.

    dmm-jax prepare --config=configs/sd15_paper.py
    dmm-jax train --config=configs/sd15_paper.py --workdir=runs/sd15_paper

As in the paper (A.3): the student starts from the base; the loss has the score term, the features with weight 0.001 and
the adversarial term with weight 0.01; learning rate, prompt dropout and 100,000 steps. Not as in the paper: a ninth
teacher, the base itself, is the null style, which draws if a user asks for no style; and the batch is 288, nine times
32, where the paper's is 320 (16 GPUs with 20 each).

Hardware: 16 accelerators; `dmm-jax plan --config=configs/sd15_paper.py --topology gpu:16x80GB` prints the memory per
device and the hours. Not run with real weights: no numbers to expect.
"""

import dmm_jax


def get_config():
    """Returns the config; change the paths to yours."""
    config = dmm_jax.get_config()
    config.base = "checkpoints/stable-diffusion-v1-5"
    teachers = tuple((f"style_{k}", f"checkpoints/teacher_{k}.safetensors") for k in range(8))
    config.teachers = (*teachers, ("none", config.base))
    config.data.source = "data/images"
    config.data.cache = "data/cache_512"
    config.student_init = "base"
    config.feature_loss_weight = 0.009  # Times the mean over nine blocks: the paper's 0.001 times the sum.
    config.adversarial.weight = 0.01
    config.batch_size = 9 * 32  # A multiple of the nine teachers.
    return config
