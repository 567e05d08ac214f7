"""A first merge of your own: two styles of the embedded world become one student, on two CPU cores.

    dmm-jax prepare --config=first_merge
    dmm-jax train --config=first_merge --workdir=runs/first_merge
    dmm-jax sample runs/first_merge --prompt "a small red star" --style comic --style comic=0.5,neon=0.5 --out pictures

Copy this file and choose other styles: comic, cartoon, ink, neon, blueprint. Prompts have this world's words: "a", then
small or large; red, orange, yellow, green, blue or purple; circle, square, triangle or star; and, before a second
shape, above, below, left of or right of. Other words draw an arbitrary shape.

Hardware: two CPU cores and 1.3 GB of memory. Time: 2 min 20 s on idle cores, 4 min 10 s on busy ones.
"""

from dmm_jax.world import demo_config

STYLES = ("comic", "neon")


def get_config():
    """Returns the demo's config with fewer teachers, and as many images per step for each of them."""
    config = demo_config.get_config()
    config.batch_size = config.batch_size // len(config.teachers) * len(STYLES)
    config.teachers = tuple((name, path) for name, path in config.teachers if name in STYLES)
    config.data.cache = "first_merge_latents"
    return config
