"""Laws of the TFDS builders: what is read equals the source, example for example, without TensorFlow."""

import json

import numpy as np
import pytest
from PIL import Image

from dmm_jax.data.sources import FolderSource
from dmm_jax.world.source import ShapesSource

builders = pytest.importorskip("dmm_jax.data.builders")


def _assert_holds(built, source):
    assert len(built) == len(source)
    for row in (built[i] for i in range(len(built))):
        true = source[row["id"]]
        assert row["caption"] == true["caption"]
        np.testing.assert_array_equal(row["image"], true["image"])
    assert sorted(built[i]["id"] for i in range(len(built))) == list(range(len(source)))


def test_the_built_world_is_the_world(tmp_path):
    builders.ShapesWorld(count=9, style="ink", seed=2, data_dir=tmp_path).download_and_prepare()
    folder = tmp_path / "shapes_world" / "1.0.0"
    assert list(folder.glob("*.array_record*"))
    _assert_holds(builders.BuiltSource(folder), ShapesSource(9, "ink", 2))


def test_a_built_folder_is_the_folder(tmp_path):
    rows = []
    for i in range(5):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9 + i, 12, 3), np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file": f"{i}.png", "caption": f"nümber {i}"}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data_dir = tmp_path / "built"
    builders.FolderCaptions(folder=tmp_path, resolution=8, data_dir=data_dir).download_and_prepare()
    _assert_holds(builders.BuiltSource(data_dir / "folder_captions" / "1.0.0"), FolderSource(tmp_path, 8))
