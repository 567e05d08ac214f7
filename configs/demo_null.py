"""The demo with the null style: the base is a sixth teacher, called `none`, and stands for no style.

    dmm-jax demo --config=configs/demo_null.py --workdir=demo-null

The row `none` of the report says how near: the student without a style beside the base drawn again from other noise.
"""

from dmm_jax.world import demo_config


def get_config():
    """Returns the demo's config with the null style, and as many images of each teacher."""
    config = demo_config.get_config()
    config.teachers = (("none", config.base), *config.teachers)
    config.batch_size = 72
    return config
