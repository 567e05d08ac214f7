"""Opening any damaged file or folder ends in our own error, or in tensors of the shapes that its header states.

The tests are property-based: hypothesis chooses the damage to sound files, and shrinks a failing example. Opening
writes nothing, and its memory and time are bounded.
"""

import contextlib
import datetime
import json
import os
import pathlib
import resource
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import adapter_facts, lora, single_file
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.vae import with_vae
from tests import adapters, worlds

MAX_GROWTH_MB = 400
NUM_FILES = int(os.environ.get("DMM_JAX_FUZZ_FILES", "2000"))
NUM_ADAPTERS = int(os.environ.get("DMM_JAX_FUZZ_FILES", "300"))
ENDS = ("attn1.to_q.weight", "resnets.0.conv1.weight")  # A dense layer and a convolution.
HOSTILE_NAMES = [
    "../../x",
    "/etc/passwd",
    "..",
    "",
    "\0",
    "a" * 5000,
    "x\ny",
    "C:\\x",
    "\u202e",
    "__metadata__",
    "x/../y",
]
HOSTILE_NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 1.5, 1e308, True]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "", "f32", "C64"]

numbers = st.sampled_from(HOSTILE_NUMBERS) | st.integers(-10, 100_000)
scalars = st.none() | st.booleans() | numbers | st.text(max_size=20) | st.sampled_from(HOSTILE_NAMES)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES) | values,
        "shape": st.lists(numbers, max_size=5) | values,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | values,
    }
)


def bounded(max_examples: int) -> settings:
    deadline = datetime.timedelta(seconds=20)  # Only a hang takes so long; a file takes milliseconds.
    checks = list(HealthCheck)
    return settings(
        max_examples=max_examples, deadline=deadline, derandomize=True, database=None, suppress_health_check=checks
    )


def unpacked(raw: bytes):
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """Draws a damaged file: changes in its header's values, names and order, its length field, its bytes, its end."""
    header, data = unpacked(raw)
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(header)))
        kind = draw(st.sampled_from(["value", "field", "rename", "drop", "add", "metadata", "swap"]))
        if kind == "value":
            header[key] = draw(entries | values)
        elif kind == "field" and isinstance(header[key], dict) and header[key]:
            header[key] = header[key] | {draw(st.sampled_from(sorted(header[key]))): draw(values | st.lists(numbers))}
        elif kind == "rename":
            header[draw(st.sampled_from(HOSTILE_NAMES) | st.text(max_size=30))] = header.pop(key)
        elif kind == "drop" and len(header) > 1:
            header.pop(key)
        elif kind == "add":
            header[draw(st.sampled_from(HOSTILE_NAMES) | st.text(max_size=30))] = draw(entries)
        elif kind == "metadata":
            header["__metadata__"] = draw(values)
        else:
            other = draw(st.sampled_from(sorted(header)))
            header[key], header[other] = header[other], header[key]
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if draw(st.booleans()) and len(text) > 2:  # The same key twice, or any bytes within the text.
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(st.binary(max_size=8) | st.just(text[1:-1] + b",")) + text[place:]
    content = packed(text, data, draw(st.none() | st.integers(0, 2**64 - 1) | st.integers(0, len(text) + 8)))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(content) - 1))
        content = content[:place] + draw(st.binary(min_size=1, max_size=4)) + content[place + 1 :]
    return content[: draw(st.just(len(content)) | st.integers(0, len(content)))]


def read_all(file: TensorFile) -> None:
    for key in file:
        array = file[key]
        assert array.shape == file.shape(key) and array.dtype == file.dtype(key)
        assert array.nbytes <= 4 * file.path.stat().st_size  # A scaled float8 is read as float32.


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Yields a path in an empty folder; checks in the end that no other file is there."""
    folder = tmp_path_factory.mktemp("fuzz")
    yield folder / "inside" / "model.safetensors"
    assert [path.name for path in folder.iterdir()] == ["inside"]


def sound_bytes(folder: pathlib.Path) -> bytes:
    tensors = {"a.weight": np.ones((3, 2), np.float32), "b": np.zeros((0, 4), np.float16), "c": np.arange(5)}
    codes = np.ones((2, 3), ml_dtypes.float8_e4m3fn)
    tensors |= {"d.weight": codes, "d.scale_weight": np.ones((2, 1), np.float32), "scaled_fp8": codes[:0]}
    save(folder / "sound.safetensors", tensors, {"format": "pt"})
    return (folder / "sound.safetensors").read_bytes()


def test_thousands_of_damaged_files_are_read_or_refused(place, tmp_path):
    raw, counts = sound_bytes(tmp_path), {"sound": 0, "refused": 0}
    place.parent.mkdir(exist_ok=True)

    @bounded(NUM_FILES)
    @given(damaged(raw))
    def check(content):
        place.write_bytes(content)
        try:
            read_all(TensorFile(place))
            counts["sound"] += 1
        except CheckpointError as error:
            assert str(place) in str(error) and len(str(error)) < 3000
            counts["refused"] += 1
        assert [path.name for path in place.parent.iterdir()] == [place.name]

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MAX_GROWTH_MB
    assert sum(counts.values()) >= NUM_FILES
    assert counts["sound"] > NUM_FILES // 200 and counts["refused"] > NUM_FILES // 2


def test_damaged_single_files_are_opened_or_refused(place, tmp_path):
    raw = (worlds.write_world(tmp_path)["left"]).read_bytes()
    place.parent.mkdir(exist_ok=True)

    @bounded(500)
    @given(damaged(raw))
    def check(content):
        place.write_bytes(content)
        try:
            checkpoint = open_checkpoint(place, allow_unsupported=True)
            for component in checkpoint.components:
                checkpoint.params(component)
        except CheckpointError as error:
            assert len(str(error)) < 20_000

    check()


def adapter_bytes(base, folder: pathlib.Path) -> dict[str, bytes]:
    """Returns {kind: a sound adapter file} for a dense layer and a convolution of a base."""
    shapes, files = base.shapes("unet"), {}
    dense, conv = (next(key.removesuffix(".weight") for key in shapes if key.endswith(end)) for end in ENDS)
    for kind in adapters.factor_shapes(4, 4, (3, 3)):
        metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 2, "unet.alpha_pattern": {"to_q": 3}}'}
        save(folder / "sound.safetensors", adapters.random_adapter(kind, shapes, (dense, conv)), metadata)
        files[kind] = (folder / "sound.safetensors").read_bytes()
    return files


def test_damaged_adapters_of_every_kind_are_folded_or_refused(place, tmp_path):
    base = open_checkpoint(worlds.write_world(tmp_path)["base"])
    shapes, files = base.shapes("unet"), adapter_bytes(base, tmp_path)
    place.parent.mkdir(exist_ok=True)
    counts = {"sound": 0, "refused": 0}

    @bounded(NUM_ADAPTERS)
    @given(st.sampled_from(sorted(files)).flatmap(lambda kind: damaged(files[kind])))
    def check(content):
        place.write_bytes(content)
        try:
            folded = lora.with_loras(base, place, [(place, 0.5)]).tensors("unet")
            assert all(np.shape(folded[key]) == shapes[key] for key in getattr(folded, "computed", ()))
            counts["sound"] += 1
        except CheckpointError as error:
            assert len(str(error)) < 20_000
            counts["refused"] += 1
        with contextlib.suppress(CheckpointError):
            json.dumps(adapter_facts.facts(TensorFile(place)))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with np.errstate(all="ignore"):  # Damaged numbers overflow.
        for kind, content in files.items():
            place.write_bytes(content)
            assert lora.with_loras(base, place, [(place, 0.5)]).tensors("unet").computed, kind
        check()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < MAX_GROWTH_MB
    assert counts["sound"] > 0 and counts["refused"] > NUM_ADAPTERS // 3


def test_damaged_configs_of_peft_are_followed_or_refused(tmp_path):
    base = open_checkpoint(worlds.write_world(tmp_path)["base"])
    shapes = base.shapes("unet")
    layer = next(key.removesuffix(".weight") for key in shapes if key.endswith("to_q.weight"))
    out, into = shapes[f"{layer}.weight"]
    path = tmp_path / "adapter_model.safetensors"
    ends = {"lora_A": (2, into), "lora_B": (out, 2)}
    save(path, {f"base_model.model.{layer}.{end}.weight": np.ones(shape, np.float32) for end, shape in ends.items()})
    names = ("peft_type", "lora_alpha", "r", "use_rslora", "alpha_pattern", "rank_pattern", "fan_in_fan_out")
    patterns = st.dictionaries(
        st.sampled_from(["to_q", "^to_q$", "(a+)+$", ".*", layer]) | st.text(), values, max_size=3
    )

    @bounded(300)
    @given(st.dictionaries(st.sampled_from(names), values | patterns, max_size=5) | values)
    def check(config):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        try:
            folded = lora.with_loras(base, path, [(path, 0.5)]).tensors("unet")
            assert all(folded[key].shape == shapes[key] for key in folded.computed)
        except CheckpointError as error:
            assert len(str(error)) < 20_000

    with np.errstate(all="ignore"):
        check()


def test_damaged_vae_files_are_opened_or_refused(place, tmp_path):
    base = open_checkpoint(worlds.write_world(tmp_path)["base"])
    tensors = base.tensors("vae")
    bare = {single_file.vae_key(key, base.vae_config): np.array(tensors[key]) for key in tensors}
    save(tmp_path / "sound.safetensors", bare)
    place.parent.mkdir(exist_ok=True)

    @bounded(200)
    @given(damaged((tmp_path / "sound.safetensors").read_bytes()))
    def check(content):
        place.write_bytes(content)
        try:
            with_vae(base, place).params("vae")
        except CheckpointError as error:
            assert len(str(error)) < 20_000

    check()


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def test_damaged_folders_are_refused_and_open_no_file_elsewhere(tmp_path):
    base = worlds.write_world(tmp_path / "world")["base"]
    (tmp_path / "secret.safetensors").write_bytes((base / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
    (base / "unet" / "diffusion_pytorch_model.safetensors").rename(base / "unet" / "part-1.safetensors")
    keys = sorted(TensorFile(base / "unet" / "part-1.safetensors"))
    config = (base / "unet" / "config.json").read_text()
    parts = st.sampled_from(["part-1.safetensors", "../../secret.safetensors", str(tmp_path / "secret.safetensors")])
    maps = st.fixed_dictionaries({key: parts | scalars for key in keys[:3]}).map(
        lambda changes: {key: "part-1.safetensors" for key in keys} | changes
    )
    files = sorted(path for path in tmp_path.rglob("*"))

    @bounded(300)
    @given(
        st.fixed_dictionaries({}, optional={"weight_map": maps | values, "metadata": values}) | values,
        st.dictionaries(st.sampled_from(sorted(json.loads(config))), values, max_size=2),
    )
    def check(index, changes):
        (base / "unet" / INDEX).write_text(json.dumps(index))
        (base / "unet" / "config.json").write_text(json.dumps(json.loads(config) | changes))
        try:
            checkpoint = open_checkpoint(base, allow_unsupported=True)
            checkpoint.params("unet")
            assert all(path.resolve().is_relative_to(base) for path in checkpoint.files)
        except CheckpointError as error:
            assert len(str(error)) < 20_000

    check()
    assert sorted(path for path in tmp_path.rglob("*") if path.name != INDEX) == files
