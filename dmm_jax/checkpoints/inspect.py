"""Inspects checkpoints: their contents, their damage, and whether they can be merged.

A small checkpoint is read completely. Of a large one, the headers and three pieces of every tensor are read, unless
`deep` asks for everything. No tensor stays in memory, so a checkpoint may be larger than memory.
"""

import collections
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints import licenses, naming
from dmm_jax.checkpoints.architecture import published_name
from dmm_jax.checkpoints.checkpoint import Checkpoint, is_unused
from dmm_jax.checkpoints.compare import COMPARED, Problem, base_problems, contradictions, teacher_problems
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import adapter_facts, single_file
from dmm_jax.checkpoints.formats.lora import AdapterAlone
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, dtype_of, shape_of
from dmm_jax.checkpoints.naming import listed, printable
from dmm_jax.checkpoints.open import open_checkpoint, open_teacher
from dmm_jax.checkpoints.provenance import SHORT_HASH, relative_name, sha256
from dmm_jax.diffusion.guidance import ADVICE

COMPLETE_BYTES = 2**28  # Checkpoints up to this size are read completely.
HASHED_BYTES = 3 * 10**9  # Files up to this size are always hashed: a second or two per gigabyte.
PIECE_BYTES = 2**15  # The size of each of the three pieces (start, middle, end) that are read of a tensor otherwise.
MEANINGS = {  # For "config" and "unreadable", the error itself is the meaning.
    "missing": "the network cannot be built without them",
    "unexpected": "they have no place in this architecture, and no tensor is dropped in silence",
    "misshapen": "they do not fit the architecture",
    "quantised": "they hold integers and not the weights; use the float16 file of this model",
    "not finite": "they hold NaN or infinity, which every image would inherit",
    "spare": "they hold NaN or infinity, but come after the layer that is used; they read as 0",
    "position_ids": "merging has damaged this buffer; positions are 0 to 76 here whatever it says",
}
HARMLESS = ("position_ids", "spare")


def inspect(
    paths: Sequence[str | os.PathLike], deep: bool = False, hashes: bool = False, prediction_type: str = ""
) -> dict:
    """Returns a report on checkpoints that `json.dumps` accepts. It raises nothing for a damaged or missing checkpoint.

    The first path is the base of a merge, the rest are its teachers. `inspect_text.render` returns the report as text.

    Args:
      paths: at least one checkpoint, each as `open_checkpoint` takes it.
      deep: read every checkpoint completely; without it, of those above `COMPLETE_BYTES` only pieces.
      hashes: hash all files; without it, only those up to `HASHED_BYTES`.
      prediction_type: "epsilon" or "v_prediction", for checkpoints that do not state it; see `open_checkpoint`.

    Returns:
      A dictionary with these keys:
      checkpoints: one dictionary per path: "path", "name", "kind", "architecture", "prediction_type", "license",
        "styles", "tokenizer", "files" (name, bytes, sha256), "hash" (the AutoV2 hash of a single file), "components"
        (parameters, tensors, dtypes, digest), "damage" (component, kind, tensors, matters, meaning), "loras",
        "float8" (in words), "adapter" (`adapter_facts.facts` of an adapter, else None),
        "loans" (sentences about the parts that come from elsewhere), "advice" (sentences about its use),
        "ema_tensors", "unused_tensors", "unsupported",
        "read" ("all" or "sample"), and "error", which is not empty if the checkpoint cannot be opened.
      mergeable: whether nothing prevents a merge; for a single path, whether the checkpoint is sound.
      sound: the same, but also true for a single sound adapter, which needs a base.
      obstacles: one sentence for each problem.
      details: for each sentence its "path", "component" and "tensors".
    """
    base, *teachers = map(pathlib.Path, paths)
    options = {"prediction_type": prediction_type, "allow_unsupported": True}
    opened = [_try_to_open(open_checkpoint, base, **options)]
    opened += [_try_to_open(open_teacher, path, base, **options) for path in teachers]
    checkpoints = [checkpoint for checkpoint, _ in opened]
    reports = [
        _report(path, *pair, deep, hashes, is_teacher=number > 0)
        for number, (path, pair) in enumerate(zip((base, *teachers), opened, strict=True))
    ]
    for report, checkpoint in zip(reports, checkpoints, strict=True):
        report["loans"] = _fallbacks(checkpoint, checkpoints[0])
        if checkpoint and checkpoint.has("unet"):
            schedule = checkpoint.schedule_beside(checkpoints[0] or checkpoint)
            report["prediction_type"] = schedule.get("prediction_type", "epsilon")
            report["advice"] = [ADVICE] if schedule.get("rescale_betas_zero_snr") else []
    problems = [(report["path"], problem) for report in reports for problem in _own_problems(report)]
    problems += _merge_problems(checkpoints, reports)
    problems = list({str(problem): (path, problem) for path, problem in problems}.values())  # Each once.
    return {
        "checkpoints": reports,
        "mergeable": not problems,
        "sound": not problems
        or len(paths) == 1
        and isinstance(opened[0][1], AdapterAlone)
        and not reports[0]["damage"],
        "obstacles": [str(problem) for _, problem in problems],
        "details": [
            {"path": path, "component": problem.component, "tensors": list(problem.tensors)}
            for path, problem in problems
        ],
    }


def _try_to_open(opener, *paths, **options) -> tuple[Checkpoint | None, Exception | str]:
    """Returns an opened checkpoint and "", or None and the error."""
    try:
        return opener(*paths, **options), ""
    except (ValueError, OSError) as error:
        return None, error


def _own_problems(report) -> list[Problem]:
    """Returns what prevents any use of one checkpoint: it cannot be opened, is not supported, or is damaged."""
    # The error of a damaged adapter says how to use it.
    path, problems = report["path"], [Problem(report["error"])] if report["error"] and not report["damage"] else []
    if report["unsupported"]:
        problems.append(Problem(f"{path} cannot be used: {report['unsupported']}"))
    for damage in report["damage"]:
        if damage["matters"]:
            tensors = f": {listed(damage['tensors'])}" if damage["tensors"] else ""
            text = f"{path}, {damage['component']}, {damage['kind']}{tensors} ({damage['meaning']})."
            problems.append(Problem(text, damage["component"], damage["tensors"]))
    return problems


def _merge_problems(checkpoints: Sequence[Checkpoint | None], reports) -> list[tuple[str, Problem]]:
    """Returns (path, problem) pairs from the comparison of the base with its teachers."""
    if checkpoints[0] is None:
        return []
    base, *teachers = checkpoints
    if not teachers:
        unbuilt = any(damage["kind"] in ("config", "unreadable") for damage in reports[0]["damage"])
        return [] if unbuilt else [(str(base.path), Problem(line)) for line in contradictions(base, str(base.path))]
    problems = [(base.path, text) for text in base_problems(base, f"{base.path} (the first path, so the base)")]
    comparable = [
        not any(damage["kind"] in ("config", "unreadable") and damage["component"] in COMPARED for damage in damages)
        for damages in (report["damage"] for report in reports)
    ]
    for teacher, teacher_is_comparable in zip(teachers, comparable[1:], strict=True):
        if teacher is not None and teacher_is_comparable and comparable[0]:
            problems += [(teacher.path, text) for text in teacher_problems(base, str(teacher.path), teacher, True)]
    return [(str(path), text if isinstance(text, Problem) else Problem(text)) for path, text in problems]


def _report(path: pathlib.Path, checkpoint: Checkpoint | None, error, deep, hashes, is_teacher) -> dict:
    """Returns the report on one checkpoint, its "loans" still empty."""
    path = checkpoint.path if checkpoint else path
    has_loras = checkpoint is not None and bool(checkpoint.loras)
    root, name = (checkpoint.root, checkpoint.name) if has_loras else (path, path.absolute().name)
    report = {
        "path": str(path), "name": name, "error": str(error), "kind": None, "architecture": None,
        "prediction_type": None, "license": None, "styles": None, "tokenizer": False, "files": [], "hash": None,
        "components": {}, "ema_tensors": 0, "unused_tensors": 0, "unsupported": "", "damage": [], "loras": [],
        "read": "all", "loans": [], "advice": [], "float8": "", "adapter": None,
    }  # fmt: skip
    files = [root] if root.is_file() else checkpoint.files if checkpoint else []
    read_all = deep or sum(file.stat().st_size for file in files) <= COMPLETE_BYTES
    report["read"] = "all" if read_all else "sample"
    report["files"] = [
        _file(file, root, hashed=deep or hashes or file.stat().st_size <= HASHED_BYTES) for file in files
    ]
    if path.is_file() and report["files"][0]["sha256"]:
        report["hash"] = report["files"][0]["sha256"][:SHORT_HASH]
    if checkpoint is None:
        return report | _adapter(root, read_all)
    report["float8"] = "; ".join(filter(None, (TensorFile(file).float8 for file in files)))
    ema = [key for key in checkpoint.unused if key.startswith(single_file.EMA)]
    for component in checkpoint.components:
        report["components"][component], damages = _component(checkpoint, component, read_all)
        if is_teacher and component == "vae":
            unused = {"matters": False}
            damages = [
                damage | unused | {"meaning": f"{damage['meaning']}; a teacher's VAE is never used"}
                for damage in damages
            ]
        report["damage"] += damages
    return report | {
        "kind": checkpoint.kind,
        "architecture": family(checkpoint.unet_config) if checkpoint.has("unet") else None,
        "license": checkpoint.license or None,
        "styles": list(checkpoint.styles) if checkpoint.styles else None,
        "tokenizer": checkpoint.tokenizer_folder is not None,
        "ema_tensors": len(ema),
        "unused_tensors": len(checkpoint.unused) - len(ema),
        "unsupported": checkpoint.unsupported,
        "loras": [_lora(lora) for lora in checkpoint.loras],
    }


def _adapter(path: pathlib.Path, read_all: bool) -> dict:
    """Returns a report's entries about an adapter file; {} for any other file."""
    try:
        file = TensorFile(path)
        facts = adapter_facts.facts(file)
    except (ValueError, OSError):
        return {}
    if not facts:
        return {}
    infinite = [key for key in file if not _is_finite(file[key], read_all)]
    damage = [_damage("adapter", "not finite", infinite, MEANINGS["not finite"])] if infinite else []
    return {"adapter": facts, "license": licenses.stated(file.metadata, path) or None, "damage": damage}


def _fallbacks(checkpoint, base) -> list[str]:
    """Returns one sentence for each part that a checkpoint takes from elsewhere; a teacher takes them from the base."""
    if checkpoint is None or checkpoint is base:
        return checkpoint.fallbacks if checkpoint else []
    names = base.text_encoders if base and base.has("unet") else ()
    lines = [
        f"{checkpoint.path} holds no {name}: the base's is used."
        for name in names
        if not checkpoint.has(name) or name in checkpoint.from_base
    ]
    return lines + (checkpoint.assumptions(base) if base else [])


def _lora(lora) -> dict:
    file = _file(lora.path, lora.path, hashed=True)
    return file | {
        "hash": file["sha256"][:SHORT_HASH], "weight": lora.weight, "ranks": lora.ranks, "networks": lora.networks,
        "kinds": lora.kinds,
    }  # fmt: skip


def family(unet_config: Mapping) -> str:
    """Returns a UNet's architecture in words: a family at its published size, or the widths of its levels."""
    widths = printable(str(unet_config.get("block_out_channels")))
    return published_name(unet_config) or f"UNet of block_out_channels {widths}"


def _file(file: pathlib.Path, root: pathlib.Path, hashed: bool) -> dict:
    digest = sha256(file) if hashed else None
    return {"file": relative_name(file, root), "bytes": file.stat().st_size, "sha256": digest}


def _component(checkpoint, component, read_all) -> tuple[dict, list[dict]]:
    """Returns the contents of a network, and its damage."""
    try:
        tensors = checkpoint.components[component].tensors
    except (ValueError, OSError) as error:
        return {}, [_damage(component, "unreadable", [], str(error))]
    keys = naming.spellings(tensors).values()
    contents = {
        "parameters": sum(math.prod(shape_of(tensors, key)) for key in keys),
        "tensors": len(keys),
        "dtypes": dict(collections.Counter(str(dtype_of(tensors, key)) for key in keys).most_common()),
        "digest": checkpoint.digest(component) if read_all else None,
    }
    return contents, _damages(checkpoint, component, tensors, read_all)


def _damages(checkpoint, component, tensors, read_all) -> list[dict]:
    infinite = [key for key in naming.spellings(tensors).values() if not _is_finite(tensors[key], read_all)]
    unused = [key for key in infinite if is_unused(key, checkpoint.unused_prefixes(component))]
    positions = [key for key in tensors if key.rsplit(".", 1)[-1] == naming.POSITION_IDS]
    keys_by_kind = {
        "not finite": [key for key in infinite if key not in unused],
        "spare": unused,
        "position_ids": [key for key in positions if not _is_range(tensors[key])],
    }
    damages = []
    try:
        keys_by_kind = naming.differences(checkpoint.shapes(component), tensors) | keys_by_kind
    except CheckpointError as error:
        damages.append(_damage(component, "config", [], str(error)))
    return damages + [_damage(component, kind, keys, MEANINGS[kind]) for kind, keys in keys_by_kind.items() if keys]


def _is_finite(array: np.ndarray, read_all: bool) -> bool:
    length = PIECE_BYTES // array.itemsize
    if read_all or array.size <= 3 * length:
        return naming.is_finite(array)
    values, middle = array.reshape(-1), array.size // 2
    return all(map(naming.is_finite, (values[:length], values[middle : middle + length], values[-length:])))


def _is_range(array: np.ndarray) -> bool:
    """Tells whether a buffer holds the integers 0, 1, 2 and so on."""
    return array.dtype.kind in "iu" and np.array_equal(array.reshape(-1), np.arange(array.size))


def _damage(component, kind, keys, meaning) -> dict:
    shown = [printable(key, 300) for key in keys]
    return {
        "component": component, "kind": kind, "tensors": shown, "matters": kind not in HARMLESS, "meaning": meaning,
    }  # fmt: skip
