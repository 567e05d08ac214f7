"""Training states on disk: Orbax, written asynchronously, named by step; the only file that knows its interface."""

import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from dmm_jax.checkpoints.errors import CheckpointError


class StateStore:
    """The `checkpoints` folder of a workdir; a context manager, so that no save is left unfinished."""

    def __init__(self, workdir: str | pathlib.Path, *, every: int, kept: int):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=kept or None,
            save_interval_steps=max(every, 1),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(pathlib.Path(workdir).absolute() / "checkpoints", options=options)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state, *, force: bool = False) -> None:
        """Starts to save `state` if `step` is due (or `force`) and not there yet; returns before it is written."""
        if step == self.latest_step:
            return
        if force or self._manager.should_save(step):
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)), force=True)

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
            raise CheckpointError(
                f"checkpoint {self._manager.directory / str(step)} cannot be restored: {error}"
            ) from error


def restore_student(workdir: str | pathlib.Path, abstract) -> dict:
    """Reads the newest student of a run, its average where one is kept, as float32 host arrays; moments stay on disk.

    Raises:
      CheckpointError: the run has saved nothing yet.
    """
    folder = pathlib.Path(workdir).absolute() / "checkpoints"
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
    if step is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint yet: train until the first one is saved.")
    path = folder / str(step) / "state"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        saved = reader.metadata(path).item_metadata
        name = "ema" if "ema" in getattr(saved, "tree", saved) else "params"
        item = {name: jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract)}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        return reader.restore(
            path, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )[name]
