"""The null style: with the base as its teacher, a student that is asked for no style draws as the base."""

import shutil

import numpy as np
import pytest

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.pipeline import Pipeline

PROMPTS = ["a large red circle", "a small blue square"]


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    """A run that starts as the base and learns it beside `right`; every checkpoint is kept."""
    config = tiny[1].copy_and_resolve_references()
    config.teachers = (("none", config.base), ("right", str(tiny[0]["right"])))
    config.student_init, config.checkpoint_every, config.checkpoints_kept = "base", 1, 0
    folder = tmp_path_factory.mktemp("null") / "run"
    train.run(config, folder)
    return folder


def latents(pipeline, **styles):
    return pipeline(PROMPTS, num_inference_steps=2, output="latents", **styles)


def distance(a, b):
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(scope="module")
def base(tiny):
    return latents(Pipeline.from_pretrained(tiny[0]["base"]))


def test_before_the_first_update_no_style_is_the_base(workdir, base, tiny, tmp_path):
    """The first step's rate is the warm-up's: 0."""
    start = shutil.copytree(workdir, tmp_path / "run", ignore=shutil.ignore_patterns("[2-9]"))
    tensors, expected = open_checkpoint(start).tensors("unet"), open_checkpoint(tiny[0]["base"]).tensors("unet")
    assert all(np.array_equal(tensors[key], expected[key]) for key in expected)
    pipeline = Pipeline.from_pretrained(start)
    for styles in ({}, {"styles": "none"}, {"styles": "right"}):
        assert distance(latents(pipeline, **styles), base) < 1e-5


def test_after_training_no_style_is_the_null_style_and_no_other(workdir, base):
    pipeline = Pipeline.from_pretrained(workdir)
    none = latents(pipeline)
    np.testing.assert_array_equal(none, latents(pipeline, styles="none"))
    assert distance(none, base) > 1e-3 < distance(none, latents(pipeline, styles="right"))
