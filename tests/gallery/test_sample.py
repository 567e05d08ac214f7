"""Sampling covers every prompt in every style, and its parameters draw each picture again."""

import numpy as np
import pytest

from dmm_jax.gallery.sample import sample
from dmm_jax.pipeline import Pipeline


@pytest.fixture(scope="module")
def pipeline(trained):
    return Pipeline.from_pretrained(trained)


def test_the_parameters_draw_each_picture_again(pipeline):
    prompts, totals = ["a large red circle", "a small blue star"], []

    def progress(batches, total):
        totals.append(total)
        return batches

    samples = sample(pipeline, prompts, seed=3, num_inference_steps=2, batch_size=3, progress=progress)
    jobs = [(picture.prompt, picture.styles, picture.seed) for picture in samples.parameters]
    assert jobs == [(prompt, style, 3 + row) for row, prompt in enumerate(prompts) for style in pipeline.styles]
    assert totals == [2]
    for image, picture in zip(samples.images, samples.parameters, strict=True):
        repeated = pipeline(
            [picture.prompt],
            picture.negative_prompt,
            picture.styles,
            [picture.seed],
            height=picture.height,
            width=picture.width,
            num_inference_steps=picture.steps,
            guidance_scale=picture.guidance_scale,
            solver=picture.solver,
        )[0]
        assert np.abs(image.astype(int) - repeated.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "styles, options, message",
    [(["lift"], {}, "did you mean 'left'"), ([], {"batch_size": 0}, "batch_size must be .* at least 1; got 0")],
)
def test_wrong_arguments_are_refused_before_any_drawing(pipeline, monkeypatch, styles, options, message):
    monkeypatch.setattr(Pipeline, "__call__", None)
    with pytest.raises(ValueError, match=message):
        sample(pipeline, ["a large red circle"], styles, **options)
