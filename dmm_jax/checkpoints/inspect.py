"""What checkpoints hold, in which state they are, and whether they can be merged: the report behind `dmm-jax inspect`.

A small checkpoint is read whole. Of a large one, headers and pieces of every tensor are read, unless all is asked for:
then every tensor is read once or twice and none is kept, so that a checkpoint may be larger than memory.
"""

import collections
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import SD1, SD2, SDXL, architecture
from dmm_jax.checkpoints.checkpoint import Checkpoint, is_spare
from dmm_jax.checkpoints.compare import COMPARED, Obstacle, base_obstacles, teacher_obstacles
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import single_file
from dmm_jax.checkpoints.formats.safetensors_io import dtype_of, shape_of
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.naming import listed, printable
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher

__all__ = ["inspect", "render"]
# The published sizes: words for ModelSpec's name, block_out_channels, cross_attention_dim.
FULL_SIZES = {
    "Stable Diffusion 1": (SD1, [320, 640, 1280, 1280], 768),
    "Stable Diffusion 2": (SD2, [320, 640, 1280, 1280], 1024),
    "Stable Diffusion XL": (SDXL, [320, 640, 1280], 2048),
}
WHOLE_BYTES = 2**28  # Checkpoints up to this size are read whole.
HASHED_BYTES = 3 * 10**9  # Files up to this size are hashed unasked: a second or two for each gigabyte.
PIECE_BYTES = 2**15  # Of larger ones, so much at the start, in the middle and at the end of every tensor.
SHORT_HASH = 10  # Hexadecimal digits of a file's SHA-256 by which hubs call it ("AutoV2").
MEANINGS = {  # Of "config" and "unreadable", the error says it.
    "missing": "the network cannot be built without them",
    "unexpected": "they have no place in this architecture, and no tensor is dropped in silence",
    "misshapen": "they do not fit the architecture",
    "not finite": "they hold NaN or infinity, which every image would inherit",
    "spare": "they hold NaN or infinity, but lie behind the layer that is used; they read as 0",
    "position_ids": "merging has damaged this buffer; positions are 0 to 76 here whatever it says",
}
HARMLESS = ("position_ids", "spare")
NEVER_USED = "a teacher's VAE is never used"


def inspect(paths: Sequence[pathlib.Path], deep: bool = False, hashes: bool = False, prediction_type: str = "") -> dict:
    """Returns the report on checkpoints, fit for JSON; the first path is the base of a merge, the others its teachers.

    Args:
      deep: read all of every checkpoint; else of those above `WHOLE_BYTES` only pieces.
      hashes: hash all files; else those up to `HASHED_BYTES`.
      prediction_type: of what does not say it; see `open_checkpoint`.

    Returns:
      checkpoints: what was found in each; "error" says why one could not be opened, "read" is "all" or "sample".
      mergeable: whether nothing stands in the way of a merge; of a single path, whether it is sound.
      obstacles: a sentence for each thing that does.
      details: for each sentence its path, component and tensors, all of them.
    """
    base, *teachers = map(pathlib.Path, paths)
    told = {"prediction_type": prediction_type, "allow_unsupported": True}
    found = [_opened(base, open_checkpoint, **told), *(_opened(path, open_teacher, base, **told) for path in teachers)]
    reports = [_report(*one, deep, hashes, is_teacher=number > 0) for number, one in enumerate(found)]
    for report, (_, checkpoint, _) in zip(reports, found, strict=True):
        report["loans"] = _loans(checkpoint, found[0][1])
    obstacles = [(report["path"], line) for report in reports for line in _own_obstacles(report)]
    obstacles += _obstacles_between([checkpoint for _, checkpoint, _ in found], reports)
    details = [{"path": path, "component": line.component, "tensors": list(line.tensors)} for path, line in obstacles]
    sentences = [str(line) for _, line in obstacles]
    return {"checkpoints": reports, "mergeable": not obstacles, "obstacles": sentences, "details": details}


def _opened(path, opener, *base, **told):
    try:
        return path, opener(path, *base, **told), ""
    except (ValueError, OSError) as error:
        return path, None, str(error)


def _own_obstacles(report) -> list[Obstacle]:
    path, lines = report["path"], [Obstacle(report["error"])] if report["error"] else []
    if report["unsupported"]:
        lines.append(Obstacle(f"{path} cannot be used: {report['unsupported']}"))
    for damage in report["damage"]:
        if damage["matters"]:
            of = f": {listed(damage['tensors'])}" if damage["tensors"] else ""
            text = f"{path}, {damage['component']}, {damage['kind']}{of} ({damage['meaning']})."
            lines.append(Obstacle(text, damage["component"], damage["tensors"]))
    return lines


def _obstacles_between(checkpoints: Sequence[Checkpoint | None], reports) -> list[tuple[str, Obstacle]]:
    if len(checkpoints) < 2 or checkpoints[0] is None:
        return []
    base, *teachers = checkpoints
    lines = [(str(base.path), line) for line in base_obstacles(base, f"{base.path} (the first path, so the base)")]
    buildable = [not any(map(_keeps_from_comparing, report["damage"])) for report in reports]
    for teacher, good in zip(teachers, buildable[1:], strict=True):
        if teacher is not None and good and buildable[0]:
            lines += [(str(teacher.path), line) for line in teacher_obstacles(base, str(teacher.path), teacher)]
    return [(path, line if isinstance(line, Obstacle) else Obstacle(line)) for path, line in lines]


def _keeps_from_comparing(damage):
    return damage["kind"] in ("config", "unreadable") and damage["component"] in COMPARED


def _report(path: pathlib.Path, checkpoint: Checkpoint | None, error: str, deep, hashes, is_teacher) -> dict:
    path = checkpoint.path if checkpoint else path
    root, name = path, path.absolute().name
    if checkpoint is not None and checkpoint.loras:
        root, name = checkpoint.root, checkpoint.name
    report = {
        "path": str(path), "name": name, "error": error, "kind": None, "architecture": None,
        "prediction_type": None, "license": None, "styles": None, "tokenizer": False, "files": [], "hash": None,
        "components": {}, "ema_tensors": 0, "unused_tensors": 0, "unsupported": "", "damage": [], "loras": [],
        "read": "all", "loans": [],
    }  # fmt: skip
    files = [root] if root.is_file() else checkpoint.files if checkpoint else []
    whole = deep or sum(file.stat().st_size for file in files) <= WHOLE_BYTES
    report["read"] = "all" if whole else "sample"
    report["files"] = [_file(file, root, deep or hashes or file.stat().st_size <= HASHED_BYTES) for file in files]
    if path.is_file() and report["files"][0]["sha256"]:
        report["hash"] = report["files"][0]["sha256"][:SHORT_HASH]
    if checkpoint is None:
        return report
    ema = [key for key in checkpoint.unused if key.startswith(single_file.EMA)]
    for component in checkpoint.components:
        report["components"][component], damage = _component(checkpoint, component, whole)
        report["damage"] += [_unused(found) for found in damage] if is_teacher and component == "vae" else damage
    return report | {
        "kind": checkpoint.kind,
        "architecture": family(checkpoint.unet_config) if checkpoint.has("unet") else None,
        "prediction_type": checkpoint.prediction_type if checkpoint.has("unet") else None,
        "license": checkpoint.license or None,
        "styles": list(checkpoint.styles) if checkpoint.styles else None,
        "tokenizer": checkpoint.tokenizer_folder is not None,
        "ema_tensors": len(ema),
        "unused_tensors": len(checkpoint.unused) - len(ema),
        "unsupported": checkpoint.unsupported,
        "loras": [_lora(lora) for lora in checkpoint.loras],
    }


def _unused(damage):
    return damage | {"matters": False, "meaning": f"{damage['meaning']}; {NEVER_USED}"}


def _loans(checkpoint, base) -> list[str]:
    """Returns a sentence for each thing that a checkpoint takes from elsewhere; a teacher from the base."""
    if checkpoint is None or checkpoint is base:
        return checkpoint.loans if checkpoint else []
    names = base.text_encoders if base and base.has("unet") else ()
    return [
        f"{checkpoint.path} holds no {name}: the base's is used."
        for name in names
        if not checkpoint.has(name) or name in checkpoint.borrowed
    ]


def _lora(lora) -> dict:
    """Returns what a LoRA file is and what it changes."""
    file = _file(lora.path, lora.path, whole=True)
    return file | {
        "hash": file["sha256"][:SHORT_HASH], "weight": lora.weight, "ranks": lora.ranks, "networks": lora.networks,
    }  # fmt: skip


def family(unet_config: Mapping) -> str:
    """Returns a UNet's architecture in words: a family at its published size, or the widths of its levels."""
    widths, text_width = unet_config.get("block_out_channels"), unet_config.get("cross_attention_dim")
    size = (architecture(unet_config), widths, text_width)
    published = [words for words, theirs in FULL_SIZES.items() if theirs == size]
    return published[0] if published else f"UNet of block_out_channels {printable(str(widths))}"


def _file(file: pathlib.Path, path: pathlib.Path, whole: bool) -> dict:
    name = file.name if file == path else file.relative_to(path).as_posix()
    return {"file": name, "bytes": file.stat().st_size, "sha256": _sha256(file) if whole else None}


def _sha256(file):
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _component(checkpoint, component, whole) -> tuple[dict, list[dict]]:
    """Returns what a network holds, and its damage."""
    try:
        tensors = checkpoint.components[component].tensors
    except (ValueError, OSError) as error:
        return {}, [_damage(component, "unreadable", [], str(error))]
    keys = naming.spellings(tensors).values()
    held = {
        "parameters": sum(math.prod(shape_of(tensors, key)) for key in keys),
        "tensors": len(keys),
        "dtypes": dict(collections.Counter(str(dtype_of(tensors, key)) for key in keys).most_common()),
        "digest": checkpoint.digest(component) if whole else None,
    }
    return held, _damages(checkpoint, component, tensors, whole)


def _damages(checkpoint, component, tensors, whole):
    infinite = [key for key in naming.spellings(tensors).values() if not _is_finite(tensors[key], whole)]
    spare = [key for key in infinite if is_spare(key, checkpoint.spare(component))]
    found = {"not finite": [key for key in infinite if key not in spare], "spare": spare}
    found["position_ids"] = [key for key in tensors if _last(key) == naming.POSITION_IDS and not _counts(tensors[key])]
    damages = []
    try:
        found = naming.differences(checkpoint.shapes(component), tensors) | found
    except CheckpointError as error:
        damages.append(_damage(component, "config", [], str(error)))
    return damages + [_damage(component, kind, keys, MEANINGS[kind]) for kind, keys in found.items() if keys]


def _is_finite(array: np.ndarray, whole: bool) -> bool:
    length = PIECE_BYTES // array.itemsize
    if whole or array.size <= 3 * length:
        return naming.is_finite(array)
    values, middle = array.reshape(-1), array.size // 2
    return all(map(naming.is_finite, (values[:length], values[middle : middle + length], values[-length:])))


def _last(key):
    return key.rsplit(".", 1)[-1]


def _counts(array: np.ndarray) -> bool:
    """Tells whether a buffer of positions is what it was made as: whole numbers, 0, 1, 2 and so on."""
    return array.dtype.kind in "iu" and np.array_equal(array.reshape(-1), np.arange(array.size))


def _damage(component, kind, tensors, meaning):
    shown = [printable(key, 300) for key in tensors]
    return {
        "component": component, "kind": kind, "tensors": shown, "matters": kind not in HARMLESS, "meaning": meaning,
    }  # fmt: skip
