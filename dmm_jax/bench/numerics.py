"""`dmm-jax bench numerics`: the errors of bfloat16 and of fused kernels, relative to float32 throughout.

All arithmetics have the same random parameters, batch, noise and timesteps. The student is a tenth of the way from the
teachers to other weights, so that its loss is a small difference of networks, as in training.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmm_jax.bench import networks as bench_networks
from dmm_jax.config import checks
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.layout import COMPILER_OPTIONS
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.runtime import sharding

REFERENCE = ("float32", "xla")
STUDENT_SHIFT = 0.1  # The student's part of the way from the teachers to other weights.
NUM_PICTURES = 4  # Pictures in the sample.


def measure(config, size: str) -> Iterator[dict]:
    """Yields a row per arithmetic for a training step, then for a sample of 25 steps with guidance.

    A step has relative errors of the loss, of the gradient's norm and of the whole gradient, which is
    ||g - reference|| / ||reference||. A sample has the same error of its latents.
    """
    checks.check(config)
    for about, (loss, gradient), (reference_loss, reference) in _compared(config, lambda each: _step(each, size)):
        norm, reference_norm = optax.tree.norm(gradient), optax.tree.norm(reference)
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, reference))
        yield about | {
            "job": "numerics, a training step",
            "loss": float(loss),
            "loss_error": float(abs(loss - reference_loss) / reference_loss),
            "grad_norm_error": float(abs(norm - reference_norm) / reference_norm),
            "gradient_error": float(difference / reference_norm),
            "batch": config.batch_size,
        }
    for about, latents, reference in _compared(config, lambda each: _sample(each, size)):
        error = float(np.linalg.norm(latents - reference) / np.linalg.norm(reference))
        yield about | {"job": "numerics, a 25-step sample", "latents_error": error, "batch": NUM_PICTURES}


def _compared(config, compute: Callable) -> Iterator[tuple[dict, object, object]]:
    """Yields ({"arithmetic": name}, its result, the reference's result) for each arithmetic of the config's dtype."""
    arithmetics = [(config.dtype, "xla"), (config.dtype, choose_implementation(config.attention, config.dtype))]
    with jax.default_matmul_precision("highest"):
        reference = compute(_with_arithmetic(config, *REFERENCE))
    for dtype, attention in dict.fromkeys(arithmetics):
        yield {"arithmetic": f"{dtype}, {attention}"}, compute(_with_arithmetic(config, dtype, attention)), reference


def _with_arithmetic(config, dtype, attention):
    config = config.copy_and_resolve_references()
    config.dtype, config.attention = dtype, attention
    return config


def _step(config, size):
    """Returns the loss and the student's gradient of one step."""
    base, mesh = bench_networks.abstract_checkpoint(size), sharding.make_mesh(**config.mesh)
    definition = Definition(config, base, mesh)
    trained, teachers, frozen = bench_networks.random_networks(definition)
    other = bench_networks.random_params(definition.abstract_state().student.params, mesh, fsdp=True, seed=1)
    trained["student"] = jax.tree.map(lambda a, b: a + STUDENT_SHIFT * (b - a), trained["student"], other)
    options = COMPILER_OPTIONS.get(jax.default_backend())
    run = jax.jit(definition.gradients(trained), compiler_options=options)
    batch = sharding.put(bench_networks.random_batch(config, base), mesh, sharding.BATCH)
    gradient, errors = run(trained, teachers, frozen, batch, jnp.int32(1))
    weights = definition.objective.weights
    loss = sum(weight * jnp.mean(errors[name]) for name, weight in weights.items() if name in errors)
    return loss, gradient["student"]


def _sample(config, size):
    """Returns the latents of a sample; the pictures take the styles in turn."""
    names = [name for name, _ in config.teachers]
    styles = [names[k % len(names)] for k in range(NUM_PICTURES)]
    pipeline = bench_networks.random_pipeline(size, config)
    return pipeline(["a large red circle"] * NUM_PICTURES, styles=styles, output="latents", **bench_networks.SAMPLING)
