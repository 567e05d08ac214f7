"""The compiled step: one program draws noise, asks the teachers, and updates student, moments and style table.

Teachers, student and gradients run under one `shard_map`: a `vmap` over teachers' convolutions under plain `jit` gives
silently wrong numbers on several devices. Clipping, AdamW and the average are elementwise; the partitioner places them.
Every random number is a function of (seed, step, sample), so the result depends neither on the mesh nor on how often
the run was resumed.

Shapes: N teachers, T of them on this device; b samples of each teacher on this device; A micro-batches; V samples of
the validation set.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dmm_jax.distill.mixed_styles import draw_mix
from dmm_jax.distill.objective import (
    SHIFT_ID,
    Inputs,
    Networks,
    Objective,
    ask_teachers,
    draw_inputs,
    sample_errors,
)
from dmm_jax.distill.state import Trained, TrainState
from dmm_jax.distill.vectors import JoinedVectors
from dmm_jax.runtime import sharding

GATHERED_ONCE = ("teacher", "data")  # Axes along which a step gathers the student, and sums its gradients, once.


def gather(path, param: jax.Array, spec: P, dtype, axes=sharding.AXES) -> jax.Array:
    """Joins a parameter's parts along axes; kernels travel in the compute dtype, tables and vectors in float32."""
    if path[-1].key == "kernel":
        param = param.astype(dtype)
    dims = sharding.divided_dims(spec)
    for axis in axes:
        if axis in dims:
            param = jax.lax.all_gather(param, axis, axis=dims[axis], tiled=True)
    return param


def sum_gradient(grad: jax.Array, spec: P) -> jax.Array:
    """Sums a gradient over all devices; each device keeps the part of the parameter that it holds."""
    dims = sharding.divided_dims(spec)
    for axis in reversed(GATHERED_ONCE):
        if axis in dims:
            grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dims[axis], tiled=True)
    axes = copied_axes(spec)
    return jax.lax.psum(grad, axes) if axes else grad


def copied_axes(spec: P) -> tuple[str, ...]:
    """Returns the axes of the mesh along which every device has a copy of the parameter."""
    return tuple(axis for axis in sharding.AXES if axis not in sharding.divided_dims(spec))


def local_ids(mesh: Mesh | AbstractMesh, batch_rows: jax.Array, per_teacher: int) -> jax.Array:
    """Returns the numbers (T, b) of the samples in this device's part of a batch's rows (T,); inside shard_map."""
    columns = mesh.shape["data"] * mesh.shape["fsdp"]
    column = jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")
    return batch_rows[:, None] * (columns * per_teacher) + (column * per_teacher + jnp.arange(per_teacher))[None, :]


def build_gradients(
    networks: Networks,
    objective: Objective,
    mesh: Mesh | AbstractMesh,
    specs,
    *,
    dtype,
    gradient_accumulation: int,
    seed: int,
) -> Callable:
    """Returns `f(trained, teachers, frozen, batch, step, predictions=None) -> (grads, errors)` under one shard_map.

    The teachers are asked within it, unless their predictions are given, as `build_predictions`'s function returns
    them.

    grads are of the mean over the whole batch and placed like the parameters: the student's of its loss, the
    discriminator's of its own. errors are means per teacher, (N,), on every device.

    Along `teacher` and `data` the step gathers parameters once, and `sum_gradient` sums their gradients in float32.
    Along `fsdp` every micro-batch gathers them in the compute dtype, inside the differentiated function: the transpose
    of this gather is the sum of the gradients over `fsdp`.
    """

    def loss_fn(trained, sample_ids, batch, predictions, teachers, frozen, step_key):
        gathered = jax.tree.map_with_path(partial(gather, dtype=dtype, axes=("fsdp",)), trained, specs)
        inputs = jax.vmap(partial(draw_inputs, objective, step_key))(sample_ids, teachers.styles, batch)
        if objective.mix_every:
            inputs = inputs._replace(mix=draw_mix(step_key, SHIFT_ID, sample_ids, objective.mix_every))
        errors = sample_errors(networks, objective, gathered, teachers, frozen, inputs, predictions)
        # `adversarial.errors` stops the gradient of the student's term in the discriminator, and of the
        # discriminator's error in the student, so one backward pass serves both.
        weights = objective.weights | {"discriminator": 1.0}
        loss = sum(weights[name] * jnp.mean(error) for name, error in errors.items() if name in weights)
        share = mesh.size * gradient_accumulation  # The gradients of all devices and micro-batches are summed.
        return loss / share, jax.tree.map(lambda error: jnp.mean(error, 1), errors)

    def on_one_device(trained, teachers, frozen, batch, step, predictions):
        sample_ids = local_ids(mesh, teachers.batch_row, batch.input_ids.shape[1])
        step_key = jax.random.fold_in(jax.random.key(seed), step)
        trained = jax.tree.map_with_path(partial(gather, dtype=dtype, axes=GATHERED_ONCE), trained, specs)
        trained = jax.tree.map(lambda leaf, spec: _varying(leaf, copied_axes(spec)), trained, specs)
        for name in ("backbone", "student"):  # Gradients pass through them; custom ones need every input to vary.
            network = jax.tree.map(lambda leaf: _varying(leaf, sharding.AXES), getattr(frozen, name))
            frozen = frozen._replace(**{name: network})

        def grads_of(sample_ids, batch, predictions):
            differentiate = jax.value_and_grad(loss_fn, has_aux=True)
            (_, errors), grads = differentiate(trained, sample_ids, batch, predictions, teachers, frozen, step_key)
            return jax.tree.map(lambda grad: grad.astype(jnp.float32), grads), errors

        grads, errors = _sum_over_micro_batches(grads_of, gradient_accumulation, sample_ids, batch, predictions)
        grads = jax.tree.map(sum_gradient, grads, specs)
        parts = mesh.shape["data"] * mesh.shape["fsdp"] * gradient_accumulation
        return grads, jax.tree.map(lambda error: _gather_teachers(error, mesh) / parts, errors)

    in_specs = (specs, sharding.TEACHERS, sharding.COPY, sharding.BATCH, sharding.COPY, sharding.BATCH)
    options = {"in_specs": in_specs, "out_specs": (specs, sharding.COPY), "check_vma": networks.check_vma}
    mapped = jax.jit(jax.shard_map(on_one_device, mesh=mesh, **options), inline=True)  # Traced once: `flops` counts it.
    return lambda trained, teachers, frozen, batch, step, predictions=None: mapped(
        trained, teachers, frozen, batch, step, predictions
    )


def build_predictions(
    networks: Networks, objective: Objective, mesh: Mesh | AbstractMesh, *, gradient_accumulation: int, seed: int
) -> Callable:
    """Returns `f(teachers, frozen, batch, step) -> predictions` of rows of the batch (T, b, ...) under one shard_map.

    Noise, timesteps and prompts are those of the step. Micro-batches are asked one after another.
    """

    def on_one_device(teachers, frozen, batch, step):
        step_key = jax.random.fold_in(jax.random.key(seed), step)

        def predict(sample_ids, batch):
            inputs = jax.vmap(partial(draw_inputs, objective, step_key))(sample_ids, teachers.styles, batch)
            return ask_teachers(networks, objective, teachers, frozen, inputs)

        rows = local_ids(mesh, teachers.batch_row, batch.input_ids.shape[1]), batch
        if gradient_accumulation == 1:
            return predict(*rows)
        parts = jax.lax.map(lambda part: predict(*part), _micro_batches(rows, gradient_accumulation))
        return jax.tree.map(lambda leaf: jnp.concatenate(leaf, 1), parts)  # (A, T, b / A, ...) -> (T, b, ...)

    in_specs = (sharding.TEACHERS, sharding.COPY, sharding.BATCH, sharding.COPY)
    return jax.shard_map(
        on_one_device, mesh=mesh, in_specs=in_specs, out_specs=sharding.BATCH, check_vma=networks.check_vma
    )


def _varying(leaf, axes):
    """Marks a leaf as different on every device, so that no gradient is summed before `sum_gradient`."""
    return jax.lax.pcast(leaf, axes, to="varying") if axes else leaf


def _gather_teachers(error, mesh):
    """Sums (T,) over the devices of each teacher and returns all teachers' sums, (N,), with one collective."""
    padded = jnp.zeros(error.shape[0] * mesh.shape["teacher"], error.dtype)
    first = jax.lax.axis_index("teacher") * error.shape[0]
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(padded, error, first, 0), sharding.AXES)


def _sum_over_micro_batches(function, num_micro_batches, *batch):
    """Sums `function(*slices)` over slices of (T, b, ...) leaves along b; every slice holds every teacher."""
    if num_micro_batches == 1:
        return function(*batch)
    slices = _micro_batches(batch, num_micro_batches)
    first = jax.tree.map(lambda leaf: leaf[0], slices)
    rest = jax.tree.map(lambda leaf: leaf[1:], slices)
    add = lambda total, part: (jax.tree.map(jnp.add, total, function(*part)), None)  # noqa: E731
    return jax.lax.scan(add, function(*first), rest)[0]


def _micro_batches(batch, number: int):
    """Divides leaves (T, b, ...) along b, into (A, T, b / A, ...)."""

    def split(leaf):
        num_teachers, per_teacher = leaf.shape[:2]
        return jnp.moveaxis(leaf.reshape((num_teachers, number, per_teacher // number) + leaf.shape[2:]), 1, 0)

    return jax.tree.map(split, batch)


def build_step(gradients: Callable, update: Callable) -> Callable:
    """Returns `step(state, teachers, frozen, batch) -> (state, metrics)`, ready to be compiled."""

    def step(state: TrainState, teachers, frozen, batch):
        return update(state, *gradients(state.trained, teachers, frozen, batch, state.step))

    return step


def build_update(norms_of: Callable, optimizers: Mapping, ema_decay: optax.Schedule | None) -> Callable:
    """Returns `update(state, grads, errors) -> (state, metrics)`; arguments as `build_gradients`'s function returns.

    If the gradient or a loss is not finite, parameters, moments and average stay as they are; the step counts as
    skipped.

    Args:
      norms_of: see `clipping.build_norm`.
      optimizers: optax's, by network; their `update` gets the gradient's `norm`.
      ema_decay: see `average.decay_schedule`.
    """

    def updated(name, network, grads, norms):
        optimizer = optax.with_extra_args_support(optimizers[name])
        updates, opt_state = optimizer.update(grads[name], network.opt_state, network.params, norm=norms[name])
        return Trained(optax.apply_updates(network.params, updates), opt_state)

    def update(state: TrainState, grads, errors):
        norms = norms_of(grads)
        vectors = {name: JoinedVectors(params) for name, params in state.trained.items()}
        old = {name: vectors[name].join(getattr(state, name)) for name in grads}
        grads = {name: vectors[name].join(grad) for name, grad in grads.items()}
        new = {name: updated(name, old[name], grads, norms) for name in grads}
        if ema_decay:
            decay, vectors["ema"] = ema_decay(state.step - state.skipped_steps), vectors["student"]
            old["ema"] = vectors["ema"].join(state.ema)
            new["ema"] = optax.incremental_update(new["student"].params, old["ema"], 1.0 - decay)
        finite = jnp.isfinite(jnp.stack([sum(norms.values()), *(error.sum() for error in errors.values())])).all()
        finite = jax.lax.optimization_barrier(finite)
        new = jax.tree.map(partial(jnp.where, finite), new, old)
        new = {name: vectors[name].split(network) for name, network in new.items()}
        skipped = {
            "skipped_steps": state.skipped_steps + ~finite,
            "skipped_in_a_row": jnp.where(finite, 0, state.skipped_in_a_row + 1),
        }
        return state._replace(step=state.step + 1, **new, **skipped), errors | skipped | {"grad_norm": norms["student"]}

    return update


def build_validation(networks: Networks, objective: Objective, mesh: Mesh, specs, *, dtype) -> Callable:
    """Returns `f(student params, teachers, frozen, inputs) -> score errors (N, V)` of fixed `Inputs`."""
    objective = dataclasses.replace(objective, score_loss="l2", feature_loss_weight=0.0, adversarial_weight=0.0)

    def on_one_device(params, teachers, frozen, inputs: Inputs):
        student = jax.tree.map_with_path(partial(gather, dtype=dtype), params, specs)
        return sample_errors(networks, objective, {"student": student}, teachers, frozen, inputs)["score"]

    in_specs = (specs, sharding.TEACHERS, sharding.COPY, sharding.BATCH)
    return jax.shard_map(
        on_one_device, mesh=mesh, in_specs=in_specs, out_specs=sharding.BATCH, check_vma=networks.check_vma
    )
