"""`dmm-jax average` on the command line: its outputs, its errors, and no half-written files."""

import hashlib
import json

import numpy as np
import pytest

from dmm_jax.checkpoints import naming, provenance, published
from dmm_jax.checkpoints.average import networks_of
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.merge_methods import METHODS, parse_method
from dmm_jax.checkpoints.modelspec import RECIPE_KEY
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.verbs import main as cli


def run(tiny, out, *options):
    paths = tiny[0]
    teachers = ["--teachers", str(paths["left"]), str(paths["right"])]
    return cli.main(["average", str(out), "--base", str(paths["base"]), *teachers, *map(str, options)])


def failing(capsys, *argv) -> str:
    assert run(*argv) == 1
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    return stderr


@pytest.mark.parametrize("out", ["model.safetensors", "folder"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_both_formats_and_reports_its_networks(capsys, tiny, tmp_path, method, out):
    assert run(tiny, tmp_path / out, "--method", method, "--dtype", "float32") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / out)
    assert printed.err.splitlines() == [
        "Reading the base and 2 checkpoints",
        f"unet: {method} of left, right", f"text_encoder: {method} of left (the base's: it has none), right",
        "vae, tokenizer: the base's, base",
    ]  # fmt: skip
    written, base = open_checkpoint(tmp_path / out), open_checkpoint(tiny[0]["base"])
    same = {name: written.digest(name) == base.digest(name) for name in ("unet", "vae", "text_encoder")}
    assert same == {"unet": False, "vae": True, "text_encoder": False} and written.styles is None
    assert [path.name for path in tmp_path.iterdir()] == [out]


def test_the_average_is_the_mean_of_the_teachers_rounded_once(tiny, tmp_path):
    assert run(tiny, tmp_path / "x.safetensors", "--method", "average", "--weights", 1, 3) == 0
    averaged = open_checkpoint(tmp_path / "x.safetensors").tensors("unet")
    left, right = (open_checkpoint(tiny[0][name]).tensors("unet") for name in ("left", "right"))
    for key in averaged:
        np.testing.assert_allclose(averaged[key], (0.25 * left[key] + 0.75 * right[key]), rtol=6e-4, atol=1e-7)
        assert averaged[key].dtype == np.float16


@pytest.mark.parametrize("merged", ["unet", "text_encoder", "unet,text_encoder"])
def test_components_are_the_mean_and_the_rest_is_the_bases(tiny, tmp_path, merged):
    out = tmp_path / "x.safetensors"
    assert run(tiny, out, "--method", "average", "--dtype", "float32", "--components", merged) == 0
    base, right = open_checkpoint(tiny[0]["base"]), open_checkpoint(tiny[0]["right"])
    left = open_checkpoint(tiny[0]["left"], base=tiny[0]["base"])  # It has no text encoder.
    for name in ("unet", "text_encoder"):
        opened = (open_checkpoint(out), left, right, base)
        averaged, *tensors = (naming.to_torch(checkpoint.params(name)) for checkpoint in opened)
        for key, tensor in averaged.items():
            mean = (tensors[0][key] + tensors[1][key]) / 2 if name in merged.split(",") else tensors[2][key]
            np.testing.assert_allclose(tensor, mean, rtol=1e-6, atol=1e-7)


def test_unet_and_text_encoders_are_merged_by_default(tiny):
    base = open_checkpoint(tiny[0]["base"])
    assert networks_of(base) == ("unet", "text_encoder")
    assert networks_of(open_checkpoint(tiny[0]["left"])) == ("unet",)
    assert networks_of(published.checkpoint("sdxl")) == ("unet", "text_encoder", "text_encoder_2")
    with pytest.raises(ValueError, match="--components takes unet, text_encoder; got vae"):
        networks_of(base, ["unet", "vae"])


def test_the_metadata_hold_the_method_and_the_parents(tiny, tmp_path):
    options = ("--method", "dare", "--weights", 1, 3, "--density", 0.5, "--seed", 7)
    assert run(tiny, tmp_path / "x.safetensors", *options) == 0
    metadata = TensorFile(tmp_path / "x.safetensors").metadata
    opened = {name: open_checkpoint(path) for name, path in tiny[0].items()}
    records = {name: provenance.record(checkpoint) for name, checkpoint in opened.items()}
    (file,) = records["left"]["files"]
    assert file["sha256"] == hashlib.sha256(tiny[0]["left"].read_bytes()).hexdigest()
    assert json.loads(metadata[RECIPE_KEY]) == {
        "method": "dare", "scale": 0.4, "density": 0.5, "seed": 7, "networks": ["unet", "text_encoder"],
        "base": records["base"], "teachers": [records["left"] | {"weight": 1.0}, records["right"] | {"weight": 3.0}],
    }  # fmt: skip
    assert metadata["modelspec.merged_from"] == "left, right" and metadata["modelspec.title"] == "dare of left, right"


def test_a_teacher_that_does_not_fit_is_refused_with_the_shapes(capsys, tiny, tmp_path):
    tensors = {key: np.array(array) for key, array in TensorFile(tiny[0]["left"]).items()}
    (narrowed,) = (key for key in tensors if key.endswith("transformer_blocks.0.attn2.to_k.weight"))
    tensors = {
        key: np.zeros((*array.shape[:1], 32), np.float32)
        if "attn2.to_" in key and key.endswith(("_k.weight", "_v.weight"))
        else array
        for key, array in tensors.items()
    }
    assert narrowed in tensors
    save(tmp_path / "narrow.safetensors", tensors)
    error = failing(
        capsys, ({**tiny[0], "left": tmp_path / "narrow.safetensors"},), tmp_path / "out", "--method", "ties"
    )
    assert "teacher '1'" in error and "cannot be merged" in error and "(64, 64)" in error and "(64, 32)" in error
    assert not (tmp_path / "out").exists()


def test_an_existing_output_is_left_alone(capsys, tiny, tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")
    assert "nothing is overwritten" in failing(capsys, tiny, tmp_path / "x.safetensors", "--method", "average")
    assert "not empty" in failing(capsys, tiny, tmp_path, "--method", "average")
    assert "there is no folder" in failing(capsys, tiny, tmp_path / "no" / "x.safetensors", "--method", "average")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("out", ["x.safetensors", "folder"])
def test_damage_in_a_teachers_last_tensor_leaves_no_output(capsys, tiny, tmp_path, out):
    tensors = {key: np.array(array) for key, array in TensorFile(tiny[0]["left"]).items()}
    tensors["model.diffusion_model.time_embed.2.weight"].flat[0] = np.inf
    save(tmp_path / "bad.safetensors", tensors)
    (tmp_path / "out").mkdir()
    error = failing(
        capsys, ({**tiny[0], "left": tmp_path / "bad.safetensors"},), tmp_path / "out" / out, "--method", "average"
    )
    assert "bad.safetensors: NaN or infinity in time_embedding.linear_2.weight" in error
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name, count, options, message",
    [
        ("soup", 2, {}, "There are: average, task_arithmetic, ties, dare"),
        ("average", 2, {"scale": 0.5}, "average does not take scale; it takes weights alone"),
        ("ties", 2, {"seed": 1}, "ties does not take seed; it takes scale, density"),
        ("ties", 2, {"density": 0.0}, "density must be above 0"),
        ("dare", 2, {"density": 1.5}, "density must be above 0"),
        ("dare", 2, {"scale": float("nan")}, "scale must be finite"),
        ("average", 2, {"weights": [1.0]}, "2 teachers, 1 weights"),
        ("average", 0, {}, "0 teachers"),
        ("average", 2, {"weights": [0.0, 0.0]}, "nor all 0"),
        ("ties", 2, {"weights": [1.0, -1.0]}, "must not be negative"),
        ("task_arithmetic", 1, {"weights": [float("inf")]}, "weights must be finite"),
    ],
)
def test_senseless_numbers_are_refused(name, count, options, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name, count, **options)


def test_methods_have_their_own_defaults_and_allow_negative_weights():
    assert parse_method("ties", 3).density == 0.2 and parse_method("ties", 3).weights == (1.0, 1.0, 1.0)
    assert parse_method("task_arithmetic", 2, [1.0, -1.0]).weights == (1.0, -1.0)
