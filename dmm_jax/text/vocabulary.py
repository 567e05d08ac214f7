"""The byte-pair encoding of a tokenizer folder: its vocabulary and merges, read from old or new files.

CLIP's own encoding ships in `clip_bpe/` (the file of OpenAI's CLIP, MIT licence), since single-file checkpoints have
no tokenizer.
"""

import functools
import gzip
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from dmm_jax.runtime.errors import UserError

BUNDLED = pathlib.Path(__file__).parent / "clip_bpe"
CLIP, OPEN_CLIP = BUNDLED / "clip", BUNDLED / "open_clip"  # Tokenizer folders with CLIP's encoding, padded differently.
OLD_FILES, NEW_FILE = ("vocab.json", "merges.txt"), "tokenizer.json"
ADDED_FILE, SPECIAL_FILES = "added_tokens.json", ("tokenizer_config.json", "special_tokens_map.json")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
CLIP_VOCAB_SIZE = 49408
MAX_BYTES = 50_000_000  # Of each file of a tokenizer; the transformers package reads them all.


class Bpe(NamedTuple):
    """A byte-level byte-pair encoding (arXiv:1508.07909)."""

    vocabulary: dict[str, int]  # {token: id}
    merges: list[tuple[str, str]]  # The pairs that are joined, in order of priority.


def has_tokenizer(folder: pathlib.Path) -> bool:
    """Tells whether a folder has the files of a tokenizer, old or new."""
    return (folder / NEW_FILE).is_file() or all((folder / name).is_file() for name in OLD_FILES)


def read_bpe(folder: pathlib.Path) -> Bpe:
    """Reads a tokenizer folder: vocab.json and merges.txt, or else tokenizer.json; a bundled folder gives CLIP's own.

    Raises:
      ValueError: the files are missing, or do not hold a byte-level BPE.
    """
    if folder.parent == BUNDLED:
        return clip_bpe()
    if not has_tokenizer(folder):
        raise UserError(
            f"{folder} holds no tokenizer: expected {' and '.join(OLD_FILES)}, or {NEW_FILE}. Point to the "
            "checkpoint's tokenizer folder; a single-file checkpoint has none: take its base model's."
        )
    old = all((folder / name).is_file() for name in OLD_FILES)
    path = folder / (OLD_FILES[0] if old else NEW_FILE)
    if large := [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > MAX_BYTES]:
        raise UserError(
            f"{large[0]} is larger than {MAX_BYTES} bytes, which is no tokenizer's. Fetch the folder again."
        )
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        if old:
            lines = (folder / OLD_FILES[1]).read_text(encoding="utf-8").split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
            return Bpe(_checked_vocabulary(contents), [_pair(line) for line in merges])
        special = {token["content"]: token["id"] for token in contents.get("added_tokens", ())}
        model = contents["model"]
        return Bpe(_checked_vocabulary(model["vocab"] | special), [_pair(merge) for merge in model["merges"]])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{path} is not a CLIP tokenizer's ({reason}). Fetch the tokenizer folder again.") from None


def all_ids(folder: pathlib.Path) -> dict[str, int]:
    """Returns {token: id} of a tokenizer folder as transformers numbers them: the vocabulary, then added tokens.

    Raises:
      UserError: a file cannot be read, or an id is not a whole number.
    """
    ids = dict(read_bpe(folder).vocabulary)
    if folder.parent == BUNDLED:
        return ids
    try:
        files = {
            name: json.loads((folder / name).read_text(encoding="utf-8"))
            for name in (ADDED_FILE, NEW_FILE, *SPECIAL_FILES)
            if (folder / name).is_file()
        }
        ids |= files.get(ADDED_FILE) or {}
        ids |= {token["content"]: token["id"] for token in files.get(NEW_FILE, {}).get("added_tokens") or ()}
        specials = []
        for fields in (files[name] for name in SPECIAL_FILES if name in files):
            ids |= {token["content"]: int(key) for key, token in (fields.get("added_tokens_decoder") or {}).items()}
            specials += [fields.get(name) for name in SPECIAL_TOKENS]
            specials += fields.get("additional_special_tokens") or ()
        for token in specials:
            content = token["content"] if isinstance(token, dict) else token
            if content is not None:
                ids.setdefault(content, len(ids))
        return _checked_vocabulary(ids)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"the added tokens of {folder} cannot be read ({reason}). Fetch the folder again.") from None


def _checked_vocabulary(vocabulary: Mapping) -> dict[str, int]:
    if not all(isinstance(token, str) and type(number) is int for token, number in vocabulary.items()):
        raise UserError("the vocabulary does not map text to integers")
    return dict(vocabulary)


def _pair(merge: str | list) -> tuple[str, str]:
    """Returns the two symbols of a merge: a text with a space, or in newer files a list."""
    first, second = merge.rstrip("\r").split(" ") if isinstance(merge, str) else merge
    return first, second


def write_bpe(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the encoding of a tokenizer folder as vocab.json and merges.txt, which old and new readers open."""
    bpe = read_bpe(folder)
    text = json.dumps(bpe.vocabulary, ensure_ascii=False, separators=(",", ":"))
    (out / OLD_FILES[0]).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in bpe.merges)]
    (out / OLD_FILES[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


@functools.cache
def clip_bpe() -> Bpe:
    """Returns CLIP's own encoding: the first merges of OpenAI's file, as many as fill the vocabulary."""
    text = gzip.decompress((BUNDLED / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    num_merges = CLIP_VOCAB_SIZE - len(tokens_from_merges([]))
    merges = [_pair(line) for line in text.split("\n")[1 : 1 + num_merges]]
    return Bpe({token: number for number, token in enumerate(tokens_from_merges(merges))}, merges)


def tokens_from_merges(merges: Iterable[tuple[str, str]]) -> list[str]:
    """Returns the tokens in the order of their ids, as CLIP's code derives them from its merges.

    The tokens are: every byte as a symbol, the same symbols at the end of a word, the merged pairs, start and end.
    """
    symbols = byte_symbols()
    return [*symbols, *(symbol + WORD_END for symbol in symbols), *map("".join, merges), START, END]


def byte_symbols() -> list[str]:
    """Returns GPT-2's printable symbol for each byte, in CLIP's order: printable bytes come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
