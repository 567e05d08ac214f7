"""The progress of many images: a bar on a terminal, elsewhere a line every so often."""

import time

from tqdm import tqdm

from dmm_jax.runtime import processes, terminal

REPORT_S = 60  # Between the lines that report progress where stderr is not a terminal.


class Progress:
    """A bar on terminals, else a line now and then; each process of several counts its own share."""

    def __init__(self, total: int, stage: str):
        """Starts at 0 of `total` images."""
        shown = processes.is_first() and not terminal.is_quiet()
        self.bar = tqdm(total=total, desc=stage, unit="image", disable=None if shown else True)
        self.total, self.done = total, 0  # A bar that is not shown does not count.
        self._start, self._reported = time.perf_counter(), 0.0

    def add(self, count: int = 1) -> None:
        """Counts images, and prints their number and the time left if no line has done so for REPORT_S seconds."""
        self.done += count
        self.bar.update(count)
        seconds = time.perf_counter() - self._start
        if self.bar.disable and self.done and seconds - self._reported > REPORT_S:
            self._reported, rate = seconds, self.done / seconds
            remaining = time.strftime("%H:%M:%S", time.gmtime((self.total - self.done) / rate))
            processes.say(f"{self.done:,d} of {self.total:,d} images, {rate:.1f} images/s, {remaining} left")
