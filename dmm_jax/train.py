"""The training run: mesh, data, networks, state, restore, loop. Read `run` from top to bottom."""

import collections
import contextlib
import functools
import math
import os
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding
from tqdm import tqdm

from dmm_jax import distillation as definitions
from dmm_jax.checkpoints import parents
from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import checks, workdirs
from dmm_jax.config import options as config_lib
from dmm_jax.data import batches as data_pipeline
from dmm_jax.data.cache import LatentCache
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import discriminator as discriminator_lib
from dmm_jax.distill import incremental
from dmm_jax.distill import step as distill_step
from dmm_jax.distill import student as student_lib
from dmm_jax.distill import teachers as teachers_lib
from dmm_jax.distill.packing import Packing
from dmm_jax.planning import disk, flops, memory, requirements, text
from dmm_jax.runtime import processes, sharding, storage
from dmm_jax.runtime.metrics import MetricsLog
from dmm_jax.runtime.processes import say
from dmm_jax.text.tokenizer import Tokenizers

MAX_STEPS_AHEAD = 2  # Dispatched but not done: keeps the device busy, and lets a run stop soon after it is asked to.
TRIES = "a lower learning_rate, more warmup_steps or a smaller max_grad_norm"
NUM_TIMESTEP_BINS = 4  # Of the validation loss: 0-249, 250-499, 500-749, 750-999.


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike) -> dict:
    """Distils the teachers into one student under `workdir`; goes on from its newest checkpoint if it holds one.

    Writes config.json, parents.json, metrics.jsonl, checkpoints/ and, if asked for, samples/. The result of a run that
    was stopped and resumed equals one that never stopped, bit for bit where the device is deterministic.

    Returns:
      The last logged metrics.

    Raises:
      ValueError: the config, the checkpoints or the cache cannot be used; says which and what to do.
      FloatingPointError: too many steps in a row had no finite gradient; says which style, and what to try.
      Preempted: SIGTERM came; the step that was reached is saved. Where none was, the process ends with exit code 0.
    """
    failure, stopping = None, False
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(processes.stop_requests())
        config = incremental.resolved(config)
        checks.check(config)
        processes.check_joined()
        mesh = sharding.make_mesh(**config.mesh)
        checks.check_mesh(config, mesh.shape)
        workdir = storage.locate(workdir)
        storage.check_bucket(workdir)
        styles = config_lib.style_names(config)

        # Checkpoints: memory-mapped, nothing is read but headers.
        told = {"prediction_type": config.prediction_type}
        base = open_checkpoint(config.base, **told)
        teachers = {name: open_teacher(path, config.base, **told) for name, path in config.teachers}
        check_mergeable(base, teachers)
        old = incremental.old_student(config, base)
        lessons = incremental.lessons(teachers, old, config.grow.replay)
        names = [lesson.name for lesson in lessons]
        for line in (*base.loans, *teachers_lib.lent_by_base(base, teachers)):
            say(line)
        tokenizer = Tokenizers.from_folders(base.tokenizer_folders)
        cache = LatentCache(config.data.cache)
        wanted = {"vae": base.digest("vae"), "tokenizer": tokenizer.digest, "resolution": config.data.resolution}
        cache.check(**wanted, num_examples=config.validation_size + config.batch_size)
        networks, student_config = definitions.define_networks(config, base)
        if config.samples.every:
            schedule = NoiseSchedule.from_config(base.scheduler_config)
            solvers.plan(config.samples.solver, schedule, config.samples.num_inference_steps)  # Refuses in time.
        for line in workdirs.check(workdir, config):
            say(f"Config changed since this run was last started: {line}")

        # Networks: frozen ones on the mesh in the compute dtype, what is trained in float32.
        dtype = jnp.dtype(config.dtype)
        frozen, encoders = teachers_lib.put_teachers(
            base, lessons, definitions.teacher_config(config, base), mesh, dtype
        )
        sources = [old] if old else [base] if config.student_init == "base" else list(teachers.values())
        style = student_lib.style_params(student_config, config.style_init, config.seed)
        style = incremental.grown(style, old) if old else style
        if not any(source is base for source in sources):
            base.params("unet")  # Looked through for NaN, though the student starts elsewhere: reports compare with it.
        unets = [source.params("unet") for source in sources]
        trained = {"student": student_lib.put_student(unets, style, student_config, mesh)}
        if networks.discriminator:
            params = discriminator_lib.initial_params(
                *definitions.discriminator_arguments(config, base), base.params("unet"), config.seed
            )
            params, fixed = discriminator_lib.split(params, config.adversarial.train_backbone)
            trained["discriminator"] = student_lib.put_trained(params, mesh)
            encoders |= teachers_lib.put_params(fixed, mesh, dtype)

        # State: fresh, or the newest checkpoint's.
        optimizers = student_lib.make_optimizers(config)
        state = student_lib.make_state(trained, optimizers, mesh, config.ema_decay)
        del trained
        kept = {"kept": config.checkpoints_kept, "kept_every": config.checkpoints_kept_every}
        store = stack.enter_context(StateStore(workdir, **kept))
        start, state = store.resume(state)
        seen = start * config.batch_size
        workdirs.write_config(workdir, config)  # All that can be refused has been read.
        stack.enter_context(parents.being_kept(workdir, config))
        if start:
            say(f"Resuming at step {start} of {config.num_steps}.")
            seen = store.notes(start).get("samples_seen", seen)
        offset = seen - start * config.batch_size
        if offset:
            say(f"The batch size has changed: the data go on after the {seen} samples that were seen.")
        log = stack.enter_context(
            MetricsLog(workdir, start, names, tensorboard=config.tensorboard, writes=processes.is_first())
        )

        # Data: batch k is a pure function of (seed, k), and of the samples seen where the batch size has changed.
        train_source, validation_source = cache.split(config.validation_size)
        share = sharding.batch_share(mesh, len(lessons), config.batch_size // len(lessons))
        batches = data_pipeline.batches(train_source, config.seed, len(lessons), config.batch_size, share, offset)
        put_batch = functools.partial(sharding.put, mesh=mesh, spec=sharding.BATCH)

        # One compiled program a step; another for the validation set.
        objective = definitions.define_objective(config, base, tokenizer)
        specs = sharding.state_specs(state["params"], mesh)
        packing = Packing(state, mesh)
        step = definitions.define_step(config, networks, objective, optimizers, mesh, state, frozen, packing)
        validate = build_validator(config, lessons, networks, objective, mesh, specs, validation_source)
        draw_samples = build_sampler(config, base, styles, student_config, mesh, workdir)

        iterator = data_pipeline.iterate(batches, start)
        batch = put_batch(next(iterator)) if start < config.num_steps else None
        if batch is not None:
            known = {
                "array_bytes": memory.array_bytes(state, frozen, encoders, batch),
                "disk": disk.needed(config, state, batch),
            }
            known["flops"] = flops.of_step(config, base, objective, mesh, state, frozen, encoders, batch)
            state = packing.pack(state)
            step, frozen = distill_step.compile_step(step, state, frozen, encoders, batch)
            say(text.render(requirements.of_run(config, mesh, step, **known)))
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
        sizes = {"num_steps": config.num_steps, "batch_size": config.batch_size}
        write = functools.partial(log.train, **sizes, weights=objective.weights, bar=bar)
        stop.begin()  # From here on there is something to save.
        log.start_clock(start)
        for number in range(start + 1, config.num_steps + 1):
            state, metrics = step(state, frozen, encoders, batch)
            if number < config.num_steps:
                batch = put_batch(next(iterator))  # While the device works.
            running.append((number, metrics))
            done = None
            if len(running) > MAX_STEPS_AHEAD:
                done = running.popleft()
                with log.host.waiting():
                    jax.block_until_ready(done)
            stopping = stop()
            log.host.step_done()
            last = stopping or number == config.num_steps
            if last or _due(number, config.log_every):
                done = number, metrics
                write(done[0], metrics=done[1])
            if done and int(done[1]["skipped_in_a_row"]) >= config.max_skipped_in_a_row:
                if done[0] < number:
                    write(done[0], metrics=done[1])
                failure = diagnosis(log.last, config)
                break
            if validate and not stopping and (last or _due(number, config.validation_every)):
                log.validation(number, validate(packing.unpack(state)["params"], frozen, encoders), bar)
                stopping = stop()
            if draw_samples and not stopping and (last or _due(number, config.samples.every)):
                whole = packing.unpack(state)
                draw_samples(number, whole.get("ema", whole["params"]))
                stopping = stop()
            if last or stopping or _due(number, config.checkpoint_every):
                log.keep()  # Before the step, so that a run that resumes at it has every line.
                whole = packing.unpack(state)
                if not distill_step.all_finite(whole):
                    failure = (
                        f"step {number}: trained parameters are not finite, so the step is not saved. Resume from the "
                        f"last checkpoint with {TRIES}."
                    )
                    break
                store.save(number, whole, {"samples_seen": offset + number * config.batch_size})
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
    return (
        f"step {line['step']}: {line['skipped_in_a_row']} steps in a row had no finite gradient and were skipped "
        f"({line['skipped_steps']} in all): {what} not finite (learning rate {float(learning_rate):.3g}, gradient norm "
        f"{line['grad_norm']}). "
        + ("Look at its checkpoint with `dmm-jax inspect`. " if 0 < len(bad) < len(line["score"]) else "")
        + f"The weights are still those before the first of them. Resume from the last checkpoint with {TRIES}"
        + (", or with dtype float32." if config.dtype != "float32" else ".")
    )


def _due(number, every):
    return bool(every) and number % every == 0


def build_validator(config, lessons, networks, objective, mesh, specs, source):
    """Returns `f(params, teachers, encoders) -> {lesson: loss per timestep bin}` on fixed images, prompts and noise."""
    if not config.validation_size:
        return None
    inputs = validation_inputs(source, lessons, config.seed, len(objective.alphas_cumprod))
    bins = inputs["timesteps"][0] * NUM_TIMESTEP_BINS // len(objective.alphas_cumprod)
    on_mesh = sharding.put_global(inputs, mesh, sharding.BATCH)
    errors = jax.jit(
        distill_step.build_validation(networks, objective, mesh, specs, dtype=jnp.dtype(config.dtype)),
        out_shardings=NamedSharding(mesh, sharding.COPY),
    )

    def validate(params, teachers, encoders):
        rows = np.asarray(errors(params, teachers, encoders, on_mesh))
        return {
            lesson.name: [float(np.mean(row[bins == b])) for b in np.unique(bins)]
            for lesson, row in zip(lessons, rows, strict=True)
        }

    return validate


def validation_inputs(source, lessons, seed: int, num_timesteps: int) -> dict[str, np.ndarray]:
    """Builds the fixed set: the same images, prompts, noise and evenly spread timesteps for every lesson.

    Where a lesson has several styles, the images take them in turn.
    """
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
    turns = np.arange(len(examples))
    styles = np.stack([lesson.first_style + turns % lesson.num_styles for lesson in lessons])
    return {name: np.repeat(leaf[None], len(lessons), 0) for name, leaf in one.items()} | {
        "style_ids": styles.astype(np.int32)
    }


def build_sampler(config, base, names, student_config, mesh, workdir):
    """Returns `f(step, params)` that writes samples/step_N.png: prompts down, styles across; None if not asked for."""
    if not config.samples.every:
        return None
    from dmm_jax.gallery.grid import labelled_grid
    from dmm_jax.pipeline import Pipeline, cast_params

    dtype = jnp.dtype(config.dtype)
    whole = jax.jit(lambda params: cast_params(params, dtype), out_shardings=NamedSharding(mesh, sharding.COPY))
    first = processes.is_first()
    pipeline = Pipeline.for_unet(base, student_config, names, dtype=config.dtype) if first else None
    prompts = [prompt for prompt in config.samples.prompts for _ in names]
    options = {key: config.samples[key] for key in ("num_inference_steps", "guidance_scale", "solver")}

    def draw(number, params):
        here = jax.tree.map(lambda leaf: leaf.addressable_data(0), whole(params))  # Every process takes part.
        if not first:
            return
        pictures = pipeline.with_unet(here)(prompts, styles=names * len(config.samples.prompts), **options)
        grid = labelled_grid(
            pictures.reshape((-1, len(names)) + pictures.shape[1:]), list(config.samples.prompts), names
        )
        (workdir / "samples").mkdir(exist_ok=True)
        with (workdir / "samples" / f"step_{number:07d}.png").open("wb") as file:
            grid.save(file, "PNG")

    return draw
