"""`dmm-jax sample`: prompts that cannot be used, and components that come from another checkpoint."""

import numpy as np
import pytest

from dmm_jax.checkpoints.formats import lora
from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.styles import fold_style
from dmm_jax.gallery import gallery
from dmm_jax.runtime import terminal
from dmm_jax.verbs import main as cli
from dmm_jax.verbs import sample


@pytest.mark.parametrize("content, expected", [(None, "no prompt file"), ("\n", "no prompt")])
def test_missing_or_empty_prompts_are_refused(failing, tmp_path, content, expected):
    if content is not None:
        (tmp_path / "prompts.txt").write_text(content)
    assert expected in failing("sample", "unopened", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "o")


def test_prompts_must_be_given_and_not_empty(failing, tmp_path):
    assert "--prompt TEXT" in failing("sample", "unopened", "--out", tmp_path / "o", code=2)
    assert "is empty" in failing("sample", "unopened", "--out", tmp_path / "o", "--prompt", " ", code=2)


def test_a_wrong_solver_is_refused_before_the_model_is_read(failing, tmp_path):
    error = failing("sample", "unopened", "--prompt", "x", "--solver", "DPM2 a", "--out", tmp_path / "o")
    assert "no solver 'DPM2 a'" in error and "Reading" not in error


def test_seed_minus_one_takes_a_random_seed_and_prints_it(failing, tmp_path, monkeypatch):
    monkeypatch.setattr(sample.secrets, "randbelow", lambda limit: limit - 5)
    error = failing("sample", "unopened", "--prompt", "x", "--seed", "-1", "--out", tmp_path / "o")
    assert f"--seed {2**31 - 5}\n" in error and "Reading unopened" in error


def test_the_stages_are_printed_unless_quiet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gallery, "write_gallery", lambda pipeline, out, *others, **options: out / "index.html")
    words = ["sample", "demo", "--prompt", "x", "--prompt", "y", "--out", str(tmp_path / "o")]
    assert cli.main(words) == 0
    stages = f"Reading demo\nCompiling, then drawing 10 pictures, 8 at once, into {tmp_path / 'o'}\n"
    assert capsys.readouterr().err == stages
    assert cli.main([*words, "--quiet"]) == 0 and capsys.readouterr().err == ""
    terminal.set_verbosity(terminal.NORMAL)


def test_a_lora_of_the_student_is_opened_with_it(failing, arguments, tmp_path):
    error = failing(*arguments, "--lora", f"{tmp_path / 'missing.safetensors'}*0.8")
    assert "missing.safetensors" in error and not (tmp_path / "o").exists()


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


def test_a_lora_on_the_student_is_the_same_lora_on_its_stock_export(trained, tmp_path):
    layer, file = "down_blocks.0.resnets.0.conv1", tmp_path / "detail.safetensors"
    student = open_checkpoint(trained)
    channels_out, channels_in, *_ = student.shapes("unet")[f"{layer}.weight"]
    rng, key = np.random.default_rng(0), f"lora_unet_{layer.replace('.', '_')}"
    factors = {"lora_down": (3, channels_in, 3, 3), "lora_up": (channels_out, 3, 1, 1)}
    save(file, {f"{key}.{name}.weight": rng.standard_normal(shape, np.float32) for name, shape in factors.items()})
    with_lora = open_checkpoint(lora.PLUS.join([str(trained), f"{file}*0.8"]))
    mix = np.array([0.3, 0.7], np.float32)
    expected = lora.with_loras(fold_style(student, mix), tmp_path, [(file, 0.8)]).tensors("unet")
    folded = fold_style(with_lora, mix).tensors("unet")
    assert with_lora.styles == student.styles and folded.keys() == expected.keys()
    assert all(np.array_equal(folded[name], expected[name]) for name in expected)
    before = fold_style(student, mix).tensors("unet")
    assert [name for name in before if not np.array_equal(folded[name], before[name])] == [f"{layer}.weight"]
