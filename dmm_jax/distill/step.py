"""The compiled step: one program draws the noise, asks the teachers, and updates student, moments and style table.

The whole of it runs under one `shard_map`, so nothing is left to the partitioner's guess: a `vmap` over teachers'
convolutions would give silently wrong numbers on several devices. Every random number is a function of (seed, step,
sample), so the result depends neither on the mesh nor on how often the run was resumed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dmm_jax.diffusion import schedule as noise_schedule
from dmm_jax.diffusion.prediction import to_x0
from dmm_jax.distill import adversarial, losses
from dmm_jax.distill.teachers import stacked
from dmm_jax.models.text_encoders import TextConditioning
from dmm_jax.models.unet_2d_condition import UNetOutput
from dmm_jax.runtime import sharding

ONCE = ("teacher", "data")  # Along these the student is gathered and its gradients are summed once a step.
FOR_STYLE, FOR_DISCRIMINATOR = 3, 4  # Numbers of a sample's further keys.


@dataclasses.dataclass(frozen=True)
class Networks:
    """The structure (NNX graph definitions) of the networks whose parameters the step is given."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef
    text_encoders: nnx.GraphDef  # Of one checkpoint: one, or SDXL's two.
    discriminator: nnx.GraphDef | None = None  # Where there is an adversarial term.
    check_vma: bool = True  # Whether shard_map may check what varies over the mesh: not with a library's Pallas kernel.


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, and how the samples are drawn."""

    alphas_cumprod: tuple[float, ...]
    prediction_type: str
    feature_loss_weight: float
    feature_loss: str
    adversarial_weight: float
    prompt_dropout: float
    empty_ids: tuple[tuple[int, ...], ...]  # Rows that stand for no prompt, equally often: "", and SDXL's zeros.

    @property
    def weights(self) -> dict[str, float]:
        """The student's loss: the weight of each error's mean (DMM, arXiv:2504.12364, eq. 13)."""
        weights = {"score": 1.0, "feature": self.feature_loss_weight, "adversarial": self.adversarial_weight}
        return {name: weight for name, weight in weights.items() if weight}


def draw(objective: Objective, step_key: jax.Array, sample_ids: jax.Array, styles: jax.Array, batch: dict) -> dict:
    """Adds noise (B, h, w, C), uniform timesteps (B,), dropped prompts and styles (B,) to one teacher's batch.

    Each comes from its sample's own key. ONE drop mask serves student and teacher: with two, guidance of the student
    would be ruined (the released code's fault).

    Args:
      styles: (2,) the teacher's first style, and how many it teaches: each sample gets one of them.
    """

    def one(sample_id):
        key = jax.random.fold_in(step_key, sample_id)
        for_noise, for_time, for_drop = jax.random.split(key, 3)
        noise = jax.random.normal(for_noise, batch["latents"].shape[1:])
        timestep = jax.random.randint(for_time, (), 0, len(objective.alphas_cumprod))
        style_id = styles[0] + jax.random.randint(jax.random.fold_in(key, FOR_STYLE), (), 0, styles[1])
        more = {}
        if objective.adversarial_weight:
            again = jax.random.fold_in(key, FOR_DISCRIMINATOR)
            more = {"discriminator": adversarial.draw(again, noise.shape, len(objective.alphas_cumprod))}
        return noise, timestep, jax.random.uniform(for_drop), {"style_ids": style_id} | more

    noise, timesteps, drawn, more = jax.vmap(one)(sample_ids)
    empty = jnp.asarray(objective.empty_ids)  # (R, L)
    row = jnp.floor(drawn / max(objective.prompt_dropout, 1e-9) * len(empty))  # Past the last: the prompt is kept.
    empty = empty[jnp.clip(row, 0, len(empty) - 1).astype(jnp.int32)]
    input_ids = jnp.where((drawn < objective.prompt_dropout)[:, None], empty, batch["input_ids"])
    return batch | more | {"noise": noise, "timesteps": timesteps, "input_ids": input_ids}


def sample_errors(networks: Networks, objective: Objective, trained, teachers, encoders, inputs: dict) -> dict:
    """Returns the errors, each (T, b), of the teachers that live here.

    Args:
      trained: {"student": its parameters, whole}, and the "discriminator"'s where there is one.
      teachers: as `put_teachers` has them.
      encoders: {"base": parameters of its text encoders}, and the "backbone" of a discriminator whose head alone is
        trained.
      inputs: leaves (T, b, ...): latents, noise, timesteps, input_ids, style_ids; and SDXL's time_ids.

    Returns:
      {"score", "feature"}; with a discriminator also "adversarial", the student's, and "discriminator", its own.
    """
    lead = inputs["timesteps"].shape
    flat = jax.tree.map(_samples, inputs)
    alphas_cumprod = jnp.asarray(objective.alphas_cumprod, jnp.float32)
    noisy = noise_schedule.add_noise(flat["latents"], flat["noise"], flat["timesteps"], alphas_cumprod)
    text = encode(networks, encoders["base"], flat["input_ids"])
    targets = ask_teachers(networks, objective, teachers, inputs, noisy, text)

    model = nnx.merge(networks.student, trained["student"])
    added = text.added_cond(flat.get("time_ids"))
    styled = {"style_embedding": _style(model, flat["style_ids"]), "added_cond": added}
    output = model(noisy, flat["timesteps"], text.encoder_hidden_states, **styled)
    errors = {"score": losses.score_error(output.sample, targets.sample)}
    errors["feature"] = jnp.zeros_like(errors["score"])
    if objective.feature_loss_weight:
        errors["feature"] = losses.feature_error(output.features, targets.features, objective.feature_loss)
    if objective.adversarial_weight:
        alpha_bar = alphas_cumprod[flat["timesteps"]]
        x0 = [
            to_x0(prediction, noisy, alpha_bar, objective.prediction_type)
            for prediction in (output.sample, targets.sample)
        ]
        params = {"backbone": encoders.get("backbone")} | trained["discriminator"]
        judge = adversarial.judge(networks.discriminator, flat["discriminator"], alphas_cumprod, text, added)
        errors |= adversarial.errors(judge, params, *x0, flat["style_ids"], model.num_models)
    return jax.tree.map(lambda error: error.reshape(lead), errors)


def ask_teachers(networks: Networks, objective: Objective, teachers, inputs, noisy, text) -> UNetOutput:
    """Returns what the teachers predict for their part of the noisy latents (B, h, w, C), all at once.

    One program for a batch of networks: what has no parameters runs once for all images, dense layers are batched
    products, and convolutions run network by network (`layers.for_stacks`). Asked one after the other, eight teachers
    would be thousands of small kernels more.

    Args:
      text: what the base's text encoders make of the prompts; a teacher with encoders of its own asks those.
    """
    lead = inputs["timesteps"].shape

    def split(leaf):
        return leaf.reshape(lead + leaf.shape[1:])

    def prompted(encoder, input_ids, text):
        own = jax.tree.map(lambda leaf: leaf[encoder], teachers["text"])
        return jax.lax.cond(encoder < 0, lambda: text, lambda: encode(networks, own, input_ids))

    def ask(unet, noisy, inputs, text):
        model = nnx.merge(networks.teacher, unet)
        styled = {"style_embedding": _style(model, inputs["style_ids"]) if model.num_models else None}
        added = text.added_cond(inputs.get("time_ids"))
        output = model(noisy, inputs["timesteps"], text.encoder_hidden_states, **styled, added_cond=added)
        return output._replace(features=output.features if objective.feature_loss_weight else ())

    given = {name: inputs[name] for name in ("timesteps", "style_ids", "time_ids") if name in inputs}
    text = jax.tree.map(split, text)
    if teachers["text"] is not None:
        text = jax.lax.map(lambda row: prompted(*row), (teachers["encoder"], inputs["input_ids"], text))
    targets = jax.vmap(ask)(stacked(teachers["unet"]), split(noisy), given, text)
    return jax.lax.stop_gradient(jax.tree.map(_samples, targets))


def _samples(leaf):
    return leaf.reshape((-1,) + leaf.shape[2:])  # (T b, ...)


def _style(model, style_ids):
    """Returns rows of a table of styles; zeros for a style that it does not hold."""
    return model.style_embedding(jax.nn.one_hot(style_ids, model.num_models))


def encode(networks: Networks, text_encoders, input_ids) -> TextConditioning:
    """Runs a checkpoint's text encoders: token ids (B, L) to what conditions its UNet."""
    return jax.lax.stop_gradient(nnx.merge(networks.text_encoders, text_encoders)(input_ids))


def gather(path, param: jax.Array, spec: P, dtype, axes=sharding.AXES) -> jax.Array:
    """Joins a parameter's parts along axes; kernels travel in the compute dtype, tables and vectors in float32."""
    if path[-1].key == "kernel":
        param = param.astype(dtype)
    dims = sharding.divided_dims(spec)
    for axis in axes:
        if axis in dims:
            param = jax.lax.all_gather(param, axis, axis=dims[axis], tiled=True)
    return param


def _summed(grad: jax.Array, spec: P) -> jax.Array:
    """Sums a gradient over all devices; those that hold parts of the parameter are left theirs."""
    dims = sharding.divided_dims(spec)
    for axis in reversed(ONCE):
        if axis in dims:
            grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=dims[axis], tiled=True)
    return _on_missing_axes(jax.lax.psum, grad, spec)


def _on_missing_axes(function, leaf, spec):
    axes = tuple(axis for axis in sharding.AXES if axis not in sharding.divided_dims(spec))
    return function(leaf, axes) if axes else leaf


def local_ids(mesh: Mesh | AbstractMesh, num_teachers: int, per_teacher: int) -> jax.Array:
    """Returns the numbers (T, b) of the samples in this device's part of a batch; inside shard_map."""
    column = jax.lax.axis_index("data") * mesh.shape["fsdp"] + jax.lax.axis_index("fsdp")
    rows = jax.lax.axis_index("teacher") * num_teachers + jnp.arange(num_teachers)
    in_row = column * per_teacher + jnp.arange(per_teacher)
    columns = mesh.shape["data"] * mesh.shape["fsdp"]
    return rows[:, None] * (columns * per_teacher) + in_row[None, :]


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
    """Returns `f(trained, teachers, encoders, batch, step) -> (grads, errors)` under one shard_map.

    grads are of the mean over the whole batch, placed like the parameters: the student's of its loss, the
    discriminator's of its own. errors are per teacher, (N,), on every device. Along `teacher` and `data` parameters are
    gathered once, and gradients summed in float32; along `fsdp` every micro-batch does both, in the compute dtype.
    """
    varying = partial(jax.lax.pcast, to="varying")

    def loss_fn(trained, sample_ids, batch, teachers, encoders, step_key):
        whole = jax.tree.map_with_path(partial(gather, dtype=dtype, axes=("fsdp",)), trained, specs)
        inputs = jax.vmap(partial(draw, objective, step_key))(sample_ids, teachers["styles"], batch)
        errors = sample_errors(networks, objective, whole, teachers, encoders, inputs)
        weights = objective.weights | {"discriminator": 1.0}  # Neither of the two moves the other's parameters.
        loss = sum(weights[name] * jnp.mean(error) for name, error in errors.items() if name in weights)
        return loss / (mesh.size * gradient_accumulation), jax.tree.map(lambda error: jnp.mean(error, 1), errors)

    def local(trained, teachers, encoders, batch, step):
        sample_ids = local_ids(mesh, *batch["input_ids"].shape[:2])
        step_key = jax.random.fold_in(jax.random.key(seed), step)
        trained = jax.tree.map_with_path(partial(gather, dtype=dtype, axes=ONCE), trained, specs)
        trained = jax.tree.map(partial(_on_missing_axes, varying), trained, specs)
        if "backbone" in encoders:  # Gradients pass through it, and layers that write theirs out want all to vary.
            backbone = jax.tree.map(lambda leaf: varying(leaf, sharding.AXES), encoders["backbone"])
            encoders = encoders | {"backbone": backbone}

        def grads_of(sample_ids, batch):
            differentiate = jax.value_and_grad(loss_fn, has_aux=True)
            (_, errors), grads = differentiate(trained, sample_ids, batch, teachers, encoders, step_key)
            return jax.tree.map(lambda grad: grad.astype(jnp.float32), grads), errors

        if gradient_accumulation == 1:
            grads, errors = grads_of(sample_ids, batch)
        else:
            grads, errors = _sum_over_micro_batches(grads_of, gradient_accumulation, (sample_ids, batch))
        grads = jax.tree.map(_summed, grads, specs)
        share = mesh.shape["data"] * mesh.shape["fsdp"] * gradient_accumulation
        return grads, jax.tree.map(lambda leaf: _of_all_teachers(leaf, mesh) / share, errors)

    in_specs = (specs, sharding.TEACHERS, sharding.COPY, sharding.BATCH, sharding.COPY)
    out_specs = (specs, sharding.COPY)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=networks.check_vma)


def _of_all_teachers(error, mesh):
    """Sums (T,) over the devices of each teacher and returns it of all, (N,), on each device: one sum does both."""
    whole = jnp.zeros(error.shape[0] * mesh.shape["teacher"], error.dtype)
    first = jax.lax.axis_index("teacher") * error.shape[0]
    return jax.lax.psum(jax.lax.dynamic_update_slice_in_dim(whole, error, first, 0), sharding.AXES)


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


def build_step(loss_and_grads: Callable, norms_of: Callable, optimizers: Mapping, ema_decay: float) -> Callable:
    """Returns `step(state, teachers, encoders, batch) -> (state, metrics)`: one update, ready to be compiled.

    Where the gradient or a loss is not finite, params, moments and average stay as they are: the step is counted as
    skipped, and nothing else happens.

    Args:
      norms_of: see `clipping.build_norm`.
      optimizers: optax's, of what is trained: "student", perhaps "discriminator"; they are given the gradient's `norm`.
    """

    def step(state, teachers, encoders, batch):
        grads, errors = loss_and_grads(trained(state), teachers, encoders, batch, state["step"])
        norms = norms_of(grads)
        new = _updated(optimizers["student"], grads["student"], norms["student"], state)
        if ema_decay:
            new["ema"] = optax.incremental_update(new["params"], state["ema"], 1.0 - ema_decay)
        if "discriminator" in grads:
            given = grads["discriminator"], norms["discriminator"], state["discriminator"]
            new["discriminator"] = _updated(optimizers["discriminator"], *given)
        finite = jnp.isfinite(jnp.stack([sum(norms.values()), *(error.sum() for error in errors.values())])).all()
        new = jax.tree.map(partial(jnp.where, finite), new, {name: state[name] for name in new})
        skipped = {
            "skipped_steps": state["skipped_steps"] + ~finite,
            "skipped_in_a_row": jnp.where(finite, 0, state["skipped_in_a_row"] + 1),
        }
        return new | skipped | {"step": state["step"] + 1}, errors | skipped | {"grad_norm": norms["student"]}

    return step


def all_finite(state: Mapping) -> bool:
    """Tells whether all trained parameters are finite: what a run asks before it saves them.

    `build_step` keeps what is not finite out of the gradient; of a finite one AdamW makes finite parameters, but for
    rates near float32's end. Asking at every step would cost another reading of the whole state.
    """
    return bool(_all_finite(trained(state)))


@jax.jit
def _all_finite(params):
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def trained(state: Mapping) -> dict:
    """Returns the parameters in a training state, by network: the student's, perhaps the discriminator's."""
    there = {"student": state} | {name: state[name] for name in ("discriminator",) if name in state}
    return {name: held["params"] for name, held in there.items()}


def _updated(optimizer, grads, norm, held) -> dict:
    optimizer = optax.with_extra_args_support(optimizer)
    updates, opt_state = optimizer.update(grads, held["opt_state"], held["params"], norm=norm)
    return {"params": optax.apply_updates(held["params"], updates), "opt_state": opt_state}


# cuBLAS adds a layer's bias as it writes the product; the kernels that XLA would generate instead leave it to another.
# Joined, small products copy their weights at every step.
COMPILER_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}}


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
    compiled = step.lower(state, shapes, encoders, batch).compile(COMPILER_OPTIONS.get(jax.default_backend()))
    wanted = compiled.input_formats[0][1]
    return compiled, jax.tree.map(lambda leaf, kept: jax.device_put(leaf, kept, donate=True), teachers, wanted)


def teacher_formats(teachers):
    """Returns shardings of a tree of arrays or shapes that leave the layout to the compiler."""
    return jax.tree.map(lambda leaf: Format(Layout.AUTO, leaf.sharding), teachers)


def build_validation(networks: Networks, objective: Objective, mesh: Mesh, specs, *, dtype) -> Callable:
    """Returns `f(params, teachers, encoders, inputs) -> score errors (N, V)`; inputs hold noise, timesteps, styles."""
    objective = dataclasses.replace(objective, feature_loss_weight=0.0, adversarial_weight=0.0)

    def local(params, teachers, encoders, inputs):
        whole = jax.tree.map_with_path(partial(gather, dtype=dtype), params, specs)
        return sample_errors(networks, objective, {"student": whole}, teachers, encoders, inputs)["score"]

    in_specs = (specs, sharding.TEACHERS, sharding.COPY, sharding.BATCH)
    checked = networks.check_vma
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=sharding.BATCH, check_vma=checked)
