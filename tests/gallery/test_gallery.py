"""A gallery is written whole or not at all, and no prompt reaches a file name or the page's markup."""

import re

import pytest

from dmm_jax.gallery import gallery, page
from tests.gallery.pictures import HOSTILE, parameters, pictures


def write(out):
    both = [parameters(prompt=HOSTILE, seed=5, styles=style, model=HOSTILE) for style in ("anime", "photo")]
    return gallery.write_gallery(out, pictures(2), both, [HOSTILE], ["anime", "<b>photo</b>"])


def test_files_are_named_by_number_and_seed_only(tmp_path):
    write(tmp_path / "out")
    names = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert names == [f"out/{name}" for name in ("00000_seed5.png", "00001_seed5.png", "grid.png", "index.html")]


def test_the_page_escapes_prompts_models_and_labels(tmp_path):
    text = write(tmp_path / "out").read_text()
    assert "<script" not in text and "<b>" not in text
    assert text.count(page.escape(parameters(prompt=HOSTILE, model=HOSTILE, seed=5).a1111_text())) == 1


def test_the_page_needs_no_network(tmp_path):
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", write(tmp_path / "out").read_text())


def test_a_failure_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, "_body", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_gallery_is_never_overwritten(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ValueError, match="not empty"):
        write(tmp_path / "out")


def test_numbers_that_differ_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got 3 pictures"):
        gallery.write_gallery(tmp_path / "out", pictures(3), [parameters()] * 2, ["r"], ["a", "b"])
