"""A run tells once what its student comes from, by the hashes that hubs know; an export needs no parent after that."""

import collections
import hashlib
import json
import pathlib
import shutil

import pytest

from dmm_jax.checkpoints import export, parents, provenance
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.modelspec import MERGED_FROM, RECIPE_KEY
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import options as config_lib

OPTIONS = {"formats": ["single-file"], "style": "left"}


def sha256(path):
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


@pytest.fixture
def moved(tiny, trained, tmp_path):
    """A copy of the tiny run, and its left teacher at another place."""
    workdir, gone = tmp_path / "run", tmp_path / "left.safetensors"
    shutil.copytree(trained, workdir)
    shutil.copy(tiny[0]["left"], gone)
    config = json.loads((workdir / "config.json").read_text())
    config["teachers"] = [[name, str(gone) if name == "left" else path] for name, path in config["teachers"]]
    (workdir / "config.json").write_text(json.dumps(config))
    return workdir, gone


def test_a_run_keeps_its_parents_names_and_the_hashes_of_the_files_that_hubs_hold(tiny, trained):
    found = json.loads((trained / parents.NAME).read_text())
    assert set(found) == {"base", "left", "right"}
    (left,), (base,) = found["left"]["files"], found["base"]["files"]
    assert left == {"file": "left.safetensors", "sha256": sha256(tiny[0]["left"]), "autov2": left["sha256"][:10]}
    assert base["file"] == "unet/diffusion_pytorch_model.safetensors"
    assert base["sha256"] == sha256(tiny[0]["base"] / base["file"])


def test_an_export_opens_no_teacher_and_reads_no_tensor_twice(moved, tmp_path, monkeypatch):
    workdir, gone = moved
    gone.unlink()
    reads, read = collections.Counter(), TensorFile.__getitem__

    def counted(file, key):
        reads[file.path, key] += 1
        return read(file, key)

    monkeypatch.setattr(TensorFile, "__getitem__", counted)
    (out,) = export.export(workdir, tmp_path / "out", **OPTIONS)
    assert max(reads.values()) == 1 and {path.parent.name for path, _ in reads} == {"vae", "text_encoder"}
    said = TensorFile(out).metadata
    told = json.loads((workdir / parents.NAME).read_text())
    assert json.loads(said[RECIPE_KEY])["parents"] == told and said[MERGED_FROM] == "base, left, right"


def test_a_style_that_is_left_out_was_a_teacher_all_the_same(trained, tmp_path):
    (folder,) = export.export(trained, tmp_path / "out", ["dmm"], keep=["left=right"])
    said = TensorFile(folder / "unet" / "diffusion_pytorch_model.safetensors").metadata
    assert said[MERGED_FROM] == "base, left, right" and set(json.loads(said[RECIPE_KEY])["parents"]) == set(
        said[MERGED_FROM].split(", ")
    )
    card = (folder / "README.md").read_text()
    assert "| left | right | " in card and "| right |" not in card.replace("| left | right |", "")


def test_a_dmm_folder_is_read_once_and_passes_on_what_it_was_told(trained, tmp_path, monkeypatch):
    (folder,) = export.export(trained, tmp_path / "one", ["dmm"])
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    reads, read = collections.Counter(), TensorFile.__getitem__

    def counted(file, key):
        reads[key] += file.path == weights
        return read(file, key)

    monkeypatch.setattr(TensorFile, "__getitem__", counted)
    (out,) = export.export(folder, tmp_path / "two", **OPTIONS)
    twice = [key for key, count in reads.items() if count > 1]
    assert set(reads) >= set(TensorFile(weights)) and twice in ([], ["add_embedding.linear_1.bias"])
    said, before = TensorFile(out).metadata, TensorFile(weights).metadata
    recipe = json.loads(said[RECIPE_KEY])
    assert recipe["from"]["files"][0]["sha256"] == sha256(weights)
    assert recipe["recipe"] == json.loads(before[RECIPE_KEY]) and said[MERGED_FROM] == before[MERGED_FROM]


@pytest.mark.parametrize("kept", ["", '{"base": {"fi'])
def test_a_run_that_kept_nothing_whole_is_told_by_its_parents(moved, tmp_path, kept):
    workdir, gone = moved
    expected = parents.of_workdir(workdir)
    (workdir / parents.NAME).write_text(kept)
    assert parents.of_workdir(workdir) == expected == parents.of_run(config_lib.load(workdir))
    gone.unlink()
    with pytest.raises(CheckpointError, match=r"left cannot be read: there is no checkpoint .*--no-recipe"):
        export.export(workdir, tmp_path / "out", **OPTIONS)
    (out,) = export.export(workdir, tmp_path / "out", recipe=False, **OPTIONS)
    said = TensorFile(out).metadata
    assert RECIPE_KEY not in said and said["modelspec.license"] == "unknown"


def test_loras_are_parents_too(tiny, tmp_path):
    base, lora = tiny[0]["base"], tmp_path / "ink.safetensors"
    key = next(key for key in open_checkpoint(base).shapes("unet") if key.endswith("attn1.to_q.weight"))
    out, into = open_checkpoint(base).shapes("unet")[key]
    factor = open_checkpoint(base).tensors("unet")[key]
    layer = f"unet.{key.removesuffix('.weight')}"
    save(lora, {f"{layer}.lora_A.weight": factor[:1, :into], f"{layer}.lora_B.weight": factor[:out, :1]})
    found = provenance.record(open_checkpoint(f"{base} + {lora}*0.8"))
    assert found["files"] == provenance.record(open_checkpoint(base))["files"]
    digest = sha256(lora)
    assert found["loras"] == [{"file": "ink.safetensors", "sha256": digest, "autov2": digest[:10], "weight": 0.8}]


def test_the_hubs_own_name_is_read_off_its_cache(tiny, tmp_path):
    folder = tmp_path / "hub" / "models--some-one--tiny.v2" / "snapshots" / "0123abcd"
    shutil.copytree(tiny[0]["base"], folder)
    assert provenance.record(open_checkpoint(folder), hashed=False)["hub"] == "some-one/tiny.v2"
    assert "hub" not in provenance.record(open_checkpoint(tiny[0]["base"]), hashed=False)


def test_what_goes_wrong_is_said_and_stops_no_run(tiny, tmp_path, capsys):
    with parents.being_kept(tmp_path / "nowhere", tiny[1]):
        pass
    assert "parents.json was not written" in capsys.readouterr().err
