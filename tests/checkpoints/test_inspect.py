"""The report says what is in a checkpoint, names all that is wrong with it, and does so without a crash."""

import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints import inspect as module
from dmm_jax.checkpoints import naming, write
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.inspect import family, inspect, render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.verbs.main import main
from tests import families

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def copy(folder, tmp_path):
    """Returns a function that copies the stock folder under a name, to be changed."""
    return lambda name: shutil.copytree(folder, tmp_path / name)


@pytest.fixture
def single_file(folder, recipe, tmp_path):
    return write.write_single_file(tmp_path / "tiny.safetensors", open_checkpoint(folder), "float16", recipe)


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
    monkeypatch.setattr(module, "HASHED_BYTES", single_file.stat().st_size)
    assert only(inspect([single_file]))["hash"] and only(inspect([single_file]))["read"] == "sample"
    monkeypatch.setattr(module, "HASHED_BYTES", single_file.stat().st_size - 1)
    assert (
        only(inspect([single_file], hashes=True))["hash"]
        and only(inspect([single_file], hashes=True))["read"] == "sample"
    )
    whole = only(inspect([single_file], deep=True))
    sampled = inspect([single_file])
    assert whole["read"] == "all" and whole["hash"] and only(sampled)["read"] == "sample"
    assert only(sampled)["hash"] is None and only(sampled)["files"][0]["sha256"] is None
    assert "--deep" in render(sampled) and "--hash" in render(sampled) and "as far as it was read" in render(sampled)
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
    out = write.write(tmp_path, "dmm", student, None, "bfloat16", recipe)
    report = inspect([out])
    assert only(report)["styles"] == list(student.styles) and report["mergeable"]
    assert "anime, photo, ink" in render(report)
    assert "merged model" in inspect([out, out])["obstacles"][0]


def test_equal_contents_have_equal_digests_wherever_they_lie(folder, recipe, tmp_path):
    source = open_checkpoint(folder)
    file = write.write_single_file(tmp_path / "x.safetensors", source, "float32", recipe)
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


def test_a_single_file_of_impossible_sizes_is_an_obstacle_beside_a_report_on_the_rest(folder, single_file):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    edit(single_file, lambda tensors: tensors.update({key: np.zeros((3, 32, 3, 3), np.float16)}))
    report = inspect([folder, single_file])
    assert any("cannot be built from its config" in line for line in report["obstacles"])
    assert report["checkpoints"][0]["damage"] == [] and not report["mergeable"]


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


def test_a_teachers_vae_is_never_used_so_its_damage_stands_in_nobodys_way(folder, single_file, copy):
    key = "first_stage_model.quant_conv.bias"
    edit(single_file, lambda tensors: tensors[key].__setitem__(0, np.nan))
    pickled = copy("pickled")
    (pickled / "vae" / "diffusion_pytorch_model.safetensors").rename(pickled / "vae" / "diffusion_pytorch_model.bin")
    odd = copy("odd")
    edit(odd / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("quant_conv.bias"))
    teachers = [single_file, pickled, odd]
    report = inspect([folder, *teachers])
    assert report["mergeable"] and report["obstacles"] == report["details"] == []
    damages = [damage for found in report["checkpoints"] for damage in found["damage"]]
    assert [damage["kind"] for damage in damages] == ["not finite", "unreadable", "missing"]
    assert all(damage["component"] == "vae" and not damage["matters"] for damage in damages)
    assert render(report).count("a teacher's VAE is never used") == 3
    for path in teachers:
        assert not inspect([path])["mergeable"] and not inspect([path, folder])["mergeable"]


def test_what_a_teacher_takes_from_the_base_is_said(folder, single_file):
    edit(single_file, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("cond_stage")])
    report = inspect([folder, single_file])
    assert [found["loans"] for found in report["checkpoints"]] == [
        [], [f"{single_file} holds no text_encoder: the base's is used."]
    ]  # fmt: skip
    assert "holds no text_encoder: the base's is used" in render(report)


def test_the_details_of_an_obstacle_name_every_tensor(folder, copy):
    path = copy("wide")
    edit_json(path / "unet" / "config.json", cross_attention_dim=32)
    edit(path / UNET, lambda tensors: tensors.update(
        {key: array[:, :32].copy() for key, array in tensors.items() if ".attn2.to_k." in key or ".attn2.to_v." in key}
    ))  # fmt: skip
    report = inspect([folder, path])
    (obstacle,), (detail,) = report["obstacles"], report["details"]
    assert (detail["path"], detail["component"]) == (str(path), "unet")
    assert f"{len(detail['tensors'])} unet tensors" in obstacle and len(detail["tensors"]) > 5
    assert sum(line in obstacle for line in detail["tensors"]) == 5
    edit(path / UNET, lambda tensors: tensors["conv_in.bias"].__setitem__(0, np.inf))
    detail = inspect([path])["details"][0]
    assert (detail["component"], detail["tensors"]) == ("unet", ["conv_in.bias"])


def test_what_nobody_says_can_be_told_to_the_commands(single_file, tmp_path, capsys):
    def squeeze(tensors):  # Dense projections make a Stable Diffusion 2, which looks the same either way.
        for key, array in tensors.items():
            if key.startswith("model.diffusion_model.") and ".proj_" in key and array.ndim == 4:
                tensors[key] = array[:, :, 0, 0]

    edit(single_file, squeeze, {"format": "pt"})
    paths = [str(single_file)] * 2
    assert main(["inspect", *paths]) == 1 and "--prediction-type" in capsys.readouterr().out
    told = ["--prediction-type", "v_prediction"]
    main(["inspect", "--json", *paths, *told])
    report = json.loads(capsys.readouterr().out)
    assert {found["prediction_type"] for found in report["checkpoints"]} == {"v_prediction"}
    assert not any("does not say" in line for line in report["obstacles"])
    merge = ["average", str(tmp_path / "out.safetensors"), "--base", paths[0], "--teachers", paths[1]]
    merge += ["--method", "average"]
    assert main(merge) == 1 and "holds no tokenizer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return families.write_stock(tmp_path_factory.mktemp("xl") / "xl", "sdxl", 0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_damage_behind_the_layer_that_xl_uses_is_harmless_and_reads_as_0(xl, tmp_path, dtype):
    path = shutil.copytree(xl, tmp_path / "copy")
    spare = ["encoder.layers.2.mlp.fc1.weight", "final_layer_norm.bias"]

    def damage(tensors, keys=spare):
        for key in keys:
            key = next(name for name in tensors if name.endswith(key))  # One encoder's begin with `text_model.`.
            tensors[key] = tensors[key].astype(dtype)
            tensors[key].reshape(-1)[1] = np.nan

    sound = open_checkpoint(path).tensors("text_encoder")
    edit(path / TEXT, damage)
    assert damage_of(path) == {"spare": ("text_encoder", spare, False)}
    found = open_checkpoint(path)
    with pytest.warns(UserWarning, match="conditions nothing, reads as 0"):
        params = found.params("text_encoder")
    mended = {key.removeprefix("text_model."): array for key, array in naming.to_torch(params).items()}
    for key in spare:
        expected = np.array(sound[key].astype(dtype))
        expected.reshape(-1)[1] = 0
        assert mended[key].dtype == dtype and np.array_equal(mended[key], expected)
    used = "encoder.layers.1.mlp.fc1.weight"
    edit(path / TEXT, lambda tensors: damage(tensors, [used]))
    assert damage_of(path)["not finite"] == ("text_encoder", [used], True)
    second = path / "text_encoder_2" / "model.safetensors"
    shutil.copyfile(xl / TEXT, path / TEXT)
    edit(second, lambda tensors: damage(tensors, spare[1:]))
    component, (key,), matters = damage_of(path)["not finite"]
    assert (component, matters) == ("text_encoder_2", True) and key.endswith(spare[1])
