"""safetensors files: the reader returns memory-mapped views, the writer streams one tensor at a time and is atomic.

The reader enforces the format's own rules (header length, contiguous offsets, shape times dtype equals size, unique
keys, string metadata), and bounds that the format leaves open on the number and length of names.
"""

import hashlib
import json
import math
import mmap
import os
import pathlib
import shlex
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import float8
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import whole_file

DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32), "U64": np.dtype(np.uint64), "BOOL": np.dtype(bool), **float8.DTYPES,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# SDXL's header takes 0.4 MB, a LoRA's with its training metadata a few MB. Parsing takes about 25 times that in memory.
MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 100_000
MAX_NAME_CHARS = 1024
MAX_RESIDENT_BYTES = 2**26  # Bytes of one file that stay in the process's memory before its pages are released.
HASH_PLACEHOLDER = "0x" + 64 * "0"  # As a metadata value: `save` replaces it by the SHA-256 of all tensors' bytes.
# A shell's command, to which the pickle and the new file are added. PyTorch Lightning nests tensors in "state_dict".
CONVERSION = (
    'python -c "import sys, torch, safetensors.torch; source, out = sys.argv[1:]; '
    "read = torch.load(source, map_location='cpu', weights_only=True); read = read.get('state_dict', read); "
    "tensors = {name: value.clone() for name, value in read.items() if torch.is_tensor(value)}; "
    'safetensors.torch.save_file(tensors, out)"'
)

# {first bytes, without space and in lower case: (the format, what to do; "" for a pickle)}
OTHER_FORMATS = {
    (b"version https://git-lfs",): (
        "a pointer of git-LFS and not the file itself",
        "Fetch the file: `git lfs pull` in its repository, or download it.",
    ),
    (b"<!doctype", b"<html", b"<?xml"): (
        "a web page and not the file itself",
        "The download failed, perhaps for want of a login. Download the file again and compare its size.",
    ),
    (b'{"', b"{\n", b"{ ", b"{}", b"["): (
        "a JSON text",
        "Give the .safetensors file, or the folder of the whole model.",
    ),
    (b"gguf",): ("a quantised GGUF file", "Quantised weights are not read. Use the float16 safetensors of this model."),
    (b"pk\x03\x04",): ("a zip archive, as PyTorch's pickles are", ""),
    (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"): ("a pickle", ""),
    (b"\x1f\x8b", b"7z\xbc\xaf", b"rar!"): ("a compressed archive", "Unpack it and give the .safetensors file in it."),
}


class Entry(NamedTuple):
    """A tensor's entry in the header; `begin` and `end` count bytes after the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile(Mapping):
    """A safetensors file: `file[key]` is a view of the memory-mapped file. Opening reads the header only.

    Only float8 tensors are computed when they are read: in float16, or in float32 if the file holds a scale.

    Raises:
      CheckpointError: the file is missing, is a pickle, or breaks a rule of the format; the message names the rule.
    """

    def __init__(self, path: str | pathlib.Path):
        """Opens and checks `path`."""
        self.path = pathlib.Path(path)
        refuse_pickle(self.path)
        if not self.path.is_file():
            raise CheckpointError(f"there is no file {self.path}.")
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, self._start = _read_header(file, self.path, size)
            self.metadata = _metadata(self.path, header)
            self._entries = _entries(self.path, header, size - self._start)
            self._scales, self._hidden = float8.scales(self.path, self._entries)
            try:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except ValueError:
                raise _damaged(self.path, "it was cut short while it was opened") from None
        self._resident_bytes = 0

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._entries[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Returns the dtype in which a tensor is read, without reading it."""
        dtype = self._entries[key].dtype
        return np.dtype(np.float32 if key in self._scales else np.float16) if float8.is_float8(dtype) else dtype

    def is_computed(self, key: str) -> bool:
        """Tells whether reading a tensor computes it instead of mapping the file."""
        return float8.is_float8(self._entries[key].dtype)

    def __getitem__(self, key: str) -> np.ndarray:
        array = self._view(key)
        if not self.is_computed(key):
            return array
        return float8.decoded(array, self._view(self._scales[key]) if key in self._scales else None)

    def _view(self, key: str) -> np.ndarray:
        entry = self._entries[key]
        # A file that another program cuts short later, while the view is read, ends the process: nothing prevents it.
        if self._map.size() < self._start + entry.end:
            raise _damaged(self.path, "it was cut short after it was opened")
        self._resident_bytes += entry.end - entry.begin
        if self._resident_bytes > MAX_RESIDENT_BYTES:  # Views stay valid: they read released pages from disk again.
            self._map.madvise(mmap.MADV_DONTNEED)
            self._resident_bytes = entry.end - entry.begin
        flat = np.frombuffer(self._map, entry.dtype, math.prod(entry.shape), self._start + entry.begin)
        return flat.reshape(entry.shape)

    def __contains__(self, key) -> bool:
        return key in self._entries and key not in self._hidden

    def __iter__(self):
        return (key for key in self._entries if key not in self._hidden)

    def __len__(self) -> int:
        return len(self._entries) - len(self._hidden)

    @property
    def float8(self) -> str:
        """How many tensors are float8, in words; "" if none are."""
        return float8.summary(self._entries, self._scales)

    @property
    def num_bytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(entry.end - entry.begin for entry in self._entries.values())


def refuse_pickle(path: pathlib.Path) -> None:
    """Raises CheckpointError if a file's suffix is one that pickles have."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a {path.suffix} file; only .safetensors files are opened. {_conversion(path)}"
        )


def _conversion(path: pathlib.Path) -> str:
    """Returns sentences about how to convert a pickle."""
    out = path.with_name(f"{path.stem}{'_converted' if path.suffix == '.safetensors' else ''}.safetensors")
    files = " ".join(shlex.quote(str(file)) for file in (path, out))
    return (
        "It may hold a pickle, which could run code when it is opened, so it is not read. With PyTorch installed, this "
        f"converts it and runs no code of it: {CONVERSION} {files} (If it is refused, it holds more than tensors: ask "
        "its publisher for safetensors.)"
    )


def _damaged(path: pathlib.Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a sound safetensors file: {fault}. Fetch it again and compare its SHA-256.")


def refuse_other_formats(path: pathlib.Path, first_bytes: bytes) -> None:
    """Raises CheckpointError that names a file's format and what to do, if its first bytes show a known one."""
    for marks, (kind, advice) in OTHER_FORMATS.items():
        if first_bytes.lstrip().lower().startswith(marks):
            raise CheckpointError(f"{path} is {kind}. {advice or _conversion(path)}")


def _read_header(file: BinaryIO, path: pathlib.Path, size: int) -> tuple[dict, int]:
    """Returns the header as JSON, and the number of bytes before the first tensor."""
    prefix = file.read(64)
    length = int.from_bytes(prefix[:8], "little")
    if prefix[8:9] != b"{" or length + 8 > size:
        refuse_other_formats(path, prefix)
        if path.suffix == ".py" or (prefix and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in prefix)):
            raise CheckpointError(
                f"{path} is a text and not a checkpoint. Give the .safetensors file, or the folder of the whole model; "
                "an experiment (NAME.py) belongs to --config."
            )
    if len(prefix) < 8:
        raise _damaged(path, f"it has {size} bytes, less than the 8 that hold the header's length")
    if length + 8 > size:
        fault = f"its header claims {length} bytes, the file has {size}: truncated, or of another format"
        raise _damaged(path, fault)
    if length > MAX_HEADER_BYTES:
        raise _damaged(path, f"its header takes {length} bytes, no model's takes more than {MAX_HEADER_BYTES}")
    file.seek(8)
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise _damaged(path, "its header does not begin with '{'")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        raise _damaged(path, "its header is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not a JSON object with unique keys ({str(error)[:200]})") from None
    if len(header) > MAX_TENSORS:
        raise _damaged(path, f"it lists {len(header)} tensors, more than {MAX_TENSORS}")
    return header, length + 8


def _unique_keys(pairs: list[tuple]) -> dict:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise UserError("a key appears twice")
    return keys


def _metadata(path: pathlib.Path, header: dict) -> dict[str, str]:
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # Other readers accept null, too.
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata does not map text to text")
    return metadata


def _entries(path: pathlib.Path, header: dict, num_bytes: int) -> dict[str, Entry]:
    """Returns the checked entries of a header; tensors must fill `num_bytes` without a hole or an overlap."""
    entries = {}
    float8.refuse_quantised(path, header)
    for name, fields in header.items():
        if not name or len(name) > MAX_NAME_CHARS or not name.isprintable() or ".." in name:
            fault = f"is empty, longer than {MAX_NAME_CHARS}, or holds control characters or '..'"
            raise _damaged(path, f"a tensor's name {fault} ({name[:40]!r})")
        entries[name] = _entry(path, name, fields)
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            fault = f"tensor {name!r} begins at byte {entry.begin}, expected {position}: a hole or an overlap"
            raise _damaged(path, fault)
        position = entry.end
    if position != num_bytes:
        fault = f"its tensors need {position} bytes, the file holds {num_bytes}: truncated, or something follows"
        raise _damaged(path, fault)
    return entries


def _entry(path: pathlib.Path, name: str, fields) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of tensor {name!r} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(path, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_size(n) for n in shape):
        raise _damaged(path, f"the shape of tensor {name!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise _damaged(path, f"tensor {name!r} has no pair of byte offsets")
    begin, end = offsets
    if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
        raise _damaged(path, f"tensor {name!r} of shape {shape} and dtype {dtype} does not take {end - begin} bytes")
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _is_size(number) -> bool:
    return type(number) is int and 0 <= number < 2**63


class Computed(NamedTuple):
    """A tensor that a function computes whenever it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Tensors(Mapping):
    """A state dict that reads or computes one tensor at a time, on demand, and keeps none."""

    def __init__(self, entries: Mapping):
        """Takes {key: an object with `shape`, `dtype` and `read()`}, such as a place in a file, or `Computed`."""
        self._entries = dict(entries)

    def shape(self, key: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return self._entries[key].shape

    def dtype(self, key: str) -> np.dtype:
        """Returns a tensor's dtype without reading it."""
        return self._entries[key].dtype

    @property
    def computed(self) -> frozenset[str]:
        """The keys whose tensors a file holds in another form, so that each reading computes them."""
        return frozenset(key for key, entry in self._entries.items() if getattr(entry, "computed", False))

    def __getitem__(self, key: str) -> np.ndarray:
        return self._entries[key].read()

    def __iter__(self):
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def shape_of(tensors: Mapping, key: str) -> tuple[int, ...]:
    """Returns a tensor's shape; a `TensorFile` or `Tensors` does not read the tensor for it."""
    return tuple(tensors.shape(key)) if hasattr(tensors, "shape") else tuple(np.shape(tensors[key]))


def dtype_of(tensors: Mapping, key: str) -> np.dtype:
    """Returns a tensor's dtype; a `TensorFile` or `Tensors` does not read the tensor for it."""
    return np.dtype(tensors.dtype(key) if hasattr(tensors, "dtype") else tensors[key].dtype)


def num_bytes_of(tensors: Mapping, key: str) -> int:
    """Returns a tensor's size in bytes; a `TensorFile` or `Tensors` does not read the tensor for it."""
    return math.prod(shape_of(tensors, key)) * dtype_of(tensors, key).itemsize


def raw_bytes(array: np.ndarray) -> memoryview:
    """Returns an array's bytes in C order; a contiguous array is not copied."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def save_parts(folder: pathlib.Path, stem: str, tensors: Mapping, metadata: Mapping[str, str], max_bytes: int) -> None:
    """Writes `stem.safetensors`; above `max_bytes` instead `stem-00001-of-0000N.safetensors` ... and their index.

    Raises:
      ValueError: as `save`.
    """
    parts, sizes = [[]], [0]
    for key in sorted(tensors):
        size = num_bytes_of(tensors, key)
        if parts[-1] and sizes[-1] + size > max_bytes:
            parts.append([])
            sizes.append(0)
        parts[-1].append(key)
        sizes[-1] += size
    if len(parts) == 1:
        save(folder / f"{stem}.safetensors", tensors, metadata)
        return
    weight_map = {}
    for number, keys in enumerate(parts, start=1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors"
        _save(folder / name, tensors, keys, metadata)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def save(path: str | pathlib.Path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors sorted by key, one at a time; the file appears under its name when it is complete.

    Args:
      tensors: a dict, or a `TensorFile` or `Tensors`, which holds one tensor in memory at a time.
      metadata: text to text; the value `HASH_PLACEHOLDER` becomes "0x" and the SHA-256 of all bytes after the header.

    Raises:
      ValueError: the format does not have a tensor's dtype, or metadata is not text.
    """
    _save(pathlib.Path(path), tensors, sorted(tensors), metadata or {})


def _save(path: pathlib.Path, tensors: Mapping, keys: Sequence[str], metadata: Mapping[str, str]) -> None:
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise UserError("safetensors metadata must be text to text: json.dumps other values.")
    header = _header(tensors, keys, metadata)
    with whole_file(path, "xb") as file:
        file.write(header)
        digest = hashlib.sha256()
        for key in keys:
            raw = raw_bytes(tensors[key])
            file.write(raw)
            digest.update(raw)
        assert file.tell() == len(header) + sum(num_bytes_of(tensors, key) for key in keys)
        hashes = {name: f"0x{digest.hexdigest()}" for name, text in metadata.items() if text == HASH_PLACEHOLDER}
        file.seek(0)
        file.write(_header(tensors, keys, {**metadata, **hashes}))  # The header's length stays the same.


def _header(tensors: Mapping, keys: Sequence[str], metadata: Mapping[str, str]) -> bytes:
    header, position = ({"__metadata__": dict(metadata)} if metadata else {}), 0
    for key in keys:
        dtype, end = dtype_of(tensors, key), position + num_bytes_of(tensors, key)
        if dtype not in NAMES:
            raise UserError(f"tensor {key!r} has dtype {dtype}, which safetensors does not have. Convert it.")
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape_of(tensors, key)), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw
