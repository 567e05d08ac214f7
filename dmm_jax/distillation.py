"""A config becomes networks, training state, batches, a compiled step, and a pipeline.

    distillation = dmm_jax.Distillation(config)
    state = distillation.init()
    for batch in distillation.batches(stop=100):
        state, metrics = distillation.step(state, batch)
    pipeline = distillation.pipeline(state)

Its base class, `distill.definition.Definition`, allocates nothing: `plan` and `bench` use that part.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dmm_jax.checkpoints import parents, student_lora
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.states import StateStore, check_notes
from dmm_jax.config import checks, workdirs
from dmm_jax.config.options import keeps_average, solver_options
from dmm_jax.data import batches as data_batches
from dmm_jax.data.batches import Batch
from dmm_jax.data.cache import LatentCache
from dmm_jax.data.prepare import sizes_of
from dmm_jax.diffusion import solvers
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import discriminator, incremental, streaming, validation
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.layout import Packing, as_read, compile_step, compiler_options, looped, state_specs, unlooped
from dmm_jax.distill.objective import Inputs
from dmm_jax.distill.state import TrainState, all_finite, init_state
from dmm_jax.distill.step import build_validation
from dmm_jax.distill.streaming import StreamedStep
from dmm_jax.distill.student import put_student, put_trained, style_params
from dmm_jax.distill.teachers import BatchRow, missing_text_encoders, put_params, put_teachers, put_text_encoders
from dmm_jax.models.block_loops import stack_blocks, unstack_blocks
from dmm_jax.models.lora import folded, joined
from dmm_jax.models.network import cast_params
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import processes, sharding, storage
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.tokenizer import Tokenizers


@dataclasses.dataclass(frozen=True)
class RunState:
    """The state of a run between two steps, packed for the compiled step; `Distillation.unpack` returns its arrays."""

    arrays: dict
    step: int = 0
    samples_seen: int = 0  # Differs from step * batch_size after a resume with another batch size.


class Distillation(Definition):
    """A run of a config on devices: its checkpoints are open, its teachers on the mesh."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        *,
        base: Checkpoint | None = None,
        teachers: Mapping[str, Checkpoint] | None = None,
        mesh: Mesh | None = None,
    ):
        """Opens and checks everything, then loads the teachers; what can be refused is refused before that.

        Args:
          base, teachers: open checkpoints to use instead of the paths in the config.
          mesh: devices to use instead of all of them.

        Raises:
          UserError: the config, the checkpoints or the latent cache cannot be used; says which, and what to do.
        """
        config = incremental.resolved(config)
        checks.check(config)
        processes.check_joined()
        mesh = mesh or sharding.make_mesh(**config.mesh)
        checks.check_mesh(config, mesh.shape)
        base = base or parents.open_base(config)
        if teachers is None:
            teachers = parents.open_teachers(config)
        check_mergeable(base, teachers, by_distillation=True)
        base.params("unet")  # Reports compare with the base: refuse damaged tensors now, not after the training.
        self.old_student = incremental.old_student(config, base)
        self.rows = incremental.batch_rows(teachers, self.old_student, config.grow.replay)
        if config.samples.every:  # Refuses a solver or a number of steps that cannot run.
            schedule = NoiseSchedule.from_config(base.predicting(config.student_prediction).scheduler_config)
            solvers.plan(config.sampling.solver, schedule, config.sampling.num_inference_steps)
        assumptions = [line for teacher in teachers.values() for line in teacher.assumptions(base)]
        conversions = _conversions(config.student_prediction or base.prediction_type, base, self.rows)
        self.notes = (*base.fallbacks, *missing_text_encoders(base, teachers), *assumptions, *conversions)
        tokenizer = base.tokenizers() if base.tokenizer_folders else None
        super().__init__(config, base, mesh, tokenizer=tokenizer)
        self.cache = self._open_cache(tokenizer) if config.data.cache else None
        load_teachers = streaming.load_teachers if config.teachers_in_host_memory else put_teachers
        student_type = self.prediction_type if conversions else ""
        self.teachers = load_teachers(base, self.rows, self.teacher_config, mesh, self.dtype, student_type)
        self.frozen = put_text_encoders(base, mesh, self.dtype)
        if self.config.adversarial.weight:
            self._judge, fixed = discriminator.split(
                discriminator.initial_params(*self._discriminator_arguments, base.params("unet"), config.seed),
                config.adversarial.train_backbone,
            )
            self.frozen = self.frozen._replace(**put_params(fixed, mesh, self.dtype))
        self._start = student_lora.start_sources(config, base, [row.teacher for row in self.rows])
        if self.ranks:
            params = student_lora.mean(base, self._start).params("unet")
            params = stack_blocks(params, config.loop_blocks, student_lora.stack)
            self.frozen = self.frozen._replace(student=as_read(put_params(params, mesh, self.dtype)))
        self._packing = Packing(self.abstract_state(), mesh)
        # By the shape of a batch's latents.
        self._programs: dict[tuple[int, ...], jax.stages.Compiled | StreamedStep] = {}

    def _open_cache(self, tokenizer: Tokenizers) -> LatentCache:
        """Opens the latent cache and checks that this base made it, and that it is large enough."""
        config = self.config
        sizes = sizes_of(config, self.base)
        expected = {"vae": self.base.digest("vae"), "tokenizer": tokenizer.digest, "resolution": config.data.resolution}
        expected |= {"num_tokens": tokenizer([""], config.data.num_chunks).shape[1], "buckets": sizes[1:]}
        return LatentCache(config.data.cache, **expected, num_examples=config.validation_size + config.batch_size)

    def init(self) -> RunState:
        """Returns the state at step 0: the base, the mean of the teachers, or the student that grows."""
        return RunState(self._packing.pack(self._fresh()))

    def _fresh(self) -> TrainState:
        sources = self._start
        if self.old_student:
            sources = [self.old_student]
            style = incremental.grown_style(
                self.old_student, [name for name, _ in self.config.teachers], self.config.seed
            )
        else:
            style = style_params(self.student_config, self.config.style_init, self.config.seed)
        if self.ranks:
            shapes = student_lora.trained_shapes(self.student_config, self.ranks)
            student = put_trained({**student_lora.first_factors(shapes, self.config.seed), **style}, self.mesh)
        else:
            unets = [source.params("unet") for source in sources]
            student = put_student(unets, style, self.student_config, self.mesh)
        trained = {"student": looped(student, self.config.loop_blocks, self.mesh)}
        if self.config.adversarial.weight:
            trained["discriminator"] = put_trained(self._judge, self.mesh)
        return init_state(trained, self.optimizers, self.mesh, keeps_average(self.config))

    def restore(self, workdir: str | os.PathLike) -> RunState:
        """Returns the state of a workdir's newest sound checkpoint, or the one at step 0 if it has none."""
        with StateStore(workdir) as store:
            return self.resume(store)

    def resume(self, store: StateStore) -> RunState:
        """Returns the newest sound state of a store, or the one at step 0 if it holds none."""
        if not store.steps:
            return self.init()
        step, parts = store.resume(self.abstract_state(looped=False).as_dict())
        notes = store.notes(step)
        check_notes(f"step {step}", notes, self._notes)
        seen = notes.get("samples_seen", step * self.config.batch_size)
        restored = looped(TrainState.from_dict(parts), self.config.loop_blocks, self.mesh)
        return RunState(self._packing.pack(restored), step, seen)

    def save(self, workdir: str | os.PathLike, state: RunState) -> None:
        """Writes a state and the config into a workdir, which opens as a checkpoint, and waits until it is complete.

        Raises:
          FloatingPointError: trained parameters are not finite; no checkpoint is written.
          UserError: the workdir is another run's.
        """
        workdir = storage.locate(workdir)
        workdirs.check(workdir, self.config)
        with StateStore(workdir) as store:
            workdirs.write_config(workdir, self.config)
            self.store(store, state)

    def store(self, store: StateStore, state: RunState) -> None:
        """Starts to save a state; returns before it is written. Raises as `save` does."""
        unpacked = self.unpack(state)
        if not all_finite(unpacked.trained):
            raise FloatingPointError(f"step {state.step}: trained parameters are not finite, so the step is not saved.")
        store.save(state.step, unpacked.as_dict(), {"samples_seen": state.samples_seen, **self._notes})

    @functools.cached_property
    def _notes(self) -> dict[str, str]:
        return {student_lora.START: student_lora.digest(self._start)} if self.ranks else {}

    def unpack(self, state: RunState) -> TrainState:
        """Returns the arrays of a state as a checkpoint has them, valid until the next step takes the state."""
        return unlooped(self._packing.unpack(state.arrays), self.mesh)

    def batches(self, start: int = 0, stop: int | None = None, samples_seen: int | None = None) -> Iterator[Batch]:
        """Yields the batches of steps `start` to `stop` - 1 on the mesh; without `stop`, for ever.

        Batch k is a function of (seed, k) alone, unless the batch size has changed on the way.

        Args:
          samples_seen: of a run whose batch size has changed; None: start * batch_size.

        Raises:
          UserError: data.cache is empty.
        """
        train, _ = self._sources()
        num_rows, batch_size = len(self.rows), self.config.batch_size
        share = sharding.batch_share(self.mesh, num_rows, batch_size // num_rows)
        offset = 0 if samples_seen is None else samples_seen - start * batch_size
        dataset = data_batches.batches(train, self.config.seed, num_rows, batch_size, share, offset)
        examples = data_batches.iterate(dataset, start)
        steps = range(start, data_batches.MAX_STEPS if stop is None else stop)
        return (sharding.put(next(examples), self.mesh, sharding.BATCH) for _ in steps)

    def _sources(self):
        checks.check_training(self.config)
        unit = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        return self.cache.split(self.config.validation_size, unit)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width in pixels of the buckets that have images to train on."""
        return [self.cache.header.sizes[bucket] for bucket in np.unique(self._sources()[0].bucket_of)]

    def compile(self, state: RunState, batch: Batch) -> jax.stages.Compiled | StreamedStep:
        """Compiles the step for arrays or shapes like these and returns the program.

        `step` does it for the first batch of each shape. The first program chooses the layout of resident teachers.
        """
        if self.config.teachers_in_host_memory:
            arguments = state.arrays, self.teachers.on_device(0), self.frozen, batch
            step = self.streamed_step(self._packing).lower(*arguments, len(self.rows))
            program = step.compile(compiler_options())
        else:
            program = self._compile_resident(state, batch)
        self._programs[batch.latents.shape] = program
        return program

    def _compile_resident(self, state, batch) -> jax.stages.Compiled:
        formats = jax.tree.map(lambda leaf: leaf.format, self.teachers) if self._programs else None
        step = self.jitted_step(self.abstract_state(), self.teachers, self._packing, formats)
        program, self.teachers = compile_step(step, state.arrays, self.teachers, self.frozen, batch)
        return program

    def step(self, state: RunState, batch: Batch) -> tuple[RunState, dict[str, jax.Array]]:
        """Updates the student once; `state` is consumed.

        Returns:
          The new state, and metrics as arrays that may not be computed yet: "score" and "feature" (N,), one per row of
          the batch, "grad_norm", "skipped_steps", "skipped_in_a_row"; also "adversarial" and "discriminator" (N,) if
          there is a discriminator.
        """
        program = self._programs.get(batch.latents.shape) or self.compile(state, batch)
        arrays, metrics = program(state.arrays, self.teachers, self.frozen, batch)
        return RunState(arrays, state.step + 1, state.samples_seen + self.config.batch_size), metrics

    def validate(self, state: RunState, average: bool = False) -> dict[str, list[float | None]]:
        """Returns the score loss of each row per bin of timesteps, low noise first, on the fixed validation set.

        Args:
          average: judge the moving average of the student's parameters, which the run must keep, instead of them.
        """
        unpacked = self._packing.unpack(state.arrays)
        params = unpacked.ema if average else unpacked.student.params
        if self.config.teachers_in_host_memory:
            errors = np.concatenate([self._row_errors(params, number) for number in range(len(self.rows))])
        else:
            errors = self._errors(params, self.teachers, self._inputs)
        names, timesteps = [row.name for row in self.rows], self._timesteps
        return validation.by_bin(errors, names, timesteps, len(self.objective.alphas_cumprod))

    def _row_errors(self, params, number) -> np.ndarray:
        """Returns the errors (1, V) of a row whose teacher is brought to the device."""
        inputs = jax.tree.map(lambda leaf: leaf[number : number + 1], self._inputs)
        return self._errors(params, self.teachers.on_device(number), inputs)

    def _errors(self, params, teachers, inputs) -> np.ndarray:
        errors = [np.asarray(self._validation(params, teachers, self.frozen, part)) for part in inputs]
        return np.concatenate(errors, 1)

    @functools.cached_property
    def _validation(self) -> Callable:
        specs = state_specs(self.abstract_state().student.params, self.mesh)
        errors = build_validation(self.networks, self.objective, self.mesh, specs, dtype=self.dtype)
        return jax.jit(errors, out_shardings=NamedSharding(self.mesh, sharding.COPY))

    @functools.cached_property
    def _inputs(self) -> list[Inputs]:
        _, source = self._sources()
        inputs = validation.fixed_inputs(source, self.rows, self.config.seed, len(self.objective.alphas_cumprod))
        self._timesteps = np.concatenate([part.timesteps[0] for part in inputs])
        return [sharding.put_global(part, self.mesh, sharding.BATCH) for part in inputs]

    def pipeline(self, state: RunState) -> Pipeline:
        """Returns a pipeline around the student as it is now: its average, if the run keeps one.

        Every process of a run must call it; each gets a pipeline on its own devices.
        """
        unpacked = self._packing.unpack(state.arrays)
        params = unpacked.student.params if unpacked.ema is None else unpacked.ema
        params = self._whole_unet(params, self.frozen.student)
        return self._empty_pipeline.with_unet(jax.tree.map(lambda leaf: leaf.addressable_data(0), params))

    @functools.cached_property
    def _whole_unet(self) -> Callable:
        def whole_unet(params, start):
            params = params if start is None else folded(joined(start, params))
            return unstack_blocks(cast_params(params, self.dtype), list)

        return jax.jit(whole_unet, out_shardings=NamedSharding(self.mesh, sharding.COPY))

    @functools.cached_property
    def _empty_pipeline(self) -> Pipeline:
        options = {"dtype": self.config.dtype, "prompt_grammar": self.config.sampling.prompt_grammar}
        base = self.base.predicting(self.prediction_type)
        options["default_sampling"] = solver_options(self.config)
        return Pipeline.for_unet(base, self.student_config, self.styles, **options)


def _conversions(prediction_type: str, base: Checkpoint, rows: Sequence[BatchRow]) -> list[str]:
    """Returns a sentence for each row of the batch whose predictions are converted to the student's type.

    Raises:
      UserError: the noise schedule ends at a signal-to-noise ratio of zero, at which no conversion exists.
    """
    others = [row.name for row in rows if row.teacher.prediction_beside(base) != prediction_type]
    if others and NoiseSchedule.from_config(base.scheduler_config).alphas_cumprod[-1] == 0.0:
        raise UserError(
            f"{', '.join(others)}: noise and velocity do not convert into one another at a terminal signal-to-noise "
            f"ratio of zero (rescale_betas_zero_snr), and the student is to predict {prediction_type}. Use teachers of "
            "one prediction type, and student_prediction of the same."
        )
    return [
        f"{name}: its predictions are converted to {prediction_type} for the student; its features are not compared."
        for name in others
    ]
