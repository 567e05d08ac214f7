"""Writes a small world's tokenizer: CLIP's byte-level BPE in which each word of the captions is one token."""

import json
from collections.abc import Iterable
from pathlib import Path

from dmm_jax.text.vocabulary import END, START, WORD_END, tokens_from_merges
from dmm_jax.world.scenes import WORDS

MAX_LENGTH = 77

Merge = tuple[str, str]


def write_tokenizer(folder: str | Path, pad_token: str = END, words: Iterable[str] = WORDS) -> None:
    """Writes the four files of a CLIP tokenizer in which each word is one token.

    Token ids are 256 bytes, 256 bytes that end a word, the merges in order, the start token, the end token.

    Args:
      pad_token: CLIP pads with its end token; OpenCLIP's encoders (Stable Diffusion 2, SDXL's second) pad with "!".
      words: in lower-case ASCII letters.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = merges_for(words)
    tokens = tokens_from_merges(merges)
    _write(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False))
    _write(folder / "merges.txt", "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": pad_token, "unk_token": END}
    config = {**special, "model_max_length": MAX_LENGTH, "do_lower_case": True, "add_prefix_space": False,
              "errors": "replace", "tokenizer_class": "CLIPTokenizer"}  # fmt: skip
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2))
    _write(folder / "special_tokens_map.json", json.dumps(special, indent=2))


def tokenizer_fields(folder: Path) -> dict:
    """Returns the fields of a text encoder's config.json that depend on its tokenizer."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    end = vocabulary[END]
    return {
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary[START],
        "eos_token_id": end,
        "pad_token_id": end,
    }


def merges_for(words: Iterable[str]) -> list[Merge]:
    """Returns merges, best first, that make each (ASCII) word one token.

    A later merge does not change an earlier word, whose own merges apply first until it is one token.
    """
    merges: list[Merge] = []
    for word in words:
        while len(pieces := split_word(word, merges)) > 1:
            merges.append((pieces[0], pieces[1]))
    return merges


def split_word(word: str, merges: list[Merge]) -> list[str]:
    """Splits a word into tokens by byte pair encoding: joins the pair of best rank until no merge applies."""
    rank = {merge: i for i, merge in enumerate(merges)}
    pieces = [*word[:-1], word[-1] + WORD_END]
    while len(pieces) > 1:
        best = min(zip(pieces, pieces[1:], strict=False), key=lambda pair: rank.get(pair, len(merges)))
        if best not in rank:
            break
        pieces = _join(pieces, best)
    return pieces


def _join(pieces: list[str], pair: Merge) -> list[str]:
    joined, i = [], 0
    while i < len(pieces):
        step = 2 if tuple(pieces[i : i + 2]) == pair else 1
        joined.append("".join(pieces[i : i + step]))
        i += step
    return joined


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
