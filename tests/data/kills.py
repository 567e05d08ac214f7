"""`python -m tests.data.kills [IMAGES] [KILLS]`: a cache that was killed again and again equals one that was not.

Prepares IMAGES (100,000) synthetic images, killed with SIGKILL at KILLS (20) random moments, and compares every file
with those of an undisturbed call. Prints also the peak memory of a process with a tenth of the images, and with all.
"""

import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from dmm_jax.data.fill_cache import encode_images
from tests.data.test_fill_cache import SIZES, Oblongs, halved, tokenize

SHARD_SIZE = 500
PEAK = "peak_mb="


def fill(folder: str, count: str) -> None:
    """Prepares images; prints the peak memory of this process."""
    options = {"scaling_factor": 0.5, "vae": "v", "tokenizer": "t", "shard_size": SHARD_SIZE, "sizes": SIZES}
    encode_images(Repeated(int(count)), halved, tokenize, folder, 16, **options)
    status = pathlib.Path("/proc/self/status").read_text()
    print(PEAK + str(int(status.split("VmHWM:")[1].split()[0]) / 1024))


class Repeated(Oblongs):
    """The first images again and again, each time with other ids."""

    def __getitem__(self, index):
        return super().__getitem__(index % 255) | {"id": index}


def start(folder: pathlib.Path, count: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data.kills", "fill", str(folder), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def peak_mb(folder: pathlib.Path, count: int) -> float:
    """Prepares images in a process of its own and returns its peak memory."""
    output = start(folder, count).communicate()[0]
    return float(output.split(PEAK)[1])


def killed(folder: pathlib.Path, count: int, kills: int, start_s: float, work_s: float) -> int:
    """Starts the work again until it is finished, and kills it up to `kills` times; returns how often it was killed.

    Args:
      start_s: until a process begins to work.
      work_s: the most that a process works before it is killed.
    """
    rng, done = random.Random(0), 0
    while not folder.exists():
        child = start(folder, count)
        if done < kills:
            try:
                child.wait(start_s + rng.random() * work_s)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGKILL)
                done += 1
        child.communicate()
    return done


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def main(count: int = 100_000, kills: int = 20) -> None:
    """Compares, and prints what was compared."""
    with tempfile.TemporaryDirectory() as name:
        folder, times, peaks = pathlib.Path(name), [], []
        for part in (count // 10, count):
            started = time.perf_counter()
            peaks.append(peak_mb(folder / str(part), part))
            times.append(time.perf_counter() - started)
        start_s = max(10 * times[0] - times[1], 0) / 9
        done = killed(folder / "killed", count, kills, start_s, 1.2 * (times[1] - start_s) / kills)
        same = contents(folder / "killed") == contents(folder / str(count))
    print(f"{count} images, {done} kills: the caches are {'equal byte for byte' if same else 'DIFFERENT'}")
    print(f"peak memory: {peaks[0]:.0f} MB with {count // 10} images, {peaks[1]:.0f} MB with {count}")
    if not same or done < kills:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["fill"]:
        fill(*sys.argv[2:])
    else:
        main(*map(int, sys.argv[1:]))
