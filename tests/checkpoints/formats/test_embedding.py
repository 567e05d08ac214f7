"""Textual inversions of every form are read for the text encoders that they fit, and refused for others."""

import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.embedding import read_embeddings
from dmm_jax.checkpoints.formats.safetensors_io import save

SD1, SDXL = {"text_encoder": 6}, {"text_encoder": 6, "text_encoder_2": 10}
PAIR = {"clip_l": np.ones((2, 6), np.float32), "clip_g": np.ones((2, 10), np.float32)}


def written(folder, name="bad-hands", **tensors):
    path = folder / f"{name}.safetensors"
    save(path, tensors, {})
    return path


@pytest.mark.parametrize(
    "tensors, widths, name",
    [
        ({"emb_params": np.ones((3, 6), np.float16)}, SD1, "bad-hands"),
        ({"<cat-toy>": np.ones(6, np.float32)}, SD1, "<cat-toy>"),
        ({"<cat-toy>": np.ones((4, 6), np.float32)}, SD1, "<cat-toy>"),
        (PAIR, SDXL, "bad-hands"),
    ],
)
def test_forms_have_names_and_vectors(tmp_path, tensors, widths, name):
    path = written(tmp_path, **tensors)
    ((own_name, vectors),) = read_embeddings([path], widths, 75)
    assert own_name == name and {encoder: rows.shape[1] for encoder, rows in vectors.items()} == widths
    assert read_embeddings([f"word={path}"], widths, 75)[0].name == "word"


@pytest.mark.parametrize(
    "tensors, widths, message",
    [
        ({"emb_params": np.ones((1, 6), np.float32)}, {"text_encoder": 8}, "width 6, .* checkpoint 8"),
        (PAIR, SD1, "width 6, 10, .* checkpoint 6"),
        ({"emb_params": np.ones((1, 6), np.float32)}, SDXL, "width 6, .* checkpoint 6, 10"),
        ({"emb_params": np.full((1, 6), np.nan, np.float32)}, SD1, "NaN or infinity"),
        ({"emb_params": np.ones((9, 6), np.float32)}, SD1, r"has \[9\] vectors; expected 1 to 8"),
        ({"emb_params": np.ones((1, 2, 6), np.float32)}, SD1, "belongs to another family"),
        ({"a": np.ones(6, np.float32), "b": np.ones(6, np.float32)}, SD1, "it holds a, b; expected emb_params"),
        ({"a(b)": np.ones(6, np.float32)}, SD1, "a prompt cannot hold the name"),
    ],
)
def test_unfit_files_are_refused(tmp_path, tensors, widths, message):
    with pytest.raises(CheckpointError, match=message):
        read_embeddings([written(tmp_path, **tensors)], widths, 8)


def test_two_embeddings_of_one_name_are_refused(tmp_path):
    path = written(tmp_path, emb_params=np.ones((1, 6), np.float32))
    with pytest.raises(CheckpointError, match="two embeddings are called 'BAD-hands'"):
        read_embeddings([path, f"BAD-hands={path}"], SD1, 75)
