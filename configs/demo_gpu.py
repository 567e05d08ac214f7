"""The demo with more training steps, and a report on 2,000 pictures per style, for one GPU.

    dmm-jax demo --config=configs/demo_gpu.py --workdir=demo-gpu
    dmm-jax evaluate demo-gpu --batch-size 500 --steps 25 --merges average,task_arithmetic,ties,dare

Hardware: one GPU; training takes 1.2 GB of its memory. Time: 9 min 40 s on one H200 with 16 busy CPU cores, most of it
compilation. Expect every style to close at least 95 % of the distance from the base to the floor; one run closed 99.0 %
(comic), 99.3 % (cartoon), 97.7 % (ink), 98.9 % (neon) and 99.8 % (blueprint).
"""

from dmm_jax.world import demo_config


def get_config():
    """Returns the demo's config with longer training."""
    config = demo_config.get_config()
    config.data.num_examples = 8192
    config.num_steps = 3000
    config.batch_size = 260
    config.log_every = 250
    config.validation_every = 1000
    config.checkpoint_every = 3000
    return config
