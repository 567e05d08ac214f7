"""`dmm-jax average` as a user meets it: what is written, what is refused, nothing half-written."""

import hashlib
import json

import numpy as np
import pytest

from dmm_jax.checkpoints import naming, provenance, published
from dmm_jax.checkpoints.average import networks_of, parse_method
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.merge import METHODS
from dmm_jax.checkpoints.modelspec import RECIPE_KEY
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.verbs import main as cli


def run(tiny, out, *more):
    paths = tiny[0]
    teachers = ["--teachers", str(paths["left"]), str(paths["right"])]
    return cli.main(["average", str(out), "--base", str(paths["base"]), *teachers, *map(str, more)])


def failing(capsys, *argv) -> str:
    assert run(*argv) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("out", ["model.safetensors", "folder"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_file_and_a_folder_and_says_whose_its_networks_are(capsys, tiny, tmp_path, method, out):
    assert run(tiny, tmp_path / out, "--method", method, "--dtype", "float32") == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / out)
    assert said.err.splitlines() == [
        f"unet: {method} of left, right", f"text_encoder: {method} of left (the base's: it has none), right",
        "vae, tokenizer: the base's, base",
    ]  # fmt: skip
    found, base = open_checkpoint(tmp_path / out), open_checkpoint(tiny[0]["base"])
    same = {name: found.digest(name) == base.digest(name) for name in ("unet", "vae", "text_encoder")}
    assert same == {"unet": False, "vae": True, "text_encoder": False} and found.styles is None
    assert [path.name for path in tmp_path.iterdir()] == [out]


def test_the_average_is_rounded_once_from_the_mean_of_the_teachers(tiny, tmp_path):
    assert run(tiny, tmp_path / "x.safetensors", "--method", "average", "--weights", 1, 3) == 0
    found = open_checkpoint(tmp_path / "x.safetensors").tensors("unet")
    left, right = (open_checkpoint(tiny[0][name]).tensors("unet") for name in ("left", "right"))
    for key in found:
        np.testing.assert_allclose(found[key], (0.25 * left[key] + 0.75 * right[key]), rtol=6e-4, atol=1e-7)
        assert found[key].dtype == np.float16


@pytest.mark.parametrize("merged", ["unet", "text_encoder", "unet,text_encoder"])
def test_what_is_merged_is_the_mean_and_all_else_the_bases(tiny, tmp_path, merged):
    out = tmp_path / "x.safetensors"
    assert run(tiny, out, "--method", "average", "--dtype", "float32", "--components", merged) == 0
    base, right = open_checkpoint(tiny[0]["base"]), open_checkpoint(tiny[0]["right"])
    left = open_checkpoint(tiny[0]["left"], base=tiny[0]["base"])  # It has no text encoder.
    for name in ("unet", "text_encoder"):
        found, *others = (naming.to_torch(one.params(name)) for one in (open_checkpoint(out), left, right, base))
        for key, tensor in found.items():
            mean = (others[0][key] + others[1][key]) / 2 if name in merged.split(",") else others[2][key]
            np.testing.assert_allclose(tensor, mean, rtol=1e-6, atol=1e-7)


def test_what_a_report_compares_with_is_what_is_written_by_default(tiny):
    base = open_checkpoint(tiny[0]["base"])
    assert networks_of(base) == ("unet", "text_encoder")
    assert networks_of(open_checkpoint(tiny[0]["left"])) == ("unet",)
    assert networks_of(published.checkpoint("sdxl")) == ("unet", "text_encoder", "text_encoder_2")
    with pytest.raises(ValueError, match="--components takes unet, text_encoder; got vae"):
        networks_of(base, ["unet", "vae"])


def test_the_file_says_how_it_was_made_and_from_which_parents(tiny, tmp_path):
    options = ("--method", "dare", "--weights", 1, 3, "--density", 0.5, "--seed", 7)
    assert run(tiny, tmp_path / "x.safetensors", *options) == 0
    said = TensorFile(tmp_path / "x.safetensors").metadata
    opened = {name: open_checkpoint(path) for name, path in tiny[0].items()}
    hashes = {name: provenance.record(one) for name, one in opened.items()}
    (file,) = hashes["left"]["files"]
    assert file["sha256"] == hashlib.sha256(tiny[0]["left"].read_bytes()).hexdigest()
    assert json.loads(said[RECIPE_KEY]) == {
        "method": "dare", "scale": 0.4, "density": 0.5, "seed": 7, "networks": ["unet", "text_encoder"],
        "base": hashes["base"], "teachers": [hashes["left"] | {"weight": 1.0}, hashes["right"] | {"weight": 3.0}],
    }  # fmt: skip
    assert said["modelspec.merged_from"] == "left, right" and said["modelspec.title"] == "dare of left, right"


def test_a_teacher_that_does_not_fit_is_refused_by_what_differs(capsys, tiny, tmp_path):
    tensors = {key: np.array(array) for key, array in TensorFile(tiny[0]["left"]).items()}
    (wide,) = (key for key in tensors if key.endswith("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"))
    paths = {name: path for name, path in tiny[0].items()}
    tensors = {
        key: np.zeros((*array.shape[:1], 32), np.float32)
        if "attn2.to_" in key and key.endswith(("_k.weight", "_v.weight"))
        else array
        for key, array in tensors.items()
    }
    assert wide in tensors
    save(tmp_path / "wide.safetensors", tensors)
    said = failing(capsys, ({**paths, "left": tmp_path / "wide.safetensors"},), tmp_path / "out", "--method", "ties")
    assert "teacher '1'" in said and "cannot be merged" in said and "(64, 64)" in said and "(64, 32)" in said
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_there_is_left_alone(capsys, tiny, tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")
    assert "nothing is overwritten" in failing(capsys, tiny, tmp_path / "x.safetensors", "--method", "average")
    assert "not empty" in failing(capsys, tiny, tmp_path, "--method", "average")
    assert "there is no folder" in failing(capsys, tiny, tmp_path / "no" / "x.safetensors", "--method", "average")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("out", ["x.safetensors", "folder"])
def test_a_teacher_that_is_damaged_in_its_last_tensor_leaves_nothing(capsys, tiny, tmp_path, out):
    tensors = {key: np.array(array) for key, array in TensorFile(tiny[0]["left"]).items()}
    tensors["model.diffusion_model.time_embed.2.weight"].flat[0] = np.inf
    save(tmp_path / "bad.safetensors", tensors)
    (tmp_path / "out").mkdir()
    said = failing(
        capsys, ({**tiny[0], "left": tmp_path / "bad.safetensors"},), tmp_path / "out" / out, "--method", "average"
    )
    assert "bad.safetensors: NaN or infinity in time_embedding.linear_2.weight" in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "name, count, options, said",
    [
        ("soup", 2, {}, "there are: average, task_arithmetic, ties, dare"),
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
def test_numbers_that_make_no_sense_are_refused(name, count, options, said):
    with pytest.raises(ValueError, match=said):
        parse_method(name, count, **options)


def test_defaults_are_the_methods_own_and_negative_weights_subtract_a_task():
    assert parse_method("ties", 3).density == 0.2 and parse_method("ties", 3).weights == (1.0, 1.0, 1.0)
    assert parse_method("task_arithmetic", 2, [1.0, -1.0]).weights == (1.0, -1.0)
