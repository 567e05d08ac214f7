"""Laws of the sources of images with captions."""

import csv
import gzip
import io
import json
import os
import pathlib
import sys
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from dmm_jax.data import captions
from dmm_jax.data.files import IGNORED
from dmm_jax.data.sources import FolderSource
from dmm_jax.runtime.errors import UserError
from dmm_jax.world.scenes import parse_all
from dmm_jax.world.source import ShapesSource
from dmm_jax.world.styles import STYLES


def _image(path, value=0, size=(6, 4)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 0)).save(path)


def _listing(folder, *rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(text, encoding="utf-8")


def test_a_listing_gives_files_and_captions_in_its_order(tmp_path):
    _image(tmp_path / "b.png", 7)
    _image(tmp_path / "deep" / "a.png", 9)
    _listing(tmp_path, {"file": "b.png", "caption": "bé"}, "", {"file": "deep/a.png", "caption": "a", "more": 1})
    source = FolderSource(tmp_path)
    assert [(source[i]["caption"], source[i]["image"][0, 0, 0], source[i]["id"]) for i in range(len(source))] == [
        ("bé", 7, 0),
        ("a", 9, 1),
    ]
    assert source[0]["image"].shape == (4, 6, 3)
    assert FolderSource(tmp_path, resolution=8)[0]["image"].shape == (8, 8, 3)


def _captions(source):
    return [(file.name, caption) for file, caption in source.rows]


@pytest.mark.parametrize("names", [("file_name", "text"), ("image", "caption"), ("file", "text")])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_list_in_any_form_gives_the_same_rows(tmp_path, kind, names):
    _image(tmp_path / "a.png")
    rows = [{names[0]: "a.png", names[1]: 'red, "round"', "width": 6}, {names[0]: "./a.png", names[1]: "b", "width": 6}]
    path = tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-16" if kind == "csv" else "utf-8-sig") as file:
            if kind == "csv":
                (writer := csv.DictWriter(file, rows[0])).writeheader()
                writer.writerows(rows)
            else:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    source = FolderSource(tmp_path)
    assert _captions(source) == [("a.png", 'red, "round"'), ("a.png", "b")] and source.unused.lines() == []


def test_side_files_caption_their_image(tmp_path):
    for name in ("b.png", "sub/a.JPG", "c.tiff", "both.webp"):
        _image(tmp_path / name)
    (tmp_path / "b.txt").write_text("\ufeff\ufefftall b\n", encoding="utf-8")
    (tmp_path / "sub" / "a.TXT").write_text("small a", encoding="utf-16")
    (tmp_path / "c.caption").write_text("c")
    (tmp_path / "both.caption").write_text("same")
    (tmp_path / "both.txt").write_text("same\n")
    source = FolderSource(tmp_path)
    assert _captions(source) == [("b.png", "tall b"), ("both.webp", "same"), ("c.tiff", "c"), ("sub/a.JPG", "small a")]
    assert source.unused.lines() == []
    (tmp_path / "both.txt").write_text("other")
    with pytest.raises(UserError, match="both.caption and both.txt differ"):
        FolderSource(tmp_path)


def test_every_unused_file_is_counted_by_reason(tmp_path):
    _image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a")
    _image(tmp_path / "no.gif")
    for name in ("notes.txt", "b.heic", "._a.png", "Thumbs.db", ".DS_Store"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "host.txt").symlink_to("/etc/hostname")
    os.mkfifo(tmp_path / "pipe.png")
    source = FolderSource(tmp_path)
    assert _captions(source) == [("a.png", "a")]
    assert source.unused.counts == {
        "image without a caption": 1, "text without an image": 1, "files ending in '.heic'": 1, IGNORED: 3,
        "not a regular file": 3, "link to a folder": 1, "link to a file outside the folder": 1,
    }  # fmt: skip
    assert "        1 not used: files ending in '.heic', for example 'b.heic'" in source.unused.lines()
    _listing(tmp_path, {"file": "no.gif", "caption": "x"})
    assert FolderSource(tmp_path).unused.counts["not in captions.jsonl"] == 4


def test_a_folder_of_a_thousand_levels_is_listed(tmp_path, monkeypatch):
    """Python's recursion ends at a thousand levels, and a path of the system at 4,096 bytes."""
    monkeypatch.chdir(tmp_path)
    names = ["d"] * 1100 + ["d" * 200] * 20
    for name in names:
        os.mkdir(name)
        os.chdir(name)
        if name == "d":
            last = pathlib.Path.cwd()
    _image(last / "a.png")
    (last / "a.txt").write_text("deep")
    try:
        source = FolderSource(tmp_path)
        rows = _captions(source)
    finally:
        (last / "a.png").unlink(), (last / "a.txt").unlink()
        for name in reversed(names):  # shutil.rmtree calls itself for every level.
            os.chdir("..")
            os.rmdir(name)
    assert [caption for _, caption in rows] == ["deep"]
    assert source.unused.counts == {"not a regular file": 1}


def _tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            info.size = len(data or b"")
            tar.addfile(info, io.BytesIO(data or b""))


def test_tar_files_are_read_where_they_are(tmp_path):
    _image(tmp_path / "red.png", 200)
    image = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").unlink()
    for shard in ("00001", "00000"):
        members = [("1.png", image), ("1.json", b"{}"), ("1.txt", f"one of {shard}".encode()), ("2.png", image),
                   ("../3.png", image), ("/3.txt", b"x"), ("4.png", None), ("a" * 2000, b"")]  # fmt: skip
        _tar(tmp_path / f"{shard}.tar", members)
    (tmp_path / "00000_stats.json").write_text("{}")
    source = FolderSource(tmp_path)
    assert _captions(source) == [(f"{shard}.tar/1.png", f"one of {shard}") for shard in ("00000", "00001")]
    assert source[1]["image"][0, 0].tolist() == [200, 0, 0]
    assert source.unused.counts == {
        "image without a caption": 2, "files ending in '.json'": 1, "tar member outside the tar's root": 4,
        "tar member that is not a regular file": 2, "tar member with an overlong name": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    "damage", [lambda data: data[:700], lambda data: data[:1024] + b"x" + data[1025:], gzip.compress]
)
def test_damaged_tar_files_are_refused(tmp_path, damage):
    path = tmp_path / "a.tar"
    _tar(path, [("1.txt", b"one"), ("1.png", b"x" * 900)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="a.tar is damaged or compressed"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", ["../outside.png", "link.png", "/etc/hostname", "linked/outside.png"])
def test_captions_cannot_lead_out_of_the_folder(tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    _image(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    _listing(folder, {"file": name, "caption": "x"})
    with pytest.raises(ValueError, match="outside"):
        FolderSource(folder)


def test_side_files_cannot_lead_out_of_the_folder(tmp_path):
    folder = tmp_path / "folder"
    _image(folder / "a.png")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "a.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(ValueError, match="outside"):
        FolderSource(folder)


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", "line 1: not JSON"),
        ({"file": "a.png"}, "line 1: expected"),
        ({"file": "a.png", "caption": None}, "line 1: expected"),
        ("[1, 2]", "line 1: expected"),
        ({"file": "b.png", "caption": "x"}, "does not exist"),
        ({"file": "a.png", "caption": "x" * captions.MAX_LINE_CHARS}, "characters"),
        ("", "no captioned images"),
        ('{"file": "a.png", "caption": "\\ud800"}', "line 1: the caption is not valid Unicode"),
        ("[" * 90_000, "line 1: not JSON"),
        ({"file": "a.png", "caption": "x" * (captions.MAX_CAPTION_CHARS + 1)}, "line 1: a caption of more than 10000"),
        ({"file": "a\0.png", "caption": "x"}, "does not exist"),
        ({"file": "\ud800" + "x" * 999, "caption": "x"}, "does not exist"),
        ({"file": "loop.png", "caption": "x"}, "does not exist"),
    ],
)
def test_errors_in_a_listing_name_the_line(tmp_path, row, message):
    _image(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    _listing(tmp_path, row)
    with pytest.raises(ValueError, match=message):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "captions.jsonl"])
@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "utf-16 cut"])
def test_captions_of_other_encodings_are_refused(tmp_path, name, encoding):
    _image(tmp_path / "a.png")
    text = '{"file": "a.png", "caption": "' + ("日本" if encoding == "cp932" else "grün") + '"}'
    data = text.encode("utf-16")[:-1] if encoding == "utf-16 cut" else b"\n" + text.encode(encoding)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}, line {1 if encoding == 'utf-16 cut' else 2}: not UTF-8"):
        FolderSource(tmp_path)


@pytest.mark.parametrize("name", captions.LISTS)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "link in a circle"])
def test_a_list_that_is_no_regular_file_is_refused(tmp_path, name, kind):
    path = tmp_path / name
    make = {"fifo": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}
    make.get(kind, lambda: path.symlink_to(name))()
    with pytest.raises(UserError, match=f"{name} is missing or not a regular file"):
        FolderSource(tmp_path)


def test_a_parquet_list_names_the_package_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="metadata.parquet needs the package pyarrow: pip install pyarrow"):
        FolderSource(tmp_path)


def test_two_lists_and_long_side_files_are_refused(tmp_path):
    _image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"x" * 10**6)
    with pytest.raises(UserError, match="a.txt: a caption of more than 10000 characters"):
        FolderSource(tmp_path)
    for name in ("metadata.csv", "captions.jsonl"):
        (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="captions.jsonl and metadata.csv. Keep one"):
        FolderSource(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        FolderSource(tmp_path / "none")


def test_a_folders_digest_depends_on_captions_and_files(tmp_path):
    _image(tmp_path / "a.png")
    digests = []
    for caption in ("x", "y", "x"):
        _listing(tmp_path, {"file": "a.png", "caption": caption})
        digests.append(FolderSource(tmp_path).digest)
    _image(tmp_path / "a.png", size=(50, 50))
    digests.append(FolderSource(tmp_path).digest)
    assert digests[0] == digests[2] and len(set(digests)) == 3


def test_pictures_match_their_captions_in_any_reading_order():
    source = ShapesSource(70, style="comic", seed=3)
    assert len(source) == 70
    late, early = source[69], source[2]
    content = parse_all([early["caption"]])
    np.testing.assert_array_equal(content.shape_ids[0], source.scenes.content.shape_ids[2])
    second = ShapesSource(70, style="comic", seed=3)
    np.testing.assert_array_equal(second[2]["image"], early["image"])
    np.testing.assert_array_equal(second[69]["image"], late["image"])
    assert early["image"].dtype == np.uint8 and early["image"].shape == (64, 64, 3) and early["id"] == 2
    sky = np.round(np.array(STYLES["comic"].background) * 255)
    np.testing.assert_array_equal(early["image"][0, 0], sky)
    with pytest.raises(IndexError):
        source[70]


def test_the_shuffled_world_holds_the_same_pictures_in_another_order():
    """The first ids are those that TensorFlow Datasets 4.9.10 gives a split of 24 examples."""
    plain, shuffled = ShapesSource(24, seed=2), ShapesSource(24, seed=2, shuffled=True)
    examples = [shuffled[index] for index in range(24)]
    assert [example["id"] for example in examples[:8]] == [6, 16, 19, 12, 14, 18, 5, 13]
    assert sorted(example["id"] for example in examples) == list(range(24)) and shuffled.digest == plain.digest
    for example in examples:
        assert example["caption"] == plain[example["id"]]["caption"]
        np.testing.assert_array_equal(example["image"], plain[example["id"]]["image"])


def test_the_worlds_digest_depends_on_seed_and_style():
    digests = {ShapesSource(4, style, seed).digest for style in (None, "comic", "ink") for seed in (0, 1)}
    assert len(digests) == 6
    assert ShapesSource(4, "ink", 1).digest in digests


@pytest.mark.parametrize("arguments", [(0,), (4, "no such style")])
def test_the_world_refuses_unknown_styles_and_an_empty_count(arguments):
    with pytest.raises(ValueError, match="got"):
        ShapesSource(*arguments)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "side files", "tar"])
def test_a_condition_keeps_rows_by_their_columns(tmp_path, kind):
    rows = [{"file_name": f"{k}.png", "text": str(k), "aesthetic": 5.0 + k / 2, "nsfw": "UNLIKELY"} for k in range(4)]
    rows[3]["nsfw"] = "LIKELY"
    for row in rows:
        _image(tmp_path / row["file_name"])
    path = tmp_path / f"metadata.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            (writer := csv.DictWriter(file, rows[0])).writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for number, row in enumerate(rows):
            (tmp_path / f"{number}.txt").write_text(row["text"])
            (tmp_path / f"{number}.json").write_text(json.dumps(row))
    if kind == "tar":
        files = [path for path in sorted(tmp_path.iterdir()) if path.suffix != ".parquet"]
        with tarfile.open(tmp_path / "0.tar", "w") as archive:
            for file in files:
                archive.add(file, file.name)
                file.unlink()
    source = FolderSource(tmp_path, where="aesthetic > 5.4 and nsfw == 'UNLIKELY'")
    assert [caption for _, caption in source.rows] == ["1", "2"]
    assert source.unused.counts == {"not aesthetic > 5.4": 1, "not nsfw == 'UNLIKELY'": 1}
    assert len(FolderSource(tmp_path)) == 4 and FolderSource(tmp_path).unused.lines() == []


@pytest.mark.parametrize("text", ["aesthetic", "aesthetic > six", "a > 1 or b > 2", "a = 1", "__import__('os')", "and"])
def test_a_condition_that_cannot_be_read_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="data.where cannot be read at .*COLUMN > NUMBER"):
        FolderSource(tmp_path, where=text)


def test_rows_without_a_column_of_the_condition_are_counted(tmp_path):
    _image(tmp_path / "a.png")
    _listing(tmp_path, {"file": "a.png", "caption": "a"})
    with pytest.raises(UserError, match="without a number 'aesthetic', for example 'a.png'"):
        FolderSource(tmp_path, where="aesthetic > 6")


def test_journeydb_prefers_the_described_caption_and_bears_lost_parts(tmp_path):
    for name in ("000/a.jpg", "000/b.jpg"):
        _image(tmp_path / name)
    rows = [
        {"img_path": "./000/a.jpg", "prompt": "raw --ar 2:3", "Task2": {"Caption": "A red circle."}, "Task3": {}},
        {"img_path": "./000/b.png", "prompt": "a star", "Task2": {"Caption": None}},
        {"img_path": "./001/c.jpg", "prompt": "not downloaded", "Task2": None},
    ]
    (tmp_path / "train_anno_realease_repath.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FolderSource(tmp_path)
    assert _captions(source) == [("000/a.jpg", "A red circle."), ("000/b.jpg", "a star")]
    assert source.unused.counts == {"in train_anno_realease_repath.jsonl, but not in the folder": 1}


def _data_set(path, rows, **columns):
    """Writes a table as `datasets.Dataset.save_to_disk` does: an Arrow stream."""
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(rows, image), **columns})
    with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
        for first in range(0, len(rows), 2):
            writer.write_table(table.slice(first, 2))


def _png(value):
    Image.new("RGB", (6, 4), (value, 0, 0)).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def test_a_data_set_on_disk_is_read_at_its_place(tmp_path):
    rows = [{"bytes": _png(10 * k), "path": f"{k}.png"} for k in range(5)] + [{"bytes": None, "path": "/elsewhere.png"}]
    texts = {"text": [f"caption {k}" for k in range(6)], "score": [0.5, 0.9, 0.9, 0.9, 0.9, 0.9]}
    _data_set(tmp_path / "data-00000-of-00001.arrow", rows, **texts)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    source = FolderSource(tmp_path, where="score > 0.6")
    assert [(source[k]["image"][0, 0, 0], source[k]["caption"]) for k in range(4)] == [
        (10 * k, f"caption {k}") for k in (1, 2, 3, 4)
    ]
    assert source.unused.counts == {"row without an image in the file": 1, "not score > 0.6": 1}


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "is not an Arrow file of images"),
        (lambda path: path.write_bytes(b"x" * 500), "is not an Arrow file of images"),
        (lambda path: _data_set(path, [{"bytes": b"", "path": ""}], label=["a"]), "has the columns image, label"),
        (lambda path: path.unlink() or os.mkfifo(path), "no captioned images|not a regular file"),
    ],
)
def test_a_damaged_data_set_is_refused(tmp_path, damage, message):
    path = tmp_path / "data-00000-of-00001.arrow"
    _data_set(path, [{"bytes": _png(0), "path": "0.png"}], text=["a"])
    damage(path)
    with pytest.raises(UserError, match=message):
        FolderSource(tmp_path, where="")
