"""Estimated temporaries and traffic equal sums that a reader can do by hand."""

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


def test_a_product_counts_and_arguments_do_not():
    assert squares(lambda x: x @ x) == 1


def test_a_value_dies_with_its_last_reader():
    assert squares(lambda x: ((x @ x) @ x) @ x) == 2  # One is read while the next is written.


def test_a_value_lives_until_its_last_reader():
    def late(x):
        first = x @ x
        return ((first @ x) @ x) @ first

    assert squares(late) == 3


def test_elementwise_chains_occupy_nothing():
    assert squares(lambda x: jnp.exp(jnp.tanh(x @ x) * 2.0 + 1.0) @ x) == 2


def test_a_residual_stream_occupies_its_sum_not_its_terms():
    def residual(x):
        for _ in range(6):
            x = x + (x @ x)
        return x

    assert squares(residual) <= 3


def test_values_live_until_the_backward_pass_reads_them():
    def loss(x):
        for _ in range(5):
            x = jnp.tanh(x @ x)
        return x.sum()

    assert squares(jax.grad(loss)) >= 5


def test_recomputation_saves_the_values_inside_a_block():
    def block(x):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ x) @ x) @ x)

    def loss(block, x):
        for _ in range(4):
            x = block(x)
        return x.sum()

    plain = squares(jax.grad(lambda x: loss(block, x)))
    assert squares(jax.grad(lambda x: loss(jax.checkpoint(block), x))) < 0.7 * plain


def test_a_loop_occupies_its_body_once_and_all_stacked_results():
    def loop(x):
        return jax.lax.scan(lambda carry, _: ((carry @ x) @ x, carry), x, length=10)[1]

    assert 10 <= squares(loop) <= 13


def test_operands_of_a_product_live_until_its_gradient():
    """Five squares live at once; four if each reader recomputed the hyperbolic tangent."""

    def loss(weights, x):
        return ((jnp.tanh(x @ weights) @ weights) ** 2).sum()

    assert squares(jax.grad(loss), 2) == 5


def test_traffic_is_every_write_and_the_reads_of_each_operation():
    def moved(function):
        shape = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32)
        return lifetimes.traffic(jax.make_jaxpr(function)(shape).jaxpr) / SQUARE

    assert moved(lambda x: x @ x) == 2  # The same square on both sides is read once.
    assert moved(lambda x: jnp.exp(jnp.tanh(x @ x)) @ x) == 2 + 2 + 3  # A product, a fused chain, a product.
    looped = moved(lambda x: jax.lax.scan(lambda carry, _: (carry @ x, None), x, length=10)[0])
    assert 10 * 3 <= looped <= 10 * 3 + 2


def test_lanes_that_are_cut_from_a_kernel_result_occupy_nothing():
    """A kernel writes each sum of exponentials, which its gradient reads, 128 times, once per lane."""
    shape = jax.ShapeDtypeStruct((2, 4096, 1, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: flash_attention.flash_attention(x, x, x).sum()))(shape).jaxpr
    assert 0 < lifetimes.temporaries(jaxpr) < 2 * 4096 * 128 * 4


def test_the_parts_of_a_concatenation_are_read_where_they_are():
    """Each convolution of several teachers reads the kernel of one of them."""

    def parts(x, y):
        joined = jnp.concatenate([x, y])
        return (joined[:SIDE] @ y) @ joined[SIDE:]

    assert squares(parts, 2) == squares(lambda x, y: (x @ y) @ y, 2) == 2
    assert squares(lambda x, y: jnp.concatenate([x, y])[1 : SIDE + 1] @ y, 2) > 2  # No part: it is written.
