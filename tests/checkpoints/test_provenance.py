"""A run records its parents by the hashes that hubs show; afterwards an export opens none of its teachers."""

import collections
import hashlib
import json
import pathlib
import shutil

import pytest

from dmm_jax.checkpoints import export, provenance
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.modelspec import MERGED_FROM, RECIPE_KEY
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config.serialization import load_config

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


def test_a_run_records_the_names_and_hashes_of_its_parents(tiny, trained):
    parents = json.loads((trained / provenance.PARENTS_FILE).read_text())
    assert set(parents) == {"base", "left", "right"}
    (teacher,), (base,) = parents["left"]["files"], parents["base"]["files"]
    digest = sha256(tiny[0]["left"])
    assert teacher == {"file": "left.safetensors", "sha256": digest, "autov2": digest[:10]}
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
    metadata = TensorFile(out).metadata
    parents = json.loads((workdir / provenance.PARENTS_FILE).read_text())
    assert json.loads(metadata[RECIPE_KEY])["parents"] == parents and metadata[MERGED_FROM] == "base, left, right"


def test_the_recipe_names_teachers_whose_styles_are_left_out(trained, tmp_path):
    (folder,) = export.export(trained, tmp_path / "out", ["dmm"], keep=["left=right"])
    metadata = TensorFile(folder / "unet" / "diffusion_pytorch_model.safetensors").metadata
    assert metadata[MERGED_FROM] == "base, left, right"
    assert set(json.loads(metadata[RECIPE_KEY])["parents"]) == {"base", "left", "right"}
    card = (folder / "README.md").read_text()
    assert "| left | right | " in card and "| right |" not in card.replace("| left | right |", "")


def test_a_dmm_folder_is_read_once_and_passes_its_recipe_on(trained, tmp_path, monkeypatch):
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
    metadata, before = TensorFile(out).metadata, TensorFile(weights).metadata
    recipe = json.loads(metadata[RECIPE_KEY])
    assert recipe["from"]["files"][0]["sha256"] == sha256(weights)
    assert recipe["recipe"] == json.loads(before[RECIPE_KEY]) and metadata[MERGED_FROM] == before[MERGED_FROM]


@pytest.mark.parametrize("text", ["", '{"base": {"fi'])
def test_without_a_sound_parents_file_the_parents_are_opened(moved, tmp_path, text):
    workdir, gone = moved
    expected = provenance.parents_of_workdir(workdir)
    (workdir / provenance.PARENTS_FILE).write_text(text)
    assert provenance.parents_of_workdir(workdir) == expected == provenance.parents_of_config(load_config(workdir))
    gone.unlink()
    with pytest.raises(CheckpointError, match=r"left cannot be read: there is no checkpoint .*--no-recipe"):
        export.export(workdir, tmp_path / "out", **OPTIONS)
    (out,) = export.export(workdir, tmp_path / "out", recipe=False, **OPTIONS)
    metadata = TensorFile(out).metadata
    assert RECIPE_KEY not in metadata and metadata["modelspec.license"] == "unknown"


def test_loras_are_parents_too(tiny, tmp_path):
    base, lora = tiny[0]["base"], tmp_path / "ink.safetensors"
    key = next(key for key in open_checkpoint(base).shapes("unet") if key.endswith("attn1.to_q.weight"))
    out, into = open_checkpoint(base).shapes("unet")[key]
    factor = open_checkpoint(base).tensors("unet")[key]
    layer = f"unet.{key.removesuffix('.weight')}"
    save(lora, {f"{layer}.lora_A.weight": factor[:1, :into], f"{layer}.lora_B.weight": factor[:out, :1]})
    record = provenance.record(open_checkpoint(f"{base} + {lora}*0.8"))
    assert record["files"] == provenance.record(open_checkpoint(base))["files"]
    digest = sha256(lora)
    assert record["loras"] == [{"file": "ink.safetensors", "sha256": digest, "autov2": digest[:10], "weight": 0.8}]


def test_the_path_in_the_hubs_cache_shows_the_hubs_name(tiny, tmp_path):
    folder = tmp_path / "hub" / "models--some-one--tiny.v2" / "snapshots" / "0123abcd"
    shutil.copytree(tiny[0]["base"], folder)
    assert provenance.record(open_checkpoint(folder), hashed=False)["hub"] == "some-one/tiny.v2"
    assert provenance.hub_of(folder / "ink.safetensors") == {"hub": "some-one/tiny.v2"}
    assert "hub" not in provenance.record(open_checkpoint(tiny[0]["base"]), hashed=False)


def test_an_error_while_recording_is_printed_and_stops_no_run(tiny, tmp_path, capsys):
    with provenance.record_parents(tmp_path / "nowhere", tiny[1]):
        pass
    assert "parents.json was not written" in capsys.readouterr().err
