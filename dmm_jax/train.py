"""The training run: mesh, data, networks, state, restore, loop. Read `run` from top to bottom."""

import collections
import contextlib
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from tqdm import tqdm

from dmm_jax import config as config_lib
from dmm_jax import processes, sharding
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
from dmm_jax.models.text_encoders import TextEncoders
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel, merged_config
from dmm_jax.planning import memory
from dmm_jax.tokenizer import Tokenizers

MAX_STEPS_AHEAD = 2  # Dispatched but not done: keeps the device busy, and lets a run stop soon after it is asked to.
NUM_TIMESTEP_BINS = 4  # Of the validation loss: 0-249, 250-499, 500-749, 750-999.


def run(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> dict:
    """Distils the teachers into one student under `workdir`; goes on from its newest checkpoint if it holds one.

    Writes config.json, metrics.jsonl, checkpoints/ and, if asked for, samples/. The result of a run that was stopped
    and resumed equals one that never stopped, bit for bit where the device is deterministic.

    Returns:
      The last logged metrics.

    Raises:
      ValueError: the config, the checkpoints or the cache cannot be used; says which and what to do.
      FloatingPointError: too many steps in a row had no finite gradient; says which style, and what to try.
      Preempted: SIGTERM came; the step that was reached is saved.
    """
    config_lib.check(config)
    processes.check_joined()
    mesh = sharding.make_mesh(**config.mesh)
    config_lib.check_mesh(config, mesh.shape)
    workdir = pathlib.Path(workdir)
    names = [name for name, _ in config.teachers]

    # Checkpoints: memory-mapped, nothing is read but headers.
    told = {"prediction_type": config.prediction_type}
    base = open_checkpoint(config.base, **told)
    teachers = {name: open_checkpoint(path, **told) for name, path in config.teachers}
    teachers_lib.check_mergeable(base, teachers)
    for line in teachers_lib.lent_by_base(base, teachers):
        say(line)
    tokenizer = Tokenizers.from_folders(base.tokenizer_folders)
    cache = LatentCache(config.data.cache)
    wanted = {"vae": base.digest("vae"), "tokenizer": tokenizer.digest}
    cache.check(**wanted, num_examples=config.validation_size + config.batch_size)
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
    failure, stopping = None, False
    with contextlib.ExitStack() as stack:
        asked_to_stop = stack.enter_context(processes.stop_requests())
        kept = {"kept": config.checkpoints_kept, "kept_every": config.checkpoints_kept_every}
        store = stack.enter_context(StateStore(workdir, **kept))
        start, state = store.resume(state)
        if start:
            say(f"Resuming at step {start} of {config.num_steps}.")
        log = stack.enter_context(
            MetricsLog(workdir, start, names, tensorboard=config.tensorboard, writes=processes.is_first())
        )

        # Data: batch k is a pure function of (seed, k).
        train_source, validation_source = cache.split(config.validation_size)
        share = sharding.batch_share(mesh, len(names), config.batch_size // len(names))
        batches = data_pipeline.batches(train_source, config.seed, len(names), config.batch_size, share)
        put_batch = functools.partial(sharding.put, mesh=mesh, spec=sharding.BATCH)

        # One compiled program a step; another for the validation set.
        objective = define_objective(config, base, tokenizer)
        specs = sharding.state_specs(state["params"], mesh)
        step = define_step(config, networks, objective, optimizer, mesh, state, frozen)
        validate = build_validator(config, names, networks, objective, mesh, specs, validation_source)
        draw_samples = build_sampler(config, base, names, student_config, mesh, workdir)

        iterator = data_pipeline.iterate(batches, start)
        batch = put_batch(next(iterator)) if start < config.num_steps else None
        if batch is not None:
            say(memory.short_table(memory.held(state, frozen, encoders, batch), mesh))
            step, frozen = distill_step.compile_step(step, state, frozen, encoders, batch)
        bar = stack.enter_context(
            tqdm(
                total=config.num_steps,
                initial=start,
                unit="step",
                disable=not (sys.stderr.isatty() and processes.is_first()),
                dynamic_ncols=True,
            )
        )
        running = collections.deque()
        log.start_clock(start)
        for number in range(start + 1, config.num_steps + 1):
            state, metrics = step(state, frozen, encoders, batch)
            if number < config.num_steps:
                batch = put_batch(next(iterator))  # While the device works.
            running.append(metrics)
            if len(running) > MAX_STEPS_AHEAD:
                jax.block_until_ready(running.popleft())
            stopping = asked_to_stop(number)
            last = stopping or number == config.num_steps
            if last or _due(number, config.log_every):
                log.train(number, config.num_steps, config.batch_size, objective.feature_loss_weight, metrics, bar)
                if log.last["skipped_in_a_row"] >= config.max_skipped_in_a_row:
                    failure = diagnosis(log.last, config)
                    break
            if validate and not stopping and (last or _due(number, config.validation_every)):
                log.validation(number, validate(state["params"], frozen, encoders), bar)
            if draw_samples and not stopping and (last or _due(number, config.samples.every)):
                draw_samples(number, state.get("ema", state["params"]))
            if last or _due(number, config.checkpoint_every):
                store.save(number, state)
            bar.update()
            if stopping:
                break
    if failure:
        raise FloatingPointError(failure)
    if stopping:
        raise processes.Preempted(f"stopped by SIGTERM after step {number} of {config.num_steps}, which is saved.")
    return log.last


def diagnosis(line: Mapping, config) -> str:
    """Says of a run's last logged step why it cannot go on, and what to try."""
    bad = [name for name in line["score"] if not math.isfinite(line["score"][name] + line["feature"][name])]
    what = f"the loss of {', '.join(bad)} is" if bad else "every loss is finite, the gradient is"
    learning_rate = student_lib.learning_rate_schedule(config)(line["step"] - line["skipped_steps"])
    tries = "a lower learning_rate, more warmup_steps or a smaller max_grad_norm"
    return (
        f"step {line['step']}: {line['skipped_in_a_row']} steps in a row had no finite gradient and were skipped "
        f"({line['skipped_steps']} in all): {what} not finite (learning rate {float(learning_rate):.3g}, gradient norm "
        f"{line['grad_norm']}). "
        + ("Look at its checkpoint with `dmm-jax inspect`. " if 0 < len(bad) < len(line["score"]) else "")
        + f"The weights are still those before the first of them. Resume from the last checkpoint with {tries}"
        + (", or with dtype float32." if config.dtype != "float32" else ".")
    )


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
            say(f"Config changed since this run was last started: {line}")
    processes.wait_for_all("config.json read")
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(config_lib.to_json(config))
    processes.wait_for_all("config.json written")
    if not path.is_file():
        raise ValueError(
            f"process {jax.process_index()} does not see {path}, which process 0 wrote. "
            "Give a --workdir on a file system that all hosts share."
        )


def say(line: str) -> None:
    """Prints a line on stderr, once for all processes."""
    if processes.is_first():
        print(line, file=sys.stderr, flush=True)


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

    texts = abstract_model(lambda rngs: TextEncoders(base.text_configs, dtype=dtype, rngs=rngs))
    networks = distill_step.Networks(
        student=graph(UNet2DConditionModel, student_config, remat=config.remat, **unet),
        teacher=graph(UNet2DConditionModel, base.unet_config, **unet),
        text_encoders=nnx.split(texts)[0],
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
        empty_ids=tuple(map(tuple, np.unique(tokenizer(["", None]), axis=0).tolist())),
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


def define_step(config, networks, objective, optimizer, mesh, state, teachers) -> Callable:
    """Returns the jitted `step(state, teachers, encoders, batch) -> (state, metrics)`, its state donated.

    Args:
      state, teachers: as arrays or as shapes; for `distill_step.compile_step`, since the teachers' layout is left open.
    """
    gradients = define_gradients(config, networks, objective, mesh, state["params"])
    step = distill_step.build_step(gradients, optimizer, config.ema_decay)
    places = sharding.placed(mesh, sharding.state_specs(state, mesh))
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(None, distill_step.teacher_formats(teachers), None, None),
        out_shardings=(places, NamedSharding(mesh, sharding.COPY)),
    )


def build_validator(config, names, networks, objective, mesh, specs, source):
    """Returns `f(params, teachers, encoders) -> {style: loss per timestep bin}` on fixed latents, prompts, t, noise."""
    if not config.validation_size:
        return None
    inputs = validation_inputs(source, len(names), config.seed, len(objective.alphas_cumprod))
    bins = inputs["timesteps"][0] * NUM_TIMESTEP_BINS // len(objective.alphas_cumprod)
    on_mesh = sharding.put_whole(inputs, mesh, sharding.BATCH)
    errors = jax.jit(
        distill_step.build_validation(networks, objective, mesh, specs, dtype=jnp.dtype(config.dtype)),
        out_shardings=NamedSharding(mesh, sharding.COPY),
    )

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
        "time_ids": np.stack([example["time_ids"] for example in examples]).astype(np.int32),
        "noise": rng.standard_normal(latents.shape, np.float32),
        "timesteps": ((np.arange(len(examples)) + 0.5) * num_timesteps / len(examples)).astype(np.int32),
    }
    return {name: np.repeat(leaf[None], num_teachers, 0) for name, leaf in one.items()}


def build_sampler(config, base, names, student_config, mesh, workdir):
    """Returns `f(step, params)` that writes samples/step_N.png: prompts down, styles across; None if not asked for."""
    if not config.samples.every:
        return None
    from dmm_jax import images
    from dmm_jax.pipeline import Pipeline, in_memory

    dtype = jnp.dtype(config.dtype)
    whole = jax.jit(lambda params: in_memory(params, dtype), out_shardings=NamedSharding(mesh, sharding.COPY))
    first = processes.is_first()
    pipeline = Pipeline.of_student(base, student_config, names, dtype=config.dtype) if first else None
    prompts = [prompt for prompt in config.samples.prompts for _ in names]
    options = {key: config.samples[key] for key in ("num_inference_steps", "guidance_scale", "solver")}

    def draw(number, params):
        here = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole(params))  # Every process takes part.
        if not first:
            return
        pictures = pipeline.with_unet(here)(prompts, styles=names * len(config.samples.prompts), **options)
        grid = images.labelled_grid(
            pictures.reshape((-1, len(names)) + pictures.shape[1:]), list(config.samples.prompts), names
        )
        (workdir / "samples").mkdir(exist_ok=True)
        grid.save(workdir / "samples" / f"step_{number:07d}.png")

    return draw
