"""The embedded world's tokenizer files, read by transformers."""

import json

import numpy as np
import pytest

from dmm_jax.checkpoints.shipped import FOLDER
from dmm_jax.world.scenes import WORDS, sample_scenes
from dmm_jax.world.tokenizer import END, START, merges_for, split_word, write_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("words", [WORDS, ("cu", "cucumber"), ("leaf", "less", "leafless"), ("aaaa", "aa", "aaaaab")])
def test_every_word_is_one_token(words):
    merges = merges_for(words)
    assert {word: split_word(word, merges) for word in words} == {word: [word + "</w>"] for word in words}
    assert len(set(merges)) == len(merges)


def test_the_shipped_tokenizer_is_the_one_that_is_written(folder):
    for name in ("vocab.json", "merges.txt"):
        assert (folder / name).read_text() == (FOLDER / "base" / "tokenizer" / name).read_text()


def test_special_tokens_have_the_last_two_ids(folder):
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) < 700
    assert (vocabulary[START], vocabulary[END]) == (len(vocabulary) - 2, len(vocabulary) - 1)


def test_transformers_reads_one_token_per_word(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(tokenizer) == len(vocabulary)
    assert tokenizer.model_max_length == 77 and tokenizer.pad_token == END
    for text in sample_scenes(np.random.default_rng(0), 50)[1]:
        ids = tokenizer(text, padding="max_length", truncation=True)["input_ids"]
        words = [vocabulary[word + "</w>"] for word in text.split()]
        rest = 77 - 1 - len(words)
        assert ids == [vocabulary[START], *words, *[vocabulary[END]] * rest]


def test_foreign_words_fall_back_to_bytes(folder):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    ids = tokenizer("Zoë's cat, 7 großartig")["input_ids"]
    assert max(ids[1:-1]) < len(tokenizer) - 2
    assert tokenizer.decode(ids[1:-1]).replace(" ", "") == "zoë'scat,7großartig"
