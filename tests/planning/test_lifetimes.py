"""Estimated temporaries: sums that can be done by hand."""

import jax
import jax.numpy as jnp

from dmm_jax.kernels import flash_attention
from dmm_jax.planning import lifetimes

SIDE = 64
SQUARE = SIDE * SIDE * 4  # Bytes.


def temporaries(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return lifetimes.temporaries(jax.make_jaxpr(function)(*arguments).jaxpr)


def squares(function, num_arguments=1):
    return temporaries(function, *[(SIDE, SIDE)] * num_arguments) / SQUARE


def test_arguments_are_not_counted_and_a_product_is():
    assert squares(lambda x: x @ x) == 1


def test_a_value_dies_with_its_last_reader():
    assert squares(lambda x: ((x @ x) @ x) @ x) == 2  # One is read while the next is written.


def test_a_value_lives_until_its_last_reader():
    def late(x):
        first = x @ x
        return ((first @ x) @ x) @ first

    assert squares(late) == 3


def test_elementwise_chains_are_not_held():
    assert squares(lambda x: jnp.exp(jnp.tanh(x @ x) * 2.0 + 1.0) @ x) == 2


def test_a_residual_stream_is_held_once_not_by_all_that_was_added():
    def residual(x):
        for _ in range(6):
            x = x + (x @ x)
        return x

    assert squares(residual) <= 3


def test_what_the_backward_pass_reads_is_held_until_then():
    def loss(x):
        for _ in range(5):
            x = jnp.tanh(x @ x)
        return x.sum()

    assert squares(jax.grad(loss)) >= 5


def test_recomputation_saves_what_a_block_holds():
    def block(x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ x) @ x) @ x)

    def loss(block, x):
        for _ in range(4):
            x = block(x)
        return x.sum()

    plain = squares(jax.grad(lambda x: loss(block, x)))
    assert squares(jax.grad(lambda x: loss(jax.checkpoint(block), x))) < 0.7 * plain


def test_a_loop_holds_its_body_once_and_its_stacked_results_whole():
    def loop(x):
        return jax.lax.scan(lambda carry, _: ((carry @ x) @ x, carry), x, length=10)[1]

    assert 10 <= squares(loop) <= 13


def test_what_a_product_reads_is_written_and_held_until_its_gradient():
    """Five squares at once: with the hyperbolic tangent computed anew wherever it is read there would be four."""

    def loss(weights, x):
        return ((jnp.tanh(x @ weights) @ weights) ** 2).sum()

    assert squares(jax.grad(loss), 2) == 5


def test_traffic_is_what_is_written_and_what_each_operation_reads():
    def moved(function):
        shape = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
        return lifetimes.traffic(jax.make_jaxpr(function)(shape).jaxpr) / SQUARE

    assert moved(lambda x: x @ x) == 2  # The same square on both sides is read once.
    assert moved(lambda x: jnp.exp(jnp.tanh(x @ x)) @ x) == 2 + 2 + 3  # A product, a fused chain, a product.
    looped = moved(lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=10)[0])
    assert 10 * 3 <= looped <= 10 * 3 + 2


def test_what_a_kernel_writes_as_wide_as_lanes_and_is_cut_at_once_is_not_held():
    """The sums of a kernel's exponentials, which its gradient reads, come in rows of 128 equal numbers."""
    shape = jax.ShapeDtypeStruct((2, 4096, 1, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: flash_attention.flash_attention(x, x, x).sum()))(shape).jaxpr
    assert 0 < lifetimes.temporaries(jaxpr) < 2 * 4096 * 128 * 4
