"""Checkpoints open as people have them, wherever their tensors lie; what cannot be used is refused with its reason."""

import json
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
from dmm_jax.config import options as config_lib
from dmm_jax.text import vocabulary

COMPONENTS = ("unet", "vae", "text_encoder")
UNET_WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_INDEX = UNET_WEIGHTS + ".index.json"


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture
def single(folder, recipe, tmp_path):
    """The stock pipeline as a single file in float32."""
    return write.write_single_file(tmp_path / "one.safetensors", open_checkpoint(folder), "float32", recipe)


def rewrite(path, change, metadata=None):
    """Saves a file's tensors again after `change` worked on them."""
    file = TensorFile(path)
    tensors = {key: np.array(file[key]) for key in file}
    metadata = dict(file.metadata) if metadata is None else metadata
    change(tensors)
    save(path, tensors, metadata)


def assert_same_networks(first, second):
    for component in COMPONENTS:
        equal = jax.tree.map(np.array_equal, first.params(component), second.params(component))
        assert all(jax.tree.leaves(equal))


def test_a_diffusers_folder_tells_everything(folder):
    found = open_checkpoint(folder)
    assert (found.name, found.kind, found.architecture) == ("tiny", "diffusers", "stable-diffusion-v1")
    assert found.prediction_type == "epsilon" and found.scheduler_config["_class_name"] == "PNDMScheduler"
    assert found.styles is None and found.tokenizer_folder == folder / "tokenizer"
    assert [found.has(component) for component in (*COMPONENTS, "controlnet")] == [True, True, True, False]
    assert found.unet_config["block_out_channels"] == [32, 64] and found.config("text_encoder")["hidden_size"] == 64
    assert {path.name for path in found.files} == {UNET_WEIGHTS, "model.safetensors"}


def test_opening_reads_no_weights_and_params_are_views_of_the_file(folder):
    found = open_checkpoint(folder)
    leaves = jax.tree.leaves(found.params("unet"))
    assert all(not leaf.flags.owndata and not leaf.flags.writeable for leaf in leaves)
    cast = jax.tree.leaves(found.params("unet", np.float16))
    assert {leaf.dtype for leaf in cast} == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.fp16.safetensors"])
def test_the_fp16_variant_is_found(copy, folder, name):
    (copy / "unet" / UNET_WEIGHTS).rename(copy / "unet" / name)
    assert_same_networks(open_checkpoint(copy), open_checkpoint(folder))


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


@pytest.mark.parametrize("index", [UNET_INDEX, "diffusion_pytorch_model.safetensors.index.fp16.json"])
def test_parts_under_an_index_are_one_network(copy, folder, index):
    split(copy / "unet", index)
    found = open_checkpoint(copy)
    assert_same_networks(found, open_checkpoint(folder))
    assert found.digest("unet") == open_checkpoint(folder).digest("unet")


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


def test_parts_that_are_missing_hold_pickles_or_do_not_fit_the_index_are_named(copy):
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


def test_a_folder_with_pickles_alone_is_refused_with_the_way_out(copy):
    (copy / "unet" / UNET_WEIGHTS).rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        open_checkpoint(copy)


def test_a_folder_without_weights_or_without_a_unet_is_refused(copy):
    (copy / "unet" / UNET_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"no {UNET_WEIGHTS}"):
        open_checkpoint(copy)
    shutil.rmtree(copy / "unet")
    with pytest.raises(CheckpointError, match="no unet/config.json"):
        open_checkpoint(copy)


@pytest.mark.parametrize("said", ["", "[]", "{", '{"a": NaN,}', "\xff\xfe", "[" * 100_000])
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_json_that_cannot_be_read_is_named(copy, name, said):
    (copy / name).write_bytes(said.encode("latin-1"))
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    "changes", [{"block_out_channels": "32"}, {"layers_per_block": None}, {"norm_num_groups": 0}, {"act_fn": "mish"},
                {"time_cond_proj_dim": 256}, {"attention_head_dim": [8]}, {"down_block_types": ["AttnDownBlock2D"] * 2}]
)  # fmt: skip
def test_a_config_that_cannot_be_built_is_refused_with_its_path(copy, changes):
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(CheckpointError, match="unet of .*copy"):
        open_checkpoint(copy).params("unet")


def test_damage_is_named_with_the_network_and_the_path(copy):
    def damage(tensors):
        tensors["conv_in.bias"][0] = np.nan

    rewrite(copy / "unet" / UNET_WEIGHTS, damage)
    with pytest.raises(CheckpointError, match="unet of .*copy: NaN or infinity in conv_in.bias"):
        open_checkpoint(copy).params("unet")


def test_a_single_file_holds_the_same_networks(single, folder):
    found = open_checkpoint(single)
    assert (found.name, found.kind, found.architecture) == ("one", "single-file", "stable-diffusion-v1")
    assert found.tokenizer_folder is None and found.unused == () and found.prediction_type == "epsilon"
    assert_same_networks(found, open_checkpoint(folder))


def test_the_digest_is_of_the_contents_wherever_they_lie(single, folder):
    one, other = open_checkpoint(single), open_checkpoint(folder)
    assert all(one.digest(component) == other.digest(component) for component in COMPONENTS)
    rewrite(single, lambda tensors: tensors["first_stage_model.quant_conv.bias"].__setitem__(0, 7.0))
    changed = open_checkpoint(single)
    assert changed.digest("vae") != other.digest("vae") and changed.digest("unet") == other.digest("unet")


def test_other_spellings_of_prefixes_are_read(single, folder):
    def respell(tensors):
        for key in list(tensors):
            new = key.replace("first_stage_model.", "vae.").replace("transformer.text_model.", "transformer.")
            tensors[new] = tensors.pop(key)

    rewrite(single, respell)
    assert_same_networks(open_checkpoint(single), open_checkpoint(folder))


def test_keys_of_no_network_are_listed_and_do_not_disturb(single, folder):
    extra = {
        "model_ema.decay": np.ones(1, np.float32), "betas": np.ones(3, np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.full((1, 77), np.nan, np.float16),
        "cond_stage_model.transformer.text_projection.weight": np.ones((2, 2), np.float32),
        "cond_stage_model.logit_scale": np.ones((), np.float32),
    }  # fmt: skip
    rewrite(single, lambda tensors: tensors.update(extra))
    found = open_checkpoint(single)
    assert set(found.unused) == {key for key in extra if "position_ids" not in key}
    assert_same_networks(found, open_checkpoint(folder))


def test_an_unknown_key_below_a_network_is_an_error(single):
    rewrite(single, lambda tensors: tensors.update({"model.diffusion_model.lora_up.weight": np.zeros(1, np.float32)}))
    with pytest.raises(CheckpointError, match="1 unexpected: lora_up.weight"):
        open_checkpoint(single).params("unet")


def test_a_tensor_under_two_names_is_an_error_and_neither_is_preferred(single):
    twin = "model.diffusion_model.conv_in.bias"  # As diffusers calls input_blocks.0.0.bias.
    rewrite(single, lambda tensors: tensors.update({twin: np.ones(32, np.float32)}))
    with pytest.raises(CheckpointError, match=f"1 unexpected: {twin}"):
        open_checkpoint(single).params("unet")


@pytest.mark.parametrize("prefix, lost", [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_a_network_may_be_missing_and_the_base_has_it(single, folder, prefix, lost):
    rewrite(single, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)])
    found = open_checkpoint(single)
    assert [name for name in COMPONENTS if not found.has(name)] == [lost]
    with pytest.raises(CheckpointError, match=f"holds no {lost}.*as the base"):
        found.params(lost)
    completed = open_checkpoint(single, base=folder)
    assert_same_networks(completed, open_checkpoint(folder))
    assert completed.tokenizer_folder == folder / "tokenizer"
    assert completed.unet_config["sample_size"] == 8


def test_a_single_files_flags_outweigh_the_bases_schedule(single, folder):
    rewrite(single, lambda tensors: tensors.update(v_pred=np.zeros(0, np.float32), ztsnr=np.zeros(0, np.float32)))
    schedule = open_checkpoint(single, base=folder).scheduler_config
    assert schedule["prediction_type"] == "v_prediction" and schedule["rescale_betas_zero_snr"] is True
    assert schedule["skip_prk_steps"] is True


@pytest.mark.parametrize(
    "metadata, predicted",
    [({"modelspec.prediction_type": "v"}, "v_prediction"), ({"modelspec.predict_key": "v"}, "v_prediction"),
     ({"modelspec.prediction_type": "epsilon"}, "epsilon"), ({}, "epsilon")],
)  # fmt: skip
def test_modelspec_tells_the_prediction_type(single, metadata, predicted):
    rewrite(single, lambda tensors: None, metadata)
    assert open_checkpoint(single).prediction_type == predicted


@pytest.mark.parametrize("said", ["512", "512x768", "0x0", "4x4", "-8x-8", "\u0665x\u0665", "9" * 99 + "x" + "9" * 99])
def test_a_senseless_resolution_is_not_believed(single, said):
    rewrite(single, lambda tensors: None, {"modelspec.resolution": said})
    assert open_checkpoint(single).unet_config["sample_size"] == 64


def test_an_inpainting_model_is_refused_in_both_layouts(single, copy):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    rewrite(single, lambda tensors: tensors.update({key: np.zeros((32, 9, 3, 3), np.float32)}))
    with pytest.raises(CheckpointError, match="one.safetensors is an inpainting model"):
        open_checkpoint(single)
    config = copy / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    with pytest.raises(CheckpointError, match="copy is an inpainting model"):
        open_checkpoint(copy)


def lower_attention(single):
    """Takes the attention of the first level away, which Stable Diffusion XL's UNets do not have."""

    def change(tensors):
        for key in list(tensors):
            if ".input_blocks.1.1." in key:
                del tensors[key]

    rewrite(single, change)


def test_an_unclip_model_is_refused_by_its_name(single):
    label = {"model.diffusion_model.label_emb.0.0.weight": np.zeros((128, 2048), np.float32)}
    rewrite(single, lambda tensors: tensors.update(label))
    with pytest.raises(CheckpointError, match="one.safetensors is an unCLIP model"):
        open_checkpoint(single)


@pytest.mark.parametrize("key", ["edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"])
def test_models_on_edms_noise_levels_are_refused_and_inspect_says_it(single, key):
    rewrite(single, lambda tensors: tensors.update({key: np.ones(4, np.float32)}))
    with pytest.raises(CheckpointError, match="cannot be used: .*EDM's noise levels.*CosXL"):
        open_checkpoint(single)
    report = inspect([single])
    assert not report["mergeable"] and "EDM" in str(report["obstacles"][0])


def test_the_refiner_of_xl_is_refused_but_can_be_looked_at(single):
    refiner = {
        "conditioner.embedders.0.model.ln_final.bias": np.zeros(4, np.float32),
        "model.diffusion_model.label_emb.0.0.weight": np.zeros((128, 2560), np.float32),
    }
    lower_attention(single)
    rewrite(single, lambda tensors: tensors.update(refiner))
    with pytest.raises(CheckpointError, match="refiner of Stable Diffusion XL.*Use the base model"):
        open_checkpoint(single)
    assert open_checkpoint(single, allow_unsupported=True).has("unet")


def test_an_xl_single_file_has_xls_scale_and_schedule(single):
    label = {"model.diffusion_model.label_emb.0.0.weight": np.zeros((128, 1546), np.float32)}
    lower_attention(single)
    rewrite(single, lambda tensors: tensors.update(label))
    found = open_checkpoint(single)
    assert found.architecture == "stable-diffusion-xl-v1-base" and not found.has("text_encoder_2")
    assert found.vae_config["scaling_factor"] == 0.13025
    assert found.scheduler_config["_class_name"] == "EulerDiscreteScheduler"


def test_what_the_base_lent_is_said(single, folder):
    rewrite(single, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("first_stage_model.")])
    assert open_checkpoint(single).borrowed == () and open_checkpoint(single, base=folder).borrowed == ("vae",)
    assert open_checkpoint(single, base=folder).loans == [f"{single} holds no vae: the base's is used."]


def test_stable_diffusion_2_does_not_say_what_it_predicts_and_nobody_guesses(single):
    def squeeze(tensors):  # Dense projections are what makes it a Stable Diffusion 2.
        for key, array in tensors.items():
            if key.startswith("model.diffusion_model.") and ".proj_" in key and array.ndim == 4:
                tensors[key] = array[:, :, 0, 0]

    rewrite(single, squeeze, {})
    found = open_checkpoint(single)
    assert found.architecture == "stable-diffusion-v2" and found.prediction_type == "unknown"
    assert open_checkpoint(single, prediction_type="epsilon").prediction_type == "epsilon"


@pytest.mark.parametrize("states", [{"v_pred": np.zeros(0, np.float32)}, None])
def test_what_a_file_states_is_not_overridden_and_what_it_does_not_state_is_told(single, folder, states):
    rewrite(single, lambda tensors: tensors.update(states or {}), {})
    if states is None:
        assert open_checkpoint(single).prediction_type == "epsilon"
        found = open_checkpoint(single, prediction_type="v_prediction")
        assert found.prediction_type == "v_prediction"
        told = open_checkpoint(single, base=folder, prediction_type="v_prediction")
        assert told.prediction_type == "v_prediction" and told.scheduler_config["skip_prk_steps"] is True
        return
    assert open_checkpoint(single, prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match="says of itself that it predicts v_prediction, .* says epsilon"):
        open_checkpoint(single, prediction_type="epsilon")


def test_a_folder_states_its_prediction_type_unless_its_scheduler_is_silent(copy):
    path = copy / "scheduler" / "scheduler_config.json"
    with pytest.raises(CheckpointError, match="predicts epsilon"):
        open_checkpoint(copy, prediction_type="v_prediction")
    said = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in said.items() if name != "prediction_type"}))
    assert open_checkpoint(copy, prediction_type="v_prediction").prediction_type == "v_prediction"


def test_a_silent_file_takes_its_bases_schedule_whole(single, copy):
    path = copy / "scheduler" / "scheduler_config.json"
    flags = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler"}
    path.write_text(json.dumps(json.loads(path.read_text()) | flags))
    rewrite(single, lambda tensors: None, {})
    found = open_checkpoint(single, base=copy).scheduler_config
    assert (found["prediction_type"], found["rescale_betas_zero_snr"]) == ("v_prediction", True)


UNKNOWN_ENCODERS = [
    "cond_stage_model.clip.text_model.encoder.layers.0.layer_norm1.bias", "text_encoders.clip_l.transformer.x.weight",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "diffusion_model.input_blocks.0.0.bias",
    "cond_stage_model.transformer.adapter.weight", "conditioner.embedders.7.weight",
]  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN_ENCODERS)
def test_a_network_under_an_unknown_prefix_is_not_dropped_in_silence(single, key):
    rewrite(single, lambda tensors: tensors.update({key: np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match="1 tensors of a text encoder.*dropped in silence: " + key):
        open_checkpoint(single)
    assert not inspect([single])["mergeable"]


@pytest.mark.parametrize("old", [("query", "key", "value", "proj_attn"), ("to_q", "to_k", "to_v", "to_out.0")])
@pytest.mark.parametrize("dense", [False, True])
def test_diffusers_names_of_the_vaes_attention_are_read_in_single_files(single, folder, old, dense):
    def respell(tensors):
        for key in [key for key in tensors if ".mid.attn_1." in key]:
            module, leaf = key.split("attn_1.")[1].rsplit(".", 1)
            if module in ("q", "k", "v", "proj_out"):
                new = dict(zip(("q", "k", "v", "proj_out"), old, strict=True))[module]
                array = tensors.pop(key)
                array = array[:, :, 0, 0] if dense and array.ndim == 4 else array
                tensors[key.replace(f"attn_1.{module}.{leaf}", f"attn_1.{new}.{leaf}")] = array

    rewrite(single, respell)
    found = open_checkpoint(single)
    assert found.unused == ()
    assert_same_networks(found, open_checkpoint(folder))
    twin = "first_stage_model.encoder.mid.attn_1.q.bias"
    rewrite(single, lambda tensors: tensors.update({twin: np.zeros(64, np.float32)}))
    with pytest.raises(CheckpointError, match=f"unexpected: .*{old[0]}.bias"):
        open_checkpoint(single).params("vae")


def test_what_trained_a_vae_is_no_part_of_it(single, folder):
    extra = ["first_stage_model.loss.logvar", "first_stage_model.model_ema.decay"]
    rewrite(single, lambda tensors: tensors.update(dict.fromkeys(extra, np.full((), np.nan, np.float32))))
    found = open_checkpoint(single)
    assert sorted(found.unused) == extra and inspect([single])["mergeable"]
    assert_same_networks(found, open_checkpoint(folder))


@pytest.mark.parametrize("damage", ["pickle", "gone", "truncated"])
def test_a_vae_that_cannot_be_read_stops_only_who_asks_for_it(copy, folder, damage):
    weights = copy / "vae" / UNET_WEIGHTS
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        weights.rename(copy / "vae" / "diffusion_pytorch_model.bin") if damage == "pickle" else weights.unlink()
    found = open_checkpoint(copy)
    assert found.params("unet") and found.params("text_encoder")
    with pytest.raises(CheckpointError, match="vae"):
        found.params("vae")


def test_clips_own_tokenizer_is_used_where_a_text_encoder_of_its_size_has_none_and_it_is_said(single, folder):
    def enlarge(tensors):
        key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        tensors[key] = np.zeros((49408, 64), np.float32)

    assert open_checkpoint(single).tokenizer_folder is None and open_checkpoint(single).loans == []
    rewrite(single, enlarge)
    found = open_checkpoint(single)
    assert found.tokenizer_folder == vocabulary.CLIP and "CLIP's own" in found.loans[0]
    assert open_checkpoint(single, base=folder).tokenizer_folder == folder / "tokenizer"


def test_a_file_of_another_kind_is_refused_with_its_first_keys(tmp_path):
    save(tmp_path / "other.safetensors", {"control_model.x": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="no Stable Diffusion checkpoint.*control_model.x"):
        open_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin"])
def test_pickles_are_refused(tmp_path, ending):
    (tmp_path / f"model{ending}").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickle"):
        open_checkpoint(tmp_path / f"model{ending}")


def test_what_is_not_there_or_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        open_checkpoint(tmp_path / "gone")
    with pytest.raises(CheckpointError, match="model_index.json"):
        open_checkpoint(tmp_path)


@pytest.fixture(params=["params", "ema"])
def workdir(request, folder, student, tmp_path):
    """A training run's folder whose newest state holds the student; with an average, the average is the student."""
    config = config_lib.get_config()
    config.base = str(folder)
    config.teachers = tuple((name, str(folder)) for name in student.styles)
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.json").write_text(config_lib.to_json(config))
    wanted = jax.tree.map(jnp.asarray, student.params("unet"))
    state = {"params": wanted}
    if request.param == "ema":
        state = {"params": jax.tree.map(jnp.zeros_like, wanted), "ema": wanted}
    with StateStore(path, kept=1) as store:
        store.save(5, state)
    return path


def test_a_training_run_opens_as_its_student(workdir, student):
    found = open_checkpoint(workdir)
    assert found.kind == "workdir" and found.styles == student.styles and found.name == "run"
    assert found.unet_config["num_models"] == 3 and found.tokenizer_folder == student.tokenizer_folder
    assert_same_networks(found, student)


def test_a_training_run_that_has_saved_nothing_is_refused(workdir):
    shutil.rmtree(workdir / "checkpoints" / "5")
    with pytest.raises(CheckpointError, match="no complete checkpoint yet"):
        open_checkpoint(workdir).params("unet")


@pytest.fixture
def merged(student, recipe, tmp_path):
    return write.write(tmp_path, "dmm", student, None, "float16", recipe)


def test_a_dmm_folder_brings_the_names_of_its_styles(merged, student):
    found = open_checkpoint(merged)
    assert found.kind == "dmm" and found.styles == student.styles
    assert found.unet_config["num_models"] == 3


def test_a_dmm_folder_from_elsewhere_has_numbered_styles(merged):
    rewrite(merged / "unet" / UNET_WEIGHTS, lambda tensors: None, {"format": "pt"})
    assert open_checkpoint(merged).styles == ("style_0", "style_1", "style_2")


@pytest.mark.parametrize("said", ["3", "[", '["a"]', '["a", "b", 3]', '["a", "b", "b"]', '{"a": 1, "b": 2, "c": 3}'])
def test_style_names_that_are_none_are_refused(merged, said):
    rewrite(merged / "unet" / UNET_WEIGHTS, lambda tensors: None, {"dmm_jax.config.styles": said})
    with pytest.raises(CheckpointError, match="names no styles"):
        open_checkpoint(merged)


@pytest.mark.parametrize("number", [None, 0, -1, "3", True])
def test_a_style_table_without_a_number_of_rows_is_refused(merged, number):
    config = merged / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_models": number}))
    with pytest.raises(CheckpointError, match="num_models"):
        open_checkpoint(merged)


def test_a_dmm_folder_without_its_style_mlp_is_refused_by_name(merged):
    rewrite(merged / "unet" / UNET_WEIGHTS, lambda tensors: tensors.pop("add_embedding.linear_1.weight"))
    with pytest.raises(CheckpointError, match="1 missing: add_embedding.linear_1.weight"):
        open_checkpoint(merged).params("unet")
