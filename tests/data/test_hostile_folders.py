"""Damaged and hostile data folders and caches end well or in a UserError of one line; see tests/hostile.py."""

import contextlib
import io
import json
import random
import shutil
import struct
import tarfile

import numpy as np
from PIL import Image

from dmm_jax.data.cache import CacheHeader, LatentCache, partial_folder
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.data.captions import LISTS
from dmm_jax.data.fill_cache import encode_images
from dmm_jax.data.images import IMAGE_SUFFIXES
from dmm_jax.data.sources import FolderSource
from dmm_jax.runtime.errors import UserError
from tests import hostile

MODES = {
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    ".jpg": ("L", "RGB", "CMYK"),
    ".webp": ("RGB", "RGBA"),
    ".avif": ("RGB", "RGBA"),
    ".gif": ("1", "L", "P"),
    ".bmp": ("1", "L", "P", "RGB", "RGBA"),
    ".tif": ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16", "I;16B", "I", "F"),
}
TEXTS = ("a cat", "", "\ufeffa", "grün", "日本", "a\0b", "x" * 20_000, "\ud800", "\r\na\u2028b\n", "[" * 5000, '"')
VALUES = (
    None, True, -1, 0, 3, 2**70, 1.5, float("nan"), "", "x", "\ud800", "../x", [], [[]], [1, 2, 3], {}, [["a", "b"]],
)  # fmt: skip
NAMES = ("../x.png", "/etc/passwd", "a\0.png", "a" * 300, "\ud800", "", ".", "none.png", "0.png", 3, None)
HEADER = CacheHeader("", "", 8, 1.0, (2, 2, 3), 3, buckets=((8, 16),))


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """Returns some bytes changed, cut, repeated or replaced by noise."""
    data, kind = bytearray(data), rng.randrange(5)
    place = rng.randrange(len(data) + 1)
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        return rng.randbytes(rng.randrange(300))
    if kind == 2:
        return bytes(data[:place] + data[place // 2 : place] + data[place:])
    for _ in range(rng.choice((1, 3, 30)) if data else 0):
        data[rng.randrange(len(data) if kind == 3 else min(len(data), 64))] = rng.choice((0, 255, rng.randrange(256)))
    return bytes(data)


def _exif(rng: random.Random) -> bytes:
    """Returns EXIF with an orientation, and other tags of random types, counts and values."""
    order, tags = rng.choice("<>"), [(0x0112, 3, 1, rng.randrange(10) << 16)]
    tags += [(rng.choice((0x0100, 0x0112, 0x8769, rng.randrange(2**16))), rng.randrange(15), rng.choice((0, 1, 2**31)),
              rng.randrange(2**32)) for _ in range(rng.randrange(4))]  # fmt: skip
    rng.shuffle(tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    data = head + b"".join(struct.pack(order + "HHII", *tag) for tag in tags) + b"\0" * 4
    return b"Exif\0\0" + (_damaged(rng, data) if rng.random() < 0.3 else data)


def _image(rng: random.Random) -> bytes:
    """Returns an image file of a random format, mode and size, often damaged."""
    suffix, file = rng.choice(list(MODES)), io.BytesIO()
    size = rng.choice([(rng.randrange(2, 40), rng.randrange(2, 40))] * 20 + [(1, 5000), (2000, 3)])
    image = Image.new("RGB", size, tuple(rng.randbytes(3)))
    mode = rng.choice(MODES[suffix])
    with contextlib.suppress(ValueError):
        image = Image.new(mode, size, rng.randrange(2)) if mode in ("I;16B", "RGBX", "LAB") else image.convert(mode)
    options = {"exif": _exif(rng)} if rng.random() < 0.5 and suffix in (".png", ".jpg", ".webp") else {}
    if rng.random() < 0.2 and suffix == ".png" and mode in ("L", "P", "I;16"):
        options["transparency"] = rng.randrange(256)
    image.save(file, Image.registered_extensions()[suffix], **options)
    return _damaged(rng, file.getvalue()) if rng.random() < 0.4 else file.getvalue()


def _text(rng: random.Random) -> bytes:
    text = rng.choice(TEXTS) if rng.random() < 0.5 else "a red circle"
    encoding = rng.choice(("utf-8",) * 4 + ("utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252", "cp932", "utf-7"))
    return text.encode(encoding, "surrogatepass" if encoding in ("utf-8", "utf-8-sig") else "ignore")


def _listing(rng: random.Random) -> bytes:
    """Returns lines of JSON, some of wrong types, names or characters; sometimes something else."""
    rows = []
    for number in range(rng.randrange(1, 5)):
        row = {
            rng.choice(("file", "file_name", "image")): f"{number % 2}.png",
            rng.choice(("caption", "text")): "a circle",
        }
        if rng.random() < 0.15:
            row[rng.choice(list(row))] = rng.choice((*VALUES, *NAMES, *TEXTS))
        rows.append(json.dumps(row, ensure_ascii=rng.random() < 0.7))
    if rng.random() < 0.1:
        rows.insert(
            rng.randrange(len(rows)), rng.choice(("", "null", "[" * 50_000, "9" * 9000, "{", '{"file": 1e999}'))
        )
    encoding = rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16"))
    data = "\n".join(rows).encode(encoding, "surrogatepass")
    return _damaged(rng, data) if rng.random() < 0.2 else data


def _write_folder(rng: random.Random, folder) -> None:
    """Writes a few images with captions of one form, some of them spoilt."""
    folder.mkdir(parents=True)
    files = {}
    for number in range(3):
        suffix = ".png" if number < 2 else rng.choice((*IMAGE_SUFFIXES, ".PNG", ".heic", ".eps", ""))
        files[f"{number}{suffix}"] = _image(rng)
        files[f"{number}{rng.choice(('.txt', '.txt', '.caption', '.TXT'))}"] = _text(rng)
    if rng.random() < 0.2:
        files[rng.choice(("._0.png", "0.caption", ".DS_Store", "gr\udcfcn.txt", "sub.png", "0.txt"))] = _text(rng)
    form = rng.choice(("side files", "list", "list", "tar"))
    if form == "tar":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(rng.choice((name,) * 9 + ("../x.png", "/x.txt", "a/" * 90 + name)))
                if rng.random() < 0.1:
                    info.type, info.linkname = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)), "0.png"
                else:
                    info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        files = {"0.tar": (folder / "0.tar").read_bytes()}
        if rng.random() < 0.4:
            files["0.tar"] = _damaged(rng, files["0.tar"])
    elif form == "list":
        name = rng.choice((LISTS[0],) * 9 + LISTS)
        files[name] = _listing(rng) if name.endswith("jsonl") else b"file,caption\n0.png,a\n" + rng.randbytes(9)
    for name, data in files.items():
        (folder / name).write_bytes(data)
        if rng.random() < 0.04:
            hostile.replace_by_special(rng, folder / name)


def _prepare(folder, cache) -> None:
    """Fills a cache as `dmm-jax prepare` does, with simple functions for VAE and tokenizer, and reads it."""
    encode_images(
        FolderSource(folder),
        lambda images, keys: images[:, ::4, ::4] / 255.0,
        lambda texts: np.array([[len(text.encode()) % 2**16] * 3 for text in texts]),
        cache,
        2,
        sizes=((8, 8), (16, 8), (8, 16)),
        scaling_factor=1.0,
        vae="",
        tokenizer="",
        num_threads=2,
    )
    _read(cache)


def _read(folder) -> None:
    cache = LatentCache(folder)
    assert all(np.isfinite(cache[index]["latents"]).all() for index in range(len(cache)))


def _damage_cache(rng: random.Random, folder) -> None:
    """Spoils a header field, or one of the files."""
    path = rng.choice(sorted(folder.iterdir()))
    if rng.random() < 0.5:
        header = json.loads((folder / "cache.json").read_text())
        if header["shards"] and rng.random() < 0.2:
            header["shards"][0][rng.randrange(2)] = rng.choice((*VALUES, 2**40, "latents-00001.array_record"))
        else:
            header[rng.choice(list(header))] = rng.choice(VALUES)
        (folder / "cache.json").write_text(json.dumps(header))
    elif rng.random() < 0.2:
        hostile.replace_by_special(rng, path)
    else:
        path.write_bytes(_damaged(rng, path.read_bytes()))


def _write_cache(folder) -> None:
    """Writes two shards of two records, of one bucket each; continues an interrupted cache."""
    writer = CacheWriter(folder, HEADER)
    for bucket in (number for number in range(2) if not writer.is_complete(number)):
        latents = np.ones((2, *writer.header.shape_of(bucket)), np.float32)
        with writer.shard(bucket) as shard:
            shard.add(latents, np.ones((2, 3), np.int32), np.ones((2, 4), np.int32), range(2), bucket)
    writer.finish(2)


def test_hostile_data_folders_end_well_or_in_one_line(tmp_path):
    def case(rng, folder):
        _write_folder(rng, folder)
        try:
            _prepare(folder, folder.with_name("cache"))
        except UserError as error:
            assert "\n" not in str(error) and str(folder.parent) in str(error), error
            raise
        return True

    hostile.run(case, tmp_path, default=30)


def test_hostile_caches_end_well_or_in_one_line(tmp_path):
    _write_cache(tmp_path / "whole")

    def case(rng, folder):
        shutil.copytree(tmp_path / "whole", folder)
        interrupted = rng.random() < 0.3
        if interrupted:
            header = json.loads((folder / "cache.json").read_text()) | {"count": 0, "shards": []}
            (folder / "cache.json").write_text(json.dumps(header))
            rng.choice(sorted(folder.glob("latents-*.json"))).unlink()
        _damage_cache(rng, folder)
        try:
            if interrupted:
                folder.rename(partial_folder(folder))
                _write_cache(folder)
            _read(folder)
        except UserError as error:
            assert str(folder.parent) in str(error), error
            raise
        return True

    hostile.run(case, tmp_path, default=30)
