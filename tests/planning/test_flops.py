"""The counted operations are those of the mathematics, through every kind of inner program."""

import jax
import jax.numpy as jnp
import pytest

from dmm_jax.bench import networks, work
from dmm_jax.planning import flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def product(a, b):
    return a @ b


def test_a_product_takes_two_operations_per_multiply_add():
    assert flops.count(product, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert flops.count(jax.vmap(product), shape(11, 3, 5), shape(11, 5, 7)) == 11 * 2 * 3 * 5 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_takes_a_multiply_add_per_tap_and_input_channel(groups):
    def convolve(x, kernel):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    counted = flops.count(convolve, shape(2, 8, 8, 4), shape(3, 3, 4 // groups, 6))
    assert counted == 2 * (2 * 4 * 4 * 6) * (9 * 4 // groups)


def test_a_scan_counts_each_turn_and_a_branch_its_larger_side():
    def turns(x):
        return jax.lax.scan(lambda carry, _: (jax.jit(product)(carry, carry), None), x, length=5)[0]

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    once = 2 * 4**3
    assert flops.count(turns, shape(4, 4)) == 5 * once
    assert flops.count(branch, shape(4, 4)) == 2 * once
    assert flops.count(jax.checkpoint(branch), shape(4, 4)) == 2 * once


def test_the_unet_of_stable_diffusion_1_takes_0_803_tflop():
    # PyTorch's own counter gives 0.803 for the stock module on 64 x 64 latents. Ours saves work in three convolutions
    # of upsampled maps: 16 products instead of 36, on one more row and column.
    saved = sum(2 * c * c * (36 * n * n - 16 * (n + 1) ** 2) for c, n in ((1280, 8), (1280, 16), (640, 32)))
    assert work.unet_tflop(networks.abstract_checkpoint("sd15").unet_config) == pytest.approx(
        0.803 - saved / 1e12, abs=5e-4
    )
