"""Records where a model comes from: names, licences and SHA-256 of checkpoints' files, and a run's parents.json.

A run records its parents when it reads them. So an export needs none of them and names the files as they were then.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Iterator, Mapping, Sequence

from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import hub
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.config.options import as_kept, kept_styles, opening_options, style_names
from dmm_jax.config.serialization import load_config
from dmm_jax.runtime import processes
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import Location, locate, read_json, write_text

SHORT_HASH = 10  # Hexadecimal digits of a file's SHA-256 that hubs show ("AutoV2").
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # The folder of huggingface.co's ORGANISATION/NAME on a disk.
PARENTS_FILE = "parents.json"
BASE = "base"
TRIGGER, MAX_TRIGGER_CHARS = "modelspec.trigger_phrase", 300  # ModelSpec's field of a file's metadata.


def record(checkpoint: Checkpoint, hashed: bool = True) -> dict:
    """Returns the entry of a parent in a recipe, ready for JSON.

    Args:
      hashed: whether to read the files completely, for their hashes.

    Returns:
      file: the checkpoint's name. license: the licence that it states, or "unknown". files: the files of its UNet, by
      name, with their SHA-256 and its first ten digits. loras: the same for the LoRAs that are folded in, with their
      weights. clip_skip: if it is not 1. hub: its name on the hub, if its path shows that it is a copy from there.
      trigger: the words that its files or LoRAs state for prompts.
    """
    entry = {"file": checkpoint.name, "license": checkpoint.license or licenses.UNKNOWN} | hub_of(checkpoint.root)
    if checkpoint.clip_skip != 1:
        entry["clip_skip"] = checkpoint.clip_skip
    files = [path for path in (*unet_files(checkpoint), *(lora.path for lora in checkpoint.loras)) if path.is_file()]
    if words := list(filter(None, (TensorFile(path).metadata.get(TRIGGER, "").strip() for path in files))):
        entry["trigger"] = ", ".join(dict.fromkeys(words))[:MAX_TRIGGER_CHARS]
    if hashed:
        entry["files"] = [file_hashes(path, checkpoint.root) for path in unet_files(checkpoint)]
        if checkpoint.loras:
            entry["loras"] = [
                file_hashes(lora.path, lora.path) | {"weight": lora.weight} | hub_of(lora.path)
                for lora in checkpoint.loras
            ]
    return entry


def hub_of(path: Location) -> dict[str, str]:
    """Returns {"hub": ORGANISATION/NAME} if a path shows that it is a copy from a hub, else {}."""
    match = HUB_CACHE.search(str(path))
    return {"hub": f"{match[1]}/{match[2]}"} if match else {}


def unet_files(checkpoint: Checkpoint) -> list[pathlib.Path]:
    """Returns the files that hold a checkpoint's UNet, without those of LoRAs; an empty list for a workdir."""
    root = checkpoint.root
    return [file for file in checkpoint.files if file == root or file.parent == root / "unet"]


def file_hashes(path: pathlib.Path, root: Location) -> dict[str, str]:
    """Returns a file's name in its checkpoint, its SHA-256 and the short form that hubs show."""
    digest = sha256(path)
    return {"file": relative_name(path, root), "sha256": digest, "autov2": digest[:SHORT_HASH]}


def relative_name(path: pathlib.Path, root: Location) -> str:
    """Returns the name of a file in its checkpoint: relative to `root`, or the file's own if it is `root`."""
    return path.name if path == root else path.relative_to(root).as_posix()


def sha256(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def record_parents(workdir: Location, config) -> Iterator[None]:
    """Writes parents.json in a thread, which hashes the parents' files while the block runs; waits for it at the end.

    If the block fails, the thread is not waited for. An error in the thread is printed and does not stop the run: an
    export then opens the parents itself.
    """
    if not processes.is_first():
        yield
        return

    def write():
        try:
            parents = parents_of_config(config)
            write_text(workdir / PARENTS_FILE, json.dumps(parents, indent=2, sort_keys=True) + "\n")
        except Exception as error:  # The file system's, or any that the client of a bucket raises.
            processes.say(f"{workdir / PARENTS_FILE} was not written: {error}")

    thread = threading.Thread(target=write, name=PARENTS_FILE, daemon=True)
    thread.start()
    yield
    thread.join()


@hub.cache_only()
def parents_of_workdir(workdir: Location, hashed: bool = True) -> dict[str, dict]:
    """Returns the `record` of each of a run's parents, by "base" and style.

    Args:
      hashed: whether the files' hashes are needed. Without them, a parent that is missing has an unknown licence.

    Raises:
      CheckpointError: the run has no complete parents.json, and a parent cannot be opened.
    """
    config = load_config(workdir)
    return _read_parents(workdir, config) or parents_of_config(config, hashed)


def triggers_of_workdir(path: str | os.PathLike, student: Checkpoint, keep: Sequence[str] = ()) -> dict[str, str]:
    """Returns the trigger words that the teachers' files state, by the styles of a student; {} for a DMM folder."""
    if student.kind != "workdir":
        return {}
    parents = parents_of_workdir(locate(path), hashed=False)
    names = as_kept(keep) if keep else {name: name for name in student.styles}
    return {new: parents[old]["trigger"] for new, old in names.items() if parents.get(old, {}).get("trigger")}


def with_licenses(parents: Mapping[str, Mapping], entries: Sequence[str]) -> dict[str, dict]:
    """Returns the records with the licences of ("NAME=LICENCE", ...) where NAME is "base" or a style.

    Raises:
      UserError: an entry has another form, or names no parent.
    """
    stated = {name: licence.strip() for name, _, licence in (entry.partition("=") for entry in entries)}
    for name, licence in stated.items():
        if name not in parents or not licence:
            raise UserError(
                f"a licence is given as NAME=LICENCE, with a name of {', '.join(parents) or 'a run (this is none)'}; "
                f"got {name!r} with {licence!r}."
            )
    return {name: parent | {"license": stated.get(name) or parent["license"]} for name, parent in parents.items()}


def _read_parents(workdir, config) -> dict | None:
    """Returns the contents of parents.json, or None if it is missing, damaged, or about other styles."""
    try:
        parents = read_json(workdir / PARENTS_FILE)
        is_sound = set(parents) == {BASE, *style_names(config)} and all(map(_is_record, parents.values()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):
        return None
    return parents if is_sound else None


def _is_record(parent) -> bool:
    """Tells whether a value has the form that `record` returns; may raise for another type."""
    lists = [parent.get("files", []), parent.get("loras", [])]
    texts = [parent["file"], parent["license"], parent.get("hub", ""), parent.get("trigger", "")]
    texts += [text for files in lists for file in files for text in (file["autov2"], file.get("hub", ""))]
    weights = [lora["weight"] for lora in lists[1]]
    return all(isinstance(text, str) for text in texts) and all(isinstance(w, (int, float)) for w in weights)


def parents_of_config(config, hashed: bool = True) -> dict[str, dict]:
    """Returns the `record` of each parent: the base, and each style's teacher in row order. Opens the checkpoints.

    For the older styles of a grown student it returns the records of the older run, or of the DMM folder that it is.

    Raises:
      CheckpointError: hashes are asked for, and a parent cannot be opened.
    """
    parents = {BASE: _record_of_path(BASE, config.base, config, hashed)}
    if config.grow.student:
        path, old_names = locate(config.grow.student), kept_styles(config)
        if (path / "config.json").is_file():
            older = parents_of_workdir(path, hashed)
        else:
            older = dict.fromkeys(old_names.values(), _record_of_path("grow.student", path, config, hashed))
        parents |= {name: older[old_name] for name, old_name in old_names.items()}
    return parents | {name: _record_of_path(name, path, config, hashed) for name, path in config.teachers}


def _record_of_path(name, path, config, hashed) -> dict:
    try:
        return record(_open(name, path, config), hashed)
    except (CheckpointError, OSError) as error:
        if not hashed:
            return {"file": pathlib.Path(path).name, "license": licenses.UNKNOWN}
        raise CheckpointError(
            f"the recipe names every parent with its hash, and {name} cannot be read: {error} Put it back, or leave "
            "the recipe out: `export --no-recipe`."
        ) from error


def _open(name, path, config) -> Checkpoint:
    options = opening_options(config, name)
    return open_checkpoint(path, **options) if name == BASE else open_teacher(path, config.base, **options)


def parent_names(parents: Mapping[str, Mapping]) -> list[str]:
    """Returns the names of the parents' checkpoints, each once."""
    return list(dict.fromkeys(parent["file"] for parent in parents.values()))
