"""Fitting a style: one vector learns, everything else is frozen, and the file extends the model it was fitted to."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats.fitted_style import STYLE_KEY, with_fitted_styles, write_fitted_style
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.sources import FolderSource
from dmm_jax.distill import fit_style as module
from dmm_jax.distill.fit_style import fit_style
from dmm_jax.pipeline import Pipeline
from dmm_jax.verbs import main as cli
from dmm_jax.world.source import ShapesSource

PROMPTS = ["a large red circle", "a small blue star"]
QUICK = {"num_inference_steps": 2, "seeds": [5, 6], "output": "latents"}


@pytest.fixture(scope="module", autouse=True)
def _fewer_draws():
    """Losses are means over fewer held-out draws than users get: they take most of a tiny fit's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HELD_OUT_DRAWS", 32)
        yield


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    """The tiny run's student as a DMM folder, with a style MLP that does more than six steps have taught it."""
    (folder,) = export(trained, tmp_path_factory.mktemp("student") / "out", ["dmm"], dtype="float32")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file = TensorFile(path)
    tensors = {key: np.array(file[key]) for key in file}
    weight = tensors["add_embedding.linear_2.weight"]
    weight[:] = np.random.default_rng(0).standard_normal(weight.shape) / np.sqrt(weight.shape[1])
    save(path, tensors, file.metadata)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for example in map(ShapesSource(6, style="blueprint").__getitem__, range(6)):
        Image.fromarray(example["image"]).save(folder / f"{example['id']}.png")
        (folder / f"{example['id']}.txt").write_text(example["caption"])
    return folder


@pytest.fixture(scope="module")
def pipeline(student):
    return Pipeline.from_pretrained(student)


def fit(pipeline, images, name="mine", **options):
    side = pipeline.unet.merged().config["sample_size"] * pipeline.vae_scale_factor
    return fit_style(pipeline, FolderSource(images, side), name, **{"batch_size": 4, "steps": 30} | options)


@pytest.fixture(scope="module")
def fitted(pipeline, images, tmp_path_factory):
    style = fit(pipeline, images, learning_rate=0.3)
    return style.save(tmp_path_factory.mktemp("fitted") / "mine.safetensors"), style


@pytest.fixture(scope="module")
def with_mine(student, fitted):
    return Pipeline.from_pretrained(student, extra_styles=[fitted[0]])


def test_the_held_out_loss_falls_below_every_existing_style(fitted):
    loss = fitted[1].facts["loss"]
    assert loss["fitted"] < min(loss["start"], *loss["styles"].values())
    assert "fitted" in fitted[1].summary() and "gains nothing" not in fitted[1].summary()


def test_the_same_seed_fits_the_same_vector(pipeline, images, fitted):
    second = fit(pipeline, images, learning_rate=0.3)
    np.testing.assert_array_equal(second.row, TensorFile(fitted[0])["model_embedding.weight"][0])
    assert second.facts["loss"] == fitted[1].facts["loss"]


def test_a_fitted_style_leaves_the_models_own_unchanged(pipeline, with_mine):
    assert with_mine.styles == (*pipeline.styles, "mine")
    expected = pipeline(PROMPTS, styles="left", **QUICK)
    latents = with_mine(PROMPTS, styles=["left", {"mine": 0.5, "left": 0.5}], **QUICK)
    np.testing.assert_allclose(latents[0], expected[0], atol=1e-5 * np.abs(expected).max())
    assert np.abs(latents[1] - expected[1]).max() > 1e-4 * np.abs(expected).max()


def test_a_fitted_style_is_exported_like_any_other(student, fitted, with_mine, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(student), str(out), "--format", "diffusers,dmm", "--style", "mine", "--dtype", "float32"]
    assert cli.main([*arguments, "--extra-style", str(fitted[0])]) == 0
    stock, merged = Pipeline.from_pretrained(out / "diffusers"), Pipeline.from_pretrained(out / "dmm")
    expected = with_mine(PROMPTS, styles="mine", **QUICK)
    np.testing.assert_allclose(stock(PROMPTS, **QUICK), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(merged(PROMPTS, styles="mine", **QUICK), expected, atol=1e-5 * np.abs(expected).max())


def test_the_weights_of_a_mix_can_be_learned_alone(pipeline, student, images, tmp_path):
    style = fit(pipeline, images, "mix", steps=10, learning_rate=0.1, start="left=0.9,right=0.1", mix_only=True)
    out = style.save(tmp_path / "mix.safetensors")
    assert json.loads(TensorFile(out).metadata[STYLE_KEY]) == style.facts
    assert style.facts["loss"]["fitted"] < style.facts["loss"]["start"]
    table = open_checkpoint(student).tensors("unet")["model_embedding.weight"]
    expected = np.array([list(style.facts["mix"].values())], np.float32) @ np.asarray(table)
    np.testing.assert_allclose(TensorFile(out)["model_embedding.weight"], expected, atol=1e-5)


def test_a_file_for_another_model_is_refused(student, fitted, tmp_path):
    model = open_checkpoint(student)
    with pytest.raises(CheckpointError, match="this name is taken"):
        with_fitted_styles(model, [fitted[0], fitted[0]])
    row = np.zeros(model.shapes("unet")["model_embedding.weight"][1], np.float32)
    other = write_fitted_style(tmp_path / "a.safetensors", row, {"name": "b", "unet_sha256": "0" * 64})
    with pytest.raises(CheckpointError, match="fitted to another model"):
        with_fitted_styles(model, [other])
    narrow = write_fitted_style(tmp_path / "c.safetensors", row[1:], {"name": "b", "unet_sha256": model.digest("unet")})
    with pytest.raises(CheckpointError, match="must hold one row"):
        with_fitted_styles(model, [narrow])
    with pytest.raises(CheckpointError, match="not a fitted style"):
        with_fitted_styles(model, [_plain(tmp_path)])


def _plain(folder):
    save(folder / "plain.safetensors", {"a": np.zeros(1, np.float32)})
    return folder / "plain.safetensors"


@pytest.mark.parametrize("name, message", [("left", "Give --name another"), ("a=b", "writable"), ("a,b", "writable")])
def test_names_that_a_mix_cannot_hold_are_refused(pipeline, images, name, message):
    with pytest.raises(ValueError, match=message):
        fit(pipeline, images, name)


@pytest.mark.parametrize(
    "option, value",
    [("learning_rate", float("inf")), ("seed", -1), ("steps", 0), ("prompt_dropout", 1.0), ("resolution", -8)],
)
def test_options_out_of_range_are_refused_before_the_model_opens(images, tmp_path, capsys, option, value):
    flag = f"--{option.replace('_', '-')}={value}"
    assert verb(images, tmp_path / "a.safetensors", flag) == 1
    assert f"{flag.partition('=')[0]} must" in capsys.readouterr().err


def verb(images, out, *options):
    """Runs `dmm-jax fit-style` on a model that does not exist."""
    return cli.main(["fit-style", "no model", "--images", str(images), "--name", "mine", "--out", str(out), *options])


def test_an_unwritable_output_is_refused_before_the_model_opens(images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert verb(images, tmp_path / "file" / "a.safetensors") == 1
    assert re.search("cannot be written: .*file is a file", capsys.readouterr().err)


def test_the_verb_writes_the_file_and_prints_the_losses(student, images, tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    options = ["--images", str(images), "--name", "mine", "--out", str(out), "--steps", "2", "--batch-size", "4"]
    assert cli.main(["fit-style", str(student), *options]) == 0
    assert json.loads(TensorFile(out).metadata[STYLE_KEY])["steps"] == 2
    assert "mine: 2 steps on 6 images" in capsys.readouterr().out
