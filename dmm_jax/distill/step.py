"""The compiled step: one program draws the noise, asks the teachers, and updates student, moments and style table.

The whole of it runs under one `shard_map`, so nothing is left to the partitioner's guess: a `vmap` over teachers'
convolutions would give silently wrong numbers on several devices. Every random number is a function of (seed, step,
sample), so the result depends neither on the mesh nor on how often the run was resumed.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dmm_jax import sharding
from dmm_jax.diffusion import schedule as noise_schedule
from dmm_jax.distill import losses
from dmm_jax.models.text_encoders import TextConditioning


@dataclasses.dataclass(frozen=True)
class Networks:
    """The structure (NNX graph definitions) of the networks whose parameters the step is given."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef
    text_encoders: nnx.GraphDef  # Of one checkpoint: one, or SDXL's two.
    check_vma: bool = True  # Whether shard_map may check what varies over the mesh: not with a library's Pallas kernel.


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, and how the samples are drawn."""

    alphas_cumprod: tuple[float, ...]
    feature_loss_weight: float
    feature_loss: str
    prompt_dropout: float
    empty_ids: tuple[tuple[int, ...], ...]  # Rows that stand for no prompt, equally often: "", and SDXL's zeros.


def draw(objective: Objective, step_key: jax.Array, sample_ids: jax.Array, batch: dict) -> dict:
    """Adds noise (B, h, w, C), uniform timesteps (B,) and dropped prompts to a batch: each from its sample's own key.

    ONE drop mask serves student and teacher: with two, guidance of the student would be ruined (the released code's
    fault).
    """

    def one(sample_id):
        for_noise, for_time, for_drop = jax.random.split(jax.random.fold_in(step_key, sample_id), 3)
        noise = jax.random.normal(for_noise, batch["latents"].shape[1:])
        timestep = jax.random.randint(for_time, (), 0, len(objective.alphas_cumprod))
        return noise, timestep, jax.random.uniform(for_drop)

    noise, timesteps, drawn = jax.vmap(one)(sample_ids)
    empty = jnp.asarray(objective.empty_ids)  # (R, L)
    row = jnp.floor(drawn / max(objective.prompt_dropout, 1e-9) * len(empty))  # Past the last: the prompt is kept.
    empty = empty[jnp.clip(row, 0, len(empty) - 1).astype(jnp.int32)]
    input_ids = jnp.where((drawn < objective.prompt_dropout)[:, None], empty, batch["input_ids"])
    return batch | {"noise": noise, "timesteps": timesteps, "input_ids": input_ids}


def sample_errors(networks: Networks, objective: Objective, student, teachers, encoders, inputs: dict, style_ids):
    """Returns the score errors and feature errors, each (T, b), of the teachers that live here.

    Args:
      student: its parameters, whole.
      teachers: {"unet": parameters (T, ...), "encoder": (T,) int, -1 for the base's text encoders}.
      encoders: {"base": parameters, "others": parameters (K, ...) or None}.
      inputs: leaves (T, b, ...): latents, noise, timesteps, input_ids; and SDXL's time_ids.
      style_ids: (T,) rows of the style table.
    """
    flat = jax.tree.map(lambda leaf: leaf.reshape((-1,) + leaf.shape[2:]), inputs)
    alphas_cumprod = jnp.asarray(objective.alphas_cumprod, jnp.float32)
    noisy = noise_schedule.add_noise(flat["latents"], flat["noise"], flat["timesteps"], alphas_cumprod)
    text = encode(networks, encoders["base"], flat["input_ids"])
    num_teachers, per_teacher = inputs["timesteps"].shape

    def split(leaf):
        return leaf.reshape((num_teachers, per_teacher) + leaf.shape[1:])

    time_ids = inputs.get("time_ids")
    with_features = objective.feature_loss_weight > 0

    def ask(_, teacher):
        unet, encoder, noisy, timesteps, input_ids, text, time_ids = teacher
        if encoders["others"] is not None:
            text = jax.lax.cond(
                encoder < 0,
                lambda: text,
                lambda: encode(networks, jax.tree.map(lambda leaf: leaf[encoder], encoders["others"]), input_ids),
            )
        added = text.added_cond(time_ids)
        output = nnx.merge(networks.teacher, unet)(noisy, timesteps, text.encoder_hidden_states, added_cond=added)
        return None, (output.sample, output.features if with_features else ())

    given = (split(noisy), inputs["timesteps"], inputs["input_ids"], jax.tree.map(split, text), time_ids)
    _, targets = jax.lax.scan(ask, None, (teachers["unet"], teachers["encoder"], *given))
    targets = jax.lax.stop_gradient(jax.tree.map(lambda leaf: leaf.reshape((-1,) + leaf.shape[2:]), targets))

    model = nnx.merge(networks.student, student)
    rows = jax.nn.one_hot(jnp.repeat(style_ids, per_teacher), model.num_models)
    styled = {"style_embedding": model.style_embedding(rows), "added_cond": text.added_cond(flat.get("time_ids"))}
    output = model(noisy, flat["timesteps"], text.encoder_hidden_states, **styled)
    score = losses.score_error(output.sample, targets[0])
    feature = jnp.zeros_like(score)
    if with_features:
        feature = losses.feature_error(output.features, targets[1], objective.feature_loss)
    return split(score), split(feature)


def encode(networks: Networks, text_encoders, input_ids) -> TextConditioning:
    """Runs a checkpoint's text encoders: token ids (B, L) to what conditions its UNet."""
    return jax.lax.stop_gradient(nnx.merge(networks.text_encoders, text_encoders)(input_ids))


def gather(path, param: jax.Array, spec: P, dtype) -> jax.Array:
    """Makes a parameter whole; kernels travel in the compute dtype, tables, norms and biases in float32."""
    if path[-1].key == "kernel":
        param = param.astype(dtype)
    for dim, axis in enumerate(spec):
        if axis is not None:
            param = jax.lax.all_gather(param, axis, axis=dim, tiled=True)
    return param


def _on_missing_axes(function, leaf, spec):
    axes = tuple(axis for axis in sharding.AXES if axis not in spec)
    return function(leaf, axes) if axes else leaf


def local_ids(mesh: Mesh | AbstractMesh, num_teachers: int, per_teacher: int) -> tuple[jax.Array, jax.Array]:
    """Returns the style ids (T,) and global sample ids (T, b) of this device's part of a batch; inside shard_map."""
    column = jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")
    style_ids = jax.lax.axis_index("teacher") * num_teachers + jnp.arange(num_teachers)
    in_style = column * per_teacher + jnp.arange(per_teacher)
    columns = mesh.shape["data"] * mesh.shape["fsdp"]
    return style_ids, style_ids[:, None] * (columns * per_teacher) + in_style[None, :]


def build_loss_and_grads(
    networks: Networks,
    objective: Objective,
    mesh: Mesh | AbstractMesh,
    specs,
    *,
    dtype,
    gradient_accumulation: int,
    seed: int,
) -> Callable:
    """Returns `f(params, teachers, encoders, batch, step) -> (grads, errors)` under one shard_map.

    grads are of the mean over the whole batch, placed like params; errors are per teacher, (N,).
    """
    varying = partial(jax.lax.pcast, to="varying")

    def loss_fn(params, sample_ids, batch, teachers, encoders, style_ids, step_key):
        whole = jax.tree.map_with_path(partial(gather, dtype=dtype), params, specs)
        inputs = jax.vmap(partial(draw, objective, step_key))(sample_ids, batch)
        score, feature = sample_errors(networks, objective, whole, teachers, encoders, inputs, style_ids)
        loss = jnp.mean(score) + objective.feature_loss_weight * jnp.mean(feature)
        return loss / (mesh.size * gradient_accumulation), {
            "score": jnp.mean(score, 1),
            "feature": jnp.mean(feature, 1),
        }

    def local(params, teachers, encoders, batch, step):
        style_ids, sample_ids = local_ids(mesh, *batch["input_ids"].shape[:2])
        step_key = jax.random.fold_in(jax.random.key(seed), step)
        params = jax.tree.map(partial(_on_missing_axes, varying), params, specs)

        def grads_of(sample_ids, batch):
            differentiate = jax.value_and_grad(loss_fn, has_aux=True)
            (_, errors), grads = differentiate(params, sample_ids, batch, teachers, encoders, style_ids, step_key)
            return grads, errors

        if gradient_accumulation == 1:
            grads, errors = grads_of(sample_ids, batch)
        else:
            grads, errors = _sum_over_micro_batches(grads_of, gradient_accumulation, (sample_ids, batch))
        grads = jax.tree.map(partial(_on_missing_axes, jax.lax.psum), grads, specs)
        share = mesh.shape["data"] * mesh.shape["fsdp"] * gradient_accumulation
        return grads, jax.tree.map(lambda leaf: jax.lax.psum(leaf, ("data", "fsdp")) / share, errors)

    in_specs = (specs, sharding.TEACHERS, sharding.COPY, sharding.BATCH, sharding.COPY)
    out_specs = (specs, sharding.TEACHERS)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=networks.check_vma)


def _sum_over_micro_batches(grads_of, num_micro_batches, batch):
    """Sums `grads_of` over slices of (T, b, ...) leaves along b; every slice holds every teacher."""
    sliced = jax.tree.map(lambda leaf: _micro_batches(leaf, num_micro_batches), batch)
    first, rest = (jax.tree.map(lambda leaf, part=part: leaf[part], sliced) for part in (0, slice(1, None)))
    added, _ = jax.lax.scan(
        lambda sums, part: (jax.tree.map(jnp.add, sums, grads_of(*part)), None), grads_of(*first), rest
    )
    return added


def _micro_batches(leaf, num_micro_batches):
    num_teachers, per_teacher = leaf.shape[:2]
    leaf = leaf.reshape((num_teachers, num_micro_batches, per_teacher // num_micro_batches) + leaf.shape[2:])
    return jnp.moveaxis(leaf, 1, 0)  # (A, T, b / A, ...)


def build_step(loss_and_grads: Callable, optimizer: optax.GradientTransformation, ema_decay: float) -> Callable:
    """Returns `step(state, teachers, encoders, batch) -> (state, metrics)`: one update, ready to be compiled.

    Where the gradient or a loss is not finite, params, moments and average stay as they are: the step is counted as
    skipped, and nothing else happens.
    """

    def step(state, teachers, encoders, batch):
        grads, errors = loss_and_grads(state["params"], teachers, encoders, batch, state["step"])
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state}
        if ema_decay:
            new["ema"] = optax.incremental_update(params, state["ema"], 1.0 - ema_decay)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(errors["score"] + errors["feature"]).all()
        new = jax.tree.map(partial(jnp.where, finite), new, {name: state[name] for name in new})
        counters = {
            "step": state["step"] + 1,
            "skipped_steps": state["skipped_steps"] + ~finite,
            "skipped_in_a_row": jnp.where(finite, 0, state["skipped_in_a_row"] + 1),
        }
        return new | counters, errors | {"grad_norm": grad_norm} | {k: v for k, v in counters.items() if k != "step"}

    return step


def compile_step(step, state, teachers, encoders, batch) -> tuple[jax.stages.Compiled, dict]:
    """Compiles a jitted step, and lays the teachers out in memory as the program wants to read them.

    Convolutions on GPUs read their kernels with the output channel first: laid out otherwise, the kernels of all
    teachers would be turned over at every step.

    Args:
      step: jitted so that the layout of its teachers is the compiler's choice (`teacher_formats`).

    Returns:
      The program, and the teachers to call it with; those that were given are given up.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), teachers)
    compiled = step.lower(state, shapes, encoders, batch).compile()
    wanted = compiled.input_formats[0][1]
    return compiled, jax.tree.map(lambda leaf, kept: jax.device_put(leaf, kept, donate=True), teachers, wanted)


def teacher_formats(teachers):
    """Returns shardings of a tree of arrays or shapes that leave the layout to the compiler."""
    return jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), teachers)


def build_validation(networks: Networks, objective: Objective, mesh: Mesh, specs, *, dtype) -> Callable:
    """Returns `f(params, teachers, encoders, inputs) -> score errors (N, V)`; inputs hold noise and timesteps."""

    def local(params, teachers, encoders, inputs):
        whole = jax.tree.map_with_path(partial(gather, dtype=dtype), params, specs)
        style_ids, _ = local_ids(mesh, *inputs["input_ids"].shape[:2])
        return sample_errors(networks, objective, whole, teachers, encoders, inputs, style_ids)[0]

    in_specs = (specs, sharding.TEACHERS, sharding.COPY, sharding.BATCH)
    checked = networks.check_vma
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=sharding.BATCH, check_vma=checked)
