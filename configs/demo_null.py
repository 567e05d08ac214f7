"""The demo with a null style: a sixth teacher, called `none`, which is the base itself.

    dmm-jax demo --config=configs/demo_null.py --workdir=demo-null

Hardware: two CPU cores; a little longer than the demo's six minutes. Expect the report's row `none`, the student
without a style, near the base: 6.6 in FD (shapes) in one run, in which the other styles closed 90 to 96 % of their gap
(docs/method.md).
"""

from dmm_jax.world import demo_config


def get_config():
    """Returns the demo's config with the null style and the same number of images per teacher."""
    config = demo_config.get_config()
    config.teachers = (("none", config.base), *config.teachers)
    config.batch_size = 72
    return config
