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
    ],
)
def test_adapters_that_are_not_read_are_named(folder, tmp_path, key, kind):
    tensors = test_lora.tensors_of(test_lora.factors(open_checkpoint(folder))) | {key: np.zeros((2, 2), np.float32)}
    path = test_lora.write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(CheckpointError, match=f"holds {kind} .*which is not read. (Merge|Save|Use) "):
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
