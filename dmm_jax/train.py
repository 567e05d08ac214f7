"""The training run: a Distillation, a list of hooks, and the loop."""

import collections
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
from tqdm import tqdm

from dmm_jax.checkpoints import provenance
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import checks, workdirs
from dmm_jax.config.options import keeps_average, solver_options
from dmm_jax.distill import incremental
from dmm_jax.distill.optimizer import learning_rate_schedule
from dmm_jax.distillation import Distillation, RunState
from dmm_jax.gallery.training_page import training_page
from dmm_jax.planning import requirements, text
from dmm_jax.runtime import compilation, locks, processes, storage, terminal
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import MetricsLog
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.stopping import stop_requests
from dmm_jax.runtime.trackers import open_trackers

MAX_STEPS_AHEAD = 2  # Dispatched but not done: keeps the device busy, and a stop request waits for no more than these.
PAGE_EVERY_S = 10  # The page of the run is written at most so often.
ADVICE = "a lower learning_rate, more warmup_steps or a smaller max_grad_norm"


class Hook(NamedTuple):
    """Something that happens every so many steps, and after the last one."""

    every: int  # Steps; 0: after the last step only.
    function: Callable[[RunState, Mapping], str | None]  # (state, its step's metrics) -> why the run must end, or None.
    # Tells whether a step has what the hook makes. A stop request leaves such a hook out, to end quickly, and a restart
    # makes up for the last step. None: the hook also runs after a stop request.
    is_done: Callable[[int], bool] | None = None

    def is_due(self, step: int) -> bool:
        """Tells whether the hook runs after a step that is not the last."""
        return bool(self.every) and step % self.every == 0


def run(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    trackers: Sequence[str] = (),
    dry_run: bool = False,
) -> dict:
    """Distils the teachers into one student under `workdir`; resumes from its newest checkpoint.

    Writes config.json, parents.json, metrics.jsonl, checkpoints/, report/ and, if asked for, samples/. The result of a
    run that was stopped and resumed equals one that never stopped, bit for bit where the device is deterministic.

    Args:
      trackers: names of `runtime.trackers.TRACKERS`, which receive the metrics too.
      dry_run: reads and checks everything, compiles the step, prints what it needs, and writes nothing.

    Returns:
      The last logged metrics.

    Raises:
      UserError: the config, the checkpoints or the cache cannot be used; says which and what to do.
      FloatingPointError: too many steps in a row had no finite gradient; says which style, and what to try.
      Preempted: after SIGTERM or Ctrl-C, once the current step is saved. Before the first step the process exits.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_requests())
        config, workdir = _checked(config, workdir)
        say(f"Reading the base and {len(config.teachers)} teachers")
        distillation = Distillation(config)
        for line in distillation.notes:
            say(line)
        if dry_run:
            return _rehearse(distillation)
        check_lock = stack.enter_context(locks.lock(workdir))
        store = StateStore(workdir, keep_last=config.checkpoints_kept, keep_every=config.checkpoints_kept_every)
        state = distillation.resume(stack.enter_context(store))
        if not state.step:  # Everything that can be refused has been read. A resumed run writes it with its next save.
            workdirs.write_config(workdir, config)
        if state.step < config.num_steps:
            stack.enter_context(provenance.record_parents(workdir, config))
        _say_resumed(state, config)
        first = processes.is_first()
        options = {"trackers": open_trackers(trackers if first else (), workdir, config.to_dict()), "writes": first}
        names = [row.name for row in distillation.rows]
        log = stack.enter_context(MetricsLog(workdir, state.step, names, **options))
        bar = stack.enter_context(_progress_bar(config.num_steps, state.step))
        batches = distillation.batches(state.step, config.num_steps, state.samples_seen)
        batch = next(batches, None)
        if batch is not None:
            _compile(distillation, state, batch)
        progress = Progress(log, bar, config, distillation.objective.weights)
        hooks = make_hooks(distillation, workdir, progress, store, check_lock)

        stop.begin()  # Until here a signal exits at once; from here on the loop sees it, and saves first.
        log.start_clock(state.step)
        if state.step == config.num_steps:
            _make_up(hooks, state)
        step, failure, stopping = _loop(distillation, state, batch, batches, hooks, progress, stop)
    if failure:
        raise FloatingPointError(failure)
    if log.last.get("skipped_steps"):
        say(f"{log.last['skipped_steps']} steps had no finite gradient and changed nothing.")
    if stopping:
        raise stop.stopped(f"step {step} of {config.num_steps}")
    return log.last


def _make_up(hooks: Sequence[Hook], state: RunState) -> None:
    """Runs the hooks that a stop request left out after the last step."""
    for hook in hooks:
        if hook.is_done and not hook.is_done(state.step):
            hook.function(state, {})


def _loop(distillation, state, batch, batches, hooks, progress, stop) -> tuple[int, str | None, bool]:
    """Takes the steps; returns the last one, why the run must end early or None, and whether a signal stops it."""
    stopping = failure = None
    while batch is not None and not (stopping or failure):
        state, metrics = distillation.step(state, batch)
        batch = next(batches, None)  # While the device works.
        failure = progress.wait(state.step, metrics)
        stopping = stop()
        progress.log.host.step_done()
        for hook in hooks:
            due = batch is None or stopping or hook.is_due(state.step)
            if failure or not due or (stopping and hook.is_done):
                continue
            failure = progress.settle() or hook.function(state, metrics)
            if hook.is_done and not stopping:  # Validation and samples take long: ask again.
                stopping = stop()
        progress.bar.update()
    return state.step, failure, bool(stopping)


def _compile(distillation, state, batch) -> None:
    """Compiles the step for every size of images, and prints what the first program needs."""
    config = distillation.config
    sizes = f"batch {config.batch_size}, {len(distillation.rows)} rows, {config.dtype}, remat {config.remat}"
    layers = distillation.student_config["block_out_channels"]
    shapes = [distillation.abstract_batch(size) for size in distillation.sizes]
    others = [other for other in shapes if other.latents.shape != batch.latents.shape]
    programs = []
    for number, example in enumerate([batch, *others], start=1):
        shape = "x".join(map(str, example.latents.shape[2:]))
        name = "the training step" + (f", bucket {number} of {len(shapes)}" if others else "")
        with compilation.announced(name, f"train: {layers}, {shape}, {sizes}"):
            programs.append(distillation.compile(state, example))
    say(text.render(requirements.of_distillation(distillation, programs[0], batch)))


def _rehearse(distillation) -> dict:
    state = distillation.init()
    _compile(distillation, state, next(distillation.batches(stop=1)))
    say("Nothing is trained or written: this is a dry run.")
    return {}


def _checked(config, workdir) -> tuple[ml_collections.ConfigDict, storage.Location]:
    """Returns the complete config and the workdir's location; refuses the workdir of another run."""
    config = incremental.resolved(config)
    checks.check_training(config)
    processes.check_joined()
    workdir = storage.locate(workdir)
    storage.check_bucket(workdir)
    for line in workdirs.check(workdir, config):
        say(f"Config changed since this run was last started: {line}")
    return config, workdir


def _say_resumed(state, config) -> None:
    if state.step >= config.num_steps:
        say(f"The run has {state.step} steps and num_steps is {config.num_steps}: nothing is trained.")
    elif state.step:
        say(f"Resuming at step {state.step} of {config.num_steps}.")
    if state.samples_seen != state.step * config.batch_size:
        say(f"The batch size has changed: the data go on after the {state.samples_seen} samples that were seen.")


def _progress_bar(num_steps, step) -> tqdm:
    hidden = not (sys.stderr.isatty() and processes.is_first()) or terminal.is_quiet()
    return tqdm(total=num_steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True)


class Progress:
    """Writes the metrics of steps, and notices when too many in a row were skipped."""

    def __init__(self, log: MetricsLog, bar: tqdm, config: ml_collections.ConfigDict, weights: Mapping[str, float]):
        """Starts without a step.

        Args:
          weights: {name of an error: its weight in the student's loss}.
        """
        self.log, self.bar, self._config, self._weights = log, bar, config, weights
        self._running = collections.deque()

    def write(self, step: int, metrics: Mapping) -> None:
        """Waits for a step and writes its line."""
        sizes = {"num_steps": self._config.num_steps, "batch_size": self._config.batch_size}
        self.log.train(step, **sizes, weights=self._weights, metrics=metrics, bar=self.bar)

    def wait(self, step: int, metrics: Mapping) -> str:
        """Waits until at most MAX_STEPS_AHEAD steps are running; returns why the run must end, or ""."""
        self._running.append((step, metrics))
        return self.settle(MAX_STEPS_AHEAD)

    def settle(self, ahead: int = 0) -> str:
        """Waits until at most `ahead` steps are running, and judges each that is done, in order.

        Returns why the run must end, or "". Whatever is logged and saved, a run ends at the same step.
        """
        while len(self._running) > ahead:
            step, metrics = self._running.popleft()
            with self.log.host.waiting():
                jax.block_until_ready(metrics)
            # A shorter run fails if all its steps were skipped.
            if int(metrics["skipped_in_a_row"]) >= min(self._config.max_skipped_in_a_row, self._config.num_steps):
                self.write(step, metrics)
                return diagnosis(self.log.last, self._config)
        return ""


def make_hooks(
    distillation: Distillation,
    workdir: storage.Location,
    progress: Progress,
    store: StateStore,
    check_lock: Callable[[], None],
) -> list[Hook]:
    """Returns what a run does along the way, in this order: log, validation, samples, checkpoints.

    Args:
      check_lock: raises UserError if another run has taken over the workdir.
    """
    config, log = distillation.config, progress.log

    def write(state, metrics):
        progress.write(state.step, metrics)

    def validate(state, _):
        of_average = distillation.validate(state, average=True) if keeps_average(config) else None
        is_last = state.step >= config.num_steps
        log.validation(state.step, distillation.validate(state), progress.bar, of_average, with_table=not is_last)

    def draw(state, _):
        draw_samples(distillation, state, workdir)

    def save(state, _):
        say(f"step {state.step}: saving a checkpoint")
        check_lock()
        log.upload()  # Before the state, so that a run that resumes there has every line.
        workdirs.write_config(workdir, config)
        try:
            distillation.store(store, state)
        except FloatingPointError as error:
            return f"{error} Resume from the last checkpoint with {ADVICE}."

    page = _Page(workdir, log, config.num_steps)

    def is_drawn(step):
        return _samples_path(workdir, step).is_file()

    hooks = [Hook(config.log_every, write), Hook(config.log_every, page)]
    hooks += [Hook(config.validation_every, validate, log.has_validation)] if config.validation_size else []
    hooks += [Hook(config.samples.every, draw, is_drawn)] if config.samples.every else []
    return [*hooks, Hook(config.checkpoint_every, save), Hook(0, page)]


class _Page:
    """Writes the page of a run, at most every PAGE_EVERY_S seconds and after the last step.

    It is report/index.html until `evaluate` has written its report there, and report/training.html from then on.
    """

    def __init__(self, workdir: storage.Location, log: MetricsLog, num_steps: int):
        self._workdir, self._log, self._num_steps, self._written = workdir, log, num_steps, -math.inf

    def __call__(self, state: RunState, _: Mapping) -> None:
        is_last = state.step >= self._num_steps
        if not processes.is_first() or not (is_last or time.perf_counter() - self._written > PAGE_EVERY_S):
            return
        self._written = time.perf_counter()
        grid = max((self._workdir / "samples").glob("step_*.png"), default=None)
        samples = grid.read_bytes() if grid else None
        left = None if is_last else self._log.seconds_left
        name = "training" if (self._workdir / "report" / "metrics.json").is_file() else "index"
        path = self._workdir / "report" / f"{name}.html"
        path.parent.mkdir(exist_ok=True)
        storage.write_text(path, training_page(self._workdir.name, self._log.lines, self._num_steps, left, samples))


def diagnosis(line: Mapping, config) -> str:
    """Returns why a run cannot go on after its last logged step, and what to try."""
    bad = [name for name in line["score"] if not math.isfinite(line["score"][name] + line["feature"][name])]
    cause = f"the loss of {', '.join(bad)} is" if bad else "every loss is finite, the gradient is"
    learning_rate = float(learning_rate_schedule(config)(line["step"] - line["skipped_steps"]))
    advice = "Look at its checkpoint with `dmm-jax inspect`. " if 0 < len(bad) < len(line["score"]) else ""
    return (
        f"step {line['step']}: {line['skipped_in_a_row']} steps in a row had no finite gradient and were skipped "
        f"({line['skipped_steps']} in all): {cause} not finite (learning rate {learning_rate:.3g}, gradient norm "
        f"{line['grad_norm']}). {advice}Skipped steps change no weights. Resume from the last checkpoint with {ADVICE}"
        + (", or with dtype float32." if config.dtype != "float32" else ".")
    )


def draw_samples(distillation: Distillation, state: RunState, workdir: storage.Location) -> None:
    """Writes samples/step_N.png: prompts down, styles across; a row starts from the same noise."""
    from dmm_jax.gallery.grid import labelled_grid

    pipeline = distillation.pipeline(state)  # Every process takes part; the first one draws.
    if not processes.is_first():
        return
    config, names = distillation.config, list(distillation.styles)
    prompts, options = list(config.samples.prompts), solver_options(config)
    rows, seeds = zip(*((prompt, seed) for seed, prompt in enumerate(prompts) for _ in names), strict=True)
    try:
        pictures = pipeline(list(rows), styles=names * len(prompts), seeds=seeds, **options)
    except UserError as error:  # A picture is not finite; the run is judged by its losses alone.
        say(f"step {state.step}: no samples: {error}")
        return
    grid = labelled_grid(pictures.reshape((-1, len(names)) + pictures.shape[1:]), prompts, names)
    path = _samples_path(workdir, state.step)
    path.parent.mkdir(exist_ok=True)
    with storage.whole_file(path, "xb") as file:
        grid.save(file, "PNG")


def _samples_path(workdir: storage.Location, step: int) -> storage.Location:
    return workdir / "samples" / f"step_{step:07d}.png"
