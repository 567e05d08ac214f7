"""The latent cache: float16 latents and uint16 token ids in array_record files, described by one cache.json.

A record concatenates, little-endian: latents (C order), token ids, the image's frame, and its int64 id in the source.
The frame is four int32 in pixels: the image's original height and width, and top and left of the square that is cut
out after scaling. Stable Diffusion XL is conditioned on them (arXiv:2307.01952, section 2.2).
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any, TypedDict

import numpy as np
from array_record.python import array_record_data_source

from dmm_jax.data.files import open_regular
from dmm_jax.runtime.errors import UserError, refuse
from dmm_jax.runtime.storage import check_local

FORMAT = "dmm_jax latent cache 2"
LATENTS, TOKENS, FRAME, _ID = np.dtype("<f2"), np.dtype("<u2"), np.dtype("<i4"), np.dtype("<i8")
FRAME_BYTES = 4 * FRAME.itemsize
MAX_HEADER_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class CacheHeader:
    """The contents of cache.json: how the latents were made, and what a record holds."""

    vae: str  # Hash of the VAE's contents.
    tokenizer: str  # Hash of the tokenizer's files.
    resolution: int  # Pixels per side, after scaling the short side and cropping the centre.
    scaling_factor: float  # The VAE's; stored latents are multiplied by it.
    latent_shape: tuple[int, ...]  # (h, w, C)
    num_tokens: int  # Per prompt, over all tokenizers.
    source: str = ""  # Hash of the source of images; or teachers, prompts and sampler, as text.
    seed: int = 0  # For the posterior samples, or for the noise of the first picture.
    dtype: str = "float16"
    count: int = 0
    dropped: int = 0  # Images that could not be read.
    shards: tuple[tuple[str, int], ...] = ()  # (file name, records)

    @property
    def record_bytes(self) -> int:
        """The size of one record in bytes."""
        latents, tokens = LATENTS.itemsize * math.prod(self.latent_shape), TOKENS.itemsize * self.num_tokens
        return latents + tokens + FRAME_BYTES + _ID.itemsize

    def differences(self, **expected: Any) -> list[str]:
        """Returns one line for each field whose value is not the expected one."""
        return [
            f"{name}: expected {value!r}, the cache has {getattr(self, name)!r}"
            for name, value in expected.items()
            if getattr(self, name) != value
        ]


class CachedExample(TypedDict):
    """One record."""

    latents: np.ndarray  # float16 (h, w, C), scaled
    input_ids: np.ndarray  # int32 (num_tokens,)
    time_ids: np.ndarray  # int32 (6,): original height and width, top and left of the crop, target height and width
    id: int


def write_header(folder: pathlib.Path, header: CacheHeader, **extra: Any) -> None:
    """Writes cache.json, with `extra` fields; atomic, so that a reader never sees half a file."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(header), **extra}, indent=2)
    temporary = folder / "cache.json.tmp"
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, folder / "cache.json")


_IS_VALID = {  # By a field's type; a count of records fits into int64.
    str: lambda value: isinstance(value, str),
    int: lambda value: type(value) is int and 0 <= value < 2**63,
    float: lambda value: type(value) in (int, float) and 0 < value < math.inf,
    tuple[int, ...]: lambda value: len(value) == 3 and all(type(size) is int and size > 0 for size in value),
    tuple[tuple[str, int], ...]: lambda value: all(type(name) is str and type(count) is int for name, count in value),
}


def read_header(folder: pathlib.Path) -> tuple[CacheHeader, dict[str, Any]]:
    """Reads cache.json: the header, and the extra fields of `write_header`.

    Raises:
        ValueError: the file is missing, or `write_header` did not write it.
    """
    path = folder / "cache.json"
    try:
        with open_regular(path) as stream:
            raw = json.loads(stream.read(MAX_HEADER_BYTES).decode())
        if raw.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        fields = {field.name: raw.pop(field.name) for field in dataclasses.fields(CacheHeader)}
        wrong = [
            field.name for field in dataclasses.fields(CacheHeader) if not _IS_VALID[field.type](fields[field.name])
        ]
        if wrong:
            raise ValueError(f"wrong value of {', '.join(wrong)}")
        fields["latent_shape"] = tuple(fields["latent_shape"])
        fields["shards"] = tuple(map(tuple, fields["shards"]))
        return CacheHeader(**fields), raw
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is not the header of a latent cache ({reason}). Prepare the cache in a new folder."
        ) from error


def encode_record(latents: np.ndarray, input_ids: np.ndarray, frame: np.ndarray, image_id: int) -> bytes:
    """Packs one example into the bytes of its record."""
    parts = (latents.astype(LATENTS), input_ids.astype(TOKENS), frame.astype(FRAME), _ID.type(image_id))
    return b"".join(part.tobytes() for part in parts)


def decode_record(header: CacheHeader, record: bytes) -> CachedExample:
    """Unpacks one example from the bytes of its record."""
    num_latents = math.prod(header.latent_shape)
    tokens_at = num_latents * LATENTS.itemsize
    latents = np.frombuffer(record, LATENTS, num_latents).reshape(header.latent_shape)
    input_ids = np.frombuffer(record, TOKENS, header.num_tokens, tokens_at).astype(np.int32)
    frame = np.frombuffer(record, FRAME, 4, tokens_at + TOKENS.itemsize * header.num_tokens)
    return {
        "latents": latents,
        "input_ids": input_ids,
        "time_ids": np.array([*frame, header.resolution, header.resolution], np.int32),
        "id": int(np.frombuffer(record[-_ID.itemsize :], _ID)[0]),
    }


class LatentCache:
    """A finished cache: a random access source of `CachedExample`.

    Raises:
        ValueError: the cache is not finished, or its files do not match cache.json.
    """

    def __init__(self, folder: str | pathlib.Path, **expected: Any):
        """Opens a cache and checks it against `expected` (see `check`)."""
        self.folder = check_local(folder, "a latent cache")
        if not self.folder.exists() and partial_folder(self.folder).exists():
            raise UserError(f"{self.folder} is not finished. Run `dmm-jax prepare` again to complete it.")
        self.header, _ = read_header(self.folder)
        self._records = self._open_shards()
        self.check(**expected)

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

    def split(self, num_held_out: int) -> tuple["CacheSlice", "CacheSlice"]:
        """Returns two sources: the examples to train on, and the last `num_held_out` examples."""
        cut = len(self) - num_held_out
        if num_held_out < 0 or cut < 1:
            raise UserError(f"{self.folder} has {len(self)} examples; {num_held_out} cannot be held out.")
        return CacheSlice(self, 0, cut), CacheSlice(self, cut, len(self))

    def __len__(self) -> int:
        return self.header.count

    def __getitem__(self, index: int) -> CachedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a cache of {len(self)} examples")
        return decode_record(self.header, self._read(self._records, index))

    def __repr__(self) -> str:
        return f"LatentCache({str(self.folder)!r})"

    def _open_shards(self):
        header, paths = self.header, []
        for name, _ in header.shards:
            if pathlib.PurePath(name).name != name or not os.path.isfile(self.folder / name):
                raise UserError(f"{self.folder} lacks its file {name!r}. Delete the folder and run prepare again.")
            paths.append(str(self.folder / name))
        try:
            records = array_record_data_source.ArrayRecordDataSource(paths) if paths else []
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder} is damaged ({error}). Prepare the cache again.") from error
        if len(records) != header.count or sum(count for _, count in header.shards) != header.count:
            raise UserError(f"{self.folder} should hold {header.count} records; its files hold {len(records)}.")
        if not header.count:
            raise UserError(f"{self.folder} has no records. Prepare the cache again.")
        self._read(records, 0)
        return records

    def _read(self, records, index: int) -> bytes:
        try:
            record = records[index]
            if len(record) == self.header.record_bytes:
                return record
            error = f"{len(record)} bytes instead of {self.header.record_bytes}"
        except (RuntimeError, ValueError) as caught:  # array_record compares checksums.
            error = " ".join(str(caught).split())[:300]
        raise UserError(f"{self.folder}: record {index} is damaged ({error}). Delete the folder and run prepare again.")


class CacheSlice:
    """Consecutive examples of a cache, as a source."""

    def __init__(self, cache: LatentCache, start: int, stop: int):
        """Selects the examples `start` to `stop` - 1."""
        self.cache, self.start, self.stop = cache, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> CachedExample:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a source of {len(self)} examples")
        return self.cache[self.start + index]


def partial_folder(folder: pathlib.Path) -> pathlib.Path:
    """Returns the folder in which a cache is written until it is complete."""
    return folder.with_name(folder.name + ".partial")
