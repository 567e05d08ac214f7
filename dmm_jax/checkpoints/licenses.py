"""Reads the licences that checkpoints state, and joins them. People must judge what the licences allow."""

import pathlib
import re
from collections.abc import Iterable, Mapping

from dmm_jax.checkpoints.naming import printable

MODELSPEC = "modelspec.license"  # The key in a file's metadata.
UNKNOWN = "unknown"
SEPARATOR = "; "  # Between several licences in one line.
MAX_CHARS = 200
CARD, MAX_CARD_BYTES = "README.md", 1_000_000
_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(license|license_name)\s*:[ \t]*(\S[^\n]*)$", re.MULTILINE)


def stated(metadata: Mapping[str, str], folder: pathlib.Path | None = None) -> str:
    """Returns the licence in a file's metadata, else the licence in the folder's model card, else "".

    If a card says `license: other`, its `license_name` counts.
    """
    license = metadata.get(MODELSPEC, "") or _of_card(folder / CARD if folder else None)
    return printable(" ".join(license.split()), MAX_CHARS)


def _of_card(card: pathlib.Path | None) -> str:
    if card is None or not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return ""
    head = _HEAD.match(card.read_text(encoding="utf-8", errors="replace"))
    fields = {name: value.strip().strip("'\"") for name, value in _FIELD.findall(head[1])} if head else {}
    name = fields.get("license_name", "") if fields.get("license") == "other" else ""
    return name or fields.get("license", "")


def together(licenses: Iterable[str]) -> str:
    """Returns several licences as one line, each once, an empty one as "unknown"; "" for no licences."""
    parts = (part for license in licenses for part in (license or UNKNOWN).split(SEPARATOR))
    return SEPARATOR.join(dict.fromkeys(parts))
