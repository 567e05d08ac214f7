"""The study of cut prompts: what its prompts keep of a caption, how it counts, and its table."""

import numpy as np
import pytest

from dmm_jax.config import checks
from dmm_jax.studies import shapes_prompts
from dmm_jax.text.prompt_chunks import tokenize
from dmm_jax.text.prompt_grammar import A1111, PLAIN
from dmm_jax.text.tokenizer import Tokenizer, Tokenizers
from dmm_jax.world import classifier, tokenizer
from dmm_jax.world.scenes import sample_scenes
from dmm_jax.world.shipped_checkpoints import CLASSIFIER, FOLDER
from dmm_jax.world.source import ShapesSource


@pytest.mark.parametrize("row", shapes_prompts.ROWS)
def test_each_row_is_a_valid_config(tmp_path, row):
    shapes_prompts.write_prompts(tmp_path, 5)
    config = shapes_prompts.row_config(tmp_path, row, seed=1, num_steps=2, num_made=5)
    checks.check(config)
    with open(config.data.source) as file:
        assert len(file.readlines()) == 5


def test_a_long_prompt_has_its_caption_in_the_second_chunk(tmp_path):
    tokenizer.write_tokenizer(tmp_path)
    tokenizers = Tokenizers([Tokenizer.from_folder(tmp_path)])
    captions = ["a large red circle", "a small blue star"]
    long = shapes_prompts.long_prompts(captions)
    whole, alone = tokenize(tokenizers, long, A1111).input_ids, tokenize(tokenizers, captions, A1111).input_ids
    assert whole.shape[1] == 2
    np.testing.assert_array_equal(whole[:, 1], alone[:, 0])
    with pytest.warns(UserWarning, match="cut to 75"):
        first, second = tokenize(tokenizers, long, PLAIN).input_ids
    np.testing.assert_array_equal(first, second)


def test_accuracy_counts_the_words_that_a_picture_shows():
    """Pictures of their captions score high by every word; pictures of other captions score as chance does."""
    graph, params = classifier.load(FOLDER / CLASSIFIER)
    source = ShapesSource(60, seed=3)
    images = np.stack([source[k]["image"] for k in range(60)])
    content = sample_scenes(np.random.default_rng(4), 60)[0].content
    right = classifier.scene_accuracy(graph, params, images, source.scenes.content)
    wrong = classifier.scene_accuracy(graph, params, images, content)
    assert min(right.values()) > 0.8 and wrong["scene"] < 0.1 and wrong["colour_ids"] < 0.5


def test_the_table_has_a_mean_over_styles_and_seeds():
    def line(row, seed, share, **values):
        style = {"accuracy": {"scene": share}, **values}
        return {"row": row, "seed": seed, "values": {"captions": {"a": style}, "long prompts": {"a": style}}}

    lines = [line("captions", 0, 0.5, distance=1.0), line("captions", 1, 0.7, distance=2.0), line("teachers", 0, 0.9)]
    rows = shapes_prompts.table(lines).splitlines()[2:]
    assert rows == ["| captions | 60% | 1.50 | 60% | 1.50 | 2 |", "| teachers | 90% |  | 90% |  | 1 |"]
