"""The words of a tokenizer folder: vocabulary and merges, in the form of old or of new files, or CLIP's own.

CLIP's own ship here (`clip_bpe`: the file of OpenAI's CLIP, MIT licence), since a single-file checkpoint brings none.
"""

import functools
import gzip
import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from dmm_jax.runtime.errors import UserError

BUNDLED = pathlib.Path(__file__).parent / "clip_bpe"
CLIP, OPEN_CLIP = BUNDLED / "clip", BUNDLED / "open_clip"  # Tokenizer folders of the same words; they pad differently.
OLD_FILES, NEW_FILE = ("vocab.json", "merges.txt"), "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_VOCAB_SIZE = 49408
MAX_BYTES = 50_000_000


class Words(NamedTuple):
    """What a byte-level BPE knows (arXiv:1508.07909): {token: id}, and the pairs that it joins, first ones first."""

    vocabulary: dict[str, int]
    merges: list[tuple[str, str]]


def has_words(folder: pathlib.Path) -> bool:
    """Tells whether a folder is a tokenizer's, old or new."""
    return (folder / NEW_FILE).is_file() or all((folder / name).is_file() for name in OLD_FILES)


def read_words(folder: pathlib.Path) -> Words:
    """Reads a tokenizer folder: vocab.json and merges.txt, else tokenizer.json; or CLIP's own.

    Raises:
      ValueError: the files are missing, or are no byte-level BPE.
    """
    if folder.parent == BUNDLED:
        return clip_words()
    if not has_words(folder):
        raise UserError(
            f"{folder} holds no tokenizer: expected {' and '.join(OLD_FILES)}, or {NEW_FILE}. Point to the "
            "checkpoint's tokenizer folder; a single-file checkpoint has none: take its base model's."
        )
    old = all((folder / name).is_file() for name in OLD_FILES)
    path = folder / (OLD_FILES[0] if old else NEW_FILE)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"it is larger than {MAX_BYTES} bytes")
        said = json.loads(path.read_text(encoding="utf-8"))
        if old:
            lines = (folder / OLD_FILES[1]).read_text(encoding="utf-8").split("\n")
            return Words(_vocabulary(said), [_pair(line) for line in lines if line and not line.startswith("#version")])
        special = {token["content"]: token["id"] for token in said.get("added_tokens", ())}
        return Words(_vocabulary(said["model"]["vocab"] | special), [_pair(pair) for pair in said["model"]["merges"]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path} is no CLIP tokenizer's ({said}). Fetch the tokenizer folder again.") from None


def _vocabulary(found) -> dict[str, int]:
    if not all(isinstance(token, str) and type(number) is int for token, number in found.items()):
        raise UserError("the vocabulary is not text to number")
    return dict(found)


def _pair(found) -> tuple[str, str]:
    first, second = found.rstrip("\r").split(" ") if isinstance(found, str) else found  # Newer files hold pairs.
    return first, second


def write_words(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes a tokenizer folder's words as vocab.json and merges.txt, which readers old and new open."""
    words = read_words(folder)
    text = json.dumps(words.vocabulary, ensure_ascii=False, separators=(",", ":"))
    (out / OLD_FILES[0]).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in words.merges)]
    (out / OLD_FILES[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


@functools.cache
def clip_words() -> Words:
    """Returns CLIP's own words, which ship here: of OpenAI's file its code takes the first merges."""
    text = gzip.decompress((BUNDLED / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    count = CLIP_VOCAB_SIZE - len(tokens_of([]))
    merges = [_pair(line) for line in text.split("\n")[1 : 1 + count]]
    return Words({token: number for number, token in enumerate(tokens_of(merges))}, merges)


def tokens_of(merges: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the tokens in the order of their ids, as CLIP's code makes them of its merges.

    Every byte as a symbol, the same at the end of a word, what the merges make of them, the start and the end token.
    """
    symbols = byte_symbols()
    return [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges), START, END]


def byte_symbols() -> list[str]:
    """Returns GPT-2's printable stand-in for each byte, in CLIP's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
