"""TFDS builders of the image sources, as array_record files that are written and read without TensorFlow."""

import io
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from dmm_jax.data.sources import Example, FolderSource, ImageSource
from dmm_jax.world.source import ShapesSource


class _Captions(tfds.core.GeneratorBasedBuilder):
    """Images with captions; `id` is the place in the source, for TFDS shuffles what it writes."""

    SKIP_REGISTERING = True
    code_path = None  # Else TFDS 4.9.10 looks for checksums of downloads, with a package that it forgets to require.

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _source(self) -> ImageSource:
        raise NotImplementedError

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "caption": tfds.features.Text(),
            "id": tfds.features.Scalar(np.int64),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        source = self._source()
        for index in range(len(source)):
            example = source[index]
            png = io.BytesIO()
            Image.fromarray(example["image"]).save(png, format="PNG")
            png.seek(0)
            yield index, {"image": png, "caption": example["caption"], "id": example["id"]}


class ShapesWorld(_Captions):
    """The embedded world: captioned pictures of one or two shapes, in one style or in random ones."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, count: int, style: str | None = None, seed: int = 0, **kwargs):
        """Builds `count` pictures; see `ShapesSource`."""
        self._arguments = (count, style, seed)
        super().__init__(**kwargs)

    def _source(self) -> ImageSource:
        return ShapesSource(*self._arguments)


class FolderCaptions(_Captions):
    """A folder of images with captions.jsonl or .txt side files, fitted to squares."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, folder: str | pathlib.Path, resolution: int, **kwargs):
        """Builds from `folder`, images fitted to `resolution` pixels square (0: left as is); see `FolderSource`."""
        self._arguments = (folder, resolution)
        super().__init__(**kwargs)

    def _source(self) -> ImageSource:
        return FolderSource(*self._arguments)


class BuiltSource:
    """What a builder wrote, as a source of examples in the order of the builder's source."""

    def __init__(self, folder: str | pathlib.Path, split: str = "train"):
        """Opens the version folder, such as `.../shapes_world/1.0.0`."""
        self._builder = tfds.builder_from_directory(str(folder))
        self._data = self._builder.as_data_source(split=split)
        self.digest = ""  # Of what was built; whoever built it may know.

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> Example:
        row = self._data[index]
        return {"image": row["image"], "caption": row["caption"].decode(), "id": int(row["id"])}
