"""Random pictures, parameters of a picture, and a text that would break out of careless markup."""

import numpy as np

from dmm_jax.gallery.png import Parameters

HOSTILE = "<script>alert(\"x\")</script> ../../etc/passwd & 'q'"


def parameters(**changes):
    values = {
        "prompt": "a red circle, (large:1.2)",
        "negative_prompt": "blurry",
        "seed": 1,
        "steps": 25,
        "solver": "dpmpp_2m_karras",
        "guidance_scale": 7.0,
        "width": 512,
        "height": 512,
        "model": "name",
        "model_hash": "abcdef1234",
        "styles": "anime",
    }
    return Parameters(**values | changes)


def pictures(count, height=16, width=16):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
