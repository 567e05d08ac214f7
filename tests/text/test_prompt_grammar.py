"""The prompt grammar reads prompts as AUTOMATIC1111's web UI does, and refuses what it cannot read."""

import json

import numpy as np
import pytest

from dmm_jax.runtime.errors import UserError
from dmm_jax.text.prompt_grammar import MAX_CHARACTERS, parse, plain_text
from tests.text.record_a1111 import FILE

RECORDED = json.loads(FILE.read_text())


@pytest.mark.filterwarnings("ignore:prompt .* no partner")
@pytest.mark.parametrize("prompt", RECORDED)
def test_pieces_are_those_of_a1111(prompt):
    pieces = [piece for number, part in enumerate(parse(prompt)) for piece in [("BREAK", -1.0)] * (number > 0) + part]
    expected = RECORDED[prompt]["pieces"] if prompt else []
    assert [text for text, _ in pieces] == [text for text, _ in expected]
    np.testing.assert_allclose([weight for _, weight in pieces], [weight for _, weight in expected], rtol=1e-12)


def test_plain_text_has_the_words_alone():
    assert plain_text("a (red:1.3) [circle] BREAK and a [star]") == "a red circle and a star"
    assert plain_text("a red circle,  a star.") == "a red circle,  a star."


def test_a_break_inside_brackets_is_a_break():
    assert parse("(a BREAK b:1.5)") == [[("a", 1.5)], [("b", 1.5)]]
    blanks = " " * 1000
    assert parse(f"a{blanks}BREAK{blanks}b BREAK c ") == [[("a", 1.0)], [("b", 1.0)], [("c ", 1.0)]]


@pytest.mark.parametrize("prompt, place", [("a (b", 3), ("a) b", 2), ("a [b) c]", 5), ("a:1.2) b", 6)])
def test_a_bracket_without_partner_is_a_warning(prompt, place):
    with pytest.warns(UserWarning, match=f"character {place} has no partner"):
        parse(prompt)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("(a:nan)", "weight 'nan' is not a finite number"),
        ("(a:-inf)", "weight '-inf' is not a finite number"),
        ("(a:1.2.3)", "weight '1.2.3' is not a finite number"),
        (f"(a:{'9' * 400})", "is not a finite number"),
        (
            "a <lora:style:0.8> b",
            "'<lora:style:0.8>' is not supported: prompts and requests to a server load no LoRA.* --lora FILE.0.8",
        ),
        ("a [b:c:0.5]", "cannot change between steps"),
        ("a [b|c] d", "cannot change between steps"),
        ("a cat AND a dog", "an image has one prompt"),
        ("word " * 10_000, f"50000 characters; a prompt may have {MAX_CHARACTERS}"),
    ],
)
def test_prompts_outside_the_grammar_are_refused(prompt, message):
    with pytest.raises(UserError, match=message) as error:
        parse(prompt)
    assert str(error.value).count("\n") == 0


@pytest.mark.filterwarnings("ignore:prompt .* no partner")
def test_deep_nesting_takes_linear_time():
    half = MAX_CHARACTERS // 4
    assert parse("(a" * half + "))" * half) and len(parse("[" * 1000 + "a" + "]" * 1000)[0]) == 1
