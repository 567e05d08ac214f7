"""Random access sources of images with captions: a folder, and the embedded world.

Every source has `len`, `source[i] -> {"image": uint8 (H, W, 3), "caption": str, "id": int}` and a `digest`, a hash of
its contents.
"""

import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from dmm_jax.data.images import fit_square, load_rgb
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import read_text

SHAPES_WORLD, TEACHERS = "shapes_world", "teachers"  # Values of `config.data.source` that do not name a folder.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_LINE_CHARS = 100_000


class Example(TypedDict):
    """An image with its caption; `id` tells the images of a source apart."""

    image: np.ndarray  # uint8 (H, W, 3)
    caption: str
    id: int


@runtime_checkable
class ImageSource(Protocol):
    """Random access to captioned images, so that work resumes at any index and several threads read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class FolderSource:
    """A folder of images, with captions in `captions.jsonl` (lines {"file": ..., "caption": ...}) or `NAME.txt` files.

    Raises:
        ValueError: there are no captions, a line is malformed, or a file is missing or outside the folder.
    """

    def __init__(self, folder: str | pathlib.Path, resolution: int = 0):
        """Lists the files and reads the captions. Images are fitted to `resolution` pixels per side, unless it is 0."""
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
                '{"file": "a.png", "caption": "..."}, or a.txt next to each a.png.'
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
        """A hash of names, sizes and captions; not of pixels, since that would read every file."""
        rows = [(str(path.relative_to(self.folder)), path.stat().st_size, text) for path, text in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _inside(self, name: str) -> pathlib.Path:
        """Returns the path of a captioned file; refuses one outside the folder, also by way of a link."""
        path = (self.folder / name).resolve()
        if not path.is_relative_to(self.folder):
            raise UserError(f"{name!r} is outside {self.folder}. Captions may name only files below it.")
        if not path.is_file():
            raise UserError(f"{path} has a caption but does not exist. Remove its caption or add the image.")
        return path


def read_captions(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (file, caption) from the lines of a captions.jsonl."""
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_CHARS + 1), ""), start=1):
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error.reason}). Save it as UTF-8.") from None


def read_side_files(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Yields (file, caption) for each image below a folder that has a .txt file of the same name."""
    for image in sorted(folder.rglob("*")):
        text = image.with_suffix(".txt")
        if image.suffix.lower() in IMAGE_SUFFIXES and text.is_file():
            if not text.resolve().is_relative_to(folder):
                raise UserError(f"{text} is a link to a file outside {folder}. Replace the link by the file.")
            yield str(image.relative_to(folder)), read_text(text).strip()


def _parse_line(line: str, where: str) -> tuple[str, str]:
    if len(line) > MAX_LINE_CHARS:
        raise UserError(f"{where}: more than {MAX_LINE_CHARS} characters. Write one short object per line.")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON ({error}). Write one object per line.") from error
    if not isinstance(row, dict) or not isinstance(row.get("file"), str) or not isinstance(row.get("caption"), str):
        raise UserError(f'{where}: expected {{"file": "a.png", "caption": "..."}}; got {line.strip()[:200]!r}.')
    return row["file"], row["caption"]
