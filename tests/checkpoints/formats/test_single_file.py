"""diffusers' own converter finds every key, and the shapes alone determine the config."""

import pytest

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import single_file, single_file_config

CA, DOWN, UP_CA, UP = "CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"
COMMON = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 32}
UNETS = {
    "SD 1": {
        "block_out_channels": [32, 64, 96, 96], "layers_per_block": 2, "cross_attention_dim": 24,
        "down_block_types": [CA, CA, CA, DOWN], "up_block_types": [UP, UP_CA, UP_CA, UP_CA],
        "attention_head_dim": 8, "use_linear_projection": False, "transformer_layers_per_block": 1,
    },
    "SD 2": {
        "block_out_channels": [64, 128, 192, 192], "layers_per_block": 2, "cross_attention_dim": 40,
        "down_block_types": [CA, CA, CA, DOWN], "up_block_types": [UP, UP_CA, UP_CA, UP_CA],
        "attention_head_dim": [1, 2, 3, 3], "use_linear_projection": True, "transformer_layers_per_block": 1,
    },
    "SD XL": {
        "block_out_channels": [64, 128, 192], "layers_per_block": 2, "cross_attention_dim": 40,
        "down_block_types": [DOWN, CA, CA], "up_block_types": [UP_CA, UP_CA, UP],
        "attention_head_dim": [1, 2, 3], "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 3],
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 1546,
    },
    "the demo's": {
        "block_out_channels": [64, 64], "layers_per_block": 1, "cross_attention_dim": 64,
        "down_block_types": [CA, CA], "up_block_types": [UP_CA, UP_CA],
        "attention_head_dim": 8, "use_linear_projection": False, "transformer_layers_per_block": 1,
    },
    "one level": {
        "block_out_channels": [32], "layers_per_block": 3, "cross_attention_dim": 8,
        "down_block_types": [CA], "up_block_types": [UP_CA],
        "attention_head_dim": 8, "use_linear_projection": False, "transformer_layers_per_block": 1,
    },
    "many layers": {
        "block_out_channels": [32, 32, 64], "layers_per_block": 4, "cross_attention_dim": 8,
        "down_block_types": [CA, DOWN, CA], "up_block_types": [UP_CA, UP, UP_CA],
        "attention_head_dim": 8, "use_linear_projection": False, "transformer_layers_per_block": 1,
    },
}  # fmt: skip
VAES = {
    "SD": {"block_out_channels": [32, 64, 96, 96], "layers_per_block": 2, "latent_channels": 4},
    "shallow": {"block_out_channels": [32], "layers_per_block": 1, "latent_channels": 4},
}
PUBLISHED = {  # name: (its sizes, how many tensors it has)
    "SD 1": ({"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}, 686),
    "SD 2": (
        {
            "block_out_channels": [320, 640, 1280, 1280],
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
        },
        686,
    ),
    "SD XL": (
        {
            "block_out_channels": [320, 640, 1280], "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10], "projection_class_embeddings_input_dim": 2816,
        },
        1680,
    ),
}  # fmt: skip


def vae(config):
    levels = len(config["block_out_channels"])
    return config | {
        "in_channels": 3, "out_channels": 3, "norm_num_groups": 32, "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }  # fmt: skip


def shapes_of(component, config):
    return naming.torch_shapes(abstract_params(component, config))


def in_single_file(component, config, tensors):
    return {single_file.KEYS[component](key, config): value for key, value in tensors.items()}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_converter_finds_every_tensor_of_the_unet(name):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = UNETS[name] | COMMON
    tensors = {key: object() for key in shapes_of("unet", config)}
    ldm = {single_file.UNET + key: value for key, value in in_single_file("unet", config, tensors).items()}
    assert len(ldm) == len(tensors)
    assert utils.convert_ldm_unet_checkpoint(ldm, config) == tensors


@pytest.mark.parametrize("prefix", single_file.PREFIXES["vae"])
@pytest.mark.parametrize("name", VAES)
def test_diffusers_converter_finds_every_tensor_of_the_vae(name, prefix):
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = vae(VAES[name])
    shapes = shapes_of("vae", config)
    tensors = {key: torch.full(shape, float(number)) for number, (key, shape) in enumerate(shapes.items())}
    ldm = in_single_file("vae", config, tensors)
    converted = utils.convert_ldm_vae_checkpoint({prefix + key: value for key, value in ldm.items()}, config)
    assert set(converted) == set(tensors)
    for key, tensor in tensors.items():
        assert converted[key].shape == tensor.shape and torch.equal(converted[key], tensor)


@pytest.mark.parametrize("name", UNETS)
def test_the_unets_shapes_determine_its_config(name):
    config = UNETS[name] | COMMON
    shapes = in_single_file("unet", config, shapes_of("unet", config))
    inferred = single_file_config.unet_config(shapes, "X")
    assert {field: inferred[field] for field in config} == config


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_same_rules_recognise_full_size_unets(name):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    sizes, num_tensors = PUBLISHED[name]
    config = UNETS[name] | COMMON | sizes
    shapes = shapes_of("unet", config)
    assert len(shapes) == num_tensors
    ldm = in_single_file("unet", config, shapes)
    inferred = single_file_config.unet_config(ldm, "X")
    assert {field: inferred[field] for field in config} == config
    assert shapes_of("unet", inferred) == shapes
    assert utils.convert_ldm_unet_checkpoint({single_file.UNET + key: ldm[key] for key in ldm}, config) == shapes


@pytest.mark.parametrize("name", VAES)
def test_the_vaes_shapes_determine_its_config(name):
    config = vae(VAES[name])
    shapes = in_single_file("vae", config, shapes_of("vae", config))
    inferred = single_file_config.vae_config(shapes, "X")
    assert {field: inferred[field] for field in config} == config


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_the_text_encoders_shapes_determine_its_config(prefix):
    config = {
        "vocab_size": 99, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 11,
        "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
    }  # fmt: skip
    shapes = shapes_of("text_encoder", config)
    inferred = single_file_config.text_config(
        {prefix + key.removeprefix("text_model."): shapes[key] for key in shapes}, "X"
    )
    assert {field: inferred[field] for field in config} == config
    assert inferred["eos_token_id"] == 98  # The last row, as in every CLIP.


def test_an_encoder_narrower_than_a_head_has_one_head():
    shapes = {"embeddings.token_embedding.weight": (99, 32), "embeddings.position_embedding.weight": (77, 32),
              "encoder.layers.0.mlp.fc1.weight": (96, 32)}  # fmt: skip
    assert single_file_config.text_config(shapes, "X")["num_attention_heads"] == 1


@pytest.mark.parametrize(
    "name, downsamplers, upsamplers",
    [("SD 1", ["3.0", "6.0", "9.0"], ["2.1", "5.2", "8.2"]), ("SD XL", ["3.0", "6.0"], ["2.2", "5.2"])],
)
def test_resampling_comes_after_the_attention(name, downsamplers, upsamplers):
    # diffusers' converter accepts either slot, ComfyUI and A1111 only the right one.
    config = UNETS[name] | COMMON
    keys = in_single_file("unet", config, shapes_of("unet", config))
    assert [key for key in keys if ".op.weight" in key] == [f"input_blocks.{at}.op.weight" for at in downsamplers]
    convs = [key for key in keys if key.startswith("output_blocks") and key.endswith(".conv.weight")]
    assert convs == [f"output_blocks.{at}.conv.weight" for at in upsamplers]


def test_dmms_own_keys_keep_their_names_and_sdxls_are_renamed():
    merged = UNETS["SD 1"] | {"addition_embed_type": "model_merge"}
    for key in ("model_embedding.weight", "add_embedding.linear_1.weight"):
        assert single_file.unet_key(key, merged) == key
    assert single_file.unet_key("add_embedding.linear_2.bias", UNETS["SD XL"]) == "label_emb.0.2.bias"


@pytest.mark.parametrize("channels, message", [(9, "inpainting"), (8, "8 input channels"), (7, "7 input channels")])
def test_models_with_other_inputs_than_latents_are_refused(channels, message):
    shapes = {"input_blocks.0.0.weight": (320, channels, 3, 3)}
    with pytest.raises(CheckpointError, match=f"file.safetensors.*{message}"):
        single_file_config.unet_config(shapes, "file.safetensors")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_unknown_networks_are_refused_with_the_missing_key(component):
    with pytest.raises(CheckpointError, match="X: .*no known architecture"):
        single_file_config.read_config(component, {"weight": (1,)}, single_file.PREFIXES[component][-1], "X")


def test_levels_with_different_numbers_of_layers_are_refused():
    config = UNETS["SD 1"] | {"layers_per_block": [2, 2, 2, 1]}
    with pytest.raises(CheckpointError, match="as many layers on every level"):
        single_file.unet_key("down_blocks.0.resnets.0.norm1.weight", config)
    config["layers_per_block"] = [2, 2, 2, 2]
    assert single_file.unet_key("down_blocks.1.resnets.0.norm1.weight", config) == "input_blocks.4.0.in_layers.0.weight"


def test_key_maps_are_one_to_one():
    for component, config in (("unet", UNETS["SD XL"] | COMMON), ("vae", vae(VAES["SD"]))):
        keys = list(shapes_of(component, config))
        assert len(set(in_single_file(component, config, dict.fromkeys(keys)))) == len(keys)
