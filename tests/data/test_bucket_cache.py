"""A latent cache in a bucket: the same records as in a folder, continued by any host, copied to a host once."""

import numpy as np
import pytest

from dmm_jax.data import bucket_cache
from dmm_jax.data.cache import CacheHeader, LatentCache
from dmm_jax.data.cache_writer import CacheWriter
from dmm_jax.data.fill_cache import check_place
from dmm_jax.runtime.errors import UserError
from tests import fake_gcs

HEADER = CacheHeader("v", "t", 16, 1.0, (2, 2, 4), 7, buckets=((8, 32),))


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("gcsfs")
    with fake_gcs.reachable() as store:
        yield store


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Makes the tests read and write as another host, with a disk of its own."""

    def become(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        return tmp_path / name / "dmm_jax"

    become("first")
    return become


def write_shard(writer, number):
    """Writes three examples of the square, and for even shards two of the wide bucket."""
    rng = np.random.default_rng(number)
    with writer.shard(number) as shard:
        for bucket, count in ((0, 3), *[(1, 2)] * (number % 2 == 0)):
            latents = rng.standard_normal((count, *HEADER.shape_of(bucket)), np.float32)
            shard.add(latents, rng.integers(0, 99, (count, 7)), np.zeros((count, 4), int), range(count), bucket)


def assert_equal(cache, expected):
    assert len(cache) == len(expected) and np.array_equal(cache.bucket_of, expected.bucket_of)
    for k in range(len(expected)):
        for name, value in expected[k].items():
            np.testing.assert_array_equal(cache[k][name], value)


def test_a_cache_in_a_bucket_has_the_records_of_one_in_a_folder(server, host, tmp_path):
    caches = []
    for place in (tmp_path / "cache", "gs://runs/caches/whole"):
        writer = CacheWriter(place, HEADER)
        for number in range(3):
            write_shard(writer, number)
        caches.append(writer.finish(3))
    assert_equal(caches[1], caches[0])
    names = [name.removeprefix("caches/whole/") for name in server.names("caches/whole/")]
    suffixes = (".array_record", ".buckets", ".json")
    shards = [f"latents-0000{number}{suffix}" for number in range(3) for suffix in suffixes]
    assert names == ["cache.json", *shards]
    assert not list((host("first") / "preparing").rglob("*.array_record"))  # What is uploaded leaves the disk.
    train, held_out = LatentCache("gs://runs/caches/whole").split(2)
    assert len(train) + len(held_out) == 13


def test_another_host_continues_an_interrupted_cache(server, host, tmp_path):
    place = "gs://runs/caches/cut"
    first = CacheWriter(place, HEADER)
    write_shard(first, 0)
    with pytest.raises(RuntimeError, match="killed"), first.shard(1) as shard:
        shard.add(np.zeros((1, 2, 2, 4), np.float32), np.zeros((1, 7), int), np.zeros((1, 4), int), [0])
        raise RuntimeError("killed")
    with pytest.raises(UserError, match="gs://runs/caches/cut is not finished.*prepare"):
        LatentCache(place)
    host("second")
    with pytest.raises(UserError, match="prepared by another recipe"):
        CacheWriter(place, CacheHeader("other", "t", 16, 1.0, (2, 2, 4), 7))
    second = CacheWriter(place, HEADER)
    assert [second.is_complete(number) for number in range(3)] == [True, False, False]
    for number in (1, 2):
        write_shard(second, number)
    whole = CacheWriter(tmp_path / "cache", HEADER)
    for number in range(3):
        write_shard(whole, number)
    assert_equal(second.finish(3), whole.finish(3))
    with pytest.raises(UserError, match="exists already"):
        CacheWriter(place, HEADER)


def test_a_host_copies_a_cache_once_and_a_new_cache_anew(server, host, capsys):
    def make(place, vae):
        writer = CacheWriter(place, CacheHeader(vae, "t", 16, 1.0, (2, 2, 4), 7, buckets=((8, 32),)))
        write_shard(writer, 0)
        return writer.finish(1)

    make("gs://runs/caches/read", "a")
    copies = host("reader") / "latents"
    cache = LatentCache("gs://runs/caches/read", vae="a")
    assert not copies.exists()  # The header alone says what a cache is.
    with pytest.raises(UserError, match="vae: expected 'b'"):
        LatentCache("gs://runs/caches/read", vae="b")
    assert not copies.exists()
    assert cache[4]["latents"].shape == (1, 4, 4)
    capsys.readouterr()
    assert LatentCache("gs://runs/caches/read")[0]["latents"].shape == (2, 2, 4)
    assert "copying" not in capsys.readouterr().err and len(list(copies.iterdir())) == 1
    for name in server.names("caches/read/"):
        del server.objects[name]
    make("gs://runs/caches/read", "c")
    assert len(LatentCache("gs://runs/caches/read").bucket_of) == 5 and len(list(copies.iterdir())) == 2


def test_files_of_others_in_a_bucket_are_not_touched(server, host):
    server.write("caches/mine/thesis.tex", b"x")
    with pytest.raises(UserError, match=r"gs://runs/caches/mine is not empty and holds no latent cache \(thesis.tex\)"):
        check_place("gs://runs/caches/mine")
    with pytest.raises(UserError, match="no latent cache gs://runs/caches/mine.*prepare"):
        LatentCache("gs://runs/caches/mine")
    with pytest.raises(UserError, match="no bucket"):
        check_place("gs://elsewhere/cache")
    assert server.names("caches/mine/") == ["caches/mine/thesis.tex"]


def test_a_header_that_names_files_elsewhere_is_refused(server, host):
    writer = CacheWriter("gs://runs/caches/hostile", HEADER)
    write_shard(writer, 0)
    writer.finish(1)
    (_, content) = server.objects["caches/hostile/cache.json"]
    for name in (b"../../x.array_record", b".."):
        server.write("caches/hostile/cache.json", content.replace(b"latents-00000.array_record", name))
        with pytest.raises(UserError, match="elsewhere"):
            LatentCache("gs://runs/caches/hostile")


def test_a_file_that_the_bucket_lacks_is_named_and_nothing_is_copied(server, host):
    writer = CacheWriter("gs://runs/caches/lacking", HEADER)
    write_shard(writer, 0)
    cache = writer.finish(1)
    del server.objects["caches/lacking/latents-00000.buckets"]
    with pytest.raises(UserError, match="lacks its file 'latents-00000.buckets'.*prepare"):
        cache[0]
    assert not any((host("first") / "latents").iterdir())


def test_an_abandoned_cache_leaves_nothing_unless_a_shard_is_complete(server, host):
    writer = CacheWriter("gs://runs/caches/empty", HEADER)
    writer.abandon()
    assert server.names("caches/empty/") == []
    writer = CacheWriter("gs://runs/caches/empty", HEADER)
    with writer.shard(0):
        pass
    with pytest.raises(UserError, match="no image could be read"):
        writer.finish(1)
    left = {name.rsplit("/", 1)[1] for name in server.names("caches/empty/")}
    assert "latents-00000.json" in left and bucket_cache.HEADER not in left
