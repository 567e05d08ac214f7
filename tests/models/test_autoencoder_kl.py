"""Laws of the VAE: equal to diffusers' at both gates of scale, with its keys, sizes and epsilons."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dmm_jax.models.autoencoder_kl import Attention, AutoencoderKL, DiagonalGaussian, DownEncoderBlock2D
from tests.models.torch_parity import (
    SCALES,
    TOLERANCE,
    abstract,
    draw,
    load,
    normal,
    parameters,
    relative_error,
    scaled,
    to_torch,
)

# config.json of Stable Diffusion XL's VAE; that of Stable Diffusion 1 differs in sample_size and scaling_factor only.
FULL = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


def config_of(widths, **changes):
    levels = len(widths)
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": 4,
        **changes,
    }


TINY = config_of([8, 16])
VARIANTS = {
    "two levels": TINY,
    "one level": config_of([8], layers_per_block=2),
    "three levels, two layers": config_of([8, 12, 12], layers_per_block=2, norm_num_groups=2, latent_channels=3),
    "no 1x1 convolutions": config_of([8, 16], use_quant_conv=False, use_post_quant_conv=False),
    "no attention, grey": config_of([8, 16], mid_block_add_attention=False, in_channels=1, out_channels=1),
}


def pure(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


@functools.cache
def initial_params():
    """Returns initial parameters of TINY."""
    return pure(draw(abstract(AutoencoderKL.from_config, TINY)))


def tiny(dtype=jnp.float32, **changes):
    model = abstract(AutoencoderKL.from_config, {**TINY, **changes}, dtype=dtype)
    nnx.update(model, initial_params())
    return model


def num_parameters(model):
    return sum(leaf.size for _, leaf in parameters(model).values())


def torch_twin(config, scale):
    """Returns diffusers' VAE with PyTorch's initial weights times `scale`."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return scaled(diffusers.AutoencoderKL(**config), scale)


@functools.cache
def programs(name):
    """Returns a variant's shapes-only model, and its compiled encoder and decoder over parameters."""
    model = abstract(AutoencoderKL.from_config, VARIANTS[name])
    graph, _ = nnx.split(model, nnx.Param)
    encode = jax.jit(lambda params, images: nnx.merge(graph, params).encode(images))
    return model, encode, jax.jit(lambda params, latents: nnx.merge(graph, params).decode(latents))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", VARIANTS)
def test_encoding_and_decoding_are_those_of_diffusers(name, scale):
    config = VARIANTS[name]
    twin = torch_twin(config, scale)
    model, encode, decode = programs(name)
    params = pure(load(model, twin))

    images = normal(2, 16, 24, config.get("in_channels", 3))
    output, expected = encode(params, images), twin.encode(to_torch(images)).latent_dist
    assert relative_error(output.mean, expected.mean) < TOLERANCE
    assert relative_error(output.logvar, expected.logvar) < TOLERANCE
    assert relative_error(output.std, expected.std) < TOLERANCE

    latents = normal(2, 4, 6, config.get("latent_channels", 4))
    assert relative_error(decode(params, latents), twin.decode(to_torch(latents)).sample) < TOLERANCE


@pytest.mark.parametrize("size", [2.0, 0.1])
def test_the_attention_is_that_of_diffusers_on_large_and_small_inputs(size):
    pytest.importorskip("torch")
    from diffusers.models.attention_processor import Attention as TorchAttention

    twin = TorchAttention(
        16, heads=1, dim_head=16, eps=1e-6, norm_num_groups=4, residual_connection=True, bias=True, upcast_softmax=True
    )
    scaled(twin, 1.7)
    layer = abstract(Attention, 16, 4, dtype=jnp.float32)
    load(layer, twin)
    hidden = normal(2, 3, 5, 16, std=size)
    assert relative_error(jax.jit(layer)(hidden), twin(to_torch(hidden))) < TOLERANCE


@pytest.mark.parametrize("size", [1.0, 0.1])
def test_a_down_block_is_that_of_diffusers_on_even_and_odd_sizes(size):
    pytest.importorskip("torch")
    from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D as TorchBlock

    twin = scaled(TorchBlock(8, 12, num_layers=2, resnet_groups=4, downsample_padding=0), 1.7)
    block = abstract(DownEncoderBlock2D, 8, 12, 2, 4, True, dtype=jnp.float32)
    load(block, twin)
    hidden = normal(1, 6, 7, 8, std=size)
    assert relative_error(jax.jit(block)(hidden), twin(to_torch(hidden))) < TOLERANCE


def test_the_full_vae_has_248_tensors_and_83_65_million_parameters():
    model = abstract(AutoencoderKL.from_config, FULL)
    assert len(parameters(model)) == 248 and num_parameters(model) == 83_653_863
    assert model.scaling_factor == 0.13025 and model.downsampling == 8


def test_all_52_norms_have_epsilon_1e_6_and_are_float32():
    model = abstract(AutoencoderKL.from_config, FULL, dtype=jnp.bfloat16)
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.GroupNorm)]
    assert len(norms) == 52
    assert {(norm.epsilon, norm.use_fast_variance, norm.dtype) for norm in norms} == {(1e-6, False, jnp.float32)}


def test_the_log_variance_is_clipped_to_a_finite_deviation():
    model = tiny()
    bias = model.quant_conv.bias
    bias[...] = jnp.array([0.0] * 4 + [1e3, -1e3, 0.0, 0.0])
    logvar = jax.jit(model.encode)(normal(1, 4, 4, 3)).logvar
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all() and (jnp.abs(logvar[..., 2:]) < 20).all()


def test_samples_have_the_gaussians_mean_and_standard_deviation():
    mean, logvar = jnp.array([-3.0, 0.0, 5.0]), jnp.log(jnp.array([0.25, 1.0, 4.0]))
    gaussian = DiagonalGaussian(*(jnp.broadcast_to(x, (4, 50, 50, 3)) for x in (mean, logvar)))
    samples = gaussian.sample(jax.random.key(0))
    assert jnp.allclose(samples.mean((0, 1, 2)), mean, atol=0.06)
    assert jnp.allclose(samples.std((0, 1, 2)), gaussian.std[0, 0, 0], rtol=0.03)
    assert (samples == gaussian.sample(jax.random.key(0))).all()
    assert (samples != gaussian.sample(jax.random.key(1))).any()


def test_bfloat16_has_float32_parameters_and_outputs_and_is_close():
    images, latents = normal(1, 8, 8, 3), normal(1, 4, 4, 4)
    exact, rough = tiny(), tiny(jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(rough, nnx.Param)))
    for output, expected in [
        (jax.jit(rough.encode)(images).mean, jax.jit(exact.encode)(images).mean),
        (jax.jit(rough.decode)(latents), jax.jit(exact.decode)(latents)),
    ]:
        assert output.dtype == jnp.float32
        assert 1e-6 < jnp.abs(output - expected).max() / jnp.abs(expected).max() < 0.03


def test_force_upcast_computes_in_float32_instead_of_float16():
    latents = normal(1, 4, 4, 4)
    upcast, plain = tiny(jnp.float16, force_upcast=True), tiny(jnp.float16, force_upcast=False)
    assert (jax.jit(upcast.decode)(latents) == jax.jit(tiny().decode)(latents)).all()
    assert plain.decoder.conv_in.dtype == jnp.float16


def test_a_size_that_does_not_divide_into_latent_cells_is_refused():
    with pytest.raises(ValueError, match="multiples of 2 pixels; got 8 x 9"):
        tiny().encode(normal(1, 8, 9, 3))


def test_a_config_without_optional_fields_means_stable_diffusion_1():
    model = tiny()
    assert model.scaling_factor == 0.18215 and {"quant_conv.weight", "post_quant_conv.bias"} < set(parameters(model))


def test_unsupported_fields_and_values_are_all_named():
    unsupported = {"act_fn": "gelu", "shift_factor": 0.1, "down_block_types": ["AttnDownEncoderBlock2D"] * 2, "new": 1}
    with pytest.raises(ValueError) as error:
        tiny(**unsupported)
    assert all(name in str(error.value) for name in unsupported)
    tiny(shift_factor=None, latents_mean=None, latents_std=None, act_fn="silu", sample_size=64)


def test_two_builds_of_one_config_share_a_graph():
    graphs = [nnx.split(tiny(force_upcast=upcast))[0] for upcast in (True, True, False)]
    assert graphs[0] == graphs[1] == graphs[2] and hash(graphs[0]) == hash(graphs[1])
    assert graphs[0] != nnx.split(tiny(jnp.bfloat16))[0]


def test_the_split_model_runs_under_jit_and_differentiates():
    graph, params = nnx.split(tiny(), nnx.Param)
    images = normal(1, 8, 8, 3)

    def loss(params):
        model = nnx.merge(graph, params)
        return jnp.mean((model.decode(model.encode(images).mean) - images) ** 2)

    gradients = jax.jit(jax.grad(loss))(nnx.to_pure_dict(params))
    assert jnp.isfinite(gradients["encoder"]["conv_in"]["kernel"]).all()
    assert (gradients["encoder"]["conv_in"]["kernel"] != 0).any()


@pytest.mark.parametrize("scaling_factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scaling_factor_that_is_not_positive_is_refused(scaling_factor):
    with pytest.raises(ValueError, match="scaling_factor of the VAE must be a positive number"):
        AutoencoderKL(scaling_factor=scaling_factor, rngs=nnx.Rngs(0))
