"""The recipe's parts: scaling a VAE's latents, the training loop, and parameters on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.world import recipe
from dmm_jax.world.training import Fit, Plan, params_of
from tests.worlds import VAE


def test_scaled_latents_decode_to_the_same_image():
    graph, params = params_of(AutoencoderKL.from_config(VAE, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)), jnp.float32)
    with jax.numpy_rank_promotion("allow"):
        scaled = nnx.merge(graph, recipe.scale_latents(params, 3.0))
    plain = nnx.merge(graph, params)
    before, after = plain.encode(images), scaled.encode(images)
    np.testing.assert_allclose(after.mean, 3.0 * before.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after.logvar, before.logvar + 2.0 * np.log(3.0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scaled.decode(after.mean), plain.decode(before.mean), rtol=1e-4, atol=1e-5)


def test_fit_minimises_the_loss(capsys):
    def distance(params, data, rows, key):
        return jnp.sum((params["x"] - data["input_ids"][rows].mean(0)) ** 2)

    fit = Fit(distance, Plan(num_steps=200, batch_size=4), 0.1, average=0.9)
    params = fit({"x": jnp.zeros(3)}, {"input_ids": jnp.full((8, 3), 2.0)}, "test", seed=0)
    assert np.asarray(params["x"]) == pytest.approx(2.0, abs=0.05)
    assert [line.split(" loss")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"test: step {number}/200" for number in (1, 40, 90, 140, 190)
    ]


def test_networks_are_trained_once(tmp_path):
    params = {"blocks": {0: {"kernel": np.arange(3.0)}}, "bias": np.ones(2)}
    loaded = recipe.load_or_train(tmp_path / "raw", "net", lambda: params)
    assert jax.tree.map(np.array_equal, loaded, params) == {"blocks": {0: {"kernel": True}}, "bias": True}
    recipe.load_or_train(tmp_path / "raw", "net", lambda: pytest.fail("trained again"))
