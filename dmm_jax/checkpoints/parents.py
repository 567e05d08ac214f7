"""The checkpoints that a run's student comes from: told once, when the run reads them, and kept in its parents.json.

So an export needs none of them, and names the files as they were, not as they are by then.
"""

import contextlib
import json
import pathlib
import sys
import threading
from collections.abc import Iterator, Mapping

from dmm_jax.checkpoints import licenses, provenance
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import options as config_lib
from dmm_jax.runtime import processes
from dmm_jax.runtime.storage import Location, locate

NAME = "parents.json"
BASE = "base"


@contextlib.contextmanager
def being_kept(workdir: Location, config) -> Iterator[None]:
    """Hashes the parents' files in a thread while the block runs, and writes parents.json; waits for it at the end.

    Nothing is waited for when the block fails. What goes wrong here is said and stops no run: an export then looks for
    the parents itself.
    """
    if not processes.is_first():
        yield
        return
    thread = threading.Thread(target=_keep, args=(workdir, config), name=NAME, daemon=True)
    thread.start()
    yield
    thread.join()


def _keep(workdir, config):
    try:
        (workdir / NAME).write_text(json.dumps(of_run(config), indent=2, sort_keys=True) + "\n")
    except Exception as error:  # Of the file system, or of a bucket's client.
        print(f"{workdir / NAME} was not written: {error}", file=sys.stderr, flush=True)


def of_workdir(workdir: Location, hashed: bool = True) -> dict[str, dict]:
    """Returns `provenance.record` of a run's parents, by "base" and style, with the licences that its config tells.

    Args:
      hashed: whether the files' hashes are needed. Without them a parent that is gone counts as one that says nothing.

    Raises:
      CheckpointError: the run kept no parents.json, and a parent cannot be opened.
    """
    config = config_lib.load(workdir)
    told = config_lib.licenses(config)
    found = _kept(workdir, config) or of_run(config, hashed)
    return {name: one | {"license": told.get(name) or one["license"]} for name, one in found.items()}


def _kept(workdir, config) -> dict | None:
    """Returns what parents.json says, or None where it is not there, was cut off, or tells of other styles."""
    try:
        found = json.loads((workdir / NAME).read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(found, dict) and set(found) == {BASE, *config_lib.style_names(config)}
    return found if whole and all("file" in one and "license" in one for one in found.values()) else None


def of_run(config, hashed: bool = True) -> dict[str, dict]:
    """Returns `provenance.record` of the parents by opening them: the base, and each style's teacher in row order.

    Of a grown student's older styles it is what the older run says; where that is a DMM folder, the folder.

    Raises:
      CheckpointError: hashes are asked for, and a parent cannot be opened.
    """
    found = {BASE: _record(BASE, config.base, config, hashed)}
    if config.grow.student:
        path, kept = locate(config.grow.student), config_lib.kept_styles(config)
        if (path / "config.json").is_file():
            older = of_workdir(path, hashed)
        else:
            older = dict.fromkeys(kept.values(), _record("grow.student", path, config, hashed))
        found |= {name: older[old] for name, old in kept.items()}
    return found | {name: _record(name, path, config, hashed) for name, path in config.teachers}


def _record(name, path, config, hashed) -> dict:
    try:
        return provenance.record(open_checkpoint(path, prediction_type=config.prediction_type), hashed)
    except (CheckpointError, OSError) as error:
        if not hashed:
            return {"file": pathlib.Path(path).name, "license": licenses.UNKNOWN}
        raise CheckpointError(
            f"the recipe names every parent with its hash, and {name} cannot be read: {error} Put it back, or leave "
            "the recipe out: --no-recipe."
        ) from error


def names(parents: Mapping[str, Mapping]) -> list[str]:
    """Returns what the parents are called, each once."""
    return list(dict.fromkeys(parent["file"] for parent in parents.values()))
