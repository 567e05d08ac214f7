"""Names in adapter files: each spelling names one layer, and what is not read is called by its name."""

import numpy as np
import pytest

from dmm_jax.checkpoints import published
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import lora_keys
from dmm_jax.checkpoints.open import open_checkpoint
from tests.checkpoints.formats import test_lora


@pytest.mark.parametrize(
    "key, kind",
    [
        ("lora_unet_x.oft_blocks", "OFT or BOFT"),
        ("base_model.model.x.vera_lambda_b", "VeRA"),
        ("base_model.model.x.lora_E.default", "AdaLoRA"),
        ("base_model.model.x.lora_embedding_A", "LoRA of token embeddings"),
        ("bundle_emb.x.string_to_param.*", "bundled textual inversions"),
        ("320.0.linear.0.weight", "a hypernetwork"),
        ("base_model.model.x.glora_A.Xd", "PEFT's GLoRA"),
        ("lora_unet_double_blocks_0_img_attn_proj.lora_up.weight", "an adapter of FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "an adapter of FLUX"),
        ("diffusion_model.joint_blocks.0.x_block.attn.proj.lora_A.weight", "an adapter of Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "an adapter of a transformer"),
    ],
)
def test_adapters_that_are_not_read_are_named(folder, tmp_path, key, kind):
    tensors = test_lora.tensors_of(test_lora.factors(open_checkpoint(folder))) | {key: np.zeros((2, 2), np.float32)}
    path = test_lora.write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"holds {kind} .*which is not read. (Merge|Save|Use|Only) "):
        open_checkpoint(f"{folder} + {path}")


def test_unknown_names_differ_from_layers_that_a_base_lacks(folder, tmp_path):
    tensors = {}
    for name in (
        "lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q",  # A layer of XL.
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "lora_unet_no_such_layer",
    ):
        tensors |= {f"{name}.lora_up.weight": np.zeros((4, 1), np.float32)}
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(f"{folder} + {test_lora.write(tmp_path / 'a.safetensors', tensors)}")
    assert "2 of layers or networks that this base does not have; the file belongs to another family: " in str(
        error.value
    )
    assert "1 unknown: lora_unet_no_such_layer.lora_up.weight" in str(error.value)


def test_no_spelling_names_two_layers():
    for name in ("sd15", "sdxl"):
        checkpoint = published.checkpoint(name)
        shapes = {part: checkpoint.shapes(part) for part in lora_keys.FLAT if checkpoint.has(part)}
        for part, own in shapes.items():
            names = {}
            for key in own:
                if key.endswith(".weight"):
                    for prefix, spelling in lora_keys.spellings(part, key, checkpoint.unet_config):
                        assert names.setdefault(prefix + spelling, key) == key
        layers = lora_keys.layer_names(shapes, checkpoint.unet_config)
        assert {layer[0] for layer in layers.values()} == set(shapes)


MID, FC1 = "mid_block.attentions.0.proj_in", "text_model.encoder.layers.0.mlp.fc1"
FLAT_MID, FLAT_FC1 = MID.replace(".", "_"), FC1.replace(".", "_")
UNET, TEXT, TEXT_2 = (
    ("unet", f"{MID}.weight"), ("text_encoder", f"{FC1}.weight"), ("text_encoder_2", f"{FC1}.weight"),
)  # fmt: skip
NAMES = {  # {a name in adapters of Stable Diffusion XL: the layer that it names}
    f"lora_unet_{FLAT_MID}": UNET, f"lycoris_unet_{FLAT_MID}": UNET, f"lycoris_{FLAT_MID}": UNET,
    "lora_unet_middle_block_1_proj_in": UNET, "lycoris_middle_block_1_proj_in": UNET,
    MID: UNET, f"unet.{MID}": UNET, f"lora_unet.{MID}": UNET,
    f"base_model.model.{MID}": UNET, f"base_model.model.unet.{MID}": UNET,
    "middle_block.1.proj_in": UNET, "unet.middle_block.1.proj_in": UNET, "diffusion_model.middle_block.1.proj_in": UNET,
    "model.diffusion_model.middle_block.1.proj_in": UNET,
    f"lora_te_{FLAT_FC1}": TEXT, f"lora_te1_{FLAT_FC1}": TEXT, f"lycoris_te_{FLAT_FC1}": TEXT,
    f"lycoris_te1_{FLAT_FC1}": TEXT, f"lycoris_{FLAT_FC1}": TEXT, f"lora_te.{FC1}": TEXT, f"lora_te1.{FC1}": TEXT,
    f"text_encoder.{FC1}": TEXT, "text_encoder.encoder.layers.0.mlp.fc1": TEXT, f"clip_l.{FC1}": TEXT,
    f"clip_l.transformer.{FC1}": TEXT, f"text_encoders.clip_l.transformer.{FC1}": TEXT,
    f"cond_stage_model.transformer.{FC1}": TEXT, f"base_model.model.{FC1}": TEXT,
    f"base_model.model.text_encoder.{FC1}": TEXT,
    f"lora_te2_{FLAT_FC1}": TEXT_2, f"lycoris_te2_{FLAT_FC1}": TEXT_2, f"lora_te2.{FC1}": TEXT_2,
    f"text_encoder_2.{FC1}": TEXT_2, f"clip_g.{FC1}": TEXT_2, f"clip_g.transformer.{FC1}": TEXT_2,
    f"text_encoders.clip_g.transformer.{FC1}": TEXT_2, f"base_model.model.text_encoder_2.{FC1}": TEXT_2,
}  # fmt: skip
ENDS = {  # {the end of a key: its role}, for those that no other test writes
    ".lora_linear_layer.up.weight": "up", ".lora_linear_layer.down.weight": "down", ".lora_B.default.bias": "up_bias",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default": "magnitude", ".lora_magnitude_vector.default.weight": "magnitude",
}  # fmt: skip
OLD = {  # {the name in diffusers' first files: today's}
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_out": "attn2.to_out.0",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_v": "attn1.to_v",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_k": "self_attn.k_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_v": "self_attn.v_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out": "self_attn.out_proj",
}


@pytest.fixture(scope="module")
def xl_layers():
    """{name: layer} of Stable Diffusion XL as published."""
    checkpoint = published.checkpoint("sdxl")
    shapes = {part: checkpoint.shapes(part) for part in lora_keys.FLAT}
    return lora_keys.layer_names(shapes, checkpoint.unet_config)


@pytest.mark.parametrize("name", NAMES)
def test_every_prefix_names_its_layer(xl_layers, name):
    assert xl_layers[name] == NAMES[name]
    has_network = name not in (MID, "middle_block.1.proj_in") and not name.startswith(
        ("lycoris_mid", "lycoris_text", f"base_model.model.{MID}", f"base_model.model.{FC1}")
    )
    assert lora_keys.network_of(name) == (NAMES[name][0] if has_network else "")


def test_the_list_holds_every_prefix():
    used = {
        prefix
        for table in (lora_keys.FLAT, lora_keys.DOTTED)
        for part, prefixes in table.items()
        for prefix in prefixes
        if any(name.startswith(prefix) and layer[0] == part for name, layer in NAMES.items())
    }
    assert used == {prefix for table in (lora_keys.FLAT, lora_keys.DOTTED) for it in table.values() for prefix in it}


@pytest.mark.parametrize("end", ENDS)
def test_rare_ends_have_their_role(end):
    assert lora_keys.split_role(f"x.y{end}") == ("x.y", ENDS[end])


@pytest.mark.parametrize("name", OLD)
def test_names_of_diffusers_first_files(xl_layers, name):
    assert xl_layers[name][1].endswith(f"{OLD[name]}.weight")


@pytest.mark.parametrize(
    "key, kind",
    [("x.boft_blocks", "OFT or BOFT"), ("x.bd_A", "another adapter"), ("x.set_weight", "replaced weights"),
     ("x.reshape_weight", "reshaped weights"), ("x.absmax", "nf4 or int8 weights of bitsandbytes")],
)  # fmt: skip
def test_rare_kinds_are_named(key, kind):
    assert list(lora_keys.other_kinds([key])) == [kind]
    assert lora_keys.other_kinds(["lora_unet_x.lora_up.weight", "1.2.linear.weight"]) == {}
