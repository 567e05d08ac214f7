r"""The grammar in which AUTOMATIC1111's users write prompts: text with weights, cut into parts by BREAK.

`(word)` weighs 1.1, `(word:1.3)` weighs 1.3 and `[word]` weighs 1 / 1.1; brackets nest and their weights multiply.
A backslash before a bracket or a backslash makes it a plain character. BREAK, as a word, begins a new chunk.
"""

import math
import re
import warnings
from typing import NamedTuple

from dmm_jax.runtime.errors import UserError

A1111, PLAIN = "a1111", "plain"
GRAMMARS = (A1111, PLAIN)
STRONGER = 1.1
WEAKER = 1.0 / 1.1
MAX_CHARACTERS = 20_000
_SIGN = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?(?:[.\d]+|nan|inf|infinity))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<text>[^\\()\[\]:]+|:)",
    re.IGNORECASE,
)
_BREAK = re.compile(r"\bBREAK\b")
LORAS = (
    "prompts and requests to a server load no LoRA. A LoRA is folded into the model as it is opened: `dmm-jax sample "
    "MODEL --lora FILE*0.8`, or `dmm-jax serve 'MODEL + FILE*0.8'`"
)
# Syntax of the web UI that changes with the sampling step, or that names other files: it has no reading as a weight.
_UNSUPPORTED = (
    (re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"), LORAS),
    (re.compile(r"(?<!\\)\[[^\[\]]*(?:\||:\s*[.\d]+\s*\])[^\[\]]*"), "a prompt cannot change between steps"),
    (re.compile(r"\bAND\b"), "an image has one prompt: write 'and'"),
)


class Piece(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


def parse(prompt: str) -> list[list[Piece]]:
    """Returns the pieces of a prompt, one list for each part between BREAKs.

    A bracket that is not closed counts to the end, with a warning; one that is not opened is a plain character. BREAK
    also cuts inside brackets (the web UI reads it as a word there).

    Raises:
      UserError: a weight is not a finite number, the prompt is very long, or it uses other syntax of the web UI.
    """
    if len(prompt) > MAX_CHARACTERS:
        raise UserError(f"{quoted(prompt)} has {len(prompt)} characters; a prompt may have {MAX_CHARACTERS}. Cut it.")
    for pattern, reason in _UNSUPPORTED:
        if match := pattern.search(prompt):
            raise UserError(f"{quoted(prompt)}: {match[0]!r} is not supported: {reason}. The grammar 'plain' reads it.")
    signs = list(_SIGN.finditer(prompt))
    factors, ends = _match_brackets(prompt, signs)
    parts, products = [[]], {"(": [1.0], "[": [1.0]}
    for number, sign in enumerate(signs):
        if number in factors:
            products[sign[0]].append(products[sign[0]][-1] * factors[number])
        elif number in ends:
            products[ends[number]].pop()
        else:
            weight = products["("][-1] * products["["][-1]
            first, *others = [sign["escaped"]] if sign["escaped"] is not None else _BREAK.split(sign[0])
            _append(parts[-1], first.rstrip() if others else first, weight)
            for number, text in enumerate(others, start=1):
                parts.append([Piece(text.strip() if number < len(others) else text.lstrip(), weight)])
    return parts


def plain_text(prompt: str) -> str:
    """Returns a prompt's words, without brackets, weights and BREAK; a prompt without these is returned unchanged."""
    return " ".join("".join(piece.text for piece in pieces) for pieces in parse(prompt))


def quoted(prompt: str) -> str:
    """Returns a prompt for a message: its beginning, on one line."""
    line = " ".join(prompt[:200].split())
    return f"prompt {line[:40] + ('...' if len(line) > 40 else '')!r}"


def _append(pieces: list[Piece], text: str, weight: float) -> None:
    """Adds text; text of the same weight is one piece, since it may be one word: "a(b)" has two, "(a)(b)" has one."""
    if pieces and pieces[-1].weight == weight:
        pieces[-1] = Piece(pieces[-1].text + text, weight)
    else:
        pieces.append(Piece(text, weight))


def _match_brackets(prompt: str, signs: list[re.Match]) -> tuple[dict[int, float], dict[int, str]]:
    """Returns the factor of each opening bracket, and the opening bracket that each closing sign ends, by number."""
    factors, ends, opened = {}, {}, {"(": [], "[": []}
    alone = []
    for number, sign in enumerate(signs):
        if sign["bracket"] in opened:
            opened[sign[0]].append(number)
            factors[number] = STRONGER if sign[0] == "(" else WEAKER
        elif sign["bracket"] or sign["weight"]:
            kind = "[" if sign[0] == "]" else "("
            if not opened[kind]:
                alone.append(number)
                continue
            start = opened[kind].pop()
            ends[number] = kind
            if sign["weight"]:
                factors[start] = _weight(prompt, sign["weight"])
    alone += [number for numbers in opened.values() for number in numbers]
    if alone:
        place = signs[min(alone)].end()
        warnings.warn(
            f"{quoted(prompt)}: the bracket at character {place} has no partner; write \\( for a bracket as text.",
            stacklevel=4,
        )
    return factors, ends


def _weight(prompt: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{quoted(prompt)}: the weight {text[:40]!r} is not a finite number, as in (word:1.2).")
    return weight
