"""The report on a checkpoint lists its contents and all its damage, and no damage makes `inspect` fail."""

import hashlib
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints import inspect as module
from dmm_jax.checkpoints import naming, write
from dmm_jax.checkpoints.inspect import family, inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.verbs.main import main
from tests import families
from tests.checkpoints.files import rewrite, rewrite_json

UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"


@pytest.fixture
def copy_as(folder, tmp_path):
    """Returns a function that copies the stock folder to a new folder of the given name, which a test may change."""
    return lambda name: shutil.copytree(folder, tmp_path / name)


@pytest.fixture
def single_file(folder, recipe, tmp_path):
    return write.write_single_file(tmp_path / "tiny.safetensors", open_checkpoint(folder), "float16", recipe)


def only(report):
    assert json.loads(json.dumps(report)) == report
    (checkpoint,) = report["checkpoints"]
    return checkpoint


def values(field, entry):
    return {name: contents[field] for name, contents in entry["components"].items()}


def test_a_folder_is_described_network_by_network(folder, stock):
    report = inspect([folder])
    entry = only(report)
    assert report["mergeable"] and report["obstacles"] == [] and entry["damage"] == []
    assert entry["kind"] == "diffusers" and entry["prediction_type"] == "epsilon" and entry["tokenizer"]
    assert entry["architecture"] == "UNet of block_out_channels [32, 64]" and entry["hash"] is None
    for name, contents in entry["components"].items():
        parameters = list(getattr(stock, name).parameters())
        assert contents["parameters"] == sum(parameter.numel() for parameter in parameters)
        assert contents["tensors"] == len(parameters) and contents["dtypes"] == {"float32": len(parameters)}
        assert contents["digest"] == open_checkpoint(folder).digest(name)
    for file in entry["files"]:
        raw = (folder / file["file"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert len(entry["files"]) == 3


def test_a_single_file_is_described_with_its_autov2_hash(single_file, folder):
    rewrite(single_file, lambda tensors: tensors.update({
        "model_ema.decay": np.zeros((), np.float32), "model_ema.num_updates": np.zeros((), np.int32),
        "alphas_cumprod": np.zeros(1000, np.float32),
    }))  # fmt: skip
    entry = only(inspect([single_file]))
    assert entry["hash"] == hashlib.sha256(single_file.read_bytes()).hexdigest()[:10]
    assert (entry["ema_tensors"], entry["unused_tensors"]) == (2, 1)
    assert entry["kind"] == "single-file" and not entry["tokenizer"] and entry["damage"] == []
    assert values("parameters", entry) == values("parameters", only(inspect([folder])))


def test_a_large_file_is_read_in_pieces_except_with_deep(single_file, monkeypatch):
    monkeypatch.setattr(module, "COMPLETE_BYTES", single_file.stat().st_size - 1)
    monkeypatch.setattr(module, "PIECE_BYTES", 64)
    key = "model.diffusion_model.input_blocks.0.0.weight"
    monkeypatch.setattr(module, "HASHED_BYTES", single_file.stat().st_size)
    assert only(inspect([single_file]))["hash"] and only(inspect([single_file]))["read"] == "sample"
    monkeypatch.setattr(module, "HASHED_BYTES", single_file.stat().st_size - 1)
    hashed = only(inspect([single_file], hashes=True))
    assert hashed["hash"] and hashed["read"] == "sample"
    complete = only(inspect([single_file], deep=True))
    sampled = inspect([single_file])
    assert complete["read"] == "all" and complete["hash"] and only(sampled)["read"] == "sample"
    assert only(sampled)["hash"] is None and only(sampled)["files"][0]["sha256"] is None
    assert "--deep" in render(sampled) and "--hash" in render(sampled) and "as far as it was read" in render(sampled)
    for name, contents in only(sampled)["components"].items():
        assert contents == complete["components"][name] | {"digest": None}
    for place, is_sampled in ((0, True), (-1, True), (100, False)):
        rewrite(single_file, lambda tensors, place=place: tensors[key].reshape(-1).__setitem__(place, np.nan))
        assert inspect([single_file])["mergeable"] is not is_sampled
        assert not inspect([single_file], deep=True)["mergeable"]
        rewrite(single_file, lambda tensors, place=place: tensors[key].reshape(-1).__setitem__(place, 0.0))


def test_published_sizes_have_the_names_of_their_families():
    widths = [320, 640, 1280, 1280]
    assert family({"block_out_channels": widths, "cross_attention_dim": 768}) == "Stable Diffusion 1"
    second = {"block_out_channels": widths, "cross_attention_dim": 1024, "use_linear_projection": True}
    assert family(second) == "Stable Diffusion 2"
    xl = {"block_out_channels": widths[:3], "cross_attention_dim": 2048, "addition_embed_type": "text_time"}
    assert family(xl) == "Stable Diffusion XL"
    assert family(xl | {"block_out_channels": [8]}) == "UNet of block_out_channels [8]"


def test_a_merged_model_lists_its_styles(student, recipe, tmp_path):
    out = write.write_format(tmp_path, "dmm", student, None, "bfloat16", recipe)
    report = inspect([out])
    assert only(report)["styles"] == list(student.styles) and report["mergeable"]
    assert "anime, photo, ink" in render(report)
    assert "merged model" in inspect([out, out])["obstacles"][0]


def test_equal_contents_have_equal_digests_in_every_format(folder, recipe, tmp_path):
    source = open_checkpoint(folder)
    file = write.write_single_file(tmp_path / "x.safetensors", source, "float32", recipe)
    first, second = inspect([folder, file])["checkpoints"]
    assert values("digest", first) == values("digest", second)


def damage_of(path):
    report = inspect([path])
    damages = only(report)["damage"]
    assert report["mergeable"] == (not any(damage["matters"] for damage in damages))
    assert len(report["obstacles"]) == sum(damage["matters"] for damage in damages)
    return {damage["kind"]: (damage["component"], damage["tensors"], damage["matters"]) for damage in damages}


def test_all_damage_of_a_network_is_named_at_once(copy_as):
    def change(tensors):
        del tensors["conv_in.bias"]
        tensors["extra.weight"] = np.zeros(3, np.float32)
        tensors["conv_out.bias"] = np.zeros(5, np.float32)
        tensors["conv_in.weight"][0, 0, 0, 0] = np.nan
        tensors["conv_norm_out.bias"][0] = -np.inf

    path = copy_as("damaged")
    rewrite(path / UNET, change)
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
    rewrite(
        single_file, lambda tensors: tensors.update({POSITIONS: np.arange(77, dtype=np.float32).astype(dtype)[None]})
    )
    key = POSITIONS.removeprefix("cond_stage_model.transformer.")
    assert damage_of(single_file) == {"position_ids": ("text_encoder", [key], False)}
    assert "damaged, but harmless: text_encoder, position_ids" in render(inspect([single_file]))
    assert open_checkpoint(single_file).params("text_encoder")


def test_only_wrong_positions_are_damage(single_file):
    rewrite(single_file, lambda tensors: tensors.update({POSITIONS: np.arange(77)[None]}))
    assert damage_of(single_file) == {}
    rewrite(single_file, lambda tensors: tensors.update({POSITIONS: np.zeros((1, 77), np.int64)}))
    assert set(damage_of(single_file)) == {"position_ids"}


def test_a_config_that_builds_no_network_is_a_problem(copy_as, folder):
    path = copy_as("odd")
    rewrite_json(path / "unet" / "config.json", act_fn="tanh")
    report = inspect([folder, path])
    assert [damage["kind"] for damage in report["checkpoints"][1]["damage"]] == ["config"]
    (problem,) = report["obstacles"]
    assert "act_fn" in problem and str(path) in problem and not report["mergeable"]


def test_a_single_file_of_impossible_sizes_leaves_the_other_reports(folder, single_file):
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    rewrite(single_file, lambda tensors: tensors.update({key: np.zeros((3, 32, 3, 3), np.float16)}))
    report = inspect([folder, single_file])
    assert any("cannot be built from its config" in line for line in report["obstacles"])
    assert report["checkpoints"][0]["damage"] == [] and not report["mergeable"]


def test_a_file_that_cannot_be_opened_leaves_the_other_reports(folder, single_file, tmp_path):
    single_file.write_bytes(single_file.read_bytes()[:-1])
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x02.")
    report = inspect([folder, single_file, pickle, tmp_path / "gone"])
    assert [bool(entry["error"]) for entry in report["checkpoints"]] == [False, True, True, True]
    for problem, words in zip(report["obstacles"], ("truncated", "weights_only", "no checkpoint"), strict=True):
        assert words in problem
    assert report["checkpoints"][1]["files"][0]["sha256"] == hashlib.sha256(single_file.read_bytes()).hexdigest()
    assert render(report).count("cannot be opened") == 3


def test_the_command_returns_1_for_a_single_broken_file(folder, single_file, capsys):
    assert main(["inspect", str(single_file)]) == 0
    assert "tiny.safetensors is sound." in capsys.readouterr().out
    single_file.write_bytes(single_file.read_bytes()[:-1])
    assert main(["inspect", "--json", str(single_file)]) == 1
    assert json.loads(capsys.readouterr().out)["mergeable"] is False
    assert main(["inspect", str(folder), str(single_file)]) == 1


def test_checkpoints_of_one_architecture_merge_in_every_format(folder, single_file, copy_as):
    path = copy_as("teacher")
    rewrite(path / UNET, lambda tensors: tensors["conv_in.weight"].__imul__(2))
    report = inspect([folder, path, single_file])
    assert report["mergeable"] and report["obstacles"] == []
    assert "can be merged on tiny: teacher, tiny.safetensors." in render(report)


def test_the_text_is_one_table_with_aligned_columns(folder, single_file):
    lines = render(inspect([folder, single_file])).splitlines()
    table = lines[: lines.index("")]
    assert len(table) == 2 + 6 and table[0].endswith("weights hash")
    assert lines[len(table) + 1].startswith("weights hash: networks with equal weights have equal ones")
    starts = [i for i, symbol in enumerate(table[1]) if symbol == "-" and (i == 0 or table[1][i - 1] == " ")]
    for row in (table[0], *table[2:]):
        assert all(start == 0 or row[start - 2 : start].strip() == "" for start in starts)
    assert len({row.index("epsilon") for row in table if "epsilon" in row}) == 1


def test_names_from_a_file_cannot_control_the_terminal(copy_as):
    path = copy_as("hostile")
    rewrite_json(path / "unet" / "config.json", block_out_channels="\x1b[31m")
    assert all(symbol.isprintable() or symbol == "\n" for symbol in render(inspect([path])))


def test_an_unsupported_model_is_described_and_refused(single_file):
    rewrite(single_file, lambda tensors: tensors.update({"edm_mean": np.zeros(4, np.float32)}))
    report = inspect([single_file])
    assert only(report)["components"]["unet"]["tensors"] and not report["mergeable"]
    assert "EDM" in report["obstacles"][0]


def test_damage_of_a_teachers_vae_is_harmless(folder, single_file, copy_as):
    key = "first_stage_model.quant_conv.bias"
    rewrite(single_file, lambda tensors: tensors[key].__setitem__(0, np.nan))
    pickled = copy_as("pickled")
    (pickled / "vae" / "diffusion_pytorch_model.safetensors").rename(pickled / "vae" / "diffusion_pytorch_model.bin")
    odd = copy_as("odd")
    rewrite(odd / "vae" / "diffusion_pytorch_model.safetensors", lambda tensors: tensors.pop("quant_conv.bias"))
    teachers = [single_file, pickled, odd]
    report = inspect([folder, *teachers])
    assert report["mergeable"] and report["obstacles"] == report["details"] == []
    damages = [damage for entry in report["checkpoints"] for damage in entry["damage"]]
    assert [damage["kind"] for damage in damages] == ["not finite", "unreadable", "missing"]
    assert all(damage["component"] == "vae" and not damage["matters"] for damage in damages)
    assert render(report).count("a teacher's VAE is never used") == 3
    for path in teachers:
        assert not inspect([path])["mergeable"] and not inspect([path, folder])["mergeable"]


def test_the_report_lists_what_a_teacher_takes_from_the_base(folder, single_file):
    rewrite(single_file, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("cond_stage")])
    report = inspect([folder, single_file])
    assert [entry["loans"] for entry in report["checkpoints"]] == [
        [], [f"{single_file} holds no text_encoder: the base's is used."]
    ]  # fmt: skip
    assert "holds no text_encoder: the base's is used" in render(report)


def test_the_details_of_a_problem_name_every_tensor(folder, copy_as):
    path = copy_as("wide")
    rewrite_json(path / "unet" / "config.json", cross_attention_dim=32)
    rewrite(path / UNET, lambda tensors: tensors.update(
        {key: array[:, :32].copy() for key, array in tensors.items() if ".attn2.to_k." in key or ".attn2.to_v." in key}
    ))  # fmt: skip
    report = inspect([folder, path])
    (problem,), (detail,) = report["obstacles"], report["details"]
    assert (detail["path"], detail["component"]) == (str(path), "unet")
    assert f"{len(detail['tensors'])} unet tensors" in problem and len(detail["tensors"]) > 5
    assert sum(line in problem for line in detail["tensors"]) == 5
    rewrite(path / UNET, lambda tensors: tensors["conv_in.bias"].__setitem__(0, np.inf))
    detail = inspect([path])["details"][0]
    assert (detail["component"], detail["tensors"]) == ("unet", ["conv_in.bias"])


def test_the_commands_take_the_prediction_type_of_silent_files(single_file, tmp_path, capsys):
    def squeeze(tensors):  # Dense projections make a Stable Diffusion 2, which looks the same either way.
        for key, array in tensors.items():
            if key.startswith("model.diffusion_model.") and ".proj_" in key and array.ndim == 4:
                tensors[key] = array[:, :, 0, 0]

    rewrite(single_file, squeeze, {"format": "pt"})
    paths = [str(single_file)] * 2
    assert main(["inspect", *paths]) == 1 and "--prediction-type" in capsys.readouterr().out
    main(["inspect", "--json", *paths, "--prediction-type", "v_prediction"])
    report = json.loads(capsys.readouterr().out)
    assert {entry["prediction_type"] for entry in report["checkpoints"]} == {"v_prediction"}
    assert not any("does not say" in line for line in report["obstacles"])
    merge = ["average", str(tmp_path / "out.safetensors"), "--base", paths[0], "--teachers", paths[1]]
    merge += ["--method", "average"]
    assert main(merge) == 1 and "holds no tokenizer" in capsys.readouterr().err


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    return families.write_stock(tmp_path_factory.mktemp("xl") / "xl", "sdxl", 0)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_damage_after_the_layer_that_xl_uses_is_harmless_and_reads_0(xl, tmp_path, dtype):
    path = shutil.copytree(xl, tmp_path / "copy")
    unused = ["encoder.layers.2.mlp.fc1.weight", "final_layer_norm.bias"]

    def damage(tensors, keys=unused):
        for ending in keys:
            key = next(key for key in tensors if key.endswith(ending))  # Some keys begin with `text_model.`.
            tensors[key] = tensors[key].astype(dtype)
            tensors[key].reshape(-1)[1] = np.nan

    sound = open_checkpoint(path).tensors("text_encoder")
    rewrite(path / TEXT, damage)
    assert damage_of(path) == {"spare": ("text_encoder", unused, False)}
    damaged = open_checkpoint(path)
    with pytest.warns(UserWarning, match="conditions nothing, reads as 0"):
        params = damaged.params("text_encoder")
    zeroed = {key.removeprefix("text_model."): array for key, array in naming.to_torch(params).items()}
    for key in unused:
        expected = np.array(sound[key].astype(dtype))
        expected.reshape(-1)[1] = 0
        assert zeroed[key].dtype == dtype and np.array_equal(zeroed[key], expected)
    used = "encoder.layers.1.mlp.fc1.weight"
    rewrite(path / TEXT, lambda tensors: damage(tensors, [used]))
    assert damage_of(path)["not finite"] == ("text_encoder", [used], True)
    second = path / "text_encoder_2" / "model.safetensors"
    shutil.copyfile(xl / TEXT, path / TEXT)
    rewrite(second, lambda tensors: damage(tensors, unused[1:]))
    component, (key,), matters = damage_of(path)["not finite"]
    assert (component, matters) == ("text_encoder_2", True) and key.endswith(unused[1])


def test_the_meaning_of_no_prompt_is_read_and_written(xl, tmp_path):
    copy = shutil.copytree(xl, tmp_path / "copy")
    rewrite_json(copy / "model_index.json", force_zeros_for_empty_prompt=False)
    stock, other = open_checkpoint(xl), open_checkpoint(copy)
    for opened, zeros in ((stock, True), (other, False)):
        assert opened.zeros_for_no_prompt == opened.tokenizers().has_zeros == zeros
        assert write._model_index(opened, "X")["force_zeros_for_empty_prompt"] == zeros
    assert inspect([xl, copy])["checkpoints"][1]["loans"] == [
        f"{copy} and the base differ in force_zeros_for_empty_prompt: the base's is used."
    ]


def test_another_family_is_one_sentence(xl, folder):
    (problem,) = inspect([folder, xl])["obstacles"]
    assert "stable-diffusion-xl-v1-base, the base of stable-diffusion-v1" in problem and "tensors" not in problem


def test_control_sequences_do_not_reach_the_terminal(copy, capsys):
    rewrite_json(copy / "unet" / "config.json", act_fn="\x1b[31mred", **{"\x1b]0;x\x07": 1})
    assert main(["inspect", str(copy)]) == 1
    output = capsys.readouterr()
    assert "act_fn" in output.out and (output.out + output.err).replace("\n", "").isprintable()


def test_a_model_with_zero_terminal_snr_comes_with_advice(copy_as, folder):
    path = copy_as("zero")
    rewrite_json(path / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True)
    report = inspect([path])
    assert only(report)["advice"] and only(inspect([folder]))["advice"] == []
    assert "a guidance rescale of 0.7" in render(report)
