"""Laws of residual blocks and resampling: equal to diffusers' on small inputs, where a wrong epsilon shows."""

import jax.numpy as jnp
import pytest
from flax import nnx

from dmm_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from tests.models.torch_parity import SCALES, TOLERANCE, abstract, load, normal, relative_error, scaled, to_torch


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
@pytest.mark.parametrize("temb_channels", [48, None])
@pytest.mark.parametrize("channels", [(16, 16), (16, 24)], ids=["same width", "wider"])
def test_the_block_is_that_of_diffusers(scale, std, epsilon, temb_channels, channels):
    torch = pytest.importorskip("torch")
    from diffusers.models.resnet import ResnetBlock2D as TorchResnetBlock2D

    torch.manual_seed(0)
    common = {"temb_channels": temb_channels}
    twin = TorchResnetBlock2D(in_channels=channels[0], out_channels=channels[1], groups=8, eps=epsilon, **common)
    twin = scaled(twin, scale)
    model = abstract(ResnetBlock2D, *channels, num_groups=8, epsilon=epsilon, dtype=jnp.float32, **common)
    load(model, twin)
    hidden = normal(2, 6, 4, channels[0], std=std)
    temb = None if temb_channels is None else normal(2, temb_channels, seed=1)
    expected = twin(to_torch(hidden), None if temb is None else to_torch(temb))
    assert relative_error(model(hidden, temb), expected) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", [(6, 4), (5, 7)], ids=["even", "odd"])
def test_downsampling_pads_as_diffusers_does(scale, size):
    pytest.importorskip("torch")
    from diffusers.models.downsampling import Downsample2D as TorchDownsample2D

    twin = scaled(TorchDownsample2D(8, use_conv=True, padding=1, name="op"), scale)
    model = abstract(Downsample2D, 8, dtype=jnp.float32)
    load(model, twin)
    hidden = normal(2, *size, 8, std=0.1)
    assert relative_error(model(hidden), twin(to_torch(hidden))) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
def test_upsampling_is_that_of_diffusers(scale):
    pytest.importorskip("torch")
    from diffusers.models.upsampling import Upsample2D as TorchUpsample2D

    twin = scaled(TorchUpsample2D(8, use_conv=True), scale)
    model = abstract(Upsample2D, 8, dtype=jnp.float32)
    load(model, twin)
    hidden = normal(2, 3, 5, 8, std=0.1)
    assert relative_error(model(hidden), twin(to_torch(hidden))) < TOLERANCE


def test_a_bfloat16_block_keeps_the_dtype_of_its_input():
    model = ResnetBlock2D(16, 24, temb_channels=8, num_groups=8, epsilon=1e-5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    hidden, temb = normal(1, 4, 4, 16).astype(jnp.bfloat16), normal(1, 8).astype(jnp.bfloat16)
    assert model(hidden, temb).dtype == jnp.bfloat16
