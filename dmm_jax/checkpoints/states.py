"""Training states on disk: Orbax, written asynchronously, named by step; the only file that knows its interface."""

import json
import os
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jax.experimental import multihost_utils

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.folders import in_bucket, locate

READ_AT_ONCE = 16  # Stored chunks, when a checkpoint is looked over.


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

    def save(self, step: int, state) -> None:
        """Starts to save `state` unless `step` is there already; returns before it is written."""
        if step != self.latest_step:
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)

    def resume(self, state) -> tuple[int, Any]:
        """Returns step and state of the newest checkpoint that can be read, or 0 and `state` where there is none.

        Damaged ones are named on stderr and moved aside, so that their steps can be saved again.

        Raises:
          CheckpointError: none can be read, or the newest sound one does not fit `state`.
        """
        steps = self.steps
        while steps:
            step = steps.pop()
            damage = _agreed(_damage(self._folder(step)))
            if not damage:
                return step, self.restore(state, step)
            self._move_aside(step, damage, steps)
        return 0, state

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
        _agreed(None)  # Wait until it is done.
        self._manager.reload()

    def _folder(self, step):
        return self._manager.directory / str(step)

    def restore(self, abstract, step: int | None = None):
        """Reads a state into the shapes, dtypes and shardings of `abstract` (arrays or ShapeDtypeStructs).

        Raises:
          CheckpointError: there is none, or it does not fit `abstract`.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise CheckpointError(f"{self._manager.directory} holds no complete checkpoint yet.")
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), abstract
        )
        try:
            return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes))).state
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"{self._folder(step)} cannot be restored: {error}") from error


def _checkpoints(workdir) -> epath.Path:
    path = locate(workdir)
    return epath.Path(path if in_bucket(path) else path.absolute()) / "checkpoints"


def _url(folder: epath.Path) -> str:
    """Returns a folder as TensorStore names it."""
    return f"{folder}/" if in_bucket(folder) else f"file://{folder}/"


def _damage(folder: epath.Path, parts: tuple[bytes, ...] = ()) -> str | None:
    """Reads what is stored (of `parts` the first that is there), this process its share; tells what cannot be read."""
    try:
        needed = [folder / "_CHECKPOINT_METADATA", folder / "state" / "_METADATA"]
        for path in [*needed, *(folder / "state" / "array_metadatas").glob("*")]:
            _check_json(path)
        store = ts.KvStore.open({"driver": "ocdbt", "base": _url(folder / "state")}).result()
        keys = sorted(store.list().result())
        for part in parts:
            keys = [key for key in keys if key.startswith(part)] or keys
        if not keys:
            return "it holds no arrays"
        keys = keys[jax.process_index() :: jax.process_count()]
        for first in range(0, len(keys), READ_AT_ONCE):
            some = keys[first : first + READ_AT_ONCE]
            for key, reading in zip(some, [store.read(key) for key in some], strict=True):
                if not reading.result().value:  # So a value reads whose file is gone.
                    return f"{key.decode()} is gone"
    except (ValueError, OSError) as error:  # tensorstore's errors are ValueErrors.
        return str(error).splitlines()[0][:300]
    return None


def _check_json(path):
    try:
        json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _agreed(damage: str | None) -> str | None:
    """Returns the damage that any process found, so that all decide alike."""
    if jax.process_count() == 1:
        return damage
    found = multihost_utils.process_allgather(np.asarray(damage is not None))
    return damage or "another process cannot read its part" if found.any() else None


def restore_student(workdir: str | os.PathLike, abstract) -> dict:
    """Reads the newest student of a run, its average where one is kept, as float32 host arrays; moments stay on disk.

    Raises:
      CheckpointError: the run has saved nothing yet.
    """
    folder = _checkpoints(workdir)
    with ocp.CheckpointManager(folder) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise CheckpointError(f"{folder} holds no complete checkpoint yet: train until the first one is saved.")
    while len(steps) > 1 and (damage := _damage(folder / str(steps[-1]), (b"ema.", b"params."))):
        print(f"{folder / str(steps.pop())} is damaged ({damage}): reading step {steps[-1]}.", file=sys.stderr)
    path = folder / str(steps[-1]) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(path).item_metadata
        name = "ema" if "ema" in getattr(saved, "tree", saved) else "params"
        item = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return reader.restore(
            path, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )[name]
