"""What a run says while it runs: metrics.jsonl always, a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import bucket_errors, in_bucket, locate


class HostClock:
    """What a step costs the host: the time from a step's end to the next one's, less the waiting for the device."""

    def __init__(self):
        self._steps_s: list[float] = []
        self.restart()

    def restart(self) -> None:
        """Begins the step under way anew."""
        self._then, self._waited_s = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Leaves the block out of the step's time."""
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started

    def step_done(self) -> None:
        """Ends a step."""
        self._steps_s.append(time.perf_counter() - self._then - self._waited_s)
        self.restart()

    def median_ms(self) -> float | None:
        """Returns the median milliseconds of the steps since the last call; None where none has ended."""
        steps_s, self._steps_s = self._steps_s, []
        return 1e3 * statistics.median(steps_s) if steps_s else None


class MetricsLog:
    """`metrics.jsonl` of a workdir. Lines past the step that a run resumes at are dropped: they will come again.

    Of several processes one writes; the others read the same numbers and stop where it stops.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start: int,
        names: Sequence[str],
        *,
        tensorboard: bool = False,
        writes: bool = True,
    ):
        self.path = locate(workdir) / "metrics.jsonl"
        self._names = list(names)
        self._writes = writes
        self._writer = _tensorboard(workdir) if tensorboard and writes else None
        self._file = self._opened(start) if writes else None
        self._clock = None
        self.host = HostClock()
        self.last: dict = {}

    def __enter__(self):
        return self

    def _opened(self, start):
        kept = "".join(json.dumps(line) + "\n" for line in read(self.path) if line["step"] <= start)
        if in_bucket(self.path):
            file = io.StringIO()
            file.write(kept)
            return file
        temporary = self.path.with_suffix(".part")
        temporary.write_text(kept)
        temporary.replace(self.path)
        return self.path.open("a")

    def __exit__(self, *_):
        if self._file:
            self.keep()
            self._file.close()
        if self._writer:
            self._writer.close()

    def keep(self) -> None:
        """Brings the lines so far into the bucket, where the workdir is in one: objects are written whole.

        Nothing that a checkpoint rests on is lost where this comes before it.
        """
        if self._file and in_bucket(self.path):
            with bucket_errors(self.path):
                self.path.write_text(self._file.getvalue())

    def start_clock(self, step: int) -> None:
        """Marks the moment from which images/s and the host's time are counted."""
        self._clock = (step, time.perf_counter())
        self.host.restart()

    def train(
        self, step: int, num_steps: int, batch_size: int, weights: Mapping[str, float], metrics: Mapping, bar
    ) -> None:
        """Writes the errors of one step, the speed since the last line, and the time left; waits for the device.

        Args:
          weights: of the errors' means in the student's loss.
          metrics: of the step: every error per name, and numbers.
        """
        with self.host.waiting():
            metrics = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
        (since, then), self._clock = self._clock, (step, time.perf_counter())
        step_time_s = (self._clock[1] - then) / max(step - since, 1)
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
        left = time.strftime("%H:%M:%S", time.gmtime((num_steps - step) * step_time_s))
        skipped = f"  {line['skipped_steps']} steps skipped" * bool(line["skipped_steps"])
        speed = f"{line['images_per_s']:.1f} images/s"
        self._say(f"step {step}/{num_steps}  loss {line['loss']:.5f}  {speed}  {left} left{skipped}", bar)

    def validation(self, step: int, losses: Mapping[str, Sequence[float | None]], bar) -> None:
        """Writes the validation loss of each style, per timestep bin from low noise to high."""
        mean = float(np.mean([loss for bins in losses.values() for loss in bins if loss is not None]))
        self._write({"step": step, "validation_loss": mean, "validation": dict(losses)})
        self._say(f"step {step}  validation loss {mean:.5f}", bar)
        self.start_clock(step)

    def _write(self, line):
        self.last = self.last | line
        if not self._writes:
            return
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._writer:
            for name, value in _scalars(line):
                self._writer.add_scalar(name, value, line["step"])

    def _say(self, text, bar):
        if not self._writes:
            return
        if bar is None or bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            bar.set_postfix_str(text.split("  ", 1)[1])


def peak_memory() -> dict[str, float]:
    """Returns {"peak_memory_gb"}, the largest of the local devices' since the program began; {} where none tells it."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]
    return {"peak_memory_gb": max(peaks) / 2**30} if peaks else {}


def read(path: str | os.PathLike) -> list[dict]:
    """Reads the lines of a metrics.jsonl; a last line that was cut off in mid-write is left out."""
    path = locate(path)
    lines = path.read_text().splitlines() if path.is_file() else []
    parsed = []
    for number, line in enumerate(lines):
        try:
            parsed.append(json.loads(line))
        except json.JSONDecodeError:
            if number != len(lines) - 1:
                raise UserError(
                    f"{path}, line {number + 1} is no JSON: {line[:80]!r}. Move the file away to start a new one."
                ) from None
    return parsed


def _scalars(line, prefix=""):
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


def _tensorboard(workdir):
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError(
            "tensorboard=True needs the package tensorboardX: pip install tensorboardX, or set it to False."
        ) from None
    return SummaryWriter(str(workdir))
