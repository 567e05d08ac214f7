"""A gallery is written as it is drawn and can be continued; no prompt reaches a file name or the page's markup."""

import dataclasses
import io
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from dmm_jax.data.prompts import read_prompts
from dmm_jax.gallery import gallery, page
from dmm_jax.gallery.gallery_page import gallery_page
from dmm_jax.gallery.png import read_parameters, save_png
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError
from tests.gallery.pictures import HOSTILE, parameters, pictures

PROMPTS, OPTIONS = ["a large red circle", "a small blue star"], {"num_inference_steps": 2, "batch_size": 3}


def hostile_page():
    both = [parameters(prompt=HOSTILE, seed=5, styles=style, model=HOSTILE) for style in ("anime", "photo")]
    return gallery_page(["a.png", "b.png"], both, [HOSTILE], ["anime", "<b>photo</b>"])


def test_the_page_escapes_prompts_models_and_labels():
    text = hostile_page()
    assert "<script>alert" not in text and "<b>" not in text and text.count("<script>") == 1
    assert text.count(page.escape(parameters(prompt=HOSTILE, model=HOSTILE, seed=5).a1111_text())) == 1


def test_the_page_needs_no_network():
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", hostile_page())


def test_rows_have_at_most_eight_columns():
    many = [parameters()] * 20
    assert "--columns: 8" in gallery_page(["a.png"] * 20, many, ["p"], [f"s{k}" for k in range(20)])


@pytest.mark.parametrize("style", ["../../x", "a/b", None, {"a": 0.5, "b": 0.5}, "\\..", "日本", ""])
def test_no_prompt_or_style_leads_out_of_the_folder(style):
    (name,) = gallery.file_names("{prompt}_{style}_{seed}", [(HOSTILE, style, 7)], 1)
    assert re.fullmatch(r"[A-Za-z0-9_-]+\.png", name) and name.endswith("_7.png")
    assert len(name) < 2 * gallery.MAX_WORD_CHARS + 10


def test_the_fields_of_a_pattern_are_filled():
    names = gallery.file_names("{row}-{column} {style}", [("p", "ink", 0), ("p", "a=1", 0)], 2)
    assert names == ["0000-000 ink.png", "0000-001 a_1.png"]
    assert gallery.file_names(gallery.NAME, [("p", None, 3)], 1) == ["00000_seed3.png"]


@pytest.mark.parametrize(
    "pattern, message",
    [("{cfg}", "with the fields"), ("../{number}", "no '/'"), (".{number}", "file name"), ("{seed}", "one name")],
)
def test_a_pattern_that_cannot_name_the_files_is_refused(pattern, message):
    with pytest.raises(UserError, match=message):
        gallery.file_names(pattern, [("p", "a", 0), ("p", "b", 0)], 2)


def test_a_png_returns_its_parameters(tmp_path):
    (image,) = pictures(1)
    for style in ("ink", None, {"a": 0.5, "b": 0.5}):
        save_png(tmp_path / "a.png", image, parameters(styles=style))
        assert read_parameters(tmp_path / "a.png") == parameters(styles=style)
    Image.fromarray(image).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="Delete it"):
        read_parameters(tmp_path / "b.png")


def test_prompts_come_from_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO("a cat\n\n ein Bär \n".encode())))
    assert read_prompts("-") == ["a cat", "ein Bär"]


@pytest.fixture(scope="module")
def pipeline(trained):
    return Pipeline.from_pretrained(trained)


@pytest.fixture
def calls(monkeypatch):
    """The prompts of every batch that is drawn."""
    batches, draw = [], Pipeline.__call__

    def counting(self, prompts, *arguments, **options):
        batches.append(list(prompts))
        return draw(self, prompts, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", counting)
    return batches


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_gallery_continues_with_the_same_pictures(pipeline, tmp_path, calls):
    gallery.write_gallery(pipeline, tmp_path / "whole", PROMPTS, **OPTIONS)
    assert len(calls) == 2 and len(list((tmp_path / "whole").glob("*_seed*.png"))) == 4

    def interrupted(batches, total):
        yield next(iter(batches))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gallery.write_gallery(pipeline, tmp_path / "cut", PROMPTS, progress=interrupted, **OPTIONS)
    assert len(list((tmp_path / "cut").glob("*_seed*.png"))) == 3 and not (tmp_path / "cut" / "index.html").exists()
    gallery.write_gallery(pipeline, tmp_path / "cut", PROMPTS, **OPTIONS)
    assert len(calls) == 4 and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert [path.name for path in tmp_path.rglob("*.part*")] == []


def test_a_gallery_of_other_options_is_not_continued(pipeline, tmp_path):
    out = tmp_path / "out"
    gallery.write_gallery(pipeline, out, PROMPTS[:1], **OPTIONS)
    before = contents(out)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        gallery.write_gallery(pipeline, out, PROMPTS[:1], seed=1, **OPTIONS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        gallery.write_gallery(pipeline, tmp_path / "other", PROMPTS[:1], **OPTIONS)
    assert contents(out) == before


def test_the_parameters_in_the_files_draw_each_picture_again(pipeline, tmp_path):
    gallery.write_gallery(pipeline, tmp_path / "out", PROMPTS, seed=3, **OPTIONS)
    files = sorted((tmp_path / "out").glob("*_seed*.png"))
    jobs = [(picture.prompt, picture.styles, picture.seed) for picture in map(read_parameters, files)]
    assert jobs == [(prompt, style, 3 + row) for row, prompt in enumerate(PROMPTS) for style in pipeline.styles]
    for file in files:
        picture = read_parameters(file)
        repeated = pipeline(
            [picture.prompt],
            picture.negative_prompt,
            picture.styles,
            [picture.seed],
            height=picture.height,
            width=picture.width,
            num_inference_steps=picture.steps,
            guidance_scale=picture.guidance_scale,
            solver=picture.solver,
        )[0]
        assert np.abs(np.asarray(Image.open(file)).astype(int) - repeated.astype(int)).max() <= 1


@pytest.mark.parametrize(
    "styles, options, message",
    [
        (["lift"], {}, "did you mean 'left'"),
        ([], {"batch_size": 0}, "batch_size must be .* at least 1; got 0"),
        ([], {"solver": "dpm"}, "there is no solver"),
        ([], {"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ([], {"guidance_rescale": 2.0}, "guidance_rescale must be"),
        ([], {"seed": -2}, "a seed must be a whole number"),
        ([], {"height": 13}, "height must be a multiple"),
        ([], {"negative_prompt": "<lora:x:1>"}, "not supported"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_no_folder(pipeline, tmp_path, styles, options, message):
    with pytest.raises(UserError, match=message):
        gallery.write_gallery(pipeline, tmp_path / "out", PROMPTS, styles, **options)
    assert not (tmp_path / "out").exists()


def test_every_option_of_a_sheet_is_in_the_recipe(pipeline):
    sheet = gallery.Sheet(pipeline, PROMPTS, [])
    assert {field.name for field in dataclasses.fields(sheet)} - {"pipeline"} <= sheet.recipe().keys()
