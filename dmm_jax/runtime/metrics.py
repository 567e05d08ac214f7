"""What a run reports: metrics.jsonl, a progress bar on a terminal, plain lines elsewhere, trackers if asked for."""

import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from tqdm import tqdm

from dmm_jax.runtime import terminal
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import bucket_errors, errors_name, in_bucket, locate, read_text, write_text
from dmm_jax.runtime.trackers import Tracker


class HostClock:
    """The host's time per step: from the end of one step to the end of the next, without waiting for the device."""

    def __init__(self):
        self._steps_s: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Starts the current step again."""
        self._start, self._waited_s = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Excludes the block from the step's time."""
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    def step_done(self) -> None:
        """Ends a step."""
        self._steps_s.append(time.perf_counter() - self._start - self._waited_s)
        self.restart()

    def median_ms(self) -> float | None:
        """Returns the median milliseconds of the steps since the last call; None without any."""
        steps_s, self._steps_s = self._steps_s, []
        return 1e3 * statistics.median(steps_s) if steps_s else None


class MetricsLog:
    """Writes `metrics.jsonl` of a workdir; a run that resumes at step `start` drops the lines after it.

    In a run of several processes one writes. The other processes compute the same numbers, and `last` is the same.

    Args:
      names: of the styles, in the order of the errors.
      trackers: which receive the numbers too.
      writes: whether this process writes and prints.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start: int,
        names: Sequence[str],
        *,
        trackers: Sequence[Tracker] = (),
        writes: bool = True,
    ):
        self.path = locate(workdir) / "metrics.jsonl"
        self._names = list(names)
        self._writes = writes
        self._trackers = tuple(trackers)
        self.lines: list[dict] = []  # All lines of the file.
        self._file = self._open(start) if writes else None
        self._clock = None
        self.seconds_left = 0.0  # As of the last line.
        self.host = HostClock()
        self.last: dict = {}

    def __enter__(self):
        return self

    def _open(self, start):
        self.lines = [line for line in read_log(self.path) if line["step"] <= start]
        lines = "".join(json.dumps(line) + "\n" for line in self.lines)
        if in_bucket(self.path):
            file = io.StringIO()
            file.write(lines)
            return file
        write_text(self.path, lines)
        return self.path.open("a")

    def __exit__(self, *_):
        if self._file:
            self.upload()
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def upload(self) -> None:
        """Writes all lines to the bucket if the workdir is in one; an object cannot be appended to.

        Call it before a checkpoint is saved, so that a run that resumes there has every line.
        """
        if self._file and in_bucket(self.path):
            with bucket_errors(self.path):
                self.path.write_text(self._file.getvalue())

    def start_clock(self, step: int) -> None:
        """Starts to measure images/s and the host's time."""
        self._clock = (step, time.perf_counter())
        self.host.restart()

    def train(
        self, step: int, num_steps: int, batch_size: int, weights: Mapping[str, float], metrics: Mapping, bar
    ) -> None:
        """Writes the errors of one step, the speed since the last line, and the remaining time; waits for the device.

        Args:
          weights: {error: its weight in the student's loss}.
          metrics: of the step: one number per style for every error, and single numbers.
          bar: a tqdm progress bar, or None.
        """
        with self.host.waiting():
            metrics = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        (last_step, last_time), self._clock = self._clock, (step, time.perf_counter())
        step_time_s = (self._clock[1] - last_time) / max(step - last_step, 1)
        line = {
            "step": step,
            "loss": float(sum(weight * metrics[name].mean() for name, weight in weights.items())),
            **{
                name: dict(zip(self._names, error.tolist(), strict=True))
                for name, error in metrics.items()
                if error.ndim
            },
            "grad_norm": float(metrics["grad_norm"]),
            "skipped_steps": int(metrics["skipped_steps"]),
            "skipped_in_a_row": int(metrics["skipped_in_a_row"]),
            "images_per_s": batch_size / step_time_s,
            "host_ms": self.host.median_ms(),
        } | peak_memory()
        self._write(line)
        self.seconds_left = (num_steps - step) * step_time_s
        remaining = time.strftime("%H:%M:%S", time.gmtime(self.seconds_left))
        skipped = f"  {line['skipped_steps']} steps skipped" * bool(line["skipped_steps"])
        speed = f"{line['images_per_s']:.1f} images/s"
        worst = max(line["score"], key=line["score"].get)
        losses = f"loss {line['loss']:.5f}  most: {worst} {line['score'][worst]:.5f}"
        self._print(f"step {step}/{num_steps}  {losses}  {speed}  {remaining} left{skipped}", bar)

    def validation(
        self,
        step: int,
        losses: Mapping[str, Sequence[float | None]],
        bar,
        of_average: Mapping[str, Sequence[float | None]] | None = None,
        *,
        with_table: bool = True,
    ) -> None:
        """Writes the validation loss of each style, per timestep bin from low noise to high.

        Args:
          of_average: the same for the moving average of the weights, if the run keeps one.
          with_table: whether to print the losses of all styles; `train` ends with them.
        """
        line, text = {"step": step}, f"step {step}"
        for name, bins in {"validation": losses, "average_validation": of_average}.items():
            if bins:
                mean = float(np.mean([loss for values in bins.values() for loss in values if loss is not None]))
                line |= {f"{name}_loss": mean, name: dict(bins)}
                text += f"  {name.replace('_', ' ')} loss {mean:.5f}"
        self._write(line)
        self._print(text, bar)
        if with_table and self._writes and not terminal.is_quiet():
            tqdm.write(losses_table(self.lines), file=sys.stderr)
        self.start_clock(step)

    def has_validation(self, step: int) -> bool:
        """Tells whether the file holds the validation of a step."""
        return any(line["step"] == step and "validation" in line for line in read_log(self.path))

    def _write(self, line):
        self.last = self.last | line
        if not self._writes:
            return
        self.lines.append(line)
        with errors_name(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.log(line["step"], dict(_scalars(line)))

    def _print(self, text, bar):
        if not self._writes or terminal.is_quiet():
            return
        if bar is None or bar.disable:
            tqdm.write(text, file=sys.stderr)
        else:
            bar.set_postfix_str(text.split("  ", 1)[1])


def losses_table(lines: Sequence[Mapping]) -> str:
    """Returns a table with the losses of each style: at the first and the last logged step, and the last validation."""
    training = [line for line in lines if "score" in line]
    validations = [line for line in lines if "validation" in line]
    columns = {}
    for line in dict((line["step"], line) for line in (training[:1] + training[-1:])).values():
        columns[f"score at step {line['step']}"] = line["score"]
    if validations:
        bins = validations[-1]["validation"].items()
        means = {name: [loss for loss in losses if loss is not None] for name, losses in bins}
        columns["validation"] = {name: float(np.mean(losses)) if losses else np.nan for name, losses in means.items()}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(f"{column.get(name, np.nan):.5f}" for column in columns.values())] for name in names]
    return terminal.table([["style", *columns], *rows])


def peak_memory() -> dict[str, float]:
    """Returns {"peak_memory_gb"}: the largest of the local devices' since the program began; {} if none reports it."""
    return peak_of(device.memory_stats() for device in jax.local_devices())


def peak_of(device_stats: Iterable[Mapping | None]) -> dict[str, float]:
    """Returns {"peak_memory_gb"} of the memory statistics of devices; {} if none of them reports a peak."""
    peaks = [stats["peak_bytes_in_use"] for stats in device_stats if stats and "peak_bytes_in_use" in stats]
    return {"peak_memory_gb": max(peaks) / 2**30} if peaks else {}


def read(path: str | os.PathLike, *, strict: bool = False) -> list[dict]:
    """Reads a file of one JSON object per line, or none if it is missing; omits a last line that a kill cut off.

    Args:
      strict: refuse a cut line, too.

    Raises:
      UserError: the file is not UTF-8, or another line is not JSON.
    """
    path = locate(path)
    lines = read_text(path).splitlines() if path.is_file() else []
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            if strict or number < len(lines):
                raise UserError(
                    f"{path}, line {number} is not JSON of one object: {line[:80]!r}. Move the file away to start a "
                    "new one."
                ) from None
    return parsed


def read_log(path: str | os.PathLike) -> list[dict]:
    """Reads a run's metrics.jsonl as `read` does; refuses lines without a step."""
    lines = read(path)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line.get("step"), int):
            raise UserError(
                f"{path}, line {number}: expected an object with a step, as `train` writes it. Move it away."
            )
    return lines


def _scalars(line, prefix=""):
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value
