"""Single files open wherever their tensors are; what cannot be used is refused with its reason."""

import warnings

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.checkpoints.formats.single_file_config import text_config
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.text import vocabulary
from tests.checkpoints.files import COMPONENTS, assert_same_networks, rewrite, rewrite_json


def test_a_single_file_holds_the_same_networks(single, folder):
    opened = open_checkpoint(single)
    assert (opened.name, opened.kind, opened.architecture) == ("one", "single-file", "stable-diffusion-v1")
    assert opened.tokenizer_folder is None and opened.unused == () and opened.prediction_type == "epsilon"
    assert_same_networks(opened, open_checkpoint(folder))


def test_the_digest_depends_on_the_contents_alone(single, folder):
    original, other = open_checkpoint(single), open_checkpoint(folder)
    assert all(original.digest(component) == other.digest(component) for component in COMPONENTS)
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


def test_keys_of_no_network_are_listed_and_harmless(single, folder):
    extra = {
        "model_ema.decay": np.ones(1, np.float32), "betas": np.ones(3, np.float32),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": np.full((1, 77), np.nan, np.float16),
        "cond_stage_model.transformer.text_projection.weight": np.ones((2, 2), np.float32),
        "cond_stage_model.logit_scale": np.ones((), np.float32),
    }  # fmt: skip
    rewrite(single, lambda tensors: tensors.update(extra))
    opened = open_checkpoint(single)
    assert set(opened.unused) == {key for key in extra if "position_ids" not in key}
    assert_same_networks(opened, open_checkpoint(folder))


def test_an_unknown_key_below_a_network_is_an_error(single):
    rewrite(single, lambda tensors: tensors.update({"model.diffusion_model.lora_up.weight": np.zeros(1, np.float32)}))
    with pytest.raises(CheckpointError, match="1 unexpected: lora_up.weight"):
        open_checkpoint(single).params("unet")


def test_a_tensor_under_two_names_is_an_error(single):
    twin = "model.diffusion_model.conv_in.bias"  # As diffusers calls input_blocks.0.0.bias.
    rewrite(single, lambda tensors: tensors.update({twin: np.ones(32, np.float32)}))
    with pytest.raises(CheckpointError, match=f"1 unexpected: {twin}"):
        open_checkpoint(single).params("unet")


@pytest.mark.parametrize("prefix, missing", [("first_stage_model.", "vae"), ("cond_stage_model.", "text_encoder")])
def test_the_base_provides_a_missing_network(single, folder, prefix, missing):
    rewrite(single, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(prefix)])
    opened = open_checkpoint(single)
    assert [name for name in COMPONENTS if not opened.has(name)] == [missing]
    with pytest.raises(CheckpointError, match=f"holds no {missing}.*as the base"):
        opened.params(missing)
    completed = open_checkpoint(single, base=folder)
    assert_same_networks(completed, open_checkpoint(folder))
    assert completed.tokenizer_folder == folder / "tokenizer"
    assert completed.unet_config["sample_size"] == 8


def test_a_single_files_flags_override_the_bases_schedule(single, folder):
    rewrite(single, lambda tensors: tensors.update(v_pred=np.zeros(0, np.float32), ztsnr=np.zeros(0, np.float32)))
    schedule = open_checkpoint(single, base=folder).scheduler_config
    assert schedule["prediction_type"] == "v_prediction" and schedule["rescale_betas_zero_snr"] is True
    assert schedule["skip_prk_steps"] is True


@pytest.mark.parametrize(
    "metadata, prediction_type",
    [({"modelspec.prediction_type": "v"}, "v_prediction"), ({"modelspec.predict_key": "v"}, "v_prediction"),
     ({"modelspec.prediction_type": "epsilon"}, "epsilon"), ({}, "epsilon"),
     ({"prediction_type": "v-prediction"}, "v_prediction"), ({"modelspec.prediction_type": "vpred"}, "v_prediction")],
)  # fmt: skip
def test_modelspec_states_the_prediction_type(single, metadata, prediction_type):
    rewrite(single, lambda tensors: None, metadata)
    assert open_checkpoint(single).prediction_type == prediction_type


@pytest.mark.parametrize("name", ["modelspec.prediction_type", "modelspec.predict_key", "prediction_type"])
@pytest.mark.parametrize("stated", ["flow", "velocity", "sample"])
def test_a_stated_prediction_type_that_is_not_known_is_refused(single, name, stated):
    rewrite(single, lambda tensors: None, {name: stated})
    with pytest.raises(CheckpointError, match=f"states the prediction type '{stated}'; expected one of epsilon"):
        open_checkpoint(single)


@pytest.mark.parametrize(
    "resolution", ["512", "512x768", "0x0", "4x4", "-8x-8", "\u0665x\u0665", "9" * 99 + "x" + "9" * 99]
)
def test_a_senseless_resolution_is_ignored(single, resolution):
    rewrite(single, lambda tensors: None, {"modelspec.resolution": resolution})
    assert open_checkpoint(single).unet_config["sample_size"] == 64


def test_an_inpainting_model_is_refused_in_both_layouts(single, copy):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    rewrite(single, lambda tensors: tensors.update({key: np.zeros((32, 9, 3, 3), np.float32)}))
    with pytest.raises(CheckpointError, match="one.safetensors is an inpainting model"):
        open_checkpoint(single)
    rewrite_json(copy / "unet" / "config.json", in_channels=9)
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
def test_models_on_edms_noise_levels_are_refused(single, key):
    rewrite(single, lambda tensors: tensors.update({key: np.ones(4, np.float32)}))
    with pytest.raises(CheckpointError, match="cannot be used: .*EDM's noise levels.*CosXL"):
        open_checkpoint(single)
    report = inspect([single])
    assert not report["mergeable"] and "EDM" in str(report["obstacles"][0])


def test_the_refiner_of_xl_is_refused_but_can_be_inspected(single):
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
    opened = open_checkpoint(single)
    assert opened.architecture == "stable-diffusion-xl-v1-base" and not opened.has("text_encoder_2")
    assert opened.vae_config["scaling_factor"] == 0.13025
    assert opened.scheduler_config["_class_name"] == "EulerDiscreteScheduler"


def test_networks_from_the_base_are_reported(single, folder):
    rewrite(single, lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith("first_stage_model.")])
    assert open_checkpoint(single).from_base == () and open_checkpoint(single, base=folder).from_base == ("vae",)
    assert open_checkpoint(single, base=folder).fallbacks == [f"{single} holds no vae: the base's is used."]


def test_the_prediction_of_stable_diffusion_2_is_not_guessed(single):
    def squeeze(tensors):  # Dense projections make it a Stable Diffusion 2.
        for key, array in tensors.items():
            if key.startswith("model.diffusion_model.") and ".proj_" in key and array.ndim == 4:
                tensors[key] = array[:, :, 0, 0]

    rewrite(single, squeeze, {})
    opened = open_checkpoint(single)
    assert opened.architecture == "stable-diffusion-v2" and opened.prediction_type == "unknown"
    assert open_checkpoint(single, prediction_type="epsilon").prediction_type == "epsilon"


@pytest.mark.parametrize("states", [{"v_pred": np.zeros(0, np.float32)}, None])
def test_prediction_type_sets_only_what_a_file_does_not_state(single, folder, states):
    rewrite(single, lambda tensors: tensors.update(states or {}), {})
    if states is None:
        assert open_checkpoint(single).prediction_type == "epsilon"
        opened = open_checkpoint(single, prediction_type="v_prediction")
        assert opened.prediction_type == "v_prediction"
        completed = open_checkpoint(single, base=folder, prediction_type="v_prediction")
        assert completed.prediction_type == "v_prediction" and completed.scheduler_config["skip_prk_steps"] is True
        return
    assert open_checkpoint(single, prediction_type="v_prediction").prediction_type == "v_prediction"
    with pytest.raises(CheckpointError, match="states that it predicts v_prediction, .* says epsilon"):
        open_checkpoint(single, prediction_type="epsilon")


def test_a_silent_file_takes_its_bases_complete_schedule(single, copy):
    flags = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler"}
    rewrite_json(copy / "scheduler" / "scheduler_config.json", **flags)
    rewrite(single, lambda tensors: None, {})
    opened = open_checkpoint(single, base=copy).scheduler_config
    assert (opened["prediction_type"], opened["rescale_betas_zero_snr"]) == ("v_prediction", True)


UNKNOWN_ENCODERS = [
    "cond_stage_model.clip.text_model.encoder.layers.0.layer_norm1.bias", "text_encoders.clip_l.transformer.x.weight",
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "diffusion_model.input_blocks.0.0.bias",
    "cond_stage_model.transformer.adapter.weight", "conditioner.embedders.7.weight",
]  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN_ENCODERS)
def test_a_network_under_an_unknown_prefix_is_refused(single, key):
    rewrite(single, lambda tensors: tensors.update({key: np.zeros(3, np.float32)}))
    with pytest.raises(CheckpointError, match="1 tensors of a text encoder.*dropped in silence: " + key):
        open_checkpoint(single)
    assert not inspect([single])["mergeable"]


@pytest.mark.parametrize("old", [("query", "key", "value", "proj_attn"), ("to_q", "to_k", "to_v", "to_out.0")])
@pytest.mark.parametrize("dense", [False, True])
def test_single_files_may_use_diffusers_names_of_vae_attention(single, folder, old, dense):
    def respell(tensors):
        for key in [key for key in tensors if ".mid.attn_1." in key]:
            module, leaf = key.split("attn_1.")[1].rsplit(".", 1)
            if module in ("q", "k", "v", "proj_out"):
                new = dict(zip(("q", "k", "v", "proj_out"), old, strict=True))[module]
                array = tensors.pop(key)
                array = array[:, :, 0, 0] if dense and array.ndim == 4 else array
                tensors[key.replace(f"attn_1.{module}.{leaf}", f"attn_1.{new}.{leaf}")] = array

    rewrite(single, respell)
    opened = open_checkpoint(single)
    assert opened.unused == ()
    assert_same_networks(opened, open_checkpoint(folder))
    twin = "first_stage_model.encoder.mid.attn_1.q.bias"
    rewrite(single, lambda tensors: tensors.update({twin: np.zeros(64, np.float32)}))
    with pytest.raises(CheckpointError, match=f"unexpected: .*{old[0]}.bias"):
        open_checkpoint(single).params("vae")


def test_training_tensors_of_a_vae_are_not_part_of_it(single, folder):
    extra = ["first_stage_model.loss.logvar", "first_stage_model.model_ema.decay"]
    rewrite(single, lambda tensors: tensors.update(dict.fromkeys(extra, np.full((), np.nan, np.float32))))
    opened = open_checkpoint(single)
    assert sorted(opened.unused) == extra and inspect([single])["mergeable"]
    assert_same_networks(opened, open_checkpoint(folder))


def test_an_encoder_without_tokenizer_takes_clips_and_reports_it(single, folder):
    def enlarge(tensors):
        key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        tensors[key] = np.zeros((49408, 64), np.float32)

    assert open_checkpoint(single).tokenizer_folder is None and open_checkpoint(single).fallbacks == []
    rewrite(single, enlarge)
    opened = open_checkpoint(single)
    assert opened.tokenizer_folder == vocabulary.CLIP and "CLIP's own" in opened.fallbacks[0]
    assert open_checkpoint(single, base=folder).tokenizer_folder == folder / "tokenizer"


def test_a_file_of_another_kind_is_refused_with_its_first_keys(tmp_path):
    save(tmp_path / "other.safetensors", {"control_model.x": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="no Stable Diffusion checkpoint.*control_model.x"):
        open_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ["alphas_cumprod", "denoiser.sigmas"])
@pytest.mark.parametrize("zero", [True, False])
def test_stored_noise_levels_show_a_zero_terminal_snr(single, name, zero, dtype):
    schedule = NoiseSchedule(rescale_betas_zero_snr=zero)
    levels = (schedule.sigmas if name.endswith("sigmas") else schedule.alphas_cumprod).astype(dtype)
    rewrite(single, lambda tensors: tensors.update({name: levels}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(single).scheduler_config.get("rescale_betas_zero_snr", False) == zero


def test_unknown_noise_levels_are_named(single):
    rewrite(single, lambda tensors: tensors.update({"alphas_cumprod": np.zeros(1000, np.float32)}))
    with pytest.warns(UserWarning, match="noise levels are none that is known"):
        assert "rescale_betas_zero_snr" not in open_checkpoint(single).scheduler_config


@pytest.mark.parametrize("prefix", ["diffusion_model.", ""])
def test_a_bare_unet_opens_where_the_base_has_the_rest(single, folder, prefix):
    old = "model.diffusion_model."

    def strip(tensors):
        for key in list(tensors):
            array = tensors.pop(key)
            if key.startswith(old):
                tensors[prefix + key.removeprefix(old)] = array

    rewrite(single, strip)
    assert_same_networks(open_checkpoint(single, base=folder), open_checkpoint(folder))
    assert inspect([folder, single])["mergeable"]


@pytest.mark.parametrize("folder_of, kind", [("vae", "a VAE alone"), ("unet", "the UNet of a diffusers folder")])
def test_a_part_of_a_model_is_called_by_its_name(folder, folder_of, kind):
    with pytest.raises(CheckpointError, match=f"no Stable Diffusion checkpoint: it is {kind}"):
        open_checkpoint(folder / folder_of / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize(
    "key",
    ["model.diffusion_model.input_blocks.999999999.0.in_layers.0.weight", "first_stage_model.encoder.down.999999999.x",
     "cond_stage_model.transformer.text_model.encoder.layers.999999999.layer_norm1.weight",
     "cond_stage_model.transformer.text_model.encoder.layers.999.layer_norm1.weight",
     "model.diffusion_model.input_blocks.998.0.op.weight"],
)  # fmt: skip
def test_a_layer_of_a_huge_number_builds_nothing(single, key):
    rewrite(single, lambda tensors: tensors.update({key: np.ones(1, np.float32)}))
    with pytest.raises(CheckpointError):
        opened = open_checkpoint(single)
        for component in COMPONENTS:
            opened.params(component)


def test_rows_beyond_clips_vocabulary_are_not_its_end_token():
    shapes = {
        "token_embedding.weight": (49410, 1280), "positional_embedding": (77, 1280),
        "transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280), "text_projection": (1280, 1280),
    }  # fmt: skip
    assert text_config(shapes, "X", open_clip=True)["eos_token_id"] == 49407
    small = {"token_embedding.weight": (99, 32)}
    assert text_config(shapes | small, "X", open_clip=True)["num_attention_heads"] == 1


def test_the_end_token_of_a_single_file_is_its_tokenizers(single, folder):
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    rewrite(single, lambda tensors: tensors.update({key: np.concatenate([tensors[key], tensors[key][:2]])}))
    assert open_checkpoint(single).config("text_encoder")["eos_token_id"] == 582
    assert open_checkpoint(single, base=folder).config("text_encoder")["eos_token_id"] == 580


def test_a_silent_file_follows_its_base_everywhere(single, copy, capsys):
    rewrite(single, lambda tensors: None, {"format": "pt"})
    assert inspect([copy, single])["checkpoints"][1]["prediction_type"] == "epsilon"
    rewrite_json(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert open_checkpoint(single, base=copy).prediction_type == "v_prediction"
    report = inspect([copy, single])
    assert report["mergeable"] and report["checkpoints"][1]["prediction_type"] == "v_prediction"
    assert any("does not state what it predicts: v_prediction" in line for line in report["checkpoints"][1]["loans"])
