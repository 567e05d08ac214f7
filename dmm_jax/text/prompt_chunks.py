"""Prompts of any length as chunks that a text encoder reads: rows of token ids, and a weight for every token.

The rules are those of AUTOMATIC1111's web UI: 75 tokens per chunk, and a chunk that is full ends at its last comma, if
at most 20 tokens follow that comma.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dmm_jax.runtime.errors import UserError, meant
from dmm_jax.text.prompt_grammar import PLAIN, Piece, parse, quoted
from dmm_jax.text.tokenizer import NO_PROMPT, Tokenizer, Tokenizers

COMMA_BACKTRACK = 20  # Tokens after the last comma that move to the next chunk with the token that does not fit.
MAX_CHUNKS = 32  # A bound on memory: 2,400 tokens.


class PromptTokens(NamedTuple):
    """B prompts of K chunks; a row joins the ids of every encoder's tokenizer."""

    input_ids: Int[np.ndarray, "B K EL"]
    weights: Float[np.ndarray, "B K EL"]


class Unit(NamedTuple):
    """Ids that stay in one chunk: a token, or all vectors of an embedding."""

    ids: tuple[int, ...]
    weight: float
    is_comma: bool = False


def tokenize(
    tokenizers: Tokenizers,
    prompts: Sequence[str | None],
    grammar: str,
    num_chunks: int = 1,
    embeddings: Sequence[Mapping[str, Sequence[int]]] = (),
) -> PromptTokens:
    """Returns the ids and weights of prompts; empty chunks fill up to the longest prompt, and to `num_chunks`.

    In the grammar "plain" brackets are text, and a prompt has `num_chunks` chunks: what they do not hold is cut. None
    means no prompt: see `Tokenizers`.

    Args:
      embeddings: for each tokenizer, the ids that stand for an embedding, by its name in lower case.

    Raises:
      UserError: a prompt does not follow the grammar, has more than MAX_CHUNKS chunks, or names an unknown embedding.
    """
    if grammar == PLAIN:
        input_ids = tokenizers(prompts, num_chunks).reshape(len(prompts), num_chunks, -1)
        return PromptTokens(input_ids, np.ones(input_ids.shape, np.float32))
    parts_of_each = [parse(prompt or "") for prompt in prompts]
    pairs = list(zip(tokenizers.tokenizers, embeddings or [{}] * len(tokenizers.tokenizers), strict=True))
    chunks_of_each = [[split(*pair, parts) for parts in parts_of_each] for pair in pairs]
    for row, prompt in enumerate(prompts):
        longest = max(len(chunks[row]) for chunks in chunks_of_each)
        if longest > MAX_CHUNKS:
            raise UserError(
                f"{quoted(prompt)} fills {longest} chunks of {tokenizers.tokenizers[0].room} tokens; a prompt may have "
                f"{MAX_CHUNKS}. Cut it."
            )
        num_chunks = max(num_chunks, longest)
    rows = [
        np.array([_rows(tokenizer, prompt, num_chunks) for prompt in chunks])
        for tokenizer, chunks in zip(tokenizers.tokenizers, chunks_of_each, strict=True)
    ]
    ids, weights = np.moveaxis(np.concatenate(rows, axis=-1), 1, 0)  # (B, K, EL) each
    ids = ids.astype(np.int32)
    if tokenizers.has_zeros:
        ids[[prompt is None for prompt in prompts]] = NO_PROMPT
    return PromptTokens(ids, weights.astype(np.float32))


def split(tokenizer: Tokenizer, embeddings: Mapping, parts: Sequence[Sequence[Piece]]) -> list[list[Unit]]:
    """Returns the chunks of a prompt: each part between BREAKs begins a new one; an empty last part gives none."""
    chunks = []
    for number, pieces in enumerate(parts):
        units = [unit for piece in pieces for unit in _units(tokenizer, embeddings, piece)]
        if units or number < len(parts) - 1 or not chunks:
            chunks += fill_chunks(units, tokenizer.room)
    return chunks


def _units(tokenizer: Tokenizer, embeddings: Mapping, piece: Piece) -> Iterator[Unit]:
    """Yields the tokens of a piece, and the embeddings that it names: `name`, or ComfyUI's `embedding:name`."""
    names = "|".join(map(re.escape, sorted(embeddings, key=len, reverse=True)))
    texts = re.split(rf"(?<!\w)(?:embedding:)?({names})(?!\w)", piece.text, flags=re.I) if names else [piece.text]
    for number, text in enumerate(texts):
        if number % 2:
            yield Unit(tuple(embeddings[text.lower()]), piece.weight)
            continue
        if unknown := re.search(r"embedding:\S+|<[^<>|\s]+>" if names else r"embedding:\S+", text):
            name = unknown[0].removeprefix("embedding:")
            others = f"{meant(name, embeddings, repr)} There are: {', '.join(embeddings)}."
            raise UserError(f"there is no embedding {name!r}{others if names else ': give its file.'}")
        for token in tokenizer.token_ids(text):
            yield Unit((token,), piece.weight, token == tokenizer.comma_id)


def fill_chunks(units: Sequence[Unit], room: int) -> list[list[Unit]]:
    """Divides units into chunks of at most `room` ids; a full chunk may end at its last comma."""
    chunks, chunk = [], []
    for unit in units:
        if _size(chunk) == room and not unit.is_comma:
            after_comma = max((place for place, other in enumerate(chunk, 1) if other.is_comma), default=0)
            if after_comma and _size(chunk[after_comma:]) < COMMA_BACKTRACK:
                chunks.append(chunk[:after_comma])
                chunk = chunk[after_comma:]
        if _size(chunk) + len(unit.ids) > room:
            chunks.append(chunk)
            chunk = []
        chunk.append(unit)
    return [*chunks, chunk]


def _size(chunk: Sequence[Unit]) -> int:
    return sum(len(unit.ids) for unit in chunk)


def _rows(tokenizer, chunks, num_chunks):
    """Returns the ids and weights (2, K, L) of one prompt: start, the tokens, end, padding."""
    rows = np.ones((2, num_chunks, tokenizer.max_length))
    rows[0] = tokenizer([""])[0]
    for chunk, ids, weights in zip(chunks, *rows[:, : len(chunks)], strict=True):
        tokens = [token for unit in chunk for token in unit.ids]
        ids[1 : len(tokens) + 2] = [*tokens, tokenizer.end_id]
        weights[1 : len(tokens) + 1] = [unit.weight for unit in chunk for _ in unit.ids]
    return rows


def emphasise(states: Float[Array, "B L D"], weights: Float[Array, "B L"]) -> Float[Array, "B L D"]:
    """Multiplies each token's state by its weight, then all states by one number that restores their mean, in float32.

    Without weights the states are returned to the last bit. A mean that is only rounding is not restored.
    """
    weighted = states.astype(jnp.float32) * weights[:, :, None]
    before, after, size = (
        jnp.mean(array, axis=(1, 2), keepdims=True, dtype=jnp.float32) for array in (states, weighted, abs(weighted))
    )
    restored = weighted * jnp.where(abs(after) > 1e-6 * size, before / after, 1.0)
    plain = jnp.all(weights == 1.0, axis=1)[:, None, None]
    return jnp.where(plain, states, restored).astype(states.dtype)
