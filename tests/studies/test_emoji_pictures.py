"""The drawn emoji: an ordinary folder of captioned pictures, with splits by concept."""

import json

import numpy as np
import pytest

from dmm_jax.data.sources import FolderSource
from dmm_jax.runtime.errors import UserError
from dmm_jax.studies import emoji_pictures, emoji_sets
from dmm_jax.studies.emoji_sets import Icon
from tests.studies import emoji_packages

pytest.importorskip("resvg_py", reason="launch/requirements-test.txt installs it")


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """A folder with the pictures of the stand-in sets, and the sets."""
    folder = tmp_path_factory.mktemp("emoji")
    sets, names = emoji_packages.write_packages(folder / "packages")
    emoji_pictures.fetch(folder, sets, names)
    return folder, sets


def test_prepare_reads_the_folder_and_chooses_by_split_and_set(fetched):
    folder, _ = fetched
    rows = emoji_pictures.read_rows(folder)
    source = FolderSource(folder / "pictures")
    assert len(source) == len(rows) == 2 * (10 + 10 + 9) and not source.unused.counts
    assert source[0]["image"].shape == (64, 64, 3) and source[0]["caption"] == "red apple"
    chosen = FolderSource(folder / "pictures", where="split == 'train' and set == 'square'")
    expected = [row["caption"] for row in rows if row["split"] == "train" and row["set"] == "square"]
    assert [caption for _, caption in chosen.rows] == expected and len(expected) == 16


def test_a_held_out_concept_is_held_out_of_every_set(fetched):
    rows = emoji_pictures.read_rows(fetched[0])
    by_concept = {}
    for row in rows:
        by_concept.setdefault(row["concept"], set()).add(row["split"] == "train")
    assert {len(kinds) for kinds in by_concept.values()} == {1}
    assert sum(kinds == {False} for kinds in by_concept.values()) == 2
    assert {row["split"] for row in rows if row["set"] != emoji_pictures.WITNESS} == {"train", "held-out"}


def test_only_the_witness_shows_held_out_concepts_to_the_base():
    concept = next(c for c in (emoji_sets.Concept(f"{k:x}", "", "") for k in range(99)) if c.is_held_out)
    splits = [emoji_pictures.split_of(name, concept) for name in emoji_sets.SETS]
    assert splits == ["witness", *["held-out"] * 6]


def test_the_caption_names_the_colour_behind_the_drawing(fetched):
    rows = emoji_pictures.read_rows(fetched[0])
    source = FolderSource(fetched[0] / "pictures")
    for number in (0, 1, 20, 21, 40, 41):
        words, corner = rows[number]["caption"].split(" on pale "), source[number]["image"][-1, -1]
        expected = emoji_pictures.PALE_COLOURS[words[1]] if len(words) > 1 else (255, 255, 255)
        assert tuple(corner) == expected and len(words) == 1 + number % 2


def test_a_mirrored_icon_is_the_mirror_image():
    icon = Icon('<path d="M2 3h9v20h-9z"/>', 32, 32)
    plain, mirrored = (np.asarray(emoji_pictures.rasterise(it)) for it in (icon, icon._replace(mirrored=True)))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    assert plain[30, 10, 3] == 255 and plain[30, 50, 3] == 0


def test_icons_that_read_files_or_are_not_svg_are_refused():
    for body, reason in (('<image href="/etc/passwd"/>', "not read"), ("<path", "cannot be drawn")):
        with pytest.raises(UserError, match=reason):
            emoji_pictures.rasterise(Icon(body, 32, 32))


def test_the_table_counts_what_each_set_has_and_lacks(fetched):
    folder, sets = fetched
    lines = emoji_pictures.counts(folder, sets).splitlines()
    assert lines[2] == "| round | MIT | who draws @test/round | 10 | 8 | 2 | 0 |"
    assert lines[4:] == [
        "| outline | MIT | who draws @test/outline | 9 | 7 | 2 | 1 |",
        "| every set has |  |  | 9 | 7 | 2 | 1 |",
        "| any set has |  |  | 10 | 8 | 2 | 0 |",
    ]
    assert emoji_pictures.lacking(folder, "outline") == ["broom"]


def test_an_icon_that_cannot_be_drawn_leaves_no_pictures(tmp_path):
    sets, names = emoji_packages.write_packages(tmp_path / "packages")
    contents = emoji_packages.contents_of("round")
    contents["icons.json"]["icons"]["owl"]["body"] = "<path"
    sets["round"] = emoji_packages.write_package(tmp_path / "packages", "@test/round", contents)
    with pytest.raises(UserError, match="cannot be drawn"):
        emoji_pictures.fetch(tmp_path, sets, names)
    assert [path.name for path in tmp_path.iterdir()] == ["packages"]


def test_drawn_twice_is_the_same_to_the_byte(fetched, tmp_path):
    sets, names = emoji_packages.write_packages(tmp_path / "packages")
    second = emoji_pictures.fetch(tmp_path, sets, names)
    for path in (second / "captions.jsonl", second / "round" / "1f60c.webp", second / "square" / "1f60d_pale.webp"):
        assert path.read_bytes() == (fetched[0] / "pictures" / path.relative_to(second)).read_bytes()
    assert json.loads((second / "captions.jsonl").read_text().splitlines()[0])["concept"] == "1f60c"
