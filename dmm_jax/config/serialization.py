"""Configs as JSON: what a workdir's config.json holds, read and compared."""

import json
import os
from collections.abc import Mapping

import ml_collections

from dmm_jax.config.options import as_teachers, get_config
from dmm_jax.runtime import storage
from dmm_jax.runtime.errors import UserError, refuse

MAX_SHOWN_CHARS = 200  # The most of a value that a message shows.
MAX_INT_AS_FLOAT = 2**1000  # Python cannot convert larger ones.
_GROUP = ml_collections.ConfigDict


def to_json(config: ml_collections.ConfigDict) -> str:
    """Writes a config so that `from_json` reads the same one back."""
    return config.to_json(indent=2, sort_keys=True)


def from_json(text: str, source: str = "config.json") -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote; options that the text lacks keep their defaults, unknown ones are ignored.

    Args:
      source: the name of the text in errors.

    Raises:
      UserError: the text is not a JSON object, or a value does not have its option's type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON ({error}). Restore it from a copy.") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{source} must hold a JSON object of options; got {_kind(values)}.")
    config = get_config()
    refuse(f"{source} cannot be read", _update(config, values))
    config.teachers = as_teachers(config.teachers)
    return config


def removed_options(values: Mapping) -> list[str]:
    """Returns a line for each option of an older run's config.json that no longer exists."""
    options, stored = flat_values(get_config().to_dict()), flat_values(values)
    return [
        f"{name[:MAX_SHOWN_CHARS]}: {_shown(value)} -> no longer an option"
        for name, value in stored.items()
        if name not in options
    ]


def _update(config, values: Mapping, prefix: str = "") -> list[str]:
    """Sets the options that exist; returns a line for each value that does not have its option's type."""
    problems = []
    for name, value in values.items():
        if name not in config:
            continue
        value, default = _as_tuple(value), config[name]
        if not _fits(value, default, pairs=prefix + name == "teachers"):
            problems.append(f"{prefix}{name}: expected {_kind(default)}, got {_kind(value)}: {json.dumps(value)[:80]}")
        elif isinstance(value, Mapping):
            problems += _update(default, value, f"{prefix}{name}.")
        else:
            config[name] = value
    return problems


def _fits(value, default, pairs: bool) -> bool:
    kinds = (int, float) if isinstance(default, float) else Mapping if isinstance(default, _GROUP) else type(default)
    if isinstance(value, tuple) and not all(isinstance(entry, (str, tuple) if pairs else str) for entry in value):
        return False
    if isinstance(default, float) and isinstance(value, int) and abs(value) > MAX_INT_AS_FLOAT:
        return False
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)


def _kind(value) -> str:
    """Returns a word for a value's type that fits JSON."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}
    words |= {list: "a list", type(None): "null"}
    return words.get(type(value), "a group of options")


def _as_tuple(value):
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """Returns the changes between two configs as lines `name: old -> new`, sorted by name."""
    before, after = (flat_values(json.loads(to_json(config))) for config in (old, new))
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {_shown(before.get(name))} -> {_shown(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _shown(value) -> str:
    """Returns a value as Python writes it, cut after MAX_SHOWN_CHARS: a damaged file can hold anything."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]} …"


def flat_values(tree: Mapping, prefix: str = "") -> dict:
    """Returns a tree's values by their full names, {"mesh.teacher": 8, ...}."""
    return {
        full: leaf
        for name, value in tree.items()
        for full, leaf in (
            flat_values(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
        ).items()
    }


def load_config(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads a workdir's `config.json`.

    Raises:
      UserError: the folder holds no config.json, so no training run wrote it; or one that cannot be read.
    """
    path = storage.locate(path)
    storage.check_bucket(path)
    path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path.parent} is not a training workdir: {path.name} is missing. Give the --workdir of a `train` run."
        )
    return from_json(storage.read_text(path), str(path))
