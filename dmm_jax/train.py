"""The training run: mesh, data, networks, state, restore, loop. Read `run` from top to bottom."""

import contextlib
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from tqdm import tqdm

from dmm_jax import config as config_lib
from dmm_jax import sharding
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.data import pipeline as data_pipeline
from dmm_jax.data.cache import LatentCache
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import step as distill_step
from dmm_jax.distill import student as student_lib
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.metrics import MetricsLog
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel, merged_config
from dmm_jax.planning import memory
from dmm_jax.tokenizer import Tokenizer

NUM_TIMESTEP_BINS = 4  # Of the validation loss: 0-249, 250-499, 500-749, 750-999.


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Distils the teachers into one student under `workdir`; goes on from its newest checkpoint if it holds one.

    Writes config.json, metrics.jsonl, checkpoints/ and, if asked for, samples/. The result of a run that was stopped
    and resumed equals one that never stopped, bit for bit where the device is deterministic.

    Returns:
      The last logged metrics.

    Raises:
      ValueError: the config, the checkpoints or the cache cannot be used; says which and what to do.
      FloatingPointError: the loss is no longer finite.
    """
    config_lib.check(config)
    workdir = pathlib.Path(workdir)
    names = [name for name, _ in config.teachers]

    # Checkpoints: memory-mapped, nothing is read but headers.
    base = open_checkpoint(config.base)
    teachers = {name: open_checkpoint(path) for name, path in config.teachers}
    teachers_lib.check_mergeable(base, teachers)
    tokenizer = Tokenizer.from_folder(base.tokenizer_folder)
    cache = LatentCache(config.data.cache)
    cache.check(vae=base.digest("vae"), num_examples=config.validation_size + config.batch_size)
    mesh = sharding.make_mesh(**config.mesh)
    open_workdir(workdir, config)

    # Networks: frozen ones on the mesh in the compute dtype, the student in float32.
    dtype = jnp.dtype(config.dtype)
    frozen, encoders = teachers_lib.put_teachers(base, list(teachers.values()), mesh, dtype)
    networks, student_config = define_networks(config, base, len(names))
    sources = [base] if config.student_init == "base" else list(teachers.values())
    style = student_lib.style_params(student_config, config.style_init, config.seed)
    params = student_lib.put_student([source.params("unet") for source in sources], style, student_config, mesh)

    # State: fresh, or the newest checkpoint's.
    optimizer = student_lib.make_optimizer(config)
    state = student_lib.make_state(params, optimizer, mesh, config.ema_decay)
    del params
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(StateStore(workdir, every=config.checkpoint_every, kept=config.checkpoints_kept))
        start = store.latest_step or 0
        if start:
            state = store.restore(state)
            print(f"Resuming at step {start} of {config.num_steps}.", file=sys.stderr)
        log = stack.enter_context(MetricsLog(workdir, start, names, tensorboard=config.tensorboard))

        # Data: batch k is a pure function of (seed, k).
        train_source, validation_source = cache.split(config.validation_size)
        batches = data_pipeline.batches(train_source, config.seed, len(names), config.batch_size)
        put_batch = functools.partial(sharding.put, mesh=mesh, spec=sharding.BATCH)

        # One compiled program a step; another for the validation set.
        objective = define_objective(config, base, tokenizer)
        specs = sharding.state_specs(state["params"], mesh)
        step = define_step(config, networks, objective, optimizer, mesh, state)
        validate = build_validator(config, names, networks, objective, mesh, specs, validation_source)
        draw_samples = build_sampler(config, base, names, student_config, workdir)

        iterator = data_pipeline.iterate(batches, start)
        batch = put_batch(next(iterator)) if start < config.num_steps else None
        if batch is not None:
            print(memory.short_table(memory.held(state, frozen, encoders, batch), mesh), file=sys.stderr)
        bar = stack.enter_context(
            tqdm(
                total=config.num_steps, initial=start, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True
            )
        )
        log.start_clock(start)
        for number in range(start + 1, config.num_steps + 1):
            state, metrics = step(state, frozen, encoders, batch)
            if number < config.num_steps:
                batch = put_batch(next(iterator))  # While the device works.
            last = number == config.num_steps
            if last or _due(number, config.log_every):
                log.train(number, config.num_steps, config.batch_size, objective.feature_loss_weight, metrics, bar)
            if validate and (last or _due(number, config.validation_every)):
                log.validation(number, validate(state["params"], frozen, encoders), bar)
            if draw_samples and (last or _due(number, config.samples.every)):
                draw_samples(number, state.get("ema", state["params"]))
            if config.checkpoint_every or last:
                store.save(number, state, force=last)
            bar.update()
    return log.last


def _due(number, every):
    return bool(every) and number % every == 0


def open_workdir(workdir: pathlib.Path, config) -> None:
    """Makes the folder and writes config.json; when a run is there already, says what changed since it was written."""
    path = workdir / "config.json"
    if path.is_file():
        old = config_lib.load(workdir)
        if old.teachers and [name for name, _ in old.teachers] != [name for name, _ in config.teachers]:
            raise ValueError(
                f"{workdir} was trained on the styles {', '.join(name for name, _ in old.teachers)}; the config lists "
                f"{', '.join(name for name, _ in config.teachers)}. Use another --workdir."
            )
        for line in config_lib.differences(old, config):
            print(f"Config changed since this run was last started: {line}", file=sys.stderr)
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(config_lib.to_json(config))


def attention_implementation(config, platform: str = "") -> str:
    """Resolves "auto": a fused kernel on TPUs, and on NVIDIA GPUs in bfloat16; XLA's products elsewhere.

    Args:
      platform: "cpu", "gpu" or "tpu", where it is not this process's.
    """
    platform = platform or jax.default_backend()
    if config.attention != "auto":
        return config.attention
    if platform == "gpu" and config.dtype == "bfloat16":
        return "cudnn"
    return "flash" if platform == "tpu" else "xla"


def define_networks(config, base, num_styles: int, platform: str = "") -> tuple[distill_step.Networks, dict]:
    """Returns the graph definitions of student, teachers and text encoder, and the student's config.

    Args:
      platform: as in `attention_implementation`.
    """
    dtype = jnp.dtype(config.dtype)
    attention = attention_implementation(config, platform)
    unet = {"dtype": dtype, "attention_implementation": attention}
    student_config = merged_config(base.unet_config, num_styles)

    def graph(model, described, **options):
        return nnx.split(abstract_model(lambda rngs: model.from_config(described, rngs=rngs, **options)))[0]

    networks = distill_step.Networks(
        student=graph(UNet2DConditionModel, student_config, remat=config.remat, **unet),
        teacher=graph(UNet2DConditionModel, base.unet_config, **unet),
        text_encoder=graph(CLIPTextModel, base.text_config, dtype=dtype),
        check_vma=attention != "flash",
    )
    return networks, student_config


def define_objective(config, base, tokenizer) -> distill_step.Objective:
    """Gathers what is minimised: the base's noise schedule and the config's weights."""
    return distill_step.Objective(
        alphas_cumprod=tuple(NoiseSchedule.from_config(base.scheduler_config).alphas_cumprod.tolist()),
        feature_loss_weight=config.feature_loss_weight,
        feature_loss=config.feature_loss,
        prompt_dropout=config.prompt_dropout,
        empty_ids=tuple(tokenizer([""])[0].tolist()),
    )


def define_gradients(config, networks, objective, mesh, params) -> Callable:
    """Returns `f(params, teachers, encoders, batch, step) -> (grads, errors)`; `params` are arrays or shapes."""
    return distill_step.build_loss_and_grads(
        networks,
        objective,
        mesh,
        sharding.state_specs(params, mesh),
        dtype=jnp.dtype(config.dtype),
        gradient_accumulation=config.gradient_accumulation,
        seed=config.seed,
    )


def define_step(config, networks, objective, optimizer, mesh, state) -> Callable:
    """Returns the jitted `step(state, teachers, encoders, batch) -> (state, metrics)`, its state donated.

    Args:
      state: the training state, as arrays or as shapes.
    """
    gradients = define_gradients(config, networks, objective, mesh, state["params"])
    step = distill_step.build_step(gradients, optimizer, config.ema_decay)
    places = sharding.placed(mesh, sharding.state_specs(state, mesh))
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


def build_validator(config, names, networks, objective, mesh, specs, source):
    """Returns `f(params, teachers, encoders) -> {style: loss per timestep bin}` on fixed latents, prompts, t, noise."""
    if not config.validation_size:
        return None
    inputs = validation_inputs(source, len(names), config.seed, len(objective.alphas_cumprod))
    bins = inputs["timesteps"][0] * NUM_TIMESTEP_BINS // len(objective.alphas_cumprod)
    on_mesh = sharding.put(inputs, mesh, sharding.BATCH)
    errors = jax.jit(distill_step.build_validation(networks, objective, mesh, specs, dtype=jnp.dtype(config.dtype)))

    def validate(params, teachers, encoders):
        rows = np.asarray(errors(params, teachers, encoders, on_mesh))
        return {
            name: [float(np.mean(row[bins == b])) for b in np.unique(bins)]
            for name, row in zip(names, rows, strict=True)
        }

    return validate


def validation_inputs(source, num_teachers: int, seed: int, num_timesteps: int) -> dict[str, np.ndarray]:
    """Builds the fixed set: the same images, prompts, noise and evenly spread timesteps for every teacher."""
    examples = [source[k] for k in range(len(source))]
    rng = np.random.default_rng(seed)
    latents = np.stack([example["latents"] for example in examples]).astype(np.float32)
    one = {
        "latents": latents,
        "input_ids": np.stack([example["input_ids"] for example in examples]).astype(np.int32),
        "noise": rng.standard_normal(latents.shape, np.float32),
        "timesteps": ((np.arange(len(examples)) + 0.5) * num_timesteps / len(examples)).astype(np.int32),
    }
    return {name: np.repeat(leaf[None], num_teachers, 0) for name, leaf in one.items()}


def build_sampler(config, base, names, student_config, workdir):
    """Returns `f(step, params)` that writes samples/step_N.png: prompts down, styles across; None if not asked for."""
    if not config.samples.every:
        return None
    if not config.samples.prompts:
        raise ValueError(
            "samples.every is set but samples.prompts is empty: list the prompts to draw, or set samples.every=0."
        )
    from dmm_jax import images
    from dmm_jax.pipeline import Pipeline

    pipeline = Pipeline.of_student(base, student_config, names, dtype=config.dtype)
    prompts = [prompt for prompt in config.samples.prompts for _ in names]
    options = {key: config.samples[key] for key in ("num_inference_steps", "guidance_scale", "solver")}

    def draw(number, params):
        pictures = pipeline.with_unet(params)(prompts, styles=names * len(config.samples.prompts), **options)
        grid = images.labelled_grid(
            pictures.reshape((-1, len(names)) + pictures.shape[1:]), list(config.samples.prompts), names
        )
        (workdir / "samples").mkdir(exist_ok=True)
        grid.save(workdir / "samples" / f"step_{number:07d}.png")

    return draw


def save_summary(workdir: pathlib.Path, values: dict) -> None:
    """Writes `summary.json`: what a finished run reached."""
    (workdir / "summary.json").write_text(
        json.dumps(values | {"finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    )
