"""The reader accepts exactly the sound files; the writer leaves complete files only."""

import functools
import hashlib
import json
import os
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import float8, safetensors_io
from dmm_jax.checkpoints.formats.safetensors_io import (
    DTYPES,
    HASH_PLACEHOLDER,
    MAX_TENSORS,
    Computed,
    TensorFile,
    Tensors,
    save,
)

ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
RAW = json.dumps(ONE).encode()
BYTES = b"\0\0\0\0"


def packed(header, data=BYTES, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(**changes):
    return packed({"x": ONE | changes})


MALFORMED = {
    "empty": (b"", "0 bytes"),
    "shorter than its length field": (b"\1\0\0", "3 bytes"),
    "header beyond the file": (packed({"x": ONE}, length=10_000), "truncated"),
    "length 2^62": (packed({"x": ONE}, length=2**62), "claims"),
    "length over the limit": (packed({"x": ONE}, length=100_000_001), "claims"),
    "leading space": (packed(b" " + json.dumps({"x": ONE}).encode()), "begin with"),
    "an array": (packed(b"[]"), "begin with"),
    "not JSON": (packed(b'{"x": '), "not a JSON"),
    "UTF-16": (packed(json.dumps({"x": ONE}).encode("utf-16-le")), "not a JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "UTF-8"),
    "deep nesting": (packed(b'{"x":' + b"[" * 200_000), "not a JSON"),
    "key twice, equal": (packed(b'{"x":%b,"x":%b}' % (RAW, RAW)), "twice"),
    "key twice": (packed(b'{"x":%b,"x":%b}' % (RAW, RAW.replace(b"[0, 4]", b"[4, 8]")), BYTES * 2), "twice"),
    "entry key twice": (packed(b'{"x":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "twice"),
    "truncated data": (packed({"x": ONE}, b"\0\0"), "hold"),
    "trailing bytes": (packed({"x": ONE}, BYTES + b"PK\3\4"), "follows"),
    "overlap": (packed({"x": ONE, "y": ONE | {"data_offsets": [2, 6]}}, b"\0" * 6), "overlap"),
    "same place twice": (packed({"x": ONE, "y": ONE}), "overlap"),
    "hole": (packed({"x": ONE, "y": ONE | {"data_offsets": [8, 12]}}, b"\0" * 12), "hole"),
    "does not start at 0": (packed({"x": ONE | {"data_offsets": [4, 8]}}, b"\0" * 8), "hole"),
    "shape against size": (entry(shape=[2]), "does not take 4 bytes"),
    "shape overflow": (entry(shape=[2**62, 4]), "does not take 4 bytes"),
    "shape wraps to the size": (entry(shape=[2**32 + 1, 2**32]), "does not take"),
    "negative size": (entry(shape=[-1]), "list of sizes"),
    "fractional size": (entry(shape=[1.0]), "list of sizes"),
    "boolean size": (entry(shape=[True]), "list of sizes"),
    "shape is text": (entry(shape="1"), "list of sizes"),
    "negative offset": (entry(data_offsets=[-4, 0]), "byte offsets"),
    "swapped offsets": (entry(data_offsets=[4, 0]), "does not take -4 bytes"),
    "three offsets": (entry(data_offsets=[0, 2, 4]), "byte offsets"),
    "unknown dtype": (entry(dtype="F5"), "unknown dtype"),
    "four-bit floats": (packed({"x": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}), "is quantised"),
    "a scaled weight": (packed({"x.scale_weight": ONE}), "is quantised"),
    "a state of bitsandbytes": (packed({"x.weight.absmax": ONE}), "is quantised"),
    "dtype is a list": (entry(dtype=["F32"]), "unknown dtype"),
    "eight-bit exponents": (packed({"x": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}), "is quantised"),
    "entry lacks a field": (packed({"x": {"dtype": "F32", "shape": [1]}}), "data_offsets"),
    "entry has a field more": (entry(offset=1), "data_offsets"),
    "entry is not an object": (packed({"x": 1}), "data_offsets"),
    "long header": (packed({"x": ONE, "__metadata__": {"a": 17 * 10**6 * "a"}}), "no model's takes more"),
    "metadata is a list": (packed({"__metadata__": [], "x": ONE}), "text to text"),
    "metadata holds a number": (packed({"__metadata__": {"step": 1}, "x": ONE}), "text to text"),
    "name climbs": (packed({"../../x": ONE}), "name"),
    "name climbs backwards": (packed({"..\\x": ONE}), "name"),
    "name with an escape sequence": (packed({"\x1b[31mx": ONE}), "name"),
    "name with a newline": (packed({"a\nb": ONE}), "name"),
    "name without end": (packed({"x" * 5000: ONE}), "name"),
    "name is empty": (packed({"": ONE}), "name"),
    "name is half a character": (packed(b'{"\\ud800":%b}' % RAW), "name"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_and_the_fault_is_named(tmp_path, case):
    raw, fault = MALFORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=fault) as caught:
        TensorFile(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


# The safetensors package accepts these; we refuse names that control terminals or leave folders, and ambiguous files.
STRICTER = {
    "a scaled weight", "a state of bitsandbytes", "four-bit floats",
    "long header", "leading space", "key twice, equal", "eight-bit exponents", "entry has a field more", "name climbs",
    "name climbs backwards", "name with an escape sequence", "name with a newline", "name without end", "name is empty",
}  # fmt: skip


def read_by_the_package(path):
    """Returns the keys that the safetensors package reads, or None if it refuses the file."""
    safetensors = pytest.importorskip("safetensors")
    try:
        with safetensors.safe_open(path, "np") as file:
            return set(file.keys())
    except safetensors.SafetensorError:
        return None


def test_the_package_refuses_the_same_files_except_the_stricter_cases(tmp_path):
    accepted = set()
    for case, (raw, _) in MALFORMED.items():
        (tmp_path / "x.safetensors").write_bytes(raw)
        if read_by_the_package(tmp_path / "x.safetensors") is not None:
            accepted.add(case)
    assert accepted == STRICTER


SPLICED = [b"0", b"1", b"-", b"e3", b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b'"U8"', b"NaN", b"\xff"]


def mutated(sound, header_end, rng):
    """Returns a file with one to three small faults in its header, and a correct length field."""
    raw, num_data = bytearray(sound), len(sound) - header_end
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(8, header_end))
        match rng.integers(4):
            case 0:
                raw[place : place + 1] = bytes([rng.integers(256)])
            case 1:
                raw[place : place + int(rng.integers(0, 3))] = SPLICED[rng.integers(len(SPLICED))]
            case 2:
                del raw[place : place + int(rng.integers(1, 6))]
            case 3:
                digits = [i for i in range(8, len(raw) - num_data) if chr(raw[i]).isdecimal()]
                raw[digits[rng.integers(len(digits))]] = ord("0") + int(rng.integers(10))
    raw[:8] = struct.pack("<Q", max(len(raw) - 8 - num_data, 0))
    return bytes(raw)


def test_mutated_files_are_refused_or_read_as_the_package_reads_them(tmp_path):
    path, rng, outcomes = tmp_path / "x.safetensors", np.random.default_rng(0), set()
    save(path, {"a": np.ones((2, 3), np.float32), "b.weight": np.ones(3, np.float16), "c": np.zeros((0, 4), np.int64)})
    sound = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", sound[:8])[0]
    for _ in range(1000):
        raw = mutated(sound, header_end, rng)
        path.write_bytes(raw)
        package_keys = read_by_the_package(path)
        try:
            keys = set(TensorFile(path))
        except CheckpointError:
            keys = None
        assert keys is None or keys == package_keys, raw
        outcomes.add((keys is None, package_keys is None))
    assert {(True, True), (False, False)} <= outcomes


def test_too_many_tensors_are_refused(tmp_path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({str(number): empty for number in range(MAX_TENSORS + 1)}, b""))
    with pytest.raises(CheckpointError, match="more than"):
        TensorFile(path)


def test_every_truncation_of_a_file_is_refused(tmp_path):
    path, cut = tmp_path / "x.safetensors", tmp_path / "cut.safetensors"
    save(path, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}, {"format": "pt"})
    complete = path.read_bytes()
    for length in range(len(complete)):
        cut.write_bytes(complete[:length])
        with pytest.raises(CheckpointError):
            TensorFile(cut)


@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".pth", ".bin", ".CKPT"])
def test_pickles_are_refused_unopened_with_the_way_to_convert(tmp_path, ending):
    path = tmp_path / f"model{ending}"  # The file does not exist: its suffix decides.
    with pytest.raises(CheckpointError, match="weights_only"):
        TensorFile(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no file .*gone\.safetensors"):
        TensorFile(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("name", sorted(set(DTYPES) - set(float8.DTYPES)))
def test_tensors_come_back_bit_for_bit(tmp_path, name):
    raw = np.random.default_rng(0).integers(0, 2, (3, 5, 8), np.uint8)
    array = raw.view(DTYPES[name])
    save(tmp_path / "x.safetensors", {"b.weight": array, "a": np.zeros((0, 4), DTYPES[name])}, {"title": "ü"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert dict(file.metadata) == {"title": "ü"}
    assert list(file) == ["a", "b.weight"] and file.shape("a") == (0, 4)
    assert file["b.weight"].dtype == file.dtype("b.weight") == DTYPES[name]
    assert file["b.weight"].tobytes() == array.tobytes()


def test_reading_copies_nothing_and_cannot_write(tmp_path):
    save(tmp_path / "x.safetensors", {"x": np.ones(4, np.float16)})
    file = TensorFile(tmp_path / "x.safetensors")
    assert np.shares_memory(file["x"], file["x"])
    with pytest.raises(ValueError, match="read-only"):
        file["x"][0] = 2.0


def test_pytorchs_reader_and_ours_agree_on_both_writers_files(tmp_path):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("safetensors.torch")
    tensors = {
        "odd": np.ones(3, np.float16),
        "scale": np.full(2, 0.5, np.float32),
        "b": np.ones(3, ml_dtypes.bfloat16),
        "v_pred": np.zeros(0, np.float32),
    }
    save(tmp_path / "ours.safetensors", tensors, {"format": "pt"})
    loaded = package.load_file(tmp_path / "ours.safetensors")
    package.save_file(loaded, tmp_path / "package.safetensors", {"format": "pt"})
    file = TensorFile(tmp_path / "package.safetensors")
    assert set(loaded) == set(tensors) == set(file)
    assert loaded["b"].dtype == torch.bfloat16
    for key, array in tensors.items():
        assert file[key].dtype == array.dtype and file[key].tobytes() == array.tobytes()


def test_the_contents_hash_is_of_the_bytes_after_the_header(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float16).reshape(2, 3).T, "a": np.zeros(0, np.float32), "c": np.ones(1)}
    save(tmp_path / "x.safetensors", tensors, {"format": "pt", "hash": HASH_PLACEHOLDER})
    raw = (tmp_path / "x.safetensors").read_bytes()
    contents = raw[8 + struct.unpack("<Q", raw[:8])[0] :]
    expected = {"format": "pt", "hash": "0x" + hashlib.sha256(contents).hexdigest()}
    assert TensorFile(tmp_path / "x.safetensors").metadata == expected


def test_computed_tensors_are_written_one_at_a_time(tmp_path):
    arrays, computed = [], []

    def compute(key):
        assert sum(array() is not None for array in arrays) <= 1  # The previous one, which the writer has finished.
        computed.append(key)
        array = np.full((2, 3), len(computed), np.float16)
        arrays.append(weakref.ref(array))
        return array

    entries = {key: Computed((2, 3), np.dtype(np.float16), functools.partial(compute, key)) for key in "cab"}
    save(tmp_path / "x.safetensors", Tensors(entries), {"hash": HASH_PLACEHOLDER})
    file = TensorFile(tmp_path / "x.safetensors")
    assert computed == ["a", "b", "c"] and [file[key][0, 0] for key in "abc"] == [1, 2, 3]


def test_views_stay_valid_after_their_pages_are_released(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "MAX_RESIDENT_BYTES", 100)
    tensors = {str(number): np.full(20, number, np.float32) for number in range(5)}
    save(tmp_path / "x.safetensors", tensors)
    file = TensorFile(tmp_path / "x.safetensors")
    views = {key: file[key] for key in file}
    assert all(np.array_equal(views[key], tensors[key]) for key in tensors)


def test_strided_and_scalar_tensors_are_written_in_order(tmp_path):
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    save(tmp_path / "x.safetensors", {"t": array.T, "s": np.array(3.0, np.float32)})
    file = TensorFile(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(file["t"], array.T)
    assert file.shape("s") == () and file["s"] == 3.0


@pytest.mark.parametrize("dtype, metadata", [(np.complex64, None), (np.float32, {"step": 1})])
def test_dtypes_and_metadata_outside_the_format_are_refused(tmp_path, dtype, metadata):
    with pytest.raises((ValueError, TypeError), match="safetensors"):  # Or the annotations.
        save(tmp_path / "x.safetensors", {"x": np.zeros(2, dtype)}, metadata)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save(path, {"x": np.zeros(2, np.float32)})
    before = path.read_bytes()

    class Breaks(dict):
        reads = 0

        def __getitem__(self, key):
            Breaks.reads += 1
            if Breaks.reads > 1:
                raise OSError("disk full")
            return super().__getitem__(key)

    with pytest.raises(OSError, match="disk full"):
        save(path, Breaks(x=np.ones(2, np.float32)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_null_metadata_is_empty_as_in_the_safetensors_package(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(packed({"__metadata__": None, "x": ONE}))
    file = TensorFile(tmp_path / "x.safetensors")
    assert dict(file.metadata) == {} and list(file) == ["x"]
    with pytest.importorskip("safetensors").safe_open(tmp_path / "x.safetensors", "np") as package_file:
        assert not package_file.metadata() and list(package_file.keys()) == ["x"]


OTHER_FILES = {
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": "pointer of git-LFS.*git lfs pull",
    b"\n<!DOCTYPE html><html></html>": "web page.*Download the file again",
    b'{"error": "gated"}': "JSON text",
    b"GGUF\3\0\0\0\0\0\0\0\0": "quantised GGUF",
    b"PK\3\4\x14\0\0\0\0\0": "zip archive.*weights_only",
    b"\x80\4\x95\0\0\0\0\0\0\0\0": "pickle.*weights_only",
    b"\x1f\x8b\0\0\0\0\0\0\0\0": "compressed archive",
}


@pytest.mark.parametrize("raw", OTHER_FILES)
def test_the_first_bytes_tell_what_another_file_is(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    for content in (raw, raw.ljust(100, b"\0")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"x.safetensors is a {OTHER_FILES[raw]}"):
            TensorFile(path)


def test_a_mapped_file_that_was_cut_short_is_an_error(tmp_path):
    save(tmp_path / "x.safetensors", {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)})
    file = TensorFile(tmp_path / "x.safetensors")
    os.truncate(file.path, file.path.stat().st_size - 4)
    assert file["a"].sum() == 4
    with pytest.raises(CheckpointError, match="cut short after it was opened"):
        file["b"]
