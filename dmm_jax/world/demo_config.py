"""The demo's config: five teachers of the embedded world become one student, in six minutes on two CPU cores."""

import ml_collections

from dmm_jax.config import options
from dmm_jax.world.scenes import IMAGE_SIZE
from dmm_jax.world.shipped_checkpoints import BASE, FOLDER, teacher_paths

PROMPTS = (
    "a large red circle",
    "a small blue square above a large yellow triangle",
    "a large green star",
    "a small purple circle left of a large orange square",
)


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config."""
    config = options.get_config()
    config.base = str(FOLDER / BASE)
    config.teachers = teacher_paths()
    config.dtype = "float32"
    config.data.kind = "shapes_world"
    config.data.num_examples = 1024
    config.data.resolution = IMAGE_SIZE
    config.batch_size = 60
    config.num_steps = 280
    config.learning_rate = 1.5e-3
    config.learning_rate_schedule = "cosine"
    config.warmup_steps = 10
    config.weight_decay = 0.0
    config.log_every = 20
    config.validation_every = 140
    config.validation_size = 8
    config.checkpoint_every = 140
    config.samples.prompts = PROMPTS
    config.sampling.num_inference_steps = 10
    config.sampling.guidance_scale = 2.5
    return config
