"""Laws of CLIP's image encoder: equal to transformers' at both gates of scale; every patch and its position count."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.models.clip_vision import CLIPVisionModelWithProjection
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, draw, load, normal, relative_error, to_torch

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "projection_dim": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 12,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def tiny(**changes):
    return abstract(CLIPVisionModelWithProjection.from_config, {**TINY, **changes})


def torch_twin(config, scale):
    """Returns transformers' encoder with PyTorch's initial weights times `scale`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**config, attn_implementation="eager")
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for name, parameter in model.named_parameters():
            # Embeddings of variance 1 would hide a wrong epsilon, and outweigh the patches.
            table = name.endswith(("class_embedding", "position_embedding.weight"))
            parameter.mul_(0.1 * scale if table else scale)
    return model


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_every_output_is_that_of_transformers(scale, hidden_act):
    import torch

    twin = torch_twin({**TINY, "hidden_act": hidden_act}, scale)
    images = normal(2, 12, 12, 3)
    output = load(tiny(hidden_act=hidden_act), twin)(images)
    with torch.no_grad():
        expected = twin(to_torch(images))
        pooled = twin.vision_model(to_torch(images)).pooler_output
    assert relative_error(output.image_embeds, expected.image_embeds) < TOLERANCE
    assert relative_error(output.last_hidden_state, expected.last_hidden_state) < TOLERANCE
    assert relative_error(output.pooled, pooled) < TOLERANCE


def test_the_embedding_depends_on_every_patch_and_its_position():
    model, images = draw(tiny()), np.asarray(normal(1, 12, 12, 3))
    embedding = model(jnp.asarray(images)).image_embeds
    for row, column in np.ndindex(3, 3):
        changed = images.copy()
        changed[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
        assert not np.allclose(model(jnp.asarray(changed)).image_embeds, embedding, atol=1e-4)
    assert not np.allclose(model(jnp.asarray(images[:, :, ::-1])).image_embeds, embedding, atol=1e-4)


def test_every_token_sees_every_other():
    model, images = draw(tiny()), np.asarray(normal(1, 12, 12, 3))
    changed = images.copy()
    changed[:, 8:, 8:] += 1.0  # The last patch.
    states = [np.asarray(model(jnp.asarray(each)).last_hidden_state) for each in (images, changed)]
    assert (np.abs(states[0] - states[1]).max(axis=-1) > 1e-5).all()


def test_the_large_encoder_has_its_tensors_and_parameters():
    """24 layers of 16 tensors, two norms, three embeddings, one projection: openai/clip-vit-large-patch14-336's."""
    params = nnx.to_pure_dict(nnx.state(abstract(CLIPVisionModelWithProjection.from_config, LARGE), nnx.Param))
    shapes = naming.torch_shapes(params)
    assert len(shapes) == 24 * 16 + 4 + 3 + 1 and naming.count(params) == 304_293_888
    assert shapes["vision_model.embeddings.class_embedding"] == (1024,)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (1024, 3, 14, 14)
    assert shapes["vision_model.embeddings.position_embedding.weight"] == (577, 1024)


def test_every_norm_has_the_configs_epsilon():
    norms = [module for _, module in nnx.iter_modules(tiny(layer_norm_eps=3e-4)) if isinstance(module, nnx.LayerNorm)]
    assert len(norms) == 2 * TINY["num_hidden_layers"] + 2
    assert {(norm.epsilon, norm.use_fast_variance) for norm in norms} == {(3e-4, False)}


def test_uncomputed_sizes_and_fields_are_refused_by_name():
    with pytest.raises(ValueError, match="takes pictures of 12 x 12 pixels; got 8 x 12"):
        draw(tiny())(jnp.zeros((1, 12, 8, 3)))
    with pytest.raises(ValueError, match="rope_theta"):
        tiny(rope_theta=10000.0)
    with pytest.raises(ValueError, match="relu"):
        tiny(hidden_act="relu")
    with pytest.raises(ValueError, match="16 and 3"):
        tiny(num_attention_heads=3)
