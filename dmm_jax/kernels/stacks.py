"""Convolutions of several frozen networks that `jax.vmap` runs at once, such as all teachers of a device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


# The rule: the networks that `models.layers.for_stacks` marks. Left to `jax.vmap`, their convolutions would become one
# convolution in groups of channels, with transposes before and after it. A loop over whole networks launches 15,121
# kernels in a training step with eight teachers; this form and batched dense layers launch 6,658.
def network_by_network(convolve: Callable) -> Callable:
    """Returns `convolve(hidden, kernel, *options)` with a batching rule that is an unrolled loop.

    JAX cannot transpose it, so the networks must be frozen.
    """

    def run(hidden, kernel, *options):
        @jax.custom_batching.custom_vmap
        def run_one(hidden, kernel):
            return convolve(hidden, kernel, *options)

        @run_one.def_vmap
        def run_each(size, is_batched, *arrays):
            outputs = [
                run_one(*(leaf[k] if batched else leaf for leaf, batched in zip(arrays, is_batched, strict=True)))
                for k in range(size)
            ]
            return jnp.stack(outputs), True

        return run_one(hidden, kernel)

    return run
