"""A random student with one level, two styles and both kinds of attention: its programs compile in seconds."""

import numpy as np

from dmm_jax.bench import jobs, networks
from dmm_jax.serve.engine import Engine
from dmm_jax.serve.requests import ImageRequest

ONE_LEVEL = {"block_out_channels": [64], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
SIZE = (64, 64)
STYLES = ("style_0", "style_1")


def small_pipeline(size: str = "tiny", **unet):
    """Returns a pipeline of random float32 weights; `unet` changes its config."""
    config = jobs.get_config()
    config.teachers, config.dtype = config.teachers[:2], "float32"
    sizes = dict(networks.SIZES)
    networks.SIZES["changed"] = sizes[size] | {"unet": sizes[size]["unet"] | unet}
    try:
        return networks.random_pipeline("changed", config)
    finally:
        del networks.SIZES["changed"]


def request(prompt: str = "a large red circle", **changes) -> ImageRequest:
    """Returns a request of two steps in the first style."""
    return ImageRequest(prompt, **{"style": "style_0", "num_inference_steps": 2} | changes)


def drawn_alone(pipeline, request: ImageRequest) -> np.ndarray:
    """Returns the image that the pipeline draws for a request, evaluation by evaluation: few programs serve all."""
    fields = {**vars(request)}
    prompt, style, seed = (fields.pop(name) for name in ("prompt", "style", "seed"))
    return pipeline([prompt], styles=[style], seeds=[seed], callback=lambda *_: None, **fields)[0]


def started(pipeline, num_slots: int = 4) -> Engine:
    """Returns an engine that serves."""
    engine = Engine(pipeline, [SIZE], num_slots, max_chunks=2)
    engine.start()
    return engine
