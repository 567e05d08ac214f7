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

from dmm_jax.data.captions import LISTS, read_caption, read_list
from dmm_jax.data.files import DataFile, Unused, list_folder, list_tar
from dmm_jax.data.images import IMAGE_SUFFIXES, fit, load_rgb
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
    """A folder of images with captions, in one of three forms.

    - a list of the files and captions, see `data.captions.LISTS`;
    - NAME.txt or NAME.caption next to each image, in subfolders too;
    - tar files that hold such images and texts, as img2dataset writes them.

    `unused` counts the files that are not used.

    Raises:
        UserError: there are no captions, a caption is malformed, or a captioned file is missing or outside the folder.
    """

    def __init__(self, folder: str | pathlib.Path, resolution: int = 0):
        """Lists the files and reads the captions. Images are fitted to `resolution` pixels per side, unless it is 0."""
        if not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder. Give the folder that holds images and captions.")
        self.folder, self.resolution, self.unused = pathlib.Path(folder).resolve(), resolution, Unused()
        lists = [name for name in LISTS if os.path.lexists(self.folder / name)]
        if len(lists) > 1:
            raise UserError(f"{self.folder} holds {' and '.join(lists)}. Keep one of them.")
        files = list_folder(self.folder, self.unused)
        if lists:
            self.rows = list(self._listed(lists[0], files))
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
        for image, caption in read_list(self.folder / name):
            if not os.path.isfile(self.folder / image):
                raise UserError(f"{self.folder / name}: {image!r} does not exist or is not a file. Remove its row.")
            path = (self.folder / image).resolve()
            if not path.is_relative_to(self.folder):
                raise UserError(f"{self.folder / name}: {image!r} is outside the folder. Name only files below it.")
            used.add(path)
            yield DataFile(path, str(path.relative_to(self.folder)), path.stat().st_size), caption
        for file in files:
            if file.path not in used and file.path.resolve() not in used:
                self.unused.add(f"not in {name}", file.name)

    def _paired(self, files: Sequence[DataFile]) -> Iterator[tuple[DataFile, str]]:
        """Yields the images that have a text file of the same name; counts the other files."""
        images, texts = set(), defaultdict(list)
        for file in files:
            if file.suffix in IMAGE_SUFFIXES:
                images.add(file.stem)
            elif file.suffix in TEXT_SUFFIXES:
                texts[file.stem].append(file)
        for file in files:
            if file.suffix in IMAGE_SUFFIXES and file.stem in texts:
                captions = {read_caption(text, str(self.folder / text.name)): text.name for text in texts[file.stem]}
                if len(captions) > 1:
                    raise UserError(f"{self.folder}: {' and '.join(captions.values())} differ. Keep one of them.")
                yield file, next(iter(captions))
            elif file.suffix in IMAGE_SUFFIXES:
                self.unused.add("image without a caption", file.name)
            elif file.suffix in TEXT_SUFFIXES and file.stem not in images:
                self.unused.add("text without an image", file.name)
            elif file.suffix not in TEXT_SUFFIXES:
                self.unused.add(f"files ending in {file.suffix!r}", file.name)
