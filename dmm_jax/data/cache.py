"""The latent cache: float16 latents and uint16 token ids in array_record files, described by one cache.json.

A record concatenates, little-endian: latents (C order), token ids, the image's frame, and its int64 id in the source.
The frame is four int32 in pixels: the image's original height and width, and top and left of the crop after scaling.
Stable Diffusion XL is conditioned on them (arXiv:2307.01952, section 2.2).

Latents have the size of their image's bucket. With several buckets, a file of bytes next to each file of records holds
the bucket's number of every record.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
from array_record.python import array_record_data_source

from dmm_jax.data.bucket_cache import HEADER, PREPARING, cache_location, copy_of
from dmm_jax.data.files import open_regular
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.storage import Location, bucket_errors, in_bucket, write_text

FORMAT = "dmm_jax latent cache 3"
LATENTS, TOKENS, FRAME, _ID = np.dtype("<f2"), np.dtype("<u2"), np.dtype("<i4"), np.dtype("<i8")
MAX_HEADER_BYTES = 2**26
MAX_BUCKETS = 255  # A bucket's number is one byte.


@dataclasses.dataclass(frozen=True)
class CacheHeader:
    """The contents of cache.json: how the latents were made, and what a record holds."""

    vae: str  # Hash of the VAE's contents.
    tokenizer: str  # Hash of the tokenizer's files.
    resolution: int  # Pixels per side of the square bucket.
    scaling_factor: float  # The VAE's; stored latents are multiplied by it.
    latent_shape: tuple[int, ...]  # (h, w, C) of the square bucket.
    num_tokens: int  # Per prompt, over all tokenizers and chunks.
    buckets: tuple[tuple[int, int], ...] = ()  # Height and width in pixels of further buckets; the square is bucket 0.
    source: str = ""  # Hash of the source of images; or teachers, prompts and sampler, as text.
    seed: int = 0  # For the posterior samples, or for the noise of the first picture.
    dtype: str = "float16"
    count: int = 0
    dropped: int = 0  # Images that could not be read.
    shards: tuple[tuple[str, int], ...] = ()  # (file name, records)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of every bucket."""
        return ((self.resolution, self.resolution), *self.buckets)

    def shape_of(self, bucket: int) -> tuple[int, ...]:
        """Returns the shape of the latents in a bucket."""
        height, width = (
            side * cells // self.resolution
            for side, cells in zip(self.sizes[bucket], self.latent_shape[:2], strict=True)
        )
        return height, width, self.latent_shape[2]

    def record_type(self, bucket: int = 0) -> np.dtype:
        """Returns the NumPy type of one record."""
        fields = ("latents", LATENTS, self.shape_of(bucket)), ("input_ids", TOKENS, (self.num_tokens,))
        return np.dtype([*fields, ("frame", FRAME, (4,)), ("id", _ID)])

    def differences(self, **expected: Any) -> list[str]:
        """Returns one line for each field whose value is not the expected one."""
        return [
            f"{name}: expected {value!r}, the cache has {getattr(self, name)!r}"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]


class CachedExample(TypedDict):
    """One record; or several, their arrays with one axis more in front."""

    latents: np.ndarray  # float16 (h, w, C), scaled
    input_ids: np.ndarray  # int32 (num_tokens,)
    time_ids: np.ndarray  # int32 (6,): original height and width, top and left of the crop, target height and width
    id: int | np.ndarray  # int64


def write_header(folder: Location, header: CacheHeader) -> None:
    """Writes cache.json; atomic, so that a reader never sees half a file."""
    write_text(folder / HEADER, json.dumps({"format": FORMAT, **dataclasses.asdict(header)}, indent=2))


_IS_VALID = {  # By a field's type; a count of records fits into int64.
    str: lambda value: isinstance(value, str),
    int: lambda value: type(value) is int and 0 <= value < 2**63,
    float: lambda value: type(value) in (int, float) and 0 < value < math.inf,
    tuple[int, ...]: lambda value: len(value) == 3 and all(type(size) is int and size > 0 for size in value),
    tuple[tuple[str, int], ...]: lambda value: all(
        type(name) is str and type(count) is int and 0 <= count < 2**63 for name, count in value
    ),
    tuple[tuple[int, int], ...]: lambda value: (
        len(value) < MAX_BUCKETS
        and all(type(side) is int and 0 < side < 2**20 for height, width in value for side in (height, width))
    ),
}


def read_header(folder: Location) -> CacheHeader:
    """Reads cache.json.

    Raises:
        ValueError: the file is missing, or `write_header` did not write it.
    """
    path = folder / HEADER
    try:
        with path.open("rb") if in_bucket(path) else open_regular(path) as stream:
            raw = json.loads(stream.read(MAX_HEADER_BYTES).decode())
        if raw.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        fields = {field.name: raw.pop(field.name) for field in dataclasses.fields(CacheHeader)}
        wrong = [
            field.name for field in dataclasses.fields(CacheHeader) if not _IS_VALID[field.type](fields[field.name])
        ]
        if not fields["resolution"]:  # Shapes are relative to it.
            wrong.append("resolution")
        if wrong:
            raise ValueError(f"wrong value of {', '.join(wrong)}")
        fields["latent_shape"] = tuple(fields["latent_shape"])
        fields |= {name: tuple(map(tuple, fields[name])) for name in ("shards", "buckets")}
        return CacheHeader(**fields)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not the header of a latent cache ({reason}). Prepare the cache in a new folder."
        ) from error


def encode_record(latents: np.ndarray, input_ids: np.ndarray, frame: np.ndarray, image_id: int) -> bytes:
    """Packs one example into the bytes of its record."""
    parts = (latents.astype(LATENTS), input_ids.astype(TOKENS), frame.astype(FRAME), _ID.type(image_id))
    return b"".join(part.tobytes() for part in parts)


def decode_records(header: CacheHeader, records: Sequence[bytes], bucket: int = 0) -> CachedExample:
    """Unpacks examples of one bucket from the bytes of their records; each array has them along its first axis."""
    rows = np.frombuffer(b"".join(records), header.record_type(bucket))
    size = np.broadcast_to(np.array(header.sizes[bucket], np.int32), (len(rows), 2))
    return {
        "latents": rows["latents"],
        "input_ids": rows["input_ids"].astype(np.int32),
        "time_ids": np.concatenate([rows["frame"], size], axis=1),
        "id": rows["id"],
    }


class LatentCache:
    """A finished cache: a random access source of `CachedExample`.

    A cache in a bucket, gs://BUCKET/NAME, is copied to this host when the first record is read.

    Raises:
        ValueError: the cache is not finished, or its files do not match cache.json.
    """

    def __init__(self, folder: str | Location, **expected: Any):
        """Opens a cache and checks it against `expected` (see `check`)."""
        self.folder = cache_location(folder)
        with bucket_errors(self.folder):
            self._check_finished()
        self.header = read_header(self.folder)
        for name, _ in self.header.shards:
            if pathlib.PurePath(name).name != name or name.startswith("."):
                raise UserError(f"{self.folder} names a file {name!r} elsewhere. Delete it and run prepare again.")
        if not in_bucket(self.folder):
            self._opened  # noqa: B018  (its files are checked now)
        self.check(**expected)

    def _check_finished(self) -> None:
        has_header = self.folder / HEADER if in_bucket(self.folder) else self.folder
        unfinished = self.folder / PREPARING if in_bucket(self.folder) else partial_folder(self.folder)
        if not has_header.exists() and unfinished.exists():
            raise UserError(f"{self.folder} is not finished. Run `dmm-jax prepare` again to complete it.")
        if not has_header.exists():
            raise UserError(f"there is no latent cache {self.folder}. Make it with `dmm-jax prepare` and this config.")

    @property
    def bucket_of(self) -> np.ndarray:
        """The number of each record's size bucket, uint8 (count,)."""
        return self._opened[1]

    def check(self, *, num_examples: int = 0, **expected: Any) -> None:
        """Refuses a cache that a run cannot use.

        Args:
            num_examples: the least number of examples that the run needs.
            expected: the values that the run needs, by field of `CacheHeader`.

        Raises:
            ValueError: lists every difference.
        """
        too_few = len(self) < num_examples
        problems = [
            *self.header.differences(**expected),
            too_few and f"count: expected at least {num_examples}, the cache has {len(self)}",
        ]
        refuse(f"{self.folder} does not fit this run; prepare another cache, `dmm-jax prepare`", problems)

    def split(self, num_held_out: int, unit: int = 1) -> tuple["CacheSlice", "CacheSlice"]:
        """Returns two sources: the examples to train on, and those held out, the last of each bucket.

        A bucket's share of `num_held_out` follows its examples, in multiples of `unit`; the largest has the rest.
        """
        if not 0 <= num_held_out < len(self):
            raise UserError(f"{self.folder} has {len(self)} examples; {num_held_out} cannot be held out.")
        counts = np.bincount(self.bucket_of, minlength=len(self.header.sizes))
        shares = np.full(1, num_held_out)
        if len(counts) > 1:
            shares = np.round(num_held_out * counts / len(self) / unit).astype(int) * unit
            largest = np.argmax(counts)
            shares[largest] = max(num_held_out - np.delete(shares, largest).sum(), 0)
        held_out = np.zeros(len(self), bool)
        for bucket, share in enumerate(shares):
            held_out[np.flatnonzero(self.bucket_of == bucket)[counts[bucket] - share :]] = True
        return CacheSlice(self, np.flatnonzero(~held_out)), CacheSlice(self, np.flatnonzero(held_out))

    def __len__(self) -> int:
        return self.header.count

    def __getitem__(self, index: int) -> CachedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a cache of {len(self)} examples")
        example = self.gather([index])
        return {name: rows[0] for name, rows in example.items()} | {"id": int(example["id"][0])}

    def gather(self, indices: Sequence[int] | np.ndarray) -> CachedExample:
        """Returns examples of one bucket at once, which is much quicker than one after another."""
        bucket = int(self.bucket_of[indices[0]])
        return decode_records(self.header, self._read(self._opened[0], indices, bucket), bucket)

    def __repr__(self) -> str:
        return f"LatentCache({str(self.folder)!r})"

    @functools.cached_property
    def _opened(self):
        """Returns the source of records, and the number of each record's size bucket."""
        header, paths, folder = self.header, [], self.folder
        if in_bucket(folder):
            names = [name for name, _ in header.shards]
            names += [buckets_file(name) for name in names if header.buckets]
            folder = copy_of(folder, names, dataclasses.asdict(header))
        for name, _ in header.shards:
            if not os.path.isfile(folder / name):
                raise UserError(f"{self.folder} lacks its file {name!r}. Delete the folder and run prepare again.")
            paths.append(str(folder / name))
        try:
            records = array_record_data_source.ArrayRecordDataSource(paths) if paths else []
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder} is damaged ({error}). Prepare the cache again.") from error
        if len(records) != header.count or sum(count for _, count in header.shards) != header.count:
            raise UserError(f"{self.folder} should hold {header.count} records; its files hold {len(records)}.")
        if not header.count:
            raise UserError(f"{self.folder} has no records. Prepare the cache again.")
        read_buckets = functools.partial(self._read_buckets, folder)
        bucket_of = np.concatenate([np.zeros(0, np.uint8), *map(read_buckets, header.shards)])
        self._read(records, [0], int(bucket_of[0]))
        return records, bucket_of

    def _read_buckets(self, folder: pathlib.Path, shard: tuple[str, int]) -> np.ndarray:
        """Returns the bucket's number of each record of a shard."""
        name, count = shard
        if not self.header.buckets:
            return np.zeros(count, np.uint8)
        path = folder / buckets_file(name)
        try:
            with open_regular(path) as stream:
                buckets = np.frombuffer(stream.read(count + 1), np.uint8)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error}). Delete the folder and run prepare again.") from error
        if len(buckets) != count or buckets.max(initial=0) > len(self.header.buckets):
            raise UserError(f"{path} is damaged. Delete the folder and run prepare again.")
        return buckets

    def _read(self, records, indices: Sequence[int] | np.ndarray, bucket: int) -> list[bytes]:
        expected = self.header.record_type(bucket).itemsize
        try:
            numbers = [int(index) for index in indices]
            several = len(numbers) > 1  # They are read by threads, whose start takes longer than one record.
            found = records.__getitems__(numbers) if several else [records[numbers[0]]]
            wrong = [k for k, record in enumerate(found) if len(record) != expected]
            if not wrong:
                return found
            index, error = indices[wrong[0]], f"{len(found[wrong[0]])} bytes instead of {expected}"
        except (RuntimeError, ValueError) as caught:  # array_record compares checksums.
            for index in indices if len(indices) > 1 else ():  # Finds the damaged record.
                self._read(records, [index], bucket)
            index, error = indices[0], " ".join(str(caught).split())[:300]
        raise UserError(f"{self.folder}: record {index} is damaged ({error}). Delete the folder and run prepare again.")


class CacheSlice:
    """Some examples of a cache, as a source."""

    def __init__(self, cache: LatentCache, indices: Sequence[int] | np.ndarray):
        """Selects the examples of these indices."""
        self.cache, self.indices = cache, np.asarray(indices)
        self.bucket_of = cache.bucket_of[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> CachedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a source of {len(self)} examples")
        return self.cache[int(self.indices[index])]

    def gather(self, indices: Sequence[int] | np.ndarray) -> CachedExample:
        """Returns examples of one bucket at once."""
        return self.cache.gather(self.indices[indices])


def buckets_file(shard: str) -> str:
    """Returns the name of the file that holds the bucket's numbers of a shard's records."""
    return shard.removesuffix(".array_record") + ".buckets"


def partial_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder in which a cache is written until it is complete."""
    return folder.with_name(folder.name + ".partial")
