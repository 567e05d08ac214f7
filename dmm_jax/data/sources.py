"""Random access sources of images with captions: a folder, and the embedded world.

Every source has `len`, `source[i] -> {"image": uint8 (H, W, 3), "caption": str, "id": int}` and a `digest` that
changes when its contents do.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from dmm_jax.data.images import fit_square, load_rgb
from dmm_jax.runtime.errors import UserError

SHAPES_WORLD, TEACHERS = "shapes_world", "teachers"  # Values of `config.data.source` that do not name a folder.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_LINE_CHARS = 100_000


class Example(TypedDict):
    """An image with its caption; `id` is its place in the source."""

    image: np.ndarray
    caption: str
    id: int


@runtime_checkable
class ImageSource(Protocol):
    """What `prepare` reads: random access, so that work can resume anywhere and be read by several threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class FolderSource:
    """A folder of images, captioned by `captions.jsonl` (lines {"file": ..., "caption": ...}) or `NAME.txt` files.

    Raises:
        ValueError: no captions, a line that is no such object, or a file that is missing or outside the folder.
    """

    def __init__(self, folder: str | pathlib.Path, resolution: int = 0):
        """Lists the files and reads the captions; images are fitted to `resolution` pixels square (0: left as is)."""
        self.folder = pathlib.Path(folder).resolve()
        self.resolution = resolution
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder. Give the folder that holds images and captions.")
        listing = self.folder / "captions.jsonl"
        pairs = read_captions(listing) if listing.exists() else read_side_files(self.folder)
        self.rows = [(self._inside(name), caption) for name, caption in pairs]
        if not self.rows:
            raise UserError(
                f"{self.folder} holds no captioned images. Add captions.jsonl with lines "
                '{"file": "a.png", "caption": "..."}, or a.txt beside each a.png.'
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        path, caption = self.rows[index]
        image = load_rgb(path)
        pixels = fit_square(image, self.resolution) if self.resolution else np.asarray(image)
        return {"image": pixels, "caption": caption, "id": int(index)}

    @property
    def digest(self) -> str:
        """Returns a hash of names, sizes and captions (not of pixels, which would mean reading every file)."""
        rows = [(str(path.relative_to(self.folder)), path.stat().st_size, text) for path, text in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _inside(self, name: str) -> pathlib.Path:
        path = (self.folder / name).resolve()  # Follows links, so that none leads out.
        if not path.is_relative_to(self.folder):
            raise UserError(f"{name!r} lies outside {self.folder}. Captions may name only files below it.")
        if not path.is_file():
            raise UserError(f"{path} is captioned but is not there. Remove its caption or add the image.")
        return path


def read_captions(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Reads (file, caption) from the lines of a captions.jsonl."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_CHARS + 1), ""), start=1):
            if line.strip():
                yield _parse_line(line, f"{path}, line {number}")


def read_side_files(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Reads (file, caption) for each image below a folder with a .txt of the same name beside it."""
    for image in sorted(folder.rglob("*")):
        text = image.with_suffix(".txt")
        if image.suffix.lower() in IMAGE_SUFFIXES and text.is_file():
            if not text.resolve().is_relative_to(folder):
                raise UserError(f"{text} leads out of {folder}. Replace the link by the file.")
            yield str(image.relative_to(folder)), text.read_text(encoding="utf-8").strip()


def _parse_line(line: str, where: str) -> tuple[str, str]:
    if len(line) > MAX_LINE_CHARS:
        raise UserError(f"{where}: more than {MAX_LINE_CHARS} characters. Write one short object a line.")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}). Write one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("file"), str) or not isinstance(row.get("caption"), str):
        raise UserError(f'{where}: expected {{"file": "a.png", "caption": "..."}}; got {line.strip()[:200]!r}.')
    return row["file"], row["caption"]
