"""Chunks of prompts have the ids and weights of AUTOMATIC1111's, for one tokenizer or two; emphasis keeps the mean."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dmm_jax.runtime.errors import UserError
from dmm_jax.text.prompt_chunks import MAX_CHUNKS, Unit, emphasise, fill_chunks, tokenize
from dmm_jax.text.tokenizer import Tokenizer, Tokenizers
from dmm_jax.text.vocabulary import CLIP, OPEN_CLIP
from tests.text.record_a1111 import FILE, LONG

RECORDED = json.loads(FILE.read_text())
END = 49407


@pytest.fixture(scope="module")
def xl():
    return Tokenizers([Tokenizer.from_folder(CLIP), Tokenizer.from_folder(OPEN_CLIP)])


@pytest.mark.filterwarnings("ignore:prompt .* no partner")
@pytest.mark.parametrize("prompt", RECORDED)
def test_chunks_are_those_of_a1111(xl, prompt):
    chunks = RECORDED[prompt]["chunks"]
    tokens = tokenize(xl, [prompt], "a1111")
    assert tokens.input_ids.shape == tokens.weights.shape == (1, len(chunks), 154)
    for number, (ids, weights) in enumerate(chunks):
        for encoder, pad in enumerate((END, 0)):
            row, padding = slice(77 * encoder, 77 * (encoder + 1)), 75 - len(ids)
            assert tokens.input_ids[0, number, row].tolist() == [49406, *ids, END] + [pad] * padding
            expected = np.array([1.0, *weights, 1.0] + [1.0] * padding, np.float32)
            np.testing.assert_allclose(tokens.weights[0, number, row], expected, rtol=1e-6)


def test_prompts_are_padded_to_the_longest_with_empty_chunks(xl):
    tokens = tokenize(xl, ["a cat", LONG, None], "a1111")
    empty = tokenize(xl, [""], "a1111").input_ids[0, 0]
    assert (tokens.input_ids[0, 1] == empty).all() and (tokens.input_ids[2] == -1).all()
    assert (tokenize(xl, ["a cat"], "a1111", num_chunks=3).input_ids[0, 2] == empty).all()


def test_plain_prompts_are_the_tokenizers_rows(xl):
    tokens = tokenize(xl, ["a (cat:1.4) [on] a mat", None], "plain")
    assert tokens.input_ids.shape[1] == 1 and (tokens.weights == 1.0).all()
    assert (tokens.input_ids[:, 0] == xl(["a (cat:1.4) [on] a mat", None])).all()


def test_plain_prompts_fill_chunks_of_75_tokens(xl):
    words = " ".join(f"{number}" for number in range(10)) + " cat" * 80
    rows = tokenize(xl, [words, "a cat"], "plain", num_chunks=2).input_ids
    ids = xl.tokenizers[0].token_ids(words)
    assert rows.shape == (2, 2, 154) and xl.num_chunks(words) == 2 and xl.num_chunks("") == 1
    assert rows[0, 0, :77].tolist() == [49406, *ids[:75], END]
    assert rows[0, 1, : len(ids) - 73].tolist() == [49406, *ids[75:], END]
    assert (rows[1, 0] == xl(["a cat"])[0]).all() and (rows[1, 1] == xl([""])[0]).all()
    with pytest.warns(UserWarning, match="was cut to 75"):
        assert (xl([words])[0] == rows[0, 0]).all()


def test_the_number_of_chunks_is_bounded(xl):
    with pytest.raises(UserError, match=f"fills {MAX_CHUNKS + 1} chunks of 75 tokens; a prompt may have {MAX_CHUNKS}"):
        tokenize(xl, ["BREAK a " * MAX_CHUNKS], "a1111")


def test_an_embeddings_vectors_stay_in_one_chunk():
    words = [Unit((1,), 1.0) for _ in range(70)]
    chunks = fill_chunks([*words, Unit((7,) * 8, 1.0), Unit((2,), 1.0)], room=75)
    assert [sum(len(unit.ids) for unit in chunk) for chunk in chunks] == [70, 9]


def test_emphasis_scales_tokens_and_keeps_each_chunks_mean():
    rng = np.random.default_rng(0)
    states = rng.standard_normal((3, 7, 4)).astype(np.float32) + 0.5
    weights = np.ones((3, 7), np.float32)
    weights[1, 2:4], weights[2, 5] = 1.4, 0.3
    result = np.asarray(emphasise(jnp.asarray(states), jnp.asarray(weights)))
    np.testing.assert_array_equal(result[0], states[0])
    np.testing.assert_allclose(result.mean((1, 2)), states.mean((1, 2)), rtol=1e-5)
    ratio = result[1] / states[1]
    np.testing.assert_allclose(ratio[2:4] / ratio[0, 0], 1.4, rtol=1e-5)
