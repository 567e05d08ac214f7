"""Laws of the latent cache."""

import dataclasses
import json

import numpy as np
import pytest

from dmm_jax.data.cache import CacheHeader, LatentCache, partial_folder
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.runtime.errors import UserError

HEADER = CacheHeader("vae-hash", "token-hash", 16, 0.5, (2, 2, 4), 7)


def _batch(start, count):
    rng = np.random.default_rng(start)
    latents = rng.standard_normal((count, 2, 2, 4)).astype(np.float32)
    input_ids = rng.integers(0, 2**16, (count, 7)).astype(np.int32)
    return latents, input_ids, rng.integers(0, 2**20, (count, 4)), [1000 + start + i for i in range(count)]


def _write(folder, header=HEADER, shards=(0, 1)):
    """Writes a shard of six examples, and one of three."""
    writer = CacheWriter(folder, header)
    for number in shards:
        with writer.shard(number) as shard:
            for start in ((0, 3), (6,))[number]:
                shard.add(*_batch(start, 3))
    return writer


@pytest.fixture
def folder(tmp_path):
    _write(tmp_path / "cache").finish(2)
    return tmp_path / "cache"


def test_records_come_back_as_written(folder):
    cache = LatentCache(folder)
    assert len(cache) == 9 and len(cache.header.shards) == 2
    for start in (0, 3, 6):
        for i, (latents, input_ids, frame, image_id) in enumerate(zip(*_batch(start, 3), strict=True)):
            example = cache[start + i]
            np.testing.assert_array_equal(example["latents"], latents.astype(np.float16))
            np.testing.assert_array_equal(example["input_ids"], input_ids)
            assert example["time_ids"].tolist() == [*frame, 16, 16] and example["time_ids"].dtype == np.int32
            assert example["id"] == image_id and example["input_ids"].dtype == np.int32
    with pytest.raises(IndexError):
        cache[9]


@pytest.mark.parametrize(
    "expected",
    [{"vae": "other"}, {"tokenizer": "other"}, {"resolution": 32}, {"scaling_factor": 0.18215}, {"num_tokens": 77},
     {"latent_shape": (4, 4, 4)}, {"dtype": "float32"}, {"num_examples": 10}],
)  # fmt: skip
def test_a_cache_that_does_not_fit_the_run_is_refused(folder, expected):
    same = {"vae": "vae-hash", "tokenizer": "token-hash", "resolution": 16, "scaling_factor": 0.5, "num_examples": 9}
    LatentCache(folder, **same)
    with pytest.raises(ValueError, match=next(iter(expected)).replace("num_examples", "count")):
        LatentCache(folder, **same | expected)


def test_all_differences_are_named_at_once(folder):
    with pytest.raises(ValueError, match="(?s)vae.*resolution.*count"):
        LatentCache(folder).check(vae="x", resolution=1, num_examples=100)


def test_a_split_covers_the_cache_once(folder):
    train, held_out = LatentCache(folder).split(2)
    ids = [part[i]["id"] for part in (train, held_out) for i in range(len(part))]
    assert (len(train), len(held_out)) == (7, 2) and ids == list(range(1000, 1009))
    with pytest.raises(IndexError):
        train[7]
    with pytest.raises(ValueError, match="held out"):
        LatentCache(folder).split(9)


def test_the_folder_appears_when_the_cache_is_complete(tmp_path):
    folder = tmp_path / "cache"
    writer = _write(folder)
    assert not folder.exists()
    with pytest.raises(ValueError, match="not finished"):
        LatentCache(folder)
    writer.finish(2)
    assert folder.exists() and not partial_folder(folder).exists()


def test_a_new_writer_continues_with_the_missing_shards(tmp_path):
    folder = tmp_path / "cache"
    with pytest.raises(RuntimeError), _write(folder, shards=(0,)).shard(1) as shard:
        shard.add(*_batch(6, 3))
        raise RuntimeError("power cut")
    (partial_folder(folder) / "latents-00001.array_record").write_bytes(b"left by a killed process")
    resumed = CacheWriter(folder, HEADER)
    assert [resumed.is_complete(number) for number in range(2)] == [True, False]
    assert [path.name for path in partial_folder(folder).glob("*.array_record")] == ["latents-00000.array_record"]
    with pytest.raises(UserError, match="latents-00001.json is damaged"):
        resumed.finish(2)
    with resumed.shard(1) as shard:
        shard.add(*_batch(6, 3))
        shard.dropped = 1
    expected, cache = _write(tmp_path / "uninterrupted").finish(2), resumed.finish(2)
    assert cache.header == dataclasses.replace(expected.header, dropped=1)
    for i in range(9):
        assert cache[i]["id"] == expected[i]["id"]
        np.testing.assert_array_equal(cache[i]["latents"], expected[i]["latents"])


def test_an_interrupted_cache_of_another_recipe_is_refused(tmp_path):
    _write(tmp_path / "cache")
    with pytest.raises(ValueError, match="vae: expected 'other'"):
        CacheWriter(tmp_path / "cache", dataclasses.replace(HEADER, vae="other"))


def test_a_writer_refuses_an_existing_folder(folder):
    with pytest.raises(ValueError, match="exists already"):
        CacheWriter(folder, HEADER)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda x, t: (np.where(x > 1.0, np.nan, x), t), "NaN"),
        (lambda x, t: (x * 1e6, t), "float16"),
        (lambda x, t: (x, t - 2**17), "token ids"),
        (lambda x, t: (x, t + 2**16), "token ids"),
        (lambda x, t: (x[:, :1], t), "expected latents"),
        (lambda x, t: (x, t[:, :3]), "expected latents"),
    ],
)
def test_values_that_a_record_cannot_hold_are_refused(tmp_path, spoil, message):
    latents, input_ids, frames, ids = _batch(0, 3)
    with pytest.raises(ValueError, match=message), CacheWriter(tmp_path / "cache", HEADER).shard(0) as shard:
        shard.add(*spoil(latents, input_ids), frames, ids)


def test_an_empty_cache_is_refused(tmp_path):
    with CacheWriter(tmp_path / "cache", HEADER).shard(0):
        pass
    with pytest.raises(ValueError, match="nothing was written"):
        CacheWriter(tmp_path / "cache", HEADER).finish(1)


def _edit(folder, **changes):
    header = json.loads((folder / "cache.json").read_text())
    (folder / "cache.json").write_text(json.dumps({**header, **changes}))


@pytest.mark.parametrize(
    "changes",
    [{"count": 8}, {"num_tokens": 8}, {"format": "other"}, {"vae": "v", "shards": [["../cache/x", 9]]},
     {"shards": []}, {"shards": [["latents-00000.array_record", 2**70], ["latents-00001.array_record", 9 - 2**70]]},
     {"shards": [["none.array_record", 9]]}, {"shards": 3}, {"shards": [["a"]]},
     {"count": "9"}, {"count": True}, {"vae": 3}, {"latent_shape": [2, 2, 4.0]}, {"latent_shape": [2, -2, -4]},
     {"resolution": None}, {"resolution": 0}, {"scaling_factor": float("nan")}, {"num_tokens": [[]]}],
)  # fmt: skip
def test_a_header_that_contradicts_the_files_is_refused(folder, changes):
    _edit(folder, **changes)
    with pytest.raises(UserError, match=f"^{folder}[^\n]*$"):
        LatentCache(folder)


@pytest.mark.parametrize("contents", [b"", b"[" * 100_000, b"\xff", b'{"format": 1}', b"null", None])
def test_a_damaged_header_is_refused(folder, contents):
    (folder / "cache.json").unlink()
    if contents is None:
        (folder / "cache.json").symlink_to("/dev/zero")
    else:
        (folder / "cache.json").write_bytes(contents)
    with pytest.raises(UserError, match=f"^{folder}/cache.json[^\n]*new folder.$"):
        LatentCache(folder)


@pytest.mark.parametrize(
    "note", ["", "[1, 2]", '{"count": 6}', '{"count": "6", "dropped": 0}', '{"count": -1, "dropped": 0}']
)
def test_a_damaged_note_of_a_shard_is_refused(tmp_path, note):
    writer = _write(tmp_path / "cache")
    (writer.partial / "latents-00000.json").write_text(note)
    with pytest.raises(UserError, match="cache.partial/latents-00000.json is damaged"):
        writer.finish(2)


def test_a_link_in_the_place_of_an_unfinished_cache_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    partial_folder(tmp_path / "cache").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="cache.partial is a link"):
        _write(tmp_path / "cache")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_folder_without_a_header_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cache.json"):
        LatentCache(tmp_path)
    with pytest.raises(ValueError, match="no latent cache .*Make it with `dmm-jax prepare`"):
        LatentCache(tmp_path / "missing")


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"x" * len(data)])
def test_damaged_files_are_refused(folder, damage):
    shard = folder / LatentCache(folder).header.shards[0][0]
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(ValueError, match=str(folder)):
        LatentCache(folder)


@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("read", [lambda cache, index: cache[index], lambda cache, index: cache.gather([1, index, 2])])
def test_a_flipped_bit_is_detected(folder, index, read):
    true = LatentCache(folder)[index]["latents"]
    shard = folder / LatentCache(folder).header.shards[0][0]
    data = bytearray(shard.read_bytes())
    place = data.index(true.tobytes())
    data[place + 5] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"^{folder}: record {index} is damaged[^\n]*$"):
        read(LatentCache(folder), index)
