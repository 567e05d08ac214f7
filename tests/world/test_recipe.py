"""The recipe's parts: scaling a VAE's latents, the training loop, and parameters on disk."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.studies import emoji_stages
from dmm_jax.world import recipe, training
from dmm_jax.world.training import Fit, Plan, Stretch, StretchOver, params_of
from tests.worlds import VAE


def test_scaled_latents_decode_to_the_same_image():
    graph, params = params_of(AutoencoderKL.from_config(VAE, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)), jnp.float32)
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


@pytest.mark.parametrize("steps_per_stretch", [1, 3, 100])
def test_a_fit_does_not_depend_on_its_stretches(tmp_path, monkeypatch, steps_per_stretch):
    """Parameters, averages and moments continue; the rows and noise of a step depend on its number alone."""

    def noisy_distance(params, data, rows, key):
        targets = data["input_ids"][rows] + jax.random.normal(key, (4, 3))
        return jnp.sum((params["layers"][0]["x"] - targets.mean(0)) ** 2)

    fit, lines = Fit(noisy_distance, Plan(num_steps=8, batch_size=4), 0.1), []
    start, data = {"layers": {0: {"x": jnp.zeros(3)}}}, {"input_ids": jnp.arange(24.0).reshape(8, 3)}
    expected = fit(start, data, "test", seed=0)
    clock = map(float, range(10_000))
    monkeypatch.setattr(training, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    for _ in range(20):
        try:  # The clock goes on by a second when it is read.
            stretch = Stretch(tmp_path / "fit", next(clock) + 2 * steps_per_stretch, lines.append)
            params = fit(start, data, "test", seed=0, stretch=stretch)
            break
        except StretchOver as over:
            assert "of 8 is saved" in str(over)
    assert jax.tree.map(np.array_equal, params, expected) == {"layers": {0: {"x": True}}}
    assert lines[-1]["step"] == 8 and lines[-1]["num_steps"] == 8 and {line["step"] for line in lines} == {*range(1, 9)}


def test_padded_examples_are_not_read_and_share_the_compilation():
    def distance(params, data, rows, key):
        return jnp.sum((params["x"] - data["input_ids"][rows].mean(0)) ** 2)

    fit = Fit(distance, Plan(num_steps=5, batch_size=4), 0.1)
    for count in (5, 7):
        data = {"input_ids": jnp.arange(3.0 * count).reshape(count, 3)}
        plain = Fit(distance, fit.plan, 0.1)({"x": jnp.zeros(3)}, data, "plain", seed=0)
        padded = fit({"x": jnp.zeros(3)}, emoji_stages.padded(data, 9), "padded", seed=0)
        np.testing.assert_array_equal(padded["x"], plain["x"])
    assert fit.step._cache_size() == 1


def test_a_finished_fit_is_returned_again(tmp_path):
    fit = Fit(lambda params, data, rows, key: jnp.sum(params["x"] ** 2), Plan(num_steps=3, batch_size=1), 0.1)
    args = ({"x": jnp.ones(2)}, {"input_ids": jnp.zeros((1, 1))}, "test", 0)
    stretch = Stretch(tmp_path / "fit", float("inf"), lambda line: None)
    first = fit(*args, stretch)
    fit.step = lambda *_: pytest.fail("trained again")
    np.testing.assert_array_equal(fit(*args, stretch)["x"], first["x"])
