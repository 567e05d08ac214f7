"""The report says what is in a checkpoint, names all that is wrong with it, and does so without a crash."""

import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints import export
from dmm_jax.checkpoints import inspect as module
from dmm_jax.checkpoints.inspect import family, inspect, render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.safetensors_io import TensorFile, save
from dmm_jax.cli import main

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def copy(folder, tmp_path):
    """Returns a function that copies the stock folder under a name, to be changed."""
    return lambda name: shutil.copytree(folder, tmp_path / name)


@pytest.fixture
def single_file(folder, recipe, tmp_path):
    return export.write_single_file(tmp_path / "tiny.safetensors", open_checkpoint(folder), "float16", recipe)


def edit(path, change, metadata=None):
    """Writes a safetensors file again, its tensors changed."""
    file = TensorFile(path)
    tensors = {key: np.array(array) for key, array in file.items()}
    change(tensors)
    save(path, tensors, metadata or dict(file.metadata))


def edit_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def only(report):
    assert json.loads(json.dumps(report)) == report
    (found,) = report["checkpoints"]
    return found


def test_a_folder_is_described_network_by_network(folder, stock):
    report = inspect([folder])
    found = only(report)
    assert report["mergeable"] and report["obstacles"] == [] and found["damage"] == []
    assert found["kind"] == "diffusers" and found["prediction_type"] == "epsilon" and found["tokenizer"]
    assert found["architecture"] == "UNet of block_out_channels [32, 64]" and found["hash"] is None
    for name, held in found["components"].items():
        parameters = list(getattr(stock, name).parameters())
        assert held["parameters"] == sum(parameter.numel() for parameter in parameters)
        assert held["tensors"] == len(parameters) and held["dtypes"] == {"float32": len(parameters)}
        assert held["digest"] == open_checkpoint(folder).digest(name)
    for file in found["files"]:
        raw = (folder / file["file"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert len(found["files"]) == 3


def test_a_single_file_is_described_with_the_hash_that_hubs_show(single_file, folder):
    edit(single_file, lambda tensors: tensors.update({
        "model_ema.decay": np.zeros((), np.float32), "model_ema.num_updates": np.zeros((), np.int32),
        "alphas_cumprod": np.zeros(1000, np.float32),
    }))  # fmt: skip
    found = only(inspect([single_file]))
    assert found["hash"] == hashlib.sha256(single_file.read_bytes()).hexdigest()[:10]
    assert (found["ema_tensors"], found["unused_tensors"]) == (2, 1)
    assert found["kind"] == "single-file" and not found["tokenizer"] and found["damage"] == []
    counts = {name: held["parameters"] for name, held in found["components"].items()}
    assert counts == {name: held["parameters"] for name, held in only(inspect([folder]))["components"].items()}


def test_a_large_file_is_read_in_pieces_unless_all_is_asked_for(single_file, monkeypatch):
    monkeypatch.setattr(module, "WHOLE_BYTES", single_file.stat().st_size - 1)
    monkeypatch.setattr(module, "PIECE_BYTES", 64)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    whole = only(inspect([single_file], deep=True))
    sampled = inspect([single_file])
    assert whole["read"] == "all" and whole["hash"] and only(sampled)["read"] == "sample"
    assert only(sampled)["hash"] is None and only(sampled)["files"][0]["sha256"] is None
    assert "--deep" in render(sampled) and "as far as it was read" in render(sampled)
    for name, held in only(sampled)["components"].items():
        assert held == whole["components"][name] | {"digest": None}
    for place, seen in ((0, True), (-1, True), (100, False)):
        edit(single_file, lambda tensors, place=place: tensors[key].reshape(-1).__setitem__(place, np.nan))
        assert inspect([single_file])["mergeable"] is not seen
        assert not inspect([single_file], deep=True)["mergeable"]
        edit(single_file, lambda tensors, place=place: tensors[key].reshape(-1).__setitem__(place, 0.0))


def test_the_published_sizes_are_called_by_their_names():
    widths = [320, 640, 1280, 1280]
    assert family({"block_out_channels": widths, "cross_attention_dim": 768}) == "Stable Diffusion 1"
    second = {"block_out_channels": widths, "cross_attention_dim": 1024, "use_linear_projection": True}
    assert family(second) == "Stable Diffusion 2"
    xl = {"block_out_channels": widths[:3], "cross_attention_dim": 2048, "addition_embed_type": "text_time"}
    assert family(xl) == "Stable Diffusion XL"
    assert family(xl | {"block_out_channels": [8]}) == "UNet of block_out_channels [8]"


def test_a_merged_model_lists_its_styles(student, recipe, tmp_path):
    out = export.write(tmp_path, "dmm", student, None, "bfloat16", recipe)
    report = inspect([out])
    assert only(report)["styles"] == list(student.styles) and report["mergeable"]
    assert "anime, photo, ink" in render(report)
    assert "merged model" in inspect([out, out])["obstacles"][0]


def test_equal_contents_have_equal_digests_wherever_they_lie(folder, recipe, tmp_path):
    source = open_checkpoint(folder)
    file = export.write_single_file(tmp_path / "x.safetensors", source, "float32", recipe)
    first, second = inspect([folder, file])["checkpoints"]
    assert {name: held["digest"] for name, held in first["components"].items()} == {
        name: held["digest"] for name, held in second["components"].items()
    }


def damage_of(path):
    report = inspect([path])
    found = only(report)["damage"]
    assert report["mergeable"] == (not any(damage["matters"] for damage in found))
    assert len(report["obstacles"]) == sum(damage["matters"] for damage in found)
    return {damage["kind"]: (damage["component"], damage["tensors"], damage["matters"]) for damage in found}


def test_all_damage_of_a_network_is_named_at_once(copy):
    def change(tensors):
        del tensors["conv_in.bias"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.bias"] = np.zeros(5, np.float32)
        tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
        tensors["conv_norm_out.bias"][0] = -np.inf

    path = copy("damaged")
    edit(path / UNET, change)
    assert damage_of(path) == {
        "missing": ("unet", ["conv_in.bias"], True),
        "unexpected": ("unet", ["extra.weight"], True),
        "misshapen": ("unet", ["conv_out.bias (expected (4,), found (5,))"], True),
        "not finite": ("unet", ["conv_in.weight", "conv_norm_out.bias"], True),
    }
    text = render(inspect([path]))
    assert "damaged: unet, missing conv_in.bias" in text and "damaged cannot be used:" in text


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_positions_damaged_by_merging_are_reported_as_harmless(single_file, dtype):
    edit(single_file, lambda tensors: tensors.update({POSITIONS: np.arange(77, dtype=np.float32).astype(dtype)[None]}))
    key = POSITIONS.removeprefix("cond_stage_model.transformer.")
    assert damage_of(single_file) == {"position_ids": ("text_encoder", [key], False)}
    assert "damaged, but harmless: text_encoder, position_ids" in render(inspect([single_file]))
    assert open_checkpoint(single_file).params("text_encoder")


def test_whole_positions_are_no_damage_and_wrong_ones_are(single_file):
    edit(single_file, lambda tensors: tensors.update({POSITIONS: np.arange(77)[None]}))
    assert damage_of(single_file) == {}
    edit(single_file, lambda tensors: tensors.update({POSITIONS: np.zeros((1, 77), np.int64)}))
    assert set(damage_of(single_file)) == {"position_ids"}


def test_a_config_that_nothing_can_be_built_from_is_an_obstacle(copy, folder):
    path = copy("odd")
    edit_json(path / "unet" / "config.json", act_fn="tanh")
    report = inspect([folder, path])
    assert [damage["kind"] for damage in report["checkpoints"][1]["damage"]] == ["config"]
    (obstacle,) = report["obstacles"]
    assert "act_fn" in obstacle and str(path) in obstacle and not report["mergeable"]


def test_what_cannot_be_opened_is_an_obstacle_beside_a_report_on_the_rest(folder, single_file, tmp_path):
    single_file.write_bytes(single_file.read_bytes()[:-1])
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02.")
    report = inspect([folder, single_file, pickle, tmp_path / "gone"])
    assert [bool(found["error"]) for found in report["checkpoints"]] == [False, True, True, True]
    for obstacle, said in zip(report["obstacles"], ("truncated", "weights_only=True", "no checkpoint"), strict=True):
        assert said in obstacle
    assert report["checkpoints"][1]["files"][0]["sha256"] == hashlib.sha256(single_file.read_bytes()).hexdigest()
    assert render(report).count("cannot be opened") == 3


def test_the_command_ends_in_1_for_a_single_broken_file(folder, single_file, capsys):
    assert main(["inspect", str(single_file)]) == 0
    assert "tiny.safetensors is sound." in capsys.readouterr().out
    single_file.write_bytes(single_file.read_bytes()[:-1])
    assert main(["inspect", "--json", str(single_file)]) == 1
    assert json.loads(capsys.readouterr().out)["mergeable"] is False
    assert main(["inspect", str(folder), str(single_file)]) == 1


def test_checkpoints_of_one_kind_can_be_merged_in_every_form(folder, single_file, copy):
    path = copy("teacher")
    edit(path / UNET, lambda tensors: tensors["conv_in.weight"].__imul__(2))
    report = inspect([folder, path, single_file])
    assert report["mergeable"] and report["obstacles"] == []
    assert "can be merged on tiny: teacher, tiny.safetensors." in render(report)


def test_the_text_is_one_table_with_aligned_columns(folder, single_file):
    lines = render(inspect([folder, single_file])).splitlines()
    table = lines[: lines.index("")]
    assert len(table) == 2 + 6
    starts = [i for i, symbol in enumerate(table[1]) if symbol == "-" and (i == 0 or table[1][i - 1] == " ")]
    for row in (table[0], *table[2:]):
        assert all(start == 0 or row[start - 2 : start].strip() == "" for start in starts)
    assert len({row.index("epsilon") for row in table if "epsilon" in row}) == 1


def test_names_from_a_file_cannot_drive_the_terminal(copy):
    path = copy("hostile")
    edit_json(path / "unet" / "config.json", block_out_channels="\x1b[31m")
    assert all(symbol.isprintable() or symbol == "\n" for symbol in render(inspect([path])))


def test_an_unsupported_model_is_described_and_refused(single_file):
    edit(single_file, lambda tensors: tensors.update({"edm_mean": np.zeros(4, np.float32)}))
    report = inspect([single_file])
    assert only(report)["components"]["unet"]["tensors"] and not report["mergeable"]
    assert "EDM" in report["obstacles"][0]
