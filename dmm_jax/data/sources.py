"""Random access sources of images with captions: a folder, and the embedded world.

Every source has `len`, `source[i] -> {"image": uint8 (H, W, 3), "caption": str, "id": int}` and a `digest`, a hash of
its contents.
"""

import hashlib
import json
import os
import pathlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np

from dmm_jax.data.arrow import read_table
from dmm_jax.data.captions import JOURNEYDB, LISTS, read_caption, read_columns, read_list
from dmm_jax.data.files import DataFile, Unused, list_folder, list_tar
from dmm_jax.data.images import IMAGE_SUFFIXES, fit, load_rgb
from dmm_jax.data.where import Where
from dmm_jax.runtime.errors import UserError

TEXT_SUFFIXES = (".txt", ".caption")


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
    """A folder of images with captions, in one of four forms.

    - a list of the files and captions, see `data.captions.LISTS`;
    - NAME.txt or NAME.caption next to each image, in subfolders too;
    - tar files that hold such images and texts, as img2dataset writes them;
    - a Hugging Face data set that `save_to_disk` wrote (`data.arrow`).

    `unused` counts the files that are not used.

    Raises:
        UserError: there are no captions, a caption is malformed, or a captioned file is missing or outside the folder.
    """

    def __init__(self, folder: str | pathlib.Path, resolution: int = 0, where: str = ""):
        """Lists the files and reads the captions.

        Args:
          resolution: images are fitted to a square of so many pixels per side, unless it is 0.
          where: a condition on columns (`data.where`): of the list, of NAME.json next to an image, of the data set.
        """
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder. Give the folder that holds images and captions.")
        self.folder, self.resolution, self.unused = pathlib.Path(folder).resolve(), resolution, Unused()
        self.where = Where(where)
        lists = [name for name in LISTS if os.path.lexists(self.folder / name)]
        if len(lists) > 1:
            raise UserError(f"{self.folder} holds {' and '.join(lists)}. Keep one of them.")
        files = list_folder(self.folder, self.unused)
        if lists:
            self.rows = list(self._listed(lists[0], files))
        elif tables := [file for file in files if file.suffix == ".arrow"]:
            self.rows = list(self._in_tables(tables))
            for file in {*files} - {*tables}:
                if file.suffix != ".json":
                    self.unused.add("not in the data set", file.name)
        else:
            has_images = any(file.suffix in IMAGE_SUFFIXES for file in files)
            tars = [file for file in files if file.suffix == ".tar" and not has_images]
            groups = (sorted({*files} - {*tars}), *(list_tar(tar, self.unused) for tar in tars))
            self.rows = [row for group in groups for row in self._paired(group)]
        if not self.rows:
            raise UserError(
                f"{self.folder} holds no captioned images. Add captions.jsonl with lines "
                '{"file": "a.png", "caption": "..."}, or a.txt next to each a.png.'
                + "".join(f" {' '.join(line.split())}." for line in self.unused.lines())
            )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        file, caption = self.rows[index]
        image = load_rgb(file)
        pixels = fit(image, (self.resolution, self.resolution)) if self.resolution else np.asarray(image)
        return {"image": pixels, "caption": caption, "id": int(index)}

    @property
    def digest(self) -> str:
        """A hash of names, sizes and captions; not of pixels, since that would read every file."""
        rows = [(file.name, file.size, text) for file, text in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def _listed(self, name: str, files: Sequence[DataFile]) -> Iterator[tuple[DataFile, str]]:
        """Yields the images and captions of a list; counts the files that it does not name."""
        used = {self.folder / name}
        for image, caption, row in read_list(self.folder / name, self.where.columns):
            if name in JOURNEYDB and not os.path.isfile(self.folder / image):  # Some files have another ending.
                image = os.path.splitext(image)[0] + ".jpg"
            if not os.path.isfile(self.folder / image):
                if name in JOURNEYDB:  # Few people have all its parts.
                    self.unused.add(f"in {name}, but not in the folder", image[:200])
                    continue
                place = f"{self.folder / name}: {image[:200]!r}"
                raise UserError(f"{place} does not exist or is not a file. Remove its row.")
            path = (self.folder / image).resolve()
            if not path.is_relative_to(self.folder):
                raise UserError(f"{self.folder / name}: {image!r} is outside the folder. Name only files below it.")
            used.add(path)
            if reason := self.where.reason(row):
                self.unused.add(reason, image)
                continue
            yield DataFile(path, str(path.relative_to(self.folder)), path.stat().st_size), caption
        for file in files:
            if file.path not in used and file.path.resolve() not in used:
                self.unused.add(f"not in {name}", file.name)

    def _paired(self, files: Sequence[DataFile]) -> Iterator[tuple[DataFile, str]]:
        """Yields the images that have a text file of the same name; counts the other files."""
        images, texts, columns = set(), defaultdict(list), {}
        for file in files:
            if file.suffix in IMAGE_SUFFIXES:
                images.add(file.stem)
            elif file.suffix in TEXT_SUFFIXES:
                texts[file.stem].append(file)
            elif file.suffix == ".json":
                columns[file.stem] = file
        for file in files:
            if file.suffix in IMAGE_SUFFIXES and file.stem in texts:
                captions = {read_caption(text, str(self.folder / text.name)): text.name for text in texts[file.stem]}
                if len(captions) > 1:
                    raise UserError(f"{self.folder}: {' and '.join(captions.values())} differ. Keep one of them.")
                if reason := self.where and self.where.reason(read_columns(columns.get(file.stem))):
                    self.unused.add(reason, file.name)
                    continue
                yield file, next(iter(captions))
            elif file.suffix in IMAGE_SUFFIXES:
                self.unused.add("image without a caption", file.name)
            elif file.suffix in TEXT_SUFFIXES and file.stem not in images:
                self.unused.add("text without an image", file.name)
            elif file.suffix not in TEXT_SUFFIXES and (file.suffix != ".json" or file.stem not in images):
                self.unused.add(f"files ending in {file.suffix!r}", file.name)

    def _in_tables(self, tables: Sequence[DataFile]) -> Iterator[tuple[DataFile, str]]:
        """Yields the images and captions of Arrow files; counts rows without an image."""
        for table in tables:
            for file, caption, row in read_table(table, self.where.columns):
                if file is None:
                    self.unused.add("row without an image in the file", table.name)
                elif reason := self.where.reason(row):
                    self.unused.add(reason, file.name)
                else:
                    yield file, caption
