"""Pictures on disk carry their parameters, and nothing a prompt says can reach a file name or a page's markup."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from dmm_jax.config.styles import parse_style, style_text
from dmm_jax.gallery import images, page

HOSTILE = "<script>alert(\"x\")</script> ../../etc/passwd & 'q'"


def parameters(**changes):
    values = {
        "prompt": "a red circle, (large:1.2)",
        "negative_prompt": "blurry",
        "seed": 1,
        "steps": 25,
        "solver": "dpmpp_2m_karras",
        "guidance_scale": 7.0,
        "width": 512,
        "height": 512,
        "model": "name",
        "model_hash": "abcdef1234",
        "styles": "anime",
    }
    return images.Parameters(**values | changes)


def pictures(count, height=16, width=16):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_text_is_laid_out_as_automatic1111_writes_it():
    assert parameters().a1111_text() == (
        "a red circle, (large:1.2)\nNegative prompt: blurry\nSteps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7, "
        "Seed: 1, Size: 512x512, Model hash: abcdef1234, Model: name, Style: anime"
    )


def test_text_without_negative_prompt_and_style_leaves_them_out():
    text = parameters(negative_prompt="", styles=None).a1111_text()
    assert "Negative" not in text and "Style" not in text


def test_values_survive_the_web_uis_own_reader():
    text = parameters(styles={"anime": 0.7, "photo": 0.3}, model='odd, "name": 1', guidance_scale=7.5).a1111_text()
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', text.splitlines()[-1])
    found = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    assert found["Style"] == "anime=0.7,photo=0.3"
    assert found["Model"] == 'odd, "name": 1'
    assert found["CFG scale"] == "7.5"
    assert list(found) == ["Steps", "Sampler", "CFG scale", "Seed", "Size", "Model hash", "Model", "Style"]


@pytest.mark.parametrize(
    "solver, name",
    [("ddim", "DDIM"), ("euler", "Euler"), ("euler_ancestral_karras", "Euler a Karras"), ("heun", "Heun")],
)
def test_solvers_have_the_web_uis_names(solver, name):
    assert images.sampler_name(solver) == name


def test_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match="magic"):
        parameters(solver="magic").a1111_text()


@pytest.mark.parametrize("prompt", [HOSTILE, "une forêt", "赤い円 🙂", "two\nlines"])
def test_parameters_round_trip_through_the_png(tmp_path, prompt):
    told, picture = parameters(prompt=prompt, styles={"anime": 0.7, "photo": 0.3}), pictures(1)[0]
    images.save_png(tmp_path / "a.png", picture, told)
    with Image.open(tmp_path / "a.png") as read:
        assert read.text["parameters"] == told.a1111_text()
        assert images.Parameters(**json.loads(read.text["dmm_jax"])) == told
        np.testing.assert_array_equal(np.asarray(read), picture)


def test_a_schedule_is_written_as_the_command_line_reads_it(tmp_path):
    schedule = [(1000, {"anime": 0.7, "ink": 0.3}), ((800, 400), "photo")]
    images.save_png(tmp_path / "a.png", pictures(1)[0], parameters(styles=schedule))
    with Image.open(tmp_path / "a.png") as read:
        assert 'Style: "anime=0.7,ink=0.3:800-400:photo"' in read.text["parameters"]
        assert parse_style(style_text(json.loads(read.text["dmm_jax"])["styles"])) == schedule


def test_grid_shows_every_picture_in_its_place():
    # Flat colours, so that each can be looked up after enlargement.
    colours = pictures(6, 1, 1).reshape(2, 3, 1, 1, 3)
    grid = np.asarray(images.labelled_grid(np.tile(colours, (1, 1, 8, 8, 1)), ["", ""], ["a", "b", "c"]))
    places = [[np.argwhere((grid == colour.ravel()).all(-1)).mean(0) for colour in row] for row in colours]
    assert places[0][0][1] < places[0][1][1] < places[0][2][1]
    assert places[0][0][0] == places[0][2][0] < places[1][0][0]


def test_grid_keeps_large_pictures_pixel_for_pixel():
    picture = pictures(1, 200, 170)
    grid = np.asarray(images.labelled_grid(picture[None], ["row"], ["column"]))
    height, width = grid.shape[:2]
    found = [(y, x) for y in range(height - 199) for x in range(width - 169) if (grid[y, x] == picture[0, 0, 0]).all()]
    assert any((grid[y : y + 200, x : x + 170] == picture[0]).all() for y, x in found)


def test_grid_is_scaled_down_to_the_size_limit(monkeypatch):
    monkeypatch.setattr(images, "MAX_GRID_PIXELS", 50_000)
    grid = images.labelled_grid(pictures(12, 90, 60).reshape(3, 4, 90, 60, 3), ["r"] * 3, ["c"] * 4)
    assert 40_000 < grid.width * grid.height <= 50_000


def test_size_limit_is_what_pillow_opens_without_complaint_of_a_bomb():
    assert images.MAX_GRID_PIXELS <= min(200_000_000, 2 * Image.MAX_IMAGE_PIXELS)


@pytest.mark.parametrize("text", ["a " * 200, "x" * 500, "short", ""])
def test_labels_never_pass_their_box(text):
    lines = images._wrapped(text, 80, 3, lambda one: 7 * len(one))
    assert len(lines) <= 3 and all(7 * len(line) <= 80 for line in lines)
    assert "".join(lines).endswith("…") == (len(text) > 100)


def test_grid_refuses_labels_that_do_not_match():
    with pytest.raises(ValueError, match="3 column labels"):
        images.labelled_grid(pictures(2).reshape(1, 2, 16, 16, 3), ["r"], ["a", "b", "c"])


def gallery(out, prompt=HOSTILE):
    told = [parameters(prompt=prompt, seed=5, styles=style, model=HOSTILE) for style in ("anime", "photo")]
    return images.write_gallery(out, pictures(2), told, [prompt], ["anime", "<b>photo</b>"])


def test_gallery_names_files_by_number_and_seed_only(tmp_path):
    gallery(tmp_path / "out")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == [f"out/{name}" for name in ("00000_seed5.png", "00001_seed5.png", "grid.png", "index.html")]


def test_gallery_page_escapes_prompts_models_and_labels(tmp_path):
    text = gallery(tmp_path / "out").read_text()
    assert "<script" not in text and "<b>" not in text
    assert text.count(page.escape(parameters(prompt=HOSTILE, model=HOSTILE, seed=5).a1111_text())) == 1


def test_gallery_asks_nothing_of_the_network(tmp_path):
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", gallery(tmp_path / "out").read_text())


def test_a_gallery_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "_gallery_body", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gallery(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_gallery_never_overwrites(tmp_path):
    gallery(tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):
        gallery(tmp_path / "out")


def test_gallery_refuses_counts_that_differ(tmp_path):
    with pytest.raises(ValueError, match="got 3 pictures"):
        images.write_gallery(tmp_path / "out", pictures(3), [parameters()] * 2, ["r"], ["a", "b"])
