"""The optimisers, the learning rate's schedule and the average of the weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dmm_jax.config import options
from dmm_jax.distill import average
from dmm_jax.distill.optimizer import learning_rate_schedule, make_optimizers
from dmm_jax.models.block_loops import stack_blocks, unstack_blocks

SHAPES = {
    "conv_in": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "mid": {"conv": {"kernel": (3, 3, 8, 16), "bias": (16,)}, "to_q": {"kernel": (16, 8)}, "to_v": {"kernel": (8, 16)}},
    "model_embedding": {"embedding": (2, 16)},
}


def config_with(**changes):
    config = options.get_config()
    config.update({"learning_rate": 0.1, "warmup_steps": 0, "max_grad_norm": 0.0, "weight_decay": 0.0} | changes)
    return config


def random_tree(seed):
    """Returns random arrays of SHAPES."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32), SHAPES, is_leaf=lambda x: type(x) is tuple
    )


def first_update(**changes):
    """Returns the first update of parameters and the state after it."""
    optimizer = make_optimizers(config_with(**changes))["student"]
    params = random_tree(0)
    return optimizer.update(random_tree(1), optimizer.init(params), params, norm=1.0)


def test_muon_orthogonalises_kernels_from_inputs_to_outputs():
    updates, _ = first_update(optimizer="muon")
    for kernel in (
        updates["mid"]["conv"]["kernel"],
        updates["mid"]["to_q"]["kernel"],
        updates["mid"]["to_v"]["kernel"],
    ):
        matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1])
        values = np.linalg.svd(matrix, compute_uv=False) / (0.1 * 0.2 * np.sqrt(max(matrix.shape)))
        assert values.min() > 0.5 and values.max() < 1.3


def test_muon_leaves_tables_vectors_and_outer_layers_to_adamw():
    updates, state = first_update(optimizer="muon")
    adamw = optax.adamw(0.1, weight_decay=0.0, nesterov=True)
    expected, _ = adamw.update(random_tree(1), adamw.init(random_tree(0)), random_tree(0))
    for keys in (("model_embedding", "embedding"), ("conv_in", "kernel"), ("conv_in", "bias")):
        np.testing.assert_allclose(updates[keys[0]][keys[1]], expected[keys[0]][keys[1]], rtol=1e-5)
    np.testing.assert_allclose(updates["mid"]["conv"]["bias"], expected["mid"]["conv"]["bias"], rtol=1e-5)
    squares = [leaf.shape for leaf in jax.tree.leaves(optax.tree.get(state, "nu"))]
    assert sorted(squares) == sorted([(3, 3, 4, 8), (8,), (16,), (2, 16)])  # No second moments of other kernels.


def test_muon_updates_each_block_of_a_loop_as_it_would_alone():
    rng = np.random.default_rng(0)

    def blocks():
        kernels, biases = (rng.standard_normal((3, *shape), np.float32) for shape in ((16, 8), (8,)))
        parts = zip(kernels, biases, strict=True)
        block = {k: {"to_q": {"kernel": kernel}, "norm1": {"bias": bias}} for k, (kernel, bias) in enumerate(parts)}
        return {"mid": {"transformer_blocks": block}}

    def update(params, grads):
        optimizer = make_optimizers(config_with(optimizer="muon"))["student"]
        return optimizer.update(grads, optimizer.init(params), params, norm=1.0)[0]

    trees = blocks(), blocks()
    stacked = update(*(stack_blocks(tree, 2, jnp.stack) for tree in trees))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), unstack_blocks(stacked, list), update(*trees)
    )


def test_weight_decay_reaches_all_parameters_of_muon():
    without, _ = first_update(optimizer="muon")
    decayed, _ = first_update(optimizer="muon", weight_decay=0.5)
    jax.tree.map(
        lambda a, b, param: np.testing.assert_allclose(b - a, -0.1 * 0.5 * param, rtol=1e-3, atol=1e-6),
        without, decayed, random_tree(0),
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_styles_rate_can_be_larger(optimizer):
    plain, _ = first_update(optimizer=optimizer)
    scaled, _ = first_update(optimizer=optimizer, style_learning_rate_scale=3.0)
    for name, factor in (("model_embedding", 3.0), ("mid", 1.0)):
        jax.tree.map(lambda a, b, k=factor: np.testing.assert_allclose(b, k * a, rtol=1e-6), plain[name], scaled[name])


def test_a_constant_rate_falls_linearly_over_its_last_share():
    rate = learning_rate_schedule(config_with(num_steps=100, warmup_steps=10, decay_share=0.2))
    rates = [float(rate(step)) for step in (0, 10, 79, 80, 90, 99, 100)]
    assert rates == pytest.approx([0.0, 0.1, 0.1, 0.1, 0.05, 0.005, 0.0], abs=1e-8)


def test_a_decay_longer_than_the_run_begins_after_the_warm_up():
    rate = learning_rate_schedule(config_with(num_steps=20, warmup_steps=10, decay_share=0.9))
    assert [float(rate(step)) for step in (10, 15, 20)] == pytest.approx([0.1, 0.05, 0.0], abs=1e-8)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_the_average_has_the_width_that_the_config_names(width):
    decay = average.decay_schedule(config_with(ema_width=width))
    num_steps, weights = 4000, np.zeros(4000)
    for step in range(num_steps):
        weights *= decay(step)
        weights[step] += 1.0 - decay(step)
    steps = np.arange(num_steps) / num_steps
    mean = np.sum(weights * steps)
    assert weights.sum() == pytest.approx(1.0)
    assert np.sqrt(np.sum(weights * (steps - mean) ** 2)) == pytest.approx(width, rel=0.01)


def test_a_run_without_an_average_has_no_decay():
    assert average.decay_schedule(config_with()) is None
    assert average.decay_schedule(config_with(ema_decay=0.9))(7) == 0.9


def squared_distance(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), a, b)))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_first_moment_in_bfloat16_leaves_the_losses_equal(optimizer):
    """Over 20 steps, to 0.5 % of the first loss; its memory is half."""
    target = random_tree(2)

    def losses(dtype):
        made = make_optimizers(config_with(optimizer=optimizer, first_moment_dtype=dtype))["student"]
        params, results = random_tree(0), []
        state = made.init(params)

        @jax.jit
        def step(params, state):
            loss, grads = jax.value_and_grad(squared_distance)(params, target)
            updates, state = made.update(grads, state, params, norm=1.0)
            return optax.apply_updates(params, updates), state, loss

        for _ in range(20):
            params, state, loss = step(params, state)
            results.append(float(loss))
        return np.array(results), sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    (full, full_bytes), (half, half_bytes) = losses("float32"), losses("bfloat16")
    assert full[-1] < 0.5 * full[0] and half_bytes < 0.8 * full_bytes
    assert 0 < np.abs(half - full).max() < 0.005 * full[0]
