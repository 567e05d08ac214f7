"""Laws of the transformer block and its layers: they are diffusers'."""

import jax.numpy as jnp
import pytest

from dmm_jax.models.attention import Attention, BasicTransformerBlock, FeedForward
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, load, normal, relative_error, scaled, to_torch


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_the_layer_is_that_of_diffusers(scale, std, cross):
    torch = pytest.importorskip("torch")
    from diffusers.models.attention_processor import Attention as TorchAttention

    torch.manual_seed(0)
    width = 20 if cross else 32
    twin = scaled(TorchAttention(32, cross_attention_dim=width if cross else None, heads=4, dim_head=8), scale)
    model = load(abstract(Attention, 32, width, 4, dtype=jnp.float32), twin)
    hidden, states = normal(2, 12, 32, std=std), normal(2, 7, width, std=std, seed=1) if cross else None
    expected = twin(to_torch(hidden), to_torch(states) if cross else None)
    assert relative_error(model(hidden, states), expected) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1])
def test_the_feed_forward_layer_is_that_of_diffusers(scale, std):
    torch = pytest.importorskip("torch")
    from diffusers.models.attention import FeedForward as TorchFeedForward

    torch.manual_seed(0)
    twin = scaled(TorchFeedForward(32, activation_fn="geglu"), scale)
    model = load(abstract(FeedForward, 32, dtype=jnp.float32), twin)
    hidden = normal(2, 12, 32, std=std)
    assert relative_error(model(hidden), twin(to_torch(hidden))) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1, 0.01])
def test_the_transformer_block_is_that_of_diffusers(scale, std):
    torch = pytest.importorskip("torch")
    from diffusers.models.attention import BasicTransformerBlock as TorchBlock

    torch.manual_seed(0)
    twin = scaled(TorchBlock(32, 4, 8, cross_attention_dim=20), scale)
    model = load(abstract(BasicTransformerBlock, 32, 20, 4, dtype=jnp.float32), twin)
    hidden, states = normal(2, 12, 32, std=std), normal(2, 7, 20, seed=1)
    expected = twin(to_torch(hidden), encoder_hidden_states=to_torch(states))
    assert relative_error(model(hidden, states), expected) < TOLERANCE
