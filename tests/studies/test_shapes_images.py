"""The study of images seen: rows become valid configs, and results a table."""

import pathlib

import pytest

from dmm_jax.config import checks
from dmm_jax.studies import shapes_images

OUT = pathlib.Path("out")


@pytest.mark.parametrize("row", shapes_images.ROUND)
def test_each_row_is_a_valid_config_with_its_number_of_images(row):
    config, changes = shapes_images.row_config(OUT, row, seed=1), shapes_images.parse(row)
    checks.check(config)
    assert config.num_steps * config.batch_size == changes.pop("images")
    assert {name: config[name] for name in changes} == changes
    assert config.warmup_steps * config.batch_size == shapes_images.WARMUP_IMAGES


def test_a_row_reads_numbers_words_and_data():
    assert shapes_images.parse("images=240 learning_rate=1e-2 optimizer=muon data=made") == {
        "images": 240, "learning_rate": 0.01, "optimizer": "muon", "data": "made",
    }  # fmt: skip
    assert shapes_images.row_config(OUT, "images=240 data=made", 0).data.cache == "out/caches/made"


def test_the_table_has_the_nearest_rows_first_and_the_floor_last():
    def line(row, seed, value):
        distances = {"all": {"a": value}, "few": {"a": 10 * value}}
        return {"row": row, "seed": seed, "steps": 1000, "distances": distances}

    lines = [
        line("far", 0, 3.0),
        line("near", 0, 1.0),
        line("near", 1, 2.0),
        {"row": "wild", "seed": 0, "diverged": "x"},
    ]
    lines.append({"row": "references", "seed": 0, "floor": {"all": {"a": 0.5}, "few": {"a": 5.0}}})
    text = shapes_images.table(lines).splitlines()
    assert text[2] == "| near | 1,000 | 15.00 | 7.07 | 1.50 | 0.71 | 2 |" and text[3].startswith(
        "| far | 1,000 | 30.00 |"
    )
    assert text[4] == "| floor |  | 5.00 |  | 0.50 |  | 1 |" and "wild (seed 0) | | diverged" in text[5]
