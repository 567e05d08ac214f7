"""`dmm-jax bench numerics`: what bfloat16 and the fused kernels change, against float32 throughout.

The same random parameters, batch, noise and timesteps for all. The student stands a tenth of the way from the teachers
to other weights, so that its loss is the difference of networks that are near each other, as in training.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dmm_jax.bench import networks as bench_networks
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.config import checks
from dmm_jax.distill.layout import COMPILER_OPTIONS
from dmm_jax.distillation import Definition
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.runtime import sharding

REFERENCE = ("float32", "xla")
MOVED = 0.1
NUM_PICTURES = 4  # Of the sample.


def bench_numerics(config, size: str) -> Iterator[dict]:
    """Yields a line for each arithmetic but the reference's: relative errors of a step, and of a sample.

    Of a step: of the loss, of the gradient's norm, and ||g - reference|| / ||reference|| of the whole gradient. Of a
    sample of 25 steps with guidance: the same of its latents.
    """
    checks.check(config)
    for variant, (loss, gradient), (right_loss, right) in _against_reference(config, lambda one: _step(one, size)):
        norm, right_norm = optax.tree.norm(gradient), optax.tree.norm(right)
        yield (
            variant
            | {
                "job": "numerics, a training step",
                "loss": float(loss),
                "loss_error": float(abs(loss - right_loss) / right_loss),
                "grad_norm_error": float(abs(norm - right_norm) / right_norm),
                "gradient_error": float(optax.tree.norm(jax.tree.map(jnp.subtract, gradient, right)) / right_norm),
                "batch": config.batch_size,
            }
        )
    for variant, latents, right in _against_reference(config, lambda one: _sample(one, size)):
        error = float(np.linalg.norm(latents - right) / np.linalg.norm(right))
        yield variant | {"job": "numerics, a 25-step sample", "latents_error": error, "batch": NUM_PICTURES}


def _against_reference(config, compute: Callable) -> Iterator[tuple[dict, object, object]]:
    """Yields what each arithmetic gives, beside what the reference gives."""
    wanted = [(config.dtype, "xla"), (config.dtype, choose_implementation(config.attention, config.dtype))]
    with jax.default_matmul_precision("highest"):
        right = compute(_with(config, *REFERENCE))
    for dtype, attention in dict.fromkeys(wanted):
        yield {"arithmetic": f"{dtype}, {attention}"}, compute(_with(config, dtype, attention)), right


def _with(config, dtype, attention):
    config = config.copy_and_resolve_references()
    config.dtype, config.attention = dtype, attention
    return config


def _step(config, size):
    """Returns the loss and the student's gradient of one step."""
    base, mesh = bench_networks.described(size), sharding.make_mesh(**config.mesh)
    definition = Definition(config, base, mesh)
    trained, teachers, frozen = bench_networks.random_networks(definition)
    other = bench_networks.random_params(abstract_params("unet", definition.student_config), mesh, fsdp=True, seed=1)
    trained["student"] = jax.tree.map(lambda a, b: a + MOVED * (b - a), trained["student"], other)
    options = COMPILER_OPTIONS.get(jax.default_backend())
    run = jax.jit(definition.gradients(trained), compiler_options=options)
    batch = sharding.put(bench_networks.random_batch(config, base), mesh, sharding.BATCH)
    gradient, errors = run(trained, teachers, frozen, batch, jnp.int32(1))
    loss = sum(
        weight * jnp.mean(errors[name]) for name, weight in definition.objective.weights.items() if name in errors
    )
    return loss, gradient["student"]


def _sample(config, size):
    """Returns the latents of a sample, each picture in another style."""
    names = [name for name, _ in config.teachers]
    styles = [names[k % len(names)] for k in range(NUM_PICTURES)]
    pipeline = bench_networks.random_pipeline(size, config)
    return pipeline(["a large red circle"] * NUM_PICTURES, styles=styles, output="latents", **bench_networks.SAMPLING)
