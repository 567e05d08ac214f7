"""The licences that checkpoints state: read, shown and passed on. What they allow is for people to judge."""

import pathlib
import re
from collections.abc import Iterable, Mapping

from dmm_jax.checkpoints.naming import printable

MODELSPEC = "modelspec.license"  # In a file's metadata.
UNKNOWN = "unknown"
BETWEEN = "; "  # Several licences in one line.
MAX_CHARS = 200
CARD, MAX_CARD_BYTES = "README.md", 1_000_000
_FRONT = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(license|license_name)\s*:[ \t]*(\S[^\n]*)$", re.MULTILINE)


def stated(metadata: Mapping[str, str], folder: pathlib.Path | None = None) -> str:
    """Returns the licence that a file's metadata names, else the one of the folder's model card, else "".

    A card's `license: other` is told by its `license_name` where there is one.
    """
    found = metadata.get(MODELSPEC, "") or _of_card(folder / CARD if folder else None)
    return printable(" ".join(found.split()), MAX_CHARS)


def _of_card(card: pathlib.Path | None) -> str:
    if card is None or not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return ""
    front = _FRONT.match(card.read_text(encoding="utf-8", errors="replace"))
    told = {name: value.strip().strip("'\"") for name, value in _FIELD.findall(front[1])} if front else {}
    named = told.get("license_name", "") if told.get("license") == "other" else ""
    return named or told.get("license", "")


def together(licenses: Iterable[str]) -> str:
    """Returns several licences as one line: each once, unknown ones as such; "" of none."""
    return BETWEEN.join(dict.fromkeys(part for one in licenses for part in (one or UNKNOWN).split(BETWEEN)))
