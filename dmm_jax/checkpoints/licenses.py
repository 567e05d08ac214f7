"""Reads the licences that checkpoints state, and joins them. People must judge what the licences allow."""

import pathlib
import re
from collections.abc import Iterable, Mapping

from dmm_jax.checkpoints import shipped
from dmm_jax.checkpoints.naming import printable

MODELSPEC = "modelspec.license"  # The key in a file's metadata.
UNKNOWN = "unknown"
SEPARATOR = "; "  # Between several licences in one line.
MAX_CHARS = 200
CARD, MAX_CARD_BYTES = "README.md", 1_000_000
_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
_FIELD = re.compile(r"^(license|license_name)\s*:[ \t]*(\S[^\n]*)$", re.MULTILINE)


def stated(metadata: Mapping[str, str], path: pathlib.Path) -> str:
    """Returns the licence in a checkpoint's metadata, else in its folder's model card, else "".

    The files of this package have one card for all that have none of their own. If a card says `license: other`, its
    `license_name` counts.

    Args:
      metadata: of the file, or of the UNet's file.
      path: the file or folder.
    """
    license = metadata.get(MODELSPEC, "") or _of_card(path / CARD)
    if not license and shipped.FOLDER in path.absolute().parents:
        license = _of_card(shipped.FOLDER / CARD)
    return printable(" ".join(license.split()), MAX_CHARS)


def _of_card(card: pathlib.Path) -> str:
    if not card.is_file() or card.stat().st_size > MAX_CARD_BYTES:
        return ""
    head = _HEAD.match(card.read_text(encoding="utf-8", errors="replace"))
    fields = {name: value.strip().strip("'\"") for name, value in _FIELD.findall(head[1])} if head else {}
    name = fields.get("license_name", "") if fields.get("license") == "other" else ""
    return name or fields.get("license", "")


def together(licenses: Iterable[str]) -> str:
    """Returns several licences as one line, each once, an empty one as "unknown"; "" for no licences."""
    parts = (part for license in licenses for part in (license or UNKNOWN).split(SEPARATOR))
    return SEPARATOR.join(dict.fromkeys(parts))
