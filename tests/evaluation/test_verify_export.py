"""`export --verify` passes exports that stock diffusers computes alike, and names those that differ."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation import verify_export
from dmm_jax.verbs import main as cli

pytest.importorskip("torch")
pytest.importorskip("diffusers")

EVERYTHING = ["--format", "dmm,diffusers,single-file", "--style", "left=0.5,right=0.5", "--dtype", "float32"]


@pytest.fixture(scope="module")
def trained(trained, tmp_path_factory):
    """The run, as if it drew its samples with a guidance rescale, which diffusers' pipelines leave at 0."""
    folder = tmp_path_factory.mktemp("rescaled") / "run"
    shutil.copytree(trained, folder)
    config = json.loads((folder / "config.json").read_text())
    config["sampling"]["guidance_rescale"] = 0.7
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("verified") / "export"
    return cli.main(["export", str(trained), str(out), *EVERYTHING, "--verify"]), out


def test_exports_are_verified(exported):
    code, out = exported
    assert code == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "diffusers", "dmm", "model.safetensors"]


def test_an_existing_folder_is_verified_as_a_whole(exported, trained, capsys):
    assert cli.main(["verify", str(exported[1]), "--against", str(trained)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines] == ["dmm", "model.safetensors", "diffusers"]


def test_folders_that_cannot_be_verified_are_refused(exported, tmp_path, capsys):
    (tmp_path / "alone.safetensors").write_bytes((exported[1] / "model.safetensors").read_bytes())
    shutil.copytree(exported[1] / "dmm", tmp_path / "only" / "dmm")
    for folder, message in (("nothing", "holds no export"), ("", "add diffusers to --format"), ("only", "--against")):
        assert cli.main(["verify", str(tmp_path / folder)]) == 1
        assert message in capsys.readouterr().err


def test_networks_that_differ_are_refused_with_their_distance(exported, monkeypatch):
    forward = verify_export._forward
    monkeypatch.setattr(verify_export, "_forward", lambda *args: forward(*args) * np.float32(1.0001))
    with pytest.raises(ValueError, match="UNet 1.0e-04"):
        verify_export.verify({"diffusers": exported[1] / "diffusers"})


def test_a_tensor_that_changed_in_the_file_is_named(exported, trained, tmp_path):
    source = exported[1] / "dmm"
    student = open_checkpoint(trained)
    verify_export.check_reads_back(student, source)
    changed = tmp_path / "dmm"
    for path in source.rglob("*"):
        target = changed / path.relative_to(source)
        target.mkdir(parents=True) if path.is_dir() else (
            target.parent.mkdir(parents=True, exist_ok=True), target.write_bytes(path.read_bytes())
        )  # fmt: skip
    weights = next(pathlib.Path(changed / "unet").glob("*.safetensors"))
    tensors = {key: np.array(TensorFile(weights)[key]) for key in TensorFile(weights)}
    tensors["conv_in.bias"][0] += 1.0
    weights.unlink()
    save(weights, tensors, {"format": "pt"})
    with pytest.raises(ValueError, match=r"conv_in\.bias"):
        verify_export.check_reads_back(student, changed)


def test_a_single_file_alone_cannot_be_verified(trained, tmp_path, capsys):
    arguments = ["export", str(trained), str(tmp_path / "x"), "--format", "single-file", "--style", "left", "--verify"]
    assert cli.main(arguments) == 1
    assert "add diffusers to --format" in capsys.readouterr().err and not (tmp_path / "x").exists()
