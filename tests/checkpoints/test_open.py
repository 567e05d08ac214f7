"""Folders and training runs open as their owners have them; what cannot be used is refused with its reason."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.checkpoints import write
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config.options import get_config
from dmm_jax.config.serialization import to_json
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from tests.checkpoints.files import COMPONENTS, assert_same_networks, rewrite, rewrite_json

UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"


UNET_INDEX = UNET_WEIGHTS + ".index.json"


def test_a_diffusers_folder_states_everything(folder):
    opened = open_checkpoint(folder)
    assert (opened.name, opened.kind, opened.architecture) == ("tiny", "diffusers", "stable-diffusion-v1")
    assert opened.prediction_type == "epsilon" and opened.scheduler_config["_class_name"] == "PNDMScheduler"
    assert opened.styles is None and opened.tokenizer_folder == folder / "tokenizer"
    assert [opened.has(component) for component in (*COMPONENTS, "controlnet")] == [True, True, True, False]
    assert opened.unet_config["block_out_channels"] == [32, 64] and opened.config("text_encoder")["hidden_size"] == 64
    assert {path.name for path in opened.files} == {UNET_WEIGHTS, "model.safetensors"}


def test_opening_reads_no_weights_and_params_are_views_of_the_file(folder):
    opened = open_checkpoint(folder)
    leaves = jax.tree.leaves(opened.params("unet"))
    assert all(not leaf.flags.owndata and not leaf.flags.writeable for leaf in leaves)
    cast = jax.tree.leaves(opened.params("unet", np.float16))
    assert {leaf.dtype for leaf in cast} == {np.dtype(np.float16)}


def split(unet, index=UNET_INDEX, first="part-1.safetensors", second="part-2.safetensors"):
    """Splits the weights in two files under an index; returns the index."""
    file = TensorFile(unet / UNET_WEIGHTS)
    weight_map = {}
    for name, keys in ((first, sorted(file)[::2]), (second, sorted(file)[1::2])):
        save(unet / name, {key: file[key] for key in keys}, {"format": "pt"})
        weight_map |= dict.fromkeys(keys, name)
    (unet / UNET_WEIGHTS).unlink()
    (unet / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize(
    "index", [UNET_INDEX, *(UNET_WEIGHTS + name for name in (".index.fp16.json", ".bf16.index.json"))]
)
def test_parts_under_an_index_are_one_network(copy, folder, index):
    split(copy / "unet", index)
    opened = open_checkpoint(copy)
    assert_same_networks(opened, open_checkpoint(folder))
    assert opened.digest("unet") == open_checkpoint(folder).digest("unet")


@pytest.mark.parametrize(
    "name", ["../part-1.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "..\\x", "C:x", "x\x1b.safetensors"]
)
def test_an_index_that_points_elsewhere_is_refused(copy, name):
    weight_map = split(copy / "unet")
    weight_map[min(weight_map)] = name
    (copy / "unet" / UNET_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="must be in its folder") as caught:
        open_checkpoint(copy)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}', "{", "[" * 100_000])
def test_a_malformed_index_is_refused(copy, index):
    split(copy / "unet")
    (copy / "unet" / UNET_INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=UNET_INDEX):
        open_checkpoint(copy)


def test_parts_that_do_not_fit_the_index_are_named(copy):
    weight_map = split(copy / "unet")
    index = copy / "unet" / UNET_INDEX
    key = min(weight_map)

    index.write_text(json.dumps({"weight_map": weight_map | {key: "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="no file .*gone.safetensors"):
        open_checkpoint(copy)
    index.write_text(json.dumps({"weight_map": weight_map | {key: "part.bin"}}))
    with pytest.raises(CheckpointError, match="weights_only"):
        open_checkpoint(copy)
    index.write_text(json.dumps({"weight_map": weight_map | {key: "part-2.safetensors"}}))
    with pytest.raises(CheckpointError, match=f"do not list the same tensors: {key}"):
        open_checkpoint(copy)


def test_a_tensor_in_two_parts_is_named(copy):
    weight_map = split(copy / "unet")
    key = min(weight_map)
    rewrite(copy / "unet" / "part-2.safetensors", lambda tensors: tensors.update({key: np.zeros(1, np.float32)}))
    with pytest.raises(CheckpointError, match=f"do not list the same tensors: {key}"):
        open_checkpoint(copy)


def test_a_folder_of_pickles_is_refused_with_advice(copy):
    (copy / "unet" / UNET_WEIGHTS).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only"):
        open_checkpoint(copy)


def test_a_folder_without_weights_or_without_a_unet_is_refused(copy):
    (copy / "unet" / UNET_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no {UNET_WEIGHTS}"):
        open_checkpoint(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(CheckpointError, match="no unet/config.json"):
        open_checkpoint(copy)


@pytest.mark.parametrize("prediction", [[None], None, 1, {"a": 1}])
def test_a_prediction_type_that_is_no_text_is_refused(copy, prediction):
    rewrite_json(copy / "scheduler" / "scheduler_config.json", prediction_type=prediction)
    with pytest.raises(CheckpointError, match="scheduler_config.json has prediction_type .*expected epsilon or v_pre"):
        open_checkpoint(copy)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": NaN,}', "\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_cannot_be_read_is_named(copy, name, text):
    (copy / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": "32"}, {"layers_per_block": None}, {"norm_num_groups": 0}, {"act_fn": "mish"},
                {"time_cond_proj_dim": 256}, {"attention_head_dim": [8]}, {"down_block_types": ["AttnDownBlock2D"] * 2}]
)  # fmt: skip
def test_a_config_that_cannot_be_built_is_refused_with_its_path(copy, changes):
    rewrite_json(copy / "unet" / "config.json", **changes)
    with pytest.raises(CheckpointError, match="unet of .*copy"):
        open_checkpoint(copy).params("unet")


def test_damage_is_named_with_the_network_and_the_path(copy):
    def damage(tensors):
        tensors["conv_in.bias"][0] = np.nan

    rewrite(copy / "unet" / UNET_WEIGHTS, damage)
    with pytest.raises(CheckpointError, match="unet of .*copy: NaN or infinity in conv_in.bias"):
        open_checkpoint(copy).params("unet")


def test_prediction_type_sets_only_what_a_folder_does_not_state(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    with pytest.raises(CheckpointError, match="predicts epsilon"):
        open_checkpoint(copy, prediction_type="v_prediction")
    config = json.loads(path.read_text())
    del config["prediction_type"]
    path.write_text(json.dumps(config))
    assert open_checkpoint(copy, prediction_type="v_prediction").prediction_type == "v_prediction"


@pytest.mark.parametrize("damage", ["pickle", "gone", "truncated"])
def test_a_vae_that_cannot_be_read_fails_only_when_asked_for(copy, folder, damage):
    weights = copy / "vae" / UNET_WEIGHTS
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.rename(copy / "vae" / "diffusion_pytorch_model.bin") if damage == "pickle" else weights.unlink()
    opened = open_checkpoint(copy)
    assert opened.params("unet") and opened.params("text_encoder")
    with pytest.raises(CheckpointError, match="vae"):
        opened.params("vae")


def test_a_folder_of_files_is_described_by_their_kinds(folder, single, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    shutil.copy(single, models / "one.safetensors")
    shutil.copytree(folder, models / "tiny")
    save(models / "a.safetensors", {"lora_unet_x.lora_up.weight": np.ones((4, 1)), "lora_unet_x.alpha": np.ones(())})
    save(models / "b.safetensors", {f"lora_unet_x.lora_{name}.weight": np.ones((1, 1)) for name in ("up", "down")})
    (models / "old.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint") as error:
        open_checkpoint(models)
    text = str(error.value)
    for part in ("the checkpoints one.safetensors, tiny;", "adapters b.safetensors;", "first: old.ckpt;"):
        assert part in text
    assert "other files: a.safetensors" in text and f"for example {models / 'one.safetensors'}" in text
    assert "`dmm-jax inspect BASE OTHERS`" in text


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused(tmp_path, ending):
    (tmp_path / f"model{ending}").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(tmp_path / f"model{ending}")


def test_a_missing_path_and_another_folder_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint .*gone\\. Give a"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="model_index.json"):
        open_checkpoint(tmp_path)


def test_a_name_like_one_that_exists_is_suggested(tmp_path):
    (tmp_path / "my_merge.safetensors").touch()
    for path, near in ((tmp_path / "my_merge.safetensor", tmp_path / "my_merge.safetensors"), ("emojis", "emoji")):
        with pytest.raises(CheckpointError, match=re.escape(f"{path} (did you mean {near}?). Give")):
            open_checkpoint(path)


@pytest.fixture(params=["params", "ema"])
def workdir(request, folder, student, tmp_path):
    """A training run's folder whose newest state holds the student; with an average, the average is the student."""
    config = get_config()
    config.base = str(folder)
    config.teachers = tuple((name, str(folder)) for name in student.styles)
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    params = jax.tree.map(jnp.asarray, student.params("unet"))
    state = {"params": params}
    if request.param == "ema":
        state = {"params": jax.tree.map(jnp.zeros_like, params), "ema": params}
    with StateStore(path, keep_last=1) as store:
        store.save(5, state)
    return path


def test_a_training_run_opens_as_its_student(workdir, student):
    opened = open_checkpoint(workdir)
    assert opened.kind == "workdir" and opened.styles == student.styles and opened.name == "run"
    assert opened.unet_config["num_models"] == 3 and opened.tokenizer_folder == student.tokenizer_folder
    assert_same_networks(opened, student)


def test_a_training_run_that_has_saved_nothing_is_refused(workdir):
    shutil.rmtree(workdir / "checkpoints" / "5")
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        open_checkpoint(workdir).params("unet")


@pytest.fixture
def merged(student, recipe, tmp_path):
    return write.write_format(tmp_path, "dmm", student, None, "float16", recipe)


def test_a_dmm_folder_states_the_names_of_its_styles(merged, student):
    opened = open_checkpoint(merged)
    assert opened.kind == "dmm" and opened.styles == student.styles
    assert opened.unet_config["num_models"] == 3


def test_a_dmm_folder_from_elsewhere_has_numbered_styles(merged):
    rewrite(merged / "unet" / UNET_WEIGHTS, lambda tensors: None, {"format": "pt"})
    assert open_checkpoint(merged).styles == ("style_0", "style_1", "style_2")


@pytest.mark.parametrize("names", ["3", "[", '["a"]', '["a", "b", 3]', '["a", "b", "b"]', '{"a": 1, "b": 2, "c": 3}'])
def test_malformed_style_names_are_refused(merged, names):
    rewrite(merged / "unet" / UNET_WEIGHTS, lambda tensors: None, {"dmm_jax.config.styles": names})
    with pytest.raises(CheckpointError, match="names no styles"):
        open_checkpoint(merged)


@pytest.mark.parametrize("number", [None, 0, -1, "3", True, 10_001, 10**9])
def test_a_style_table_without_a_number_of_rows_is_refused(merged, number):
    rewrite_json(merged / "unet" / "config.json", num_models=number)
    with pytest.raises(CheckpointError, match="num_models"):
        open_checkpoint(merged)


def test_a_dmm_folder_without_its_style_mlp_is_refused_by_name(merged):
    rewrite(merged / "unet" / UNET_WEIGHTS, lambda tensors: tensors.pop("add_embedding.linear_1.weight"))
    with pytest.raises(CheckpointError, match="1 missing: add_embedding.linear_1.weight"):
        open_checkpoint(merged).params("unet")


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(copy):
    (copy / "tokenizer" / "added_tokens.json").write_text(json.dumps({"<new>": 581}))
    with pytest.raises(CheckpointError, match="text_encoder has 581 rows, but .*tokenizer has 582 tokens"):
        open_checkpoint(copy)
    assert not inspect([copy])["mergeable"]
    path = copy / "text_encoder"
    grow = lambda table: np.concatenate([table, table[:1]])  # noqa: E731
    key = next(key for key in TensorFile(path / "model.safetensors") if key.endswith("token_embedding.weight"))
    rewrite(path / "model.safetensors", lambda tensors: tensors.update({key: grow(tensors[key])}))
    rewrite_json(path / "config.json", vocab_size=582)
    assert open_checkpoint(copy).params("text_encoder") and inspect([copy])["mergeable"]


@pytest.mark.parametrize("name", [".fp16.safetensors", ".bf16.safetensors", ".fp32.safetensors"])
def test_a_variant_of_another_precision_is_read(copy, folder, name):
    (copy / "unet" / UNET_WEIGHTS).rename(copy / "unet" / UNET_WEIGHTS.replace(".safetensors", name))
    assert_same_networks(open_checkpoint(copy), open_checkpoint(folder))


@pytest.mark.parametrize("name", [".fp16.safetensors.index", ".safetensors.fp16.index", ".safetensors.index.fp16"])
def test_the_index_of_a_variant_is_read_under_every_name(copy, folder, name):
    unet = copy / "unet"
    (unet / UNET_WEIGHTS).rename(unet / "part.safetensors")
    weight_map = dict.fromkeys(TensorFile(unet / "part.safetensors"), "part.safetensors")
    (unet / f"diffusion_pytorch_model{name}.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_networks(open_checkpoint(copy), open_checkpoint(folder))


def test_integers_of_the_right_shape_are_not_weights(copy):
    key = "conv_in.weight"
    rewrite(copy / "unet" / UNET_WEIGHTS, lambda tensors: tensors.update({key: tensors[key].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=r"1 quantised: conv_in.weight \(int8\)"):
        open_checkpoint(copy).params("unet")
    assert "quantised" in inspect([copy])["obstacles"][0]


@pytest.mark.parametrize("name", [".ema.safetensors", ".non_ema.safetensors"])
def test_a_variant_of_other_weights_is_named(copy, name):
    name = UNET_WEIGHTS.replace(".safetensors", name)
    (copy / "unet" / UNET_WEIGHTS).rename(copy / "unet" / name)
    with pytest.raises(CheckpointError, match=f"only {name}.*rename"):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "text, advice",
    [
        ("https://huggingface.co/a/b/tree/main", "Give hf:a/b"),
        ("http://x.org/y.safetensors", "Download the checkpoint"),
    ],
)
def test_a_web_address_is_refused_with_advice(text, advice):
    with pytest.raises(CheckpointError, match=f"is a web address.*{advice}"):
        open_checkpoint(text)


def test_the_refiners_folder_is_refused(copy):
    rewrite_json(copy / "model_index.json", requires_aesthetics_score=True)
    with pytest.raises(CheckpointError, match="refiner of Stable Diffusion XL"):
        open_checkpoint(copy)
    assert "refiner" in inspect([copy])["obstacles"][0]


@pytest.mark.parametrize(
    "component, field",
    [("unet", "layers_per_block"), ("unet", "transformer_layers_per_block"), ("text_encoder", "num_hidden_layers"),
     ("vae", "layers_per_block"), ("text_encoder", "vocab_size"), ("unet", "num_models")],
)  # fmt: skip
@pytest.mark.parametrize("many", [10**9, 2**62, 1e308])
def test_a_huge_number_is_refused_before_anything_is_built(copy, component, field, many):
    rewrite_json(copy / component / "config.json", **{field: many})
    with pytest.raises(CheckpointError, match=f"{field}="):
        open_checkpoint(copy).shapes(component)


@pytest.mark.parametrize(
    "fields", [{"block_out_channels": [32] * 10**4}, {"layers_per_block": 60, "transformer_layers_per_block": 60}]
)
def test_many_levels_and_layers_are_refused_before_anything_is_built(copy, fields):
    rewrite_json(copy / "unet" / "config.json", **fields)
    with pytest.raises(CheckpointError, match="no network has"):
        open_checkpoint(copy).shapes("unet")


def test_a_huge_number_of_timesteps_is_refused(copy):
    rewrite_json(copy / "scheduler" / "scheduler_config.json", num_train_timesteps=10**9)
    assert "2 to 10000 timesteps" in inspect([copy])["obstacles"][0]


def test_options_of_ours_are_not_believed_from_a_file(copy):
    rewrite_json(copy / "unet" / "config.json", remat="all", attention_implementation="flash")
    arguments = UNet2DConditionModel.arguments(open_checkpoint(copy).unet_config)
    assert (arguments["remat"], arguments["attention_implementation"]) == ("none", "xla")


@pytest.mark.parametrize(
    "component, fields",
    [("unet", {"only_cross_attention": [False, False], "dual_cross_attention": [False]}),
     ("unet", {"cross_attention_dim": [64, 64]}),
     ("text_encoder", {"temperature": 1.0, "id2label": {"0": "LABEL_0"}, "return_dict": True, "max_length": 20})],
)  # fmt: skip
def test_fields_that_change_nothing_are_no_obstacle(copy, folder, component, fields):
    rewrite_json(copy / component / "config.json", **fields)
    assert_same_networks(open_checkpoint(copy), open_checkpoint(folder))
