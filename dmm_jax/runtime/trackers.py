"""Trackers of experiments: TensorBoard's event files and Weights & Biases, each if it is asked for and installed."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from dmm_jax.runtime.errors import UserError, meant


@runtime_checkable
class Tracker(Protocol):
    """Receives the numbers of a run while it trains."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records numbers by name, such as "score/anime"."""

    def close(self) -> None:
        """Writes what is still in memory."""


class TensorBoard:
    """Writes event files into the workdir."""

    def __init__(self, workdir: str | os.PathLike, config: Mapping):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "tensorboardX") from None
        self._writer = SummaryWriter(str(workdir))

    def log(self, step, scalars):
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self):
        self._writer.close()


class WeightsAndBiases:
    """Sends the numbers to Weights & Biases; a resumed run continues its curves. WANDB_MODE=offline keeps them here."""

    def __init__(self, workdir: str | os.PathLike, config: Mapping):
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "wandb") from None
        place = os.path.abspath(workdir)
        identity = hashlib.sha256(place.encode()).hexdigest()[:16]
        self._run = wandb.init(
            project="dmm_jax", name=os.path.basename(place), id=identity, resume="allow", dir=place, config=dict(config)
        )

    def log(self, step, scalars):
        self._run.log(dict(scalars), step=step)

    def close(self):
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def open_trackers(names: Sequence[str], workdir: str | os.PathLike, config: Mapping) -> list[Tracker]:
    """Opens trackers by their names in `TRACKERS`.

    Args:
      config: the options of the run, which some trackers show.

    Raises:
      UserError: a name is unknown, or its package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"there is no tracker {name!r}{meant(name, TRACKERS)} There are: {', '.join(TRACKERS)}.")
    return [TRACKERS[name](workdir, config) for name in dict.fromkeys(names)]


def _missing(name: str, package: str) -> UserError:
    return UserError(f"--tracker {name} needs the package {package}: pip install {package}, or omit the flag.")
