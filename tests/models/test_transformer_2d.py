"""Laws of the transformer over cells: diffusers' for both kinds of projection, with a norm of epsilon 1e-6."""

import jax.numpy as jnp
import pytest

from dmm_jax.models.transformer_2d import Transformer2DModel
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, load, normal, relative_error, scaled, to_torch


def build(use_linear_projection, num_layers=1):
    return abstract(
        Transformer2DModel,
        32,
        20,
        4,
        num_layers,
        use_linear_projection=use_linear_projection,
        num_groups=8,
        dtype=jnp.float32,
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("use_linear_projection, num_layers", [(False, 1), (True, 2)], ids=["conv", "linear"])
def test_the_transformer_is_that_of_diffusers(scale, std, use_linear_projection, num_layers):
    torch = pytest.importorskip("torch")
    from diffusers.models.transformers.transformer_2d import Transformer2DModel as TorchTransformer2DModel

    torch.manual_seed(0)
    twin = TorchTransformer2DModel(
        4,
        8,
        in_channels=32,
        num_layers=num_layers,
        cross_attention_dim=20,
        norm_num_groups=8,
        use_linear_projection=use_linear_projection,
    )
    model = load(build(use_linear_projection, num_layers), scaled(twin, scale))
    hidden, states = normal(2, 4, 6, 32, std=std), normal(2, 7, 20, seed=1)
    expected = twin(to_torch(hidden), encoder_hidden_states=to_torch(states)).sample
    assert relative_error(model(hidden, states), expected) < TOLERANCE


def test_the_config_chooses_dense_layers_or_1x1_convolutions():
    assert build(False).proj_in.kernel.shape == (1, 1, 32, 32)
    assert build(True).proj_out.kernel.shape == (32, 32)
