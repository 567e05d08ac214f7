"""Runs PyTorch's side of a job, `bench.peer`, and compares its speed with ours."""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence

from dmm_jax.runtime.errors import UserError


def run_peer(job: str, size: str, batch_size: int, num_steps: int, *num_teachers: int) -> list[dict]:
    """Runs the same job with PyTorch on this machine, in a process of its own, and returns its rows.

    Raises:
      UserError: torch or diffusers is not installed, or the process failed; quotes the end of its error output.
    """
    command = [sys.executable, "-m", "dmm_jax.bench.peer", job, size, *map(str, (batch_size, num_steps, *num_teachers))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the PyTorch peer failed (it needs the [torch] extra): {done.stderr.strip()[-500:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def with_ratios(rows: Iterable[dict], peer_rows: Sequence[dict]) -> Iterator[dict]:
    """Yields each row with "ratio": our images/s as a multiple of each peer row's, by the peer's job."""
    for row in rows:
        yield row | {"ratio": {peer["job"]: row["images_per_s"] / peer["images_per_s"] for peer in peer_rows}}
