"""Laws of filling a cache with images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module

from dmm_jax.data.cache import LatentCache, partial_folder
from dmm_jax.data.files import Unused
from dmm_jax.data.fill_cache import encode_images
from dmm_jax.data.images import UnreadableImage
from dmm_jax.runtime.errors import UserError
from dmm_jax.world.source import ShapesSource


class Squares:
    """Image i is filled with i; some cannot be read."""

    digest = "squares"

    def __init__(self, count=11, unreadable=(), size=(6, 5)):
        self.count, self.unreadable, self.size = count, unreadable, size

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.unreadable:
            raise UnreadableImage(f"image {index}", "damaged")
        return {"image": np.full((*self.size, 3), index, np.uint8), "caption": "x" * index, "id": index}


@jax.jit
def encode(images, keys):
    noise = jax.vmap(lambda key: jax.random.normal(key, (2, 2, 4)))(keys)
    return images[:, :2, :2, :1] / 100.0 + 0.1 * noise


def tokenize(texts):
    return np.array([[len(text)] * 7 for text in texts], np.int32)


OPTIONS = {"sizes": ((4, 4),), "scaling_factor": 0.5, "vae": "v", "tokenizer": "t", "shard_size": 3}


def _fill(out, source=None, batch_size=4, **changes):
    options = {"encode": encode, "tokenize": tokenize, **OPTIONS, **changes}
    return encode_images(source or Squares(), out=out, batch_size=batch_size, **options)


def _assert_equal(a: LatentCache, b: LatentCache):
    assert len(a) == len(b)
    for i in range(len(a)):
        assert a[i]["id"] == b[i]["id"]
        np.testing.assert_array_equal(a[i]["input_ids"], b[i]["input_ids"])
        np.testing.assert_array_equal(a[i]["latents"], b[i]["latents"])


def test_the_cache_holds_every_image_as_scaled_latents_and_token_ids(tmp_path):
    cache = _fill(tmp_path / "cache")
    assert len(cache) == 11 and cache.header.latent_shape == (2, 2, 4) and cache.header.num_tokens == 7
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(11))
    images = np.stack([np.full((4, 4, 3), i, np.uint8) for i in range(11)])
    true = np.asarray(encode(images, keys)) * np.float32(0.5)
    for i in range(11):
        assert cache[i]["id"] == i
        np.testing.assert_array_equal(cache[i]["input_ids"], [i] * 7)
        np.testing.assert_allclose(cache[i]["latents"], true[i], atol=1e-3)


def test_the_cache_does_not_depend_on_the_batch_size(tmp_path):
    _assert_equal(_fill(tmp_path / "a", batch_size=3), _fill(tmp_path / "b", batch_size=16))


def test_another_seed_draws_other_samples(tmp_path):
    a, b = _fill(tmp_path / "a"), _fill(tmp_path / "b", seed=1)
    assert not np.array_equal(a[0]["latents"], b[0]["latents"])


def test_unreadable_images_are_dropped_named_and_counted(tmp_path, capsys):
    unused = Unused()
    cache = _fill(tmp_path / "cache", Squares(unreadable=(2, 3, 10)), unused=unused)
    assert [cache[i]["id"] for i in range(len(cache))] == [0, 1, 4, 5, 6, 7, 8, 9]
    assert cache.header.dropped == 3
    assert unused.lines() == ["        3 not used: damaged, for example 'image 2'"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("encoding 11 images into") and " 8 images; " in lines[-1] and "images/s" in lines[-1]
    assert [line.split(" cannot")[0] for line in lines[1:-1]] == [f"not used: 'image {k}'" for k in (2, 3, 10)]
    with pytest.raises(UserError, match="image 2"):
        _fill(tmp_path / "strict", Squares(unreadable=(2, 3, 10)), strict=True)


def test_a_shard_may_have_no_readable_image(tmp_path):
    cache = _fill(tmp_path / "cache", Squares(7, unreadable=(0, 1, 2)))
    assert [cache[i]["id"] for i in range(len(cache))] == [3, 4, 5, 6] and cache.header.dropped == 3


def test_a_source_without_readable_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image could be read"):
        _fill(tmp_path / "cache", Squares(3, unreadable=(0, 1, 2)))


@pytest.mark.parametrize("method", ["write", "close"])
def test_a_full_disk_is_one_error_with_the_path(tmp_path, monkeypatch, method):
    """array_record raises RuntimeError, also when the file is closed again."""

    class FullDisk:
        def __init__(self, *args):
            self.write = self.close = lambda *record: None
            setattr(self, method, self.fail)

        def fail(self, *record):
            raise RuntimeError("write() failed: No space left on device\n")

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", FullDisk)
    with pytest.raises(UserError, match="cache.partial cannot be written: .*No space left.*run prepare again"):
        _fill(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_work_continues_after_the_last_shard(tmp_path):
    source = Squares(unreadable=(5,))
    seen = []

    def failing(images, keys):
        seen.append(images[0, 0, 0, 0])
        if len(seen) == 4:  # The black image for the shapes, two batches, and this.
            raise RuntimeError("power cut")
        return encode(images, keys)

    with pytest.raises(RuntimeError, match="power cut"):
        _fill(tmp_path / "cache", source, encode=failing, batch_size=3)
    assert partial_folder(tmp_path / "cache").exists()
    seen = [None] * 10
    cache = _fill(tmp_path / "cache", source, encode=failing, batch_size=3)
    assert seen[11:] == [6, 9]  # Images 0 to 5 were not encoded again.
    _assert_equal(cache, _fill(tmp_path / "uninterrupted", source, batch_size=3))
    assert cache.header.dropped == 1


def test_a_finished_cache_is_opened_and_not_encoded_again(tmp_path):
    first = _fill(tmp_path / "cache")

    def never(images, keys):
        raise AssertionError("encoded again")

    _assert_equal(_fill(tmp_path / "cache", encode=never), first)


@pytest.mark.parametrize("change", [{"vae": "w"}, {"sizes": ((5, 5),)}, {"seed": 3}, {"scaling_factor": 0.25}])
def test_a_cache_of_another_recipe_is_not_overwritten(tmp_path, change):
    _fill(tmp_path / "cache")
    with pytest.raises(ValueError, match=next(iter(change)).replace("sizes", "resolution")):
        _fill(tmp_path / "cache", **change)


def test_a_folder_that_is_not_a_cache_is_refused(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not a latent cache .*new folder"):
        _fill(tmp_path / "cache")


def test_latents_that_are_not_finite_are_refused(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        _fill(tmp_path / "cache", encode=lambda images, keys: encode(images, keys) / 0.0 * 0.0)
    assert list(tmp_path.iterdir()) == []  # No shard was completed, so no file stays.


def test_the_embedded_worlds_images_are_encoded_unscaled(tmp_path):
    source = ShapesSource(5, "comic", 0)
    options = {"encode": lambda images, keys: images[:, ::8, ::8] / 255.0, "sizes": ((64, 64),), "scaling_factor": 1.0}
    cache = _fill(tmp_path / "cache", source, **options)
    for i in range(5):
        assert cache[i]["input_ids"][0] == len(source[i]["caption"])
        np.testing.assert_allclose(cache[i]["latents"], source[i]["image"][::8, ::8] / 255.0, atol=1e-3)


def test_the_cache_records_an_images_original_size_and_crop(tmp_path):
    cache = _fill(tmp_path / "cache", Squares(3, size=(6, 9)))  # Scaled to 4 x 6, cut at the centre.
    assert all(cache[i]["time_ids"].tolist() == [6, 9, 0, 1, 4, 4] for i in range(3))
    fitting = _fill(tmp_path / "fitting", Squares(3, size=(4, 4)))
    assert fitting[2]["time_ids"].tolist() == [4, 4, 0, 0, 4, 4]


class Oblongs(Squares):
    """Squares, tall and wide images in turn."""

    def __getitem__(self, index):
        size = ((8, 8), (20, 10), (10, 20))[index % 3]
        return {"image": np.full((*size, 3), index, np.uint8), "caption": "x" * index, "id": index}


SIZES = ((8, 8), (12, 6), (6, 12))


def halved(images, keys):
    return images[:, ::2, ::2] / 100.0


def test_an_image_is_cut_to_the_bucket_of_its_ratio_and_says_so(tmp_path):
    cache = _fill(tmp_path / "cache", Oblongs(9), encode=halved, sizes=SIZES, shard_size=9)
    assert sorted(cache[i]["id"] for i in range(9)) == list(range(9))
    for i in range(9):
        example, bucket = cache[i], cache[i]["id"] % 3
        assert cache.bucket_of[i] == bucket
        assert example["latents"].shape == (*(side // 2 for side in SIZES[bucket]), 3)
        frame = ((8, 8, 0, 0, 8, 8), (20, 10, 0, 0, 12, 6), (10, 20, 0, 0, 6, 12))[bucket]
        assert tuple(example["time_ids"]) == frame
        np.testing.assert_allclose(example["latents"], example["id"] / 200.0, atol=1e-3)


def test_an_interrupted_cache_of_buckets_equals_one_that_was_not(tmp_path):
    calls = []

    def failing(images, keys):
        calls.append(images.shape)
        if len(calls) == 8:
            raise RuntimeError("power cut")
        return halved(images, keys)

    options = {"sizes": SIZES, "shard_size": 5, "batch_size": 2}
    with pytest.raises(RuntimeError, match="power cut"):
        _fill(tmp_path / "cache", Oblongs(14), encode=failing, **options)
    cache = _fill(tmp_path / "cache", Oblongs(14), encode=halved, **options)
    other = _fill(tmp_path / "other", Oblongs(14), encode=halved, **options)
    _assert_equal(cache, other)
    for name in ("cache.json", "latents-00000.buckets", "latents-00002.array_record"):
        assert (cache.folder / name).read_bytes() == (other.folder / name).read_bytes()


def test_held_out_examples_come_from_every_bucket_in_whole_units(tmp_path):
    cache = _fill(tmp_path / "cache", Oblongs(30), encode=halved, sizes=SIZES, shard_size=30)
    train, held_out = cache.split(12, unit=2)
    assert np.bincount(held_out.bucket_of).tolist() == [4, 4, 4] and len(train) == 18
    assert [len(part) for part in cache.split(2, unit=2)] == [28, 2]
    ids = [part[i]["id"] for part in (train, held_out) for i in range(len(part))]
    assert sorted(ids) == list(range(30))
