"""Laws of the text encoder: equal to transformers' at both gates of scale, causal, pooled where the text ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.runtime.errors import UserError
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, draw, load, parameters, relative_error

TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 9,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 5,
    "projection_dim": 12,
}
SD15 = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
    "vocab_size": 49408,
}
SD21 = {
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "projection_dim": 512,
}
SDXL_2 = {
    "architectures": ["CLIPTextModelWithProjection"],
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
# The end token, 5, in the middle and again as padding, before the end, at the end; the largest id is elsewhere.
IDS = np.array([[3, 5, 39, 5, 39, 5, 5], [38, 1, 2, 3, 4, 5, 39], [39, 0, 1, 2, 3, 4, 5]], np.int32)
FIRST_END, FIRST_LARGEST = [1, 5, 6], [2, 6, 0]


def tiny(**changes):
    return draw(abstract(CLIPTextModel.from_config, {**TINY, **changes}))


def num_parameters(model):
    return sum(leaf.size for _, leaf in parameters(model).values())


def torch_twin(config, scale, with_projection):
    """Returns transformers' encoder with PyTorch's initial weights times `scale`, and its tensors by our keys."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = transformers.CLIPTextModelWithProjection if with_projection else transformers.CLIPTextModel
    model = kind(transformers.CLIPTextConfig(**config, attn_implementation="eager")).eval()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, parameter in model.named_parameters():
            # Embeddings of variance 1 would hide a wrong epsilon, and outweigh what the layers add.
            parameter.mul_(0.1 * scale if "embedding" in name else scale)
    tensors = model.state_dict()
    if not any(key.startswith("text_model.") for key in tensors):  # transformers >= 5.6 writes no prefix.
        tensors = {f"text_model.{key}": tensor for key, tensor in tensors.items()}
    return model, {key: tensor for key, tensor in tensors.items() if not key.endswith("position_ids")}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [5, 2])
@pytest.mark.parametrize("with_projection", [False, True])
def test_every_output_is_that_of_transformers(scale, hidden_act, eos_token_id, with_projection):
    import torch

    config = {**TINY, "hidden_act": hidden_act, "eos_token_id": eos_token_id}
    twin, tensors = torch_twin(config, scale, with_projection)
    model = abstract(CLIPTextModel.from_config, config, with_projection=with_projection)

    output = load(model, tensors)(jnp.asarray(IDS))
    expected = twin(torch.from_numpy(IDS).long(), output_hidden_states=True)
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) < TOLERANCE
    assert len(output.hidden_states) == len(expected.hidden_states) == TINY["num_hidden_layers"] + 1
    for our_state, their_state in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(our_state, their_state) < TOLERANCE
    assert (
        relative_error(output.pooled, expected.text_embeds if with_projection else expected.pooler_output) < TOLERANCE
    )


def test_a_state_depends_on_no_later_token():
    model, cut = tiny(), 4
    changed = IDS.copy()
    changed[:, cut:] = (changed[:, cut:] + 1) % TINY["vocab_size"]
    before, after = model(jnp.asarray(IDS)).last_hidden_state, model(jnp.asarray(changed)).last_hidden_state
    assert (before[:, :cut] == after[:, :cut]).all()
    assert (before[:, cut:] != after[:, cut:]).any(axis=(1, 2)).all()


def test_pooled_is_the_final_norm_state_at_the_first_end_token():
    out = tiny()(jnp.asarray(IDS))
    assert (out.pooled == out.last_hidden_state[np.arange(3), FIRST_END]).all()


def test_the_legacy_end_token_2_means_the_largest_id():
    out = tiny(eos_token_id=2)(jnp.asarray(IDS))
    assert (out.pooled == out.last_hidden_state[np.arange(3), FIRST_LARGEST]).all()


def test_the_last_hidden_state_is_the_norm_of_the_last_layers():
    model = tiny()
    out = model(jnp.asarray(IDS))
    normed = model.text_model.final_layer_norm(out.hidden_states[-1])
    assert jnp.allclose(normed, out.last_hidden_state)
    assert not jnp.allclose(out.hidden_states[-1], out.last_hidden_state)


@pytest.mark.parametrize(
    "changes, num_tensors, num_values",
    [({}, 196, 123_060_480), (SD21, 372, 340_387_840), (SDXL_2, 517, 694_659_840)],
    ids=["CLIP-L", "OpenCLIP-H", "OpenCLIP-bigG"],
)
def test_the_full_encoders_have_their_tensors_and_parameters(changes, num_tensors, num_values):
    model = abstract(CLIPTextModel.from_config, {**SD15, **changes})
    keys = set(parameters(model)) - {"text_projection.weight"}
    assert len(parameters(model)) == num_tensors and num_parameters(model) == num_values
    assert all(key.startswith("text_model.") for key in keys)


def test_every_norm_has_the_configs_epsilon():
    norms = [module for _, module in nnx.iter_modules(tiny(layer_norm_eps=3e-4)) if isinstance(module, nnx.LayerNorm)]
    assert len(norms) == 2 * TINY["num_hidden_layers"] + 1
    assert {(norm.epsilon, norm.use_fast_variance, norm.dtype) for norm in norms} == {(3e-4, False, jnp.float32)}


def test_the_architecture_named_in_the_config_decides_on_a_projection():
    assert "text_projection.weight" not in parameters(tiny(architectures=["CLIPTextModel"]))
    assert "text_projection.weight" in parameters(tiny(architectures=["CLIPTextModelWithProjection"]))


def test_bfloat16_has_float32_parameters_and_is_close():
    exact = tiny()(jnp.asarray(IDS))
    model = draw(abstract(CLIPTextModel.from_config, TINY, dtype=jnp.bfloat16))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    rough = model(jnp.asarray(IDS))
    assert {state.dtype for state in jax.tree.leaves(rough)} == {jnp.dtype("bfloat16")}
    assert jnp.allclose(exact.last_hidden_state, rough.last_hidden_state.astype(jnp.float32), atol=0.05)


def test_two_builds_of_one_config_share_a_graph():
    graphs = [nnx.split(abstract(CLIPTextModel.from_config, TINY))[0] for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="10 tokens; this text encoder has 9 positions"):
        tiny()(jnp.zeros((1, 10), jnp.int32))


def test_unknown_fields_and_activations_are_refused_by_name():
    with pytest.raises(ValueError, match="rope_theta"):
        tiny(rope_theta=10000.0)
    with pytest.raises(ValueError, match="relu"):
        tiny(hidden_act="relu")


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(UserError, match="num_hidden_layers must be 1 or more; got 0"):
        CLIPTextModel(num_hidden_layers=0, rngs=nnx.Rngs(0))
