"""Where a checkpoint comes from, as others can look it up: names, and the SHA-256 of the files that were read."""

import hashlib
import pathlib
import re

from dmm_jax.checkpoints import licenses
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.runtime.storage import Location

SHORT_HASH = 10  # Hexadecimal digits of a file's SHA-256 by which hubs call it ("AutoV2").
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # The folder of huggingface.co's ORGANISATION/NAME on a disk.


def record(checkpoint: Checkpoint, hashed: bool = True) -> dict:
    """Returns what a recipe says of a parent, fit for JSON.

    Args:
      hashed: whether the files are read whole, for their hashes.

    Returns:
      file: the checkpoint's name. license: that it states, or "unknown". files: those of its UNet, by name, with their
      SHA-256 and its first ten digits. loras: the same of those that are folded in, with their weight. hub: its name
      on the hub that its folder is a copy of, where the path tells it.
    """
    root, base = checkpoint.root or checkpoint.path, {}
    hub = HUB_CACHE.search(str(root))
    if hub:
        base["hub"] = f"{hub[1]}/{hub[2]}"
    if hashed:
        base["files"] = [file_hashes(path, root) for path in unet_files(checkpoint)]
        if checkpoint.loras:
            base["loras"] = [file_hashes(lora.path) | {"weight": lora.weight} for lora in checkpoint.loras]
    return {"file": checkpoint.name, "license": checkpoint.license or licenses.UNKNOWN, **base}


def unet_files(checkpoint: Checkpoint) -> list[pathlib.Path]:
    """Returns the files that hold a checkpoint's UNet, without those of LoRAs; none of a workdir."""
    root = checkpoint.root or checkpoint.path
    return [file for file in checkpoint.files if file == root or file.parent == root / "unet"]


def file_hashes(path: pathlib.Path, root: Location | None = None) -> dict[str, str]:
    """Returns a file's name (below `root`, if that is its folder), its SHA-256 and what hubs call it by."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = path.name if root in (None, path) else path.relative_to(root).as_posix()
    return {"file": name, "sha256": digest, "autov2": digest[:SHORT_HASH]}
