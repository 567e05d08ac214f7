"""The path is the key: every tensor converts to PyTorch and back, bit for bit, or an error names it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel

NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


class Toy(nnx.Module):
    """Every kind of layer that owns parameters, and a list."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.net = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Conv(2, 4, (3, 5), rngs=rngs)])
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.table = nnx.Embed(7, 2, rngs=rngs)


SHAPES = {
    "net.0.weight": (3, 2), "net.0.bias": (3,), "net.1.weight": (4, 2, 3, 5), "net.1.bias": (4,),
    "norm.weight": (4,), "norm.bias": (4,), "table.weight": (7, 2),
}  # fmt: skip


@pytest.fixture
def toy():
    return nnx.to_pure_dict(nnx.state(Toy(), nnx.Param))


def random_tensors(shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def test_the_path_is_the_key_and_kernels_put_output_axes_first(toy):
    assert naming.torch_shapes(toy) == SHAPES
    assert {key: array.shape for key, array in naming.to_torch(toy).items()} == SHAPES
    kernel = toy["net"][1]["kernel"]
    np.testing.assert_array_equal(naming.to_torch(toy)["net.1.weight"][3, 1, 2, 4], kernel[2, 4, 1, 3])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_over_and_back_is_the_identity_in_every_dtype(toy, dtype):
    tensors = random_tensors(SHAPES, dtype)
    back = naming.to_torch(naming.from_torch(toy, tensors))
    assert set(back) == set(tensors)
    for key, array in tensors.items():
        assert back[key].dtype == array.dtype and back[key].tobytes() == array.tobytes()


def test_equal_dtypes_are_views_and_others_are_cast(toy):
    tensors = random_tensors(SHAPES)
    assert np.shares_memory(naming.from_torch(toy, tensors, np.float32)["net"][0]["kernel"], tensors["net.0.weight"])
    half = naming.from_torch(toy, tensors, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}


def test_all_missing_unexpected_and_misshapen_keys_are_listed_at_once(toy):
    tensors = random_tensors(SHAPES)
    del tensors["net.0.bias"], tensors["table.weight"]
    tensors |= {"norm.weight": np.zeros(5), "extra.weight": np.zeros(1), "lora.alpha": np.zeros(())}
    with pytest.raises(CheckpointError) as caught:
        naming.from_torch(toy, tensors, where="unet of X")
    message = str(caught.value)
    assert message.startswith("unet of X")
    assert "2 missing: net.0.bias, table.weight" in message
    assert "2 unexpected: extra.weight, lora.alpha" in message
    assert "1 misshapen: norm.weight (expected (4,), found (5,))" in message


def test_long_lists_are_capped_and_hostile_names_made_printable(toy):
    tensors = random_tensors(SHAPES) | {f"\x1b[31m{number:03d}": np.zeros(1) for number in range(50)}
    with pytest.raises(CheckpointError, match="50 unexpected.* and 30 more") as caught:
        naming.from_torch(toy, tensors)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_tensor_with_nan_or_infinity_is_named(toy, value, dtype):
    tensors = random_tensors(SHAPES, dtype)
    tensors["net.1.weight"][0, 0, 0, 0] = value
    tensors["norm.bias"][-1] = value
    with pytest.raises(CheckpointError, match="NaN or infinity in net.1.weight, norm.bias"):
        naming.from_torch(toy, tensors, where="unet")
    naming.from_torch(toy, tensors, check_finite=False)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_values_beyond_the_first_block_are_checked(dtype):
    array = np.zeros((1 << 18) + 1, dtype)
    assert naming.is_finite(array)
    array[-1] = np.nan
    assert not naming.is_finite(array)


def test_the_largest_value_of_each_dtype_is_finite():
    assert not naming.is_finite(np.array([1e300]))
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32):
        assert naming.is_finite(np.array([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).tiny], dtype))
    assert naming.is_finite(np.array([-1], np.int32)) and naming.is_finite(np.zeros(0, np.float16))


def state_dict(module):
    return {key: tensor.detach().numpy() for key, tensor in module.state_dict().items()}


def config_of(stock, component):
    config = getattr(stock, component).config
    return config.to_diff_dict() if component == "text_encoder" else dict(config)


@pytest.mark.parametrize("component", NETWORKS)
def test_each_network_of_diffusers_goes_over_and_back_bit_for_bit(stock, component):
    stock_tensors = state_dict(getattr(stock, component))
    abstract = abstract_params(component, config_of(stock, component))
    back = naming.to_torch(naming.from_torch(abstract, stock_tensors))
    names = naming.spellings(stock_tensors)
    assert set(back) == set(names)
    for key, original in names.items():
        assert (
            back[key].shape == stock_tensors[original].shape
            and back[key].tobytes() == stock_tensors[original].tobytes()
        )


def test_both_spellings_of_the_vaes_attention_are_read(stock):
    stock_tensors = state_dict(stock.vae)
    old = {}
    for key, array in stock_tensors.items():
        for new, name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            if f"attentions.0.{new}." in key:
                array = array[:, :, None, None] if array.ndim == 2 else array  # As the oldest files hold them.
                key = key.replace(f".{new}.", f".{name}.")
        old[key] = array
    assert len(set(old) - set(stock_tensors)) == 16
    abstract = abstract_params("vae", dict(stock.vae.config))
    assert_equal(naming.from_torch(abstract, old), naming.from_torch(abstract, stock_tensors))


def test_the_prefix_and_position_ids_of_text_encoders_are_optional(stock):
    bare = {key.removeprefix("text_model."): array for key, array in state_dict(stock.text_encoder).items()}
    prefixed = {f"text_model.{key}": array for key, array in bare.items()}
    damaged = prefixed | {"text_model.embeddings.position_ids": np.full((1, 77), np.nan, np.float16)}
    abstract = abstract_params("text_encoder", config_of(stock, "text_encoder"))
    for tensors in (bare, damaged):
        assert_equal(naming.from_torch(abstract, tensors), naming.from_torch(abstract, prefixed))
    assert set(naming.to_torch(naming.from_torch(abstract, bare))) == set(prefixed)


def test_a_tensor_in_two_spellings_is_reported_and_not_dropped(stock):
    tensors = state_dict(stock.vae)
    tensors["encoder.mid_block.attentions.0.query.weight"] = np.zeros((64, 64), np.float32)
    with pytest.raises(CheckpointError, match="1 unexpected: encoder.mid_block.attentions.0.query.weight"):
        naming.from_torch(abstract_params("vae", dict(stock.vae.config)), tensors)


def test_only_the_vaes_attention_may_be_stored_as_a_convolution(stock):
    config = dict(stock.unet.config) | {"use_linear_projection": True}
    with pytest.raises(CheckpointError, match="misshapen: .*proj_in.weight"):
        naming.from_torch(abstract_params("unet", config), state_dict(stock.unet))


def assert_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)
