"""Training states on disk: Orbax, written asynchronously, named by step; the only file that knows its interface."""

import contextlib
import json
import os
import sys
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dmm_jax.checkpoints import checksums
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import in_bucket, locate

STATE, RECORD = "state", "record"  # What a step holds: the arrays; what they are, their checksums, and the notes.


class Damaged(Exception):
    """What is stored of a step is not what was saved."""


class StateStore:
    """The `checkpoints` folder of a workdir; a context manager, so that no save is left unfinished."""

    def __init__(self, workdir: str | os.PathLike, *, kept: int = 0, kept_every: int = 0):
        """Opens or makes the folder; `kept` of the last saves are kept (0: all), and every `kept_every`-th step."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept or None,
            keep_period=kept_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(_checkpoints(workdir), options=options)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if failed and jax.process_count() > 1:
            return  # Another process may be gone: waiting for it would hang.
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps saved, or being saved, oldest first."""
        return sorted(self._manager.all_steps())

    @property
    def latest_step(self) -> int | None:
        """The last of `steps`, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state, notes: Mapping[str, Any] | None = None) -> None:
        """Starts to save `state` unless `step` is there already; returns before it is written.

        Its checksums are computed on the devices, which read it once for them, and saved beside it.

        Args:
          notes: more about the step, as JSON holds it.
        """
        if step != self.latest_step:
            record = {"leaves": checksums.of_tree(state), "notes": dict(notes or {})}
            items = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record | {"crc32": _crc(record)})}
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def resume(self, state) -> tuple[int, Any]:
        """Returns step and state of the newest checkpoint that is as it was saved; 0 and `state` where there is none.

        Damaged ones are named on stderr and moved aside, so that their steps can be saved again.

        Raises:
          CheckpointError: all are damaged, or the newest sound one does not fit `state`.
        """
        steps = self.steps
        while steps:
            step = steps.pop()
            try:
                return step, self._read(step, state)
            except Damaged as damage:
                self._move_aside(step, damage, steps)
        return 0, state

    def notes(self, step: int) -> dict[str, Any]:
        """Returns what was noted of a step that can be read."""
        record = _record(self._folder(step))
        return record["notes"] if record else {}

    def _move_aside(self, step, damage, others):
        folder = self._folder(step)
        if not others:
            raise CheckpointError(
                f"{folder} is damaged ({damage}) and there is no other checkpoint. "
                f"Move {folder.parent} away to start anew."
            )
        if jax.process_index() == 0:
            print(f"{folder} is damaged ({damage}): going back to step {others[-1]}.", file=sys.stderr, flush=True)
            aside = folder.with_name(f"damaged_{step}")
            aside.rmtree(missing_ok=True)
            folder.rename(aside)
        with _agreed():  # Wait until it is done.
            pass
        self._manager.reload()

    def _folder(self, step):
        return self._manager.directory / str(step)

    def restore(self, abstract, step: int | None = None):
        """Reads a state into the shapes, dtypes and shardings of `abstract` (arrays or ShapeDtypeStructs).

        Raises:
          CheckpointError: there is none, it is damaged, or it does not fit `abstract`.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise CheckpointError(f"{self._manager.directory} holds no complete checkpoint yet.")
        try:
            return self._read(step, abstract)
        except Damaged as damage:
            raise CheckpointError(f"{self._folder(step)} is damaged ({damage}).") from damage

    def _read(self, step, abstract):
        """Returns a state and compares its checksums; all processes of a run return, or raise, alike."""
        folder = self._folder(step)
        with _agreed():
            record = _record(folder)
        if record:
            _check_fits(folder, record["leaves"], abstract)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), abstract
        )
        try:
            with _agreed(), _told_as_damage():
                # The manager's own reading ends in a barrier, where all would wait for a process that has failed.
                state = ocp.StandardCheckpointHandler().restore(folder / STATE, args=ocp.args.StandardRestore(shapes))
        except Damaged as damage:
            if record:
                raise
            raise CheckpointError(
                f"{folder} cannot be restored, and holds no checksums that would tell whether it is damaged or does "
                f"not fit the config: {damage}. Use the config that it was saved with, or move it away."
            ) from damage
        if record:
            _compare(state, record["leaves"])
        return state


def _checkpoints(workdir) -> epath.Path:
    path = locate(workdir)
    return epath.Path(path if in_bucket(path) else path.absolute()) / "checkpoints"


def _crc(record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _record(folder: epath.Path) -> dict | None:
    """Reads what was saved beside a state: {"leaves": {path: [dtype, shape, checksum]}, "notes"}; None of old steps.

    Raises:
      Damaged: it was saved, and cannot be read or is not what was saved.
    """
    try:
        if not (folder / RECORD).exists():
            saved = json.loads((folder / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
            if RECORD not in saved:
                return None
        record = json.loads((folder / RECORD / "metadata").read_text())
        if record.pop("crc32") != _crc(record):
            raise UserError("its checksum is not the one of what it holds")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise Damaged(f"{RECORD}: {_first_line(error)}") from error
    return record


def _check_fits(folder, leaves, abstract) -> None:
    """Raises CheckpointError that names what differs between what was saved and what is wanted."""
    wanted = {path: list(checksums.kind(leaf)) for path, leaf in checksums.paths(abstract).items()}
    saved = {path: leaf[:2] for path, leaf in leaves.items()}
    differing = sorted(path for path in wanted.keys() | saved.keys() if wanted.get(path) != saved.get(path))
    if differing:
        path = differing[0]
        raise CheckpointError(
            f"{folder} cannot be restored: it does not fit the config in {len(differing)} arrays. {path} was saved as "
            f"{_told(saved.get(path))}; expected {_told(wanted.get(path))}. Use the config that it was saved with, or "
            "another --workdir."
        )


def _told(leaf) -> str:
    return f"{leaf[0]}{leaf[1]}" if leaf else "nothing"


def _compare(state, leaves) -> None:
    found = checksums.of_tree(state)
    differing = [path for path, leaf in found.items() if leaf != leaves.get(path)]
    if differing:
        others = f" and {len(differing) - 1} other arrays" if len(differing) > 1 else ""
        raise Damaged(f"{differing[0]}{others}: the values are not those that were saved")


@contextlib.contextmanager
def _told_as_damage() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TensorStore's and Orbax's have no common class.
        raise Damaged(_first_line(error)) from error


def _first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Lets all processes raise Damaged when the block does so in one of them."""
    damage = None
    try:
        yield
    except Damaged as error:
        damage = error
    found = damage is not None
    if jax.process_count() > 1:
        found = multihost_utils.process_allgather(np.asarray(found)).any()
    if found:
        raise damage or Damaged("another process cannot read its part")


def restore_student(workdir: str | os.PathLike, abstract) -> dict:
    """Reads the newest student of a run, its average where one is kept, as float32 host arrays; moments stay on disk.

    A damaged one is named on stderr, and the one before it read.

    Raises:
      CheckpointError: the run has saved nothing yet, or all is damaged.
    """
    folder = _checkpoints(workdir)
    with ocp.CheckpointManager(folder) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint yet: train until the first one is saved.")
    while True:
        path = folder / str(steps.pop())
        try:
            return _student(path, abstract)
        except Damaged as damage:
            if not steps:
                raise CheckpointError(f"{path} is damaged ({damage}) and there is no other checkpoint.") from damage
            print(f"{path} is damaged ({damage}): reading step {steps[-1]}.", file=sys.stderr, flush=True)


def _student(folder, abstract) -> dict:
    record, reader = _record(folder), ocp.PyTreeCheckpointHandler()
    with _told_as_damage():
        saved = reader.metadata(folder / STATE)
        name = "ema" if "ema" in getattr(saved, "tree", saved) else "params"
        item = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        found = reader.restore(
            folder / STATE, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )
    if record:
        _compare(found, record["leaves"])
    return found[name]
