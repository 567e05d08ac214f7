"""Fitting a style: one vector learns, everything else is frozen, and the file joins the model it was fitted to."""

import json

import numpy as np
import pytest
from PIL import Image

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.formats.fitted_style import STYLE_KEY, with_fitted_styles, write_fitted_style
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.distill import fit_style as fit_style_lib
from dmm_jax.distill.fit_style import fit_style, report
from dmm_jax.pipeline import Pipeline
from dmm_jax.verbs import main as cli
from dmm_jax.world.source import ShapesSource

PROMPTS = ["a large red circle", "a small blue star"]
QUICK = {"num_inference_steps": 2, "seeds": [5, 6], "output": "latents"}


@pytest.fixture(scope="module", autouse=True)
def _fewer_draws():
    """The losses are means over fewer held-out draws than users get: most of a tiny fit's time goes into them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_style_lib, "HELD_OUT_DRAWS", 32)
        yield


@pytest.fixture(scope="module")
def student(trained, tmp_path_factory):
    """The tiny run's student as a DMM folder, with a style MLP that says more than six steps have taught it."""
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
def fitted(student, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "mine.safetensors"
    return out, fit_style(str(student), images, "mine", out, steps=30, batch_size=4, learning_rate=0.3)


@pytest.fixture(scope="module")
def with_mine(student, fitted):
    return Pipeline.from_pretrained(student, extra_styles=[fitted[0]])


def test_the_loss_on_other_noise_falls_below_the_starts_and_every_styles(fitted):
    loss = fitted[1]["loss"]
    assert loss["fitted"] < min(loss["start"], *loss["styles"].values())
    assert "fitted" in report(fitted[1]) and "Nothing was gained" not in report(fitted[1])


def test_the_same_seed_fits_the_same_vector(student, images, fitted, tmp_path):
    again = fit_style(
        str(student), images, "mine", tmp_path / "b.safetensors", steps=30, batch_size=4, learning_rate=0.3
    )
    rows = [TensorFile(path)["model_embedding.weight"] for path in (fitted[0], tmp_path / "b.safetensors")]
    np.testing.assert_array_equal(*rows)
    assert again["loss"] == fitted[1]["loss"]


def test_the_style_joins_the_models_own_and_leaves_them_alone(student, with_mine):
    plain = Pipeline.from_pretrained(student)
    assert with_mine.styles == (*plain.styles, "mine")
    left = plain(PROMPTS, styles="left", **QUICK)
    drawn = with_mine(PROMPTS, styles=["left", {"mine": 0.5, "left": 0.5}], **QUICK)
    np.testing.assert_allclose(drawn[0], left[0], atol=1e-5 * np.abs(left).max())
    assert np.abs(drawn[1] - left[1]).max() > 1e-4 * np.abs(left).max()


def test_it_is_exported_as_any_other_style(student, fitted, with_mine, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(student), str(out), "--format", "diffusers,dmm", "--style", "mine", "--dtype", "float32"]
    assert cli.main([*arguments, "--extra-style", str(fitted[0])]) == 0
    stock, merged = Pipeline.from_pretrained(out / "diffusers"), Pipeline.from_pretrained(out / "dmm")
    drawn = with_mine(PROMPTS, styles="mine", **QUICK)
    np.testing.assert_allclose(stock(PROMPTS, **QUICK), drawn, atol=1e-4 * np.abs(drawn).max())
    np.testing.assert_allclose(merged(PROMPTS, styles="mine", **QUICK), drawn, atol=1e-5 * np.abs(drawn).max())


def test_weights_of_a_mix_can_be_all_that_is_learned(student, images, tmp_path):
    out = tmp_path / "mix.safetensors"
    start = {"start": "left=0.9,right=0.1", "mix_only": True}
    said = fit_style(str(student), images, "mix", out, steps=10, batch_size=4, learning_rate=0.1, **start)
    assert json.loads(TensorFile(out).metadata[STYLE_KEY]) == said
    assert said["loss"]["fitted"] < said["loss"]["start"]
    table = open_checkpoint(student).tensors("unet")["model_embedding.weight"]
    expected = np.array([list(said["mix"].values())], np.float32) @ np.asarray(table)
    np.testing.assert_allclose(TensorFile(out)["model_embedding.weight"], expected, atol=1e-5)


def test_what_does_not_belong_to_the_model_is_refused(student, fitted, tmp_path):
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


@pytest.mark.parametrize("name, said", [("left", "Give --name another"), ("a=b", "writable"), ("a,b", "writable")])
def test_names_that_a_mix_cannot_hold_are_refused(student, images, tmp_path, name, said):
    with pytest.raises(ValueError, match=said):
        fit_style(str(student), images, name, tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "option, value",
    [("learning_rate", float("inf")), ("seed", -1), ("steps", 0), ("prompt_dropout", 1.0), ("resolution", -8)],
)
def test_options_out_of_range_are_told_before_the_model_is_opened(images, tmp_path, option, value):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} must"):
        fit_style("no model", images, "mine", tmp_path / "a.safetensors", **{option: value})


def test_a_place_that_cannot_be_written_is_told_before_the_model_is_opened(images, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: .*file is a file"):
        fit_style("no model", images, "mine", tmp_path / "file" / "a.safetensors")
