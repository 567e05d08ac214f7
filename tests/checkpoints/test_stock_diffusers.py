"""Stock diffusers opens every export and samples from it the latents that our pipeline samples from the student."""

import dataclasses

import numpy as np
import pytest

from dmm_jax.checkpoints import write
from dmm_jax.checkpoints.checkpoint import Component
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.pipeline import Pipeline

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

MIX = {"anime": 0.7, "photo": 0.5, "ink": -0.2}
PROMPTS, NEGATIVE = ["a large red circle", "a small blue star"], "green"
STEPS, GUIDANCE = 10, 3.0
TOLERANCE = 1e-5  # Relative to the latents' maximum.
# Number of tensors before the disk is full: within the second network of a folder, and within a single file.
TENSORS_THAT_FIT = {"dmm": 250, "diffusers": 250, "single-file": 300}


@pytest.fixture(scope="module")
def exports(student, tmp_path_factory):
    """Every format in float32, each written by one call."""
    out = tmp_path_factory.mktemp("exports")
    weights, recipe = np.array(list(MIX.values()), np.float32), Recipe("tiny", list(MIX), None)
    return {fmt: write.write_format(out, fmt, student, weights, "float32", recipe) for fmt in write.CHECKPOINTS}


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(3).standard_normal((2, 8, 8, 4), np.float32)


@pytest.fixture(scope="module")
def merged(exports):
    """The merged model in our own pipeline."""
    return Pipeline.from_pretrained(exports["dmm"])


@pytest.fixture(scope="module")
def our_latents(merged, noise):
    """Latents of the merged model with the mix as an argument."""
    return draw(merged, noise, styles=MIX)


def draw(pipeline, noise, **options):
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "solver": "dpmpp_2m", "output": "latents"}
    return pipeline(PROMPTS, NEGATIVE, latents=noise, **settings, **options)


def opened_by_diffusers(exports, fmt):
    options = {"local_files_only": True, "safety_checker": None}
    if fmt == "diffusers":
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(exports[fmt], **options)
    else:
        config = str(exports["diffusers"])
        pipe = diffusers.StableDiffusionPipeline.from_single_file(str(exports[fmt]), config=config, **options)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def error(latents, expected):
    return np.abs(latents - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("fmt", ["diffusers", "single-file"])
def test_diffusers_and_our_pipeline_sample_equal_latents(exports, our_latents, noise, fmt):
    pipe = opened_by_diffusers(exports, fmt)
    cells = pipe.vae_scale_factor
    assert pipe.unet.config.sample_size == 8
    latents = pipe(
        PROMPTS, negative_prompt=[NEGATIVE] * 2, latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=8 * cells, width=8 * cells, output_type="latent",
    ).images.numpy().transpose(0, 2, 3, 1)  # fmt: skip
    assert error(latents, our_latents) < TOLERANCE


def test_a_folded_style_samples_the_latents_of_the_style(exports, our_latents, noise):
    stock = Pipeline.from_pretrained(exports["diffusers"])
    assert stock.styles == ()
    assert error(draw(stock, noise), our_latents) < TOLERANCE


def test_the_style_changes_the_latents(merged, our_latents, noise):
    assert error(draw(merged, noise, styles="photo"), our_latents) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_diffusers_opens_the_half_precision_exports(student, recipe, tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    weights = np.array(list(MIX.values()), np.float32)
    paths = {
        fmt: write.write_format(tmp_path, fmt, student, weights, name, recipe) for fmt in ("diffusers", "single-file")
    }
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        paths["diffusers"], torch_dtype=dtype, local_files_only=True, safety_checker=None
    )
    from_file = diffusers.StableDiffusionPipeline.from_single_file(
        str(paths["single-file"]), config=str(paths["diffusers"]), torch_dtype=dtype, local_files_only=True,
        safety_checker=None,
    )  # fmt: skip
    for network in ("unet", "vae", "text_encoder"):
        first, second = (getattr(opened, network).state_dict() for opened in (pipe, from_file))
        params = open_checkpoint(paths["diffusers"]).tensors(network)
        assert {tensor.dtype for key, tensor in first.items() if "position_ids" not in key} == {dtype}
        for key, tensor in first.items():
            assert torch.equal(tensor, second[key])
        assert len(params) == len([key for key in first if "position_ids" not in key])


def test_the_scheduler_config_reaches_diffusers(student, recipe, tmp_path):
    schedule = student.scheduler_config | {"prediction_type": "v_prediction"}
    source = dataclasses.replace(student, scheduler_config=schedule)
    out = write.write_format(tmp_path, "diffusers", source, np.ones(3, np.float32), "float32", recipe)
    scheduler = diffusers.PNDMScheduler.from_pretrained(out, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    np.testing.assert_allclose(scheduler.config.beta_end, 0.012)


@pytest.mark.parametrize("fmt", write.CHECKPOINTS)
def test_a_disk_that_fills_leaves_nothing_half_written(student, recipe, tmp_path, fmt, monkeypatch):
    calls, raw_bytes = [], safetensors_io.raw_bytes

    def full(array):
        calls.append(array)
        if len(calls) > TENSORS_THAT_FIT[fmt]:
            raise OSError(28, "No space left on device")
        return raw_bytes(array)

    monkeypatch.setattr(safetensors_io, "raw_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write.write_format(tmp_path, fmt, student, np.ones(3, np.float32), "float32", recipe)
    assert len(calls) == TENSORS_THAT_FIT[fmt] + 1 and list(tmp_path.iterdir()) == []


def test_an_input_error_while_writing_leaves_nothing(student, recipe, tmp_path):
    def fail():
        raise OSError(5, "Input/output error")

    components = {**student.components, "text_encoder": Component(student.config("text_encoder"), fail)}
    broken = dataclasses.replace(student, components=components)
    for fmt in write.CHECKPOINTS:
        with pytest.raises(OSError, match="Input/output"):
            write.write_format(tmp_path, fmt, broken, np.ones(3, np.float32), "float32", recipe)
    assert list(tmp_path.iterdir()) == []
