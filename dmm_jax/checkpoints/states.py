"""Saves and restores training states with Orbax: asynchronously, named by step. No other file calls Orbax."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.metadata import step_metadata_serialization

from dmm_jax.checkpoints import checksums
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.storage import in_bucket, locate, read_text

STATE, RECORD = "state", "record"  # The items of a step: its arrays; their dtypes, shapes, checksums, and the notes.


class Damaged(Exception):
    """The stored files of a step differ from what was saved."""


class StateStore:
    """The `checkpoints` folder of a workdir. It is a context manager, which finishes every save before it returns."""

    def __init__(self, workdir: str | os.PathLike, *, keep_last: int = 0, keep_every: int = 0):
        """Opens or makes the folder; the newest `keep_last` saves stay (0: all), and every `keep_every`-th step.

        Raises:
          CheckpointError: no step has metadata that Orbax can read. Others without them are moved aside.
        """
        _move_unreadable_aside(_checkpoints(workdir))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last or None,
            keep_period=keep_every or None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(_checkpoints(workdir), options=options)

    def __enter__(self):
        return self

    def __exit__(self, failed, *_):
        if failed and jax.process_count() > 1:
            return  # Another process may be gone: waiting for it would hang.
        with _full_disk_named(self._manager.directory):
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
        """Starts to save `state` unless `step` is saved already; returns before it is written.

        The checksums are computed on the devices, which read the state once for them, and saved with it.

        Args:
          notes: further facts about the step, ready for JSON.
        """
        if step != self.latest_step:
            record = {"leaves": checksums.of_tree(state), "notes": dict(notes or {})}
            items = {STATE: ocp.args.StandardSave(state), RECORD: ocp.args.JsonSave(record | {"crc32": _crc(record)})}
            with _full_disk_named(self._manager.directory):
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def resume(self, state) -> tuple[int, Any]:
        """Returns step and state of the newest sound checkpoint; 0 and `state` if nothing is saved.

        It names damaged checkpoints on stderr and moves them aside, so that their steps can be saved again.

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
        """Returns the notes that were saved with a sound step."""
        record = _record(self._folder(step))
        return record["notes"] if record else {}

    def _move_aside(self, step, damage, earlier_steps):
        folder = self._folder(step)
        if not earlier_steps:
            raise CheckpointError(
                f"{folder} is damaged ({damage}) and there is no other checkpoint. "
                f"Move {folder.parent} away to start again from step 0."
            )
        say(f"{folder} is damaged ({damage}): going back to step {earlier_steps[-1]}.")
        _rename_aside([folder])
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
        """Returns a state whose checksums are right; all processes of a run return together, or raise together."""
        folder = self._folder(step)
        with _agreed():
            record = _record(folder)
        if record:
            _check_fits(folder, record["leaves"], abstract)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), abstract
        )
        try:
            with _agreed(), _errors_as_damage():
                # The manager's own restore ends in a barrier, where all would wait for a process that has failed.
                state = ocp.StandardCheckpointHandler().restore(folder / STATE, args=ocp.args.StandardRestore(shapes))
        except Damaged as damage:
            if record:
                raise
            raise CheckpointError(
                f"{folder} cannot be restored, and holds no checksums that would show whether it is damaged or does "
                f"not fit the config: {damage}. Use the config that it was saved with, or move it away."
            ) from damage
        if record:
            _compare(state, record["leaves"])
        return state


def _checkpoints(workdir) -> epath.Path:
    path = locate(workdir)
    return epath.Path(path if in_bucket(path) else path.absolute()) / "checkpoints"


def _move_unreadable_aside(folder: epath.Path) -> None:
    """Renames the steps whose metadata would make Orbax's manager fail, all of them for one."""
    steps = [path for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    damaged = {}
    for path in steps:
        try:
            _check_metadata(path)
        except Damaged as damage:
            damaged[path] = damage
    if damaged and len(damaged) == len(steps):
        raise CheckpointError(
            f"no checkpoint in {folder} can be read: {min(map(str, damaged.values()))}. Move it away to start again "
            "from step 0."
        )
    for path, damage in damaged.items():
        newest = max(int(step.name) for step in steps if step not in damaged)
        say(f"{path} is damaged ({damage}): going back to step {newest}.")
    _rename_aside(damaged)


def _rename_aside(folders: Iterable[epath.Path]) -> None:
    """Renames the folders of steps to damaged_STEP; all processes wait until process 0 has done so."""
    for folder in folders if jax.process_index() == 0 else ():
        aside = folder.with_name(f"damaged_{folder.name}")
        aside.rmtree(missing_ok=True)
        folder.rename(aside)
    with _agreed():
        pass


def _check_metadata(folder: epath.Path) -> None:
    """Raises Damaged if Orbax cannot read the metadata of a step; they may be missing."""
    path = folder / "_CHECKPOINT_METADATA"
    if path.exists():
        with _errors_as_damage():
            metadata = step_metadata_serialization.deserialize(json.loads(read_text(path)))
            float(metadata.commit_timestamp_nsecs or 0), float(metadata.init_timestamp_nsecs or 0)  # Orbax does so.


def _crc(record) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _record(folder: epath.Path) -> dict | None:
    """Returns the record of a step: {"leaves": {path: [dtype, shape, checksum]}, "notes"}; None if it has none.

    Raises:
      Damaged: the record was saved, and is unreadable or changed.
    """
    try:
        if not (folder / RECORD).exists():
            saved = json.loads(read_text(folder / "_CHECKPOINT_METADATA"))["item_handlers"]
            if not isinstance(saved, dict):
                raise UserError("_CHECKPOINT_METADATA does not name the items")
            if RECORD not in saved:
                return None
        record = json.loads(read_text(folder / RECORD / "metadata"))
        if record.pop("crc32") != _crc(record):
            raise UserError("its checksum does not match its contents")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise Damaged(f"{RECORD}: {_first_line(error)}") from error
    return record


def _check_fits(folder, leaves, abstract) -> None:
    """Raises CheckpointError if the saved arrays do not have the paths, dtypes and shapes of `abstract`."""
    expected = {path: list(checksums.kind(leaf)) for path, leaf in checksums.paths(abstract).items()}
    saved = {path: leaf[:2] for path, leaf in leaves.items()}
    differing = sorted(path for path in expected.keys() | saved.keys() if expected.get(path) != saved.get(path))
    if differing:
        path = differing[0]
        raise CheckpointError(
            f"{folder} cannot be restored: it does not fit the config in {len(differing)} arrays. {path} was saved as "
            f"{_dtype_and_shape(saved.get(path))}; expected {_dtype_and_shape(expected.get(path))}. "
            "Use the config that it was saved with, or another workdir."
        )


def _dtype_and_shape(leaf) -> str:
    return f"{leaf[0]}{leaf[1]}" if leaf else "nothing"


def _compare(state, leaves) -> None:
    """Raises Damaged if the checksums of a state are not those of its record."""
    differing = [path for path, leaf in checksums.of_tree(state).items() if leaf != leaves.get(path)]
    if differing:
        others = f" and {len(differing) - 1} other arrays" if len(differing) > 1 else ""
        raise Damaged(f"{differing[0]}{others}: the values are not those that were saved")


@contextlib.contextmanager
def _full_disk_named(folder) -> Iterator[None]:
    """Raises UserError if the block fails because the disk is full, which TensorStore reports by a ValueError."""
    try:
        yield
    except ValueError as error:
        reason = next((text for text in ("No space left on device", "Disk quota exceeded") if text in str(error)), "")
        if not reason:
            raise
        raise UserError(
            f"{folder} cannot be written: {reason}. Free some space and run again: the run resumes from its last "
            "complete checkpoint."
        ) from error


@contextlib.contextmanager
def _errors_as_damage() -> Iterator[None]:
    """Raises Damaged for any error of the block."""
    try:
        yield
    except Exception as error:  # The errors of TensorStore and Orbax have no common class.
        raise Damaged(_first_line(error)) from error


def _first_line(error) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def _agreed() -> Iterator[None]:
    """Raises Damaged in all processes if the block does so in one of them."""
    damage = None
    try:
        yield
    except Damaged as error:
        damage = error
    any_damage = damage is not None
    if jax.process_count() > 1:
        any_damage = multihost_utils.process_allgather(np.asarray(any_damage)).any()
    if any_damage:
        raise damage or Damaged("another process cannot read its part")


def restore_student(workdir: str | os.PathLike, abstract, notes: Mapping[str, str] | None = None) -> dict:
    """Returns the newest student of a run as float32 host arrays: its moving average, if the run keeps one.

    It names damaged checkpoints on stderr and reads the one before. The optimiser's moments are not read.

    Args:
      notes: as in `check_notes`.

    Raises:
      CheckpointError: the run has saved nothing yet, all is damaged, or it has other notes.
    """
    folder = _checkpoints(workdir)
    steps = sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []
    if not steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint yet: train until the first one is saved.")
    while True:
        path = folder / str(steps.pop())
        try:
            return _student(path, abstract, notes or {})
        except Damaged as damage:
            if not steps:
                raise CheckpointError(f"{path} is damaged ({damage}) and there is no other checkpoint.") from damage
            say(f"{path} is damaged ({damage}): reading step {steps[-1]}.")


def check_notes(folder, saved: Mapping, notes: Mapping[str, str]) -> None:
    """Raises CheckpointError if a step was not saved with these notes, which are digests of what it depends on."""
    for name, value in notes.items():
        if saved.get(name) != value:
            raise CheckpointError(
                f"{folder} trains a LoRA, and its {name} has changed: the base, or a teacher of the mean it started "
                "from, is not the file that it was trained with. Put that file back."
            )


def _student(folder, abstract, notes) -> dict:
    _check_metadata(folder)
    record, reader = _record(folder), ocp.PyTreeCheckpointHandler()
    check_notes(folder, record["notes"] if record else {}, notes)
    with _errors_as_damage():
        saved = reader.metadata(folder / STATE)
        name = "ema" if "ema" in getattr(saved, "tree", saved) else "params"
        item = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = reader.restore(
            folder / STATE, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )
    if record:
        _compare(restored, record["leaves"])
    return restored[name]
