"""`dmm-jax sample`: prompts that cannot be used, and components that come from another checkpoint."""

import pytest


@pytest.mark.parametrize("content, expected", [(None, "no prompt file"), ("\n", "no prompt")])
def test_missing_or_empty_prompts_are_refused(failing, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    assert expected in failing("sample", "unopened", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o")


@pytest.fixture
def arguments(tiny, tmp_path):
    """The teacher `left`, which is a UNet alone; the style does not exist, so that nothing is drawn."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    return [
        "sample", tiny[0]["left"], "--base", tiny[0]["base"], "--style", "unknown",
        "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o",
    ]  # fmt: skip


def test_borrowed_components_are_printed_before_drawing(failing, arguments):
    borrowed, error = failing(*arguments).split("dmm-jax sample: error: ")
    assert "vae" in borrowed and "base" in borrowed and "style" in error


def test_the_prediction_type_is_compared_with_the_recorded_one(failing, arguments):
    assert "v_prediction" in failing(*arguments, "--prediction-type", "v_prediction")
