"""PNG files carry their parameters, in AUTOMATIC1111's form and as exact JSON."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dmm_jax.config.styles import parse_style, style_text
from dmm_jax.gallery.png import Parameters, sampler_name, save_png
from tests.gallery.pictures import HOSTILE, parameters, pictures


def test_text_has_automatic1111s_layout():
    assert parameters().a1111_text() == (
        "a red circle, (large:1.2)\nNegative prompt: blurry\nSteps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7, "
        "Seed: 1, Size: 512x512, Model hash: abcdef1234, Model: name, Style: anime"
    )


def test_text_omits_an_empty_negative_prompt_and_style():
    text = parameters(negative_prompt="", styles=None).a1111_text()
    assert "Negative" not in text and "Style" not in text


def test_values_survive_the_web_uis_reader():
    text = parameters(styles={"anime": 0.7, "photo": 0.3}, model='odd, "name": 1', guidance_scale=7.5).a1111_text()
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1])
    fields = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert fields["Style"] == "anime=0.7,photo=0.3"
    assert fields["Model"] == 'odd, "name": 1'
    assert fields["CFG scale"] == "7.5"
    assert list(fields) == ["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Style"]


@pytest.mark.parametrize(
    "solver, name",
    [("ddim", "DDIM"), ("euler", "Euler"), ("euler_ancestral_karras", "Euler a Karras"), ("heun", "Heun")],
)
def test_solvers_have_the_web_uis_names(solver, name):
    assert sampler_name(solver) == name


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="magic"):
        parameters(solver="magic").a1111_text()


@pytest.mark.parametrize("prompt", [HOSTILE, "une forêt", "赤い円 🙂", "two\nlines"])
def test_parameters_round_trip_through_the_png(tmp_path, prompt):
    original, picture = parameters(prompt=prompt, styles={"anime": 0.7, "photo": 0.3}), pictures(1)[0]
    save_png(tmp_path / "a.png", picture, original)
    with Image.open(tmp_path / "a.png") as read:
        assert read.text["parameters"] == original.a1111_text()
        assert Parameters(**json.loads(read.text["dmm_jax"])) == original
        np.testing.assert_array_equal(np.asarray(read), picture)


def test_a_schedule_is_written_as_the_command_line_reads_it(tmp_path):
    schedule = [(1000, {"anime": 0.7, "ink": 0.3}), ((800, 400), "photo")]
    save_png(tmp_path / "a.png", pictures(1)[0], parameters(styles=schedule))
    with Image.open(tmp_path / "a.png") as read:
        assert 'Style: "anime=0.7,ink=0.3:800-400:photo"' in read.text["parameters"]
        assert parse_style(style_text(json.loads(read.text["dmm_jax"])["styles"])) == schedule
