"""float8 weights, alone and with either spelling of a scale, read as the numbers that they stand for."""

import ml_dtypes
import numpy as np
import pytest

from dmm_jax.checkpoints import write
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import float8
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, save
from dmm_jax.checkpoints.inspect import inspect
from dmm_jax.checkpoints.inspect_text import render
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.open_single_file import open_single_file
from dmm_jax.checkpoints.styles import fold_style
from dmm_jax.runtime.errors import UserError
from tests import families

UNET = "model.diffusion_model."
DENSE = f"{UNET}time_embed.0"
ROUNDING = 2.0**-4  # Half the distance of numbers with three bits after the first.
TINY = 2.0**-10  # Half the distance of its smallest numbers.


def tensors_of(path):
    file = TensorFile(path)
    return {key: np.array(file[key]) for key in file}


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_every_float8_number_reads_exactly(tmp_path, dtype):
    numbers = np.arange(256, dtype=np.uint8).view(dtype)
    save(tmp_path / "x.safetensors", {"x": numbers})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.dtype("x") == np.float16 and file.is_computed("x")
    np.testing.assert_array_equal(file["x"].astype(np.float64), numbers.astype(np.float64))
    assert file.float8 == f"1 tensors are {np.dtype(dtype)}, 0 of them with a scale"


@pytest.mark.parametrize("end", float8.SCALES)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_a_scale_multiplies_its_weight(tmp_path, end, shape):
    rng = np.random.default_rng(0)
    codes = rng.normal(0, 1, (6, 5)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.1, 2, shape).astype(np.float32)
    extra = {"x.scale_input": np.ones((), np.float32), "scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}
    save(tmp_path / "x.safetensors", {"x.weight": codes, f"x{end}": scale, "y": np.ones(2, np.float16)} | extra)
    file = TensorFile(tmp_path / "x.safetensors")
    assert sorted(file) == ["x.weight", "y"] and len(file) == 2 and f"x{end}" not in file
    expected = codes.astype(np.float32) * scale.reshape(-1, 1)
    np.testing.assert_array_equal(file["x.weight"], expected)
    assert file.dtype("x.weight") == np.float32


@pytest.mark.parametrize("end", float8.SCALES)
@pytest.mark.parametrize("shape", [(), (6,), (6, 1, 1, 1)])
def test_a_scale_per_output_multiplies_a_kernel(tmp_path, end, shape):
    codes = np.random.default_rng(0).normal(0, 1, (6, 6, 3, 3)).astype(ml_dtypes.float8_e5m2)
    scale = np.arange(1, 1 + np.prod(shape, dtype=int), dtype=ml_dtypes.bfloat16).reshape(shape)
    unused = {f"x{name}": np.ones((), np.float32) for name in (".input_scale", ".comfy_quant")}
    save(tmp_path / "x.safetensors", {"x.weight": codes, f"x{end}": scale} | unused)
    file = TensorFile(tmp_path / "x.safetensors")
    assert list(file) == ["x.weight"]
    expected = codes.astype(np.float32) * scale.astype(np.float32).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(file["x.weight"], expected)


def test_values_beyond_the_largest_are_the_largest():
    values = float8.encoded(np.array([-1e4, 1e4], np.float32), np.ones((), np.float32))
    assert values.astype(np.float32).tolist() == [-float8.MAX_E4M3, float8.MAX_E4M3]


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"x.weight": np.ones((2, 3), np.int8), "x.weight_scale": np.ones((), np.float32)}, "is quantised"),
        ({"x.scale_weight": np.ones((), np.float32)}, "is quantised"),
        ({"x.weight": "codes", "x.scale_weight": np.ones((2, 3), np.float32)}, "not the only scale"),
        ({"x.weight": "codes", "x.scale_weight": np.ones(3, np.float32)}, "not the only scale"),  # One per input.
        ({"x.weight": "codes", "x.weight_scale": np.ones((), ml_dtypes.float8_e4m3fn)}, "not the only scale"),
        ({"x.weight": "codes", "x.scale_weight": np.ones((), np.int32)}, "not the only scale"),
        (
            {"x.weight": "codes", "x.scale_weight": np.ones((), np.float32), "x.weight_scale": np.ones((), np.float32)},
            "not the only scale",
        ),
        ({"x.weight": "codes", "x.weight_scale_inv": np.ones((), np.float32)}, "is quantised"),
    ],
)
def test_other_scales_are_refused(tmp_path, tensors, message):
    codes = np.ones((2, 3), ml_dtypes.float8_e4m3fn)
    save(
        tmp_path / "x.safetensors",
        {name: codes if isinstance(array, str) else array for name, array in tensors.items()},
    )
    with pytest.raises(CheckpointError, match=message):
        TensorFile(tmp_path / "x.safetensors")


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """(a stock checkpoint, its single file in float32, its single file in float8)."""
    out = tmp_path_factory.mktemp("float8")
    stock = fold_style(families.random_student(open_checkpoint(folder)), np.array([0.7, 0.3], np.float32))
    paths = [
        write.write_single_file(out / f"{dtype}.safetensors", stock, dtype, families.RECIPE)
        for dtype in ("float32", write.FLOAT8)
    ]
    return stock, *paths


def test_an_export_in_float8_reads_back_to_its_rounding(exported):
    stock, single, scaled = exported
    expected, file = tensors_of(single), TensorFile(scaled)
    dense = [key for key in file if file.is_computed(key)]
    assert set(dense) == {
        key for key, array in expected.items() if key.startswith(UNET) and array.ndim == 2 and key.endswith(".weight")
    }
    for key in dense:
        bound = ROUNDING * np.abs(expected[key]) + TINY * np.abs(expected[key]).max() / float8.MAX_E4M3
        assert (np.abs(file[key] - expected[key]) <= bound).all()
    rest = [key for key in file if key not in dense]
    assert all(file.dtype(key) == np.float16 for key in rest if expected[key].dtype.kind == "f" and expected[key].size)
    reopened = open_single_file(scaled)
    assert reopened.shapes("unet") == stock.shapes("unet")
    assert "time_embedding.linear_1.weight" in reopened.tensors("unet").computed
    leaf = reopened.params("unet")["time_embedding"]["linear_1"]["kernel"]
    np.testing.assert_array_equal(np.asarray(leaf).T, file[f"{DENSE}.weight"])


def test_inspect_says_what_is_float8(exported):
    report = inspect([exported[2]])
    assert report["mergeable"] and "float8_e4m3fn" in report["checkpoints"][0]["float8"]
    assert "float8: " in render(report)


def test_a_layer_of_zeros_has_a_scale_of_one():
    zeros = np.zeros((2, 2), np.float32)
    assert float8.scale_for(zeros) == 1 and not float8.encoded(zeros, float8.scale_for(zeros)).astype(np.float32).any()


def test_a_scaled_nan_is_damage(exported, tmp_path):
    raw = bytearray(exported[2].read_bytes())
    place = raw.find(float8.scale_for(TensorFile(exported[1])[f"{DENSE}.weight"]).tobytes())
    raw[place : place + 4] = np.float32(np.nan).tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="NaN or infinity in .*weight"):
        open_single_file(path).params("unet")


def test_float8_is_for_single_files_alone(folder, tmp_path):
    from dmm_jax.checkpoints.average import average
    from dmm_jax.checkpoints.export import export

    with pytest.raises(UserError, match="float8_e4m3fn for single-file alone"):
        export(folder, tmp_path / "out", ["diffusers"], "x", write.FLOAT8)
    with pytest.raises(UserError, match="float8_e4m3fn for a single file"):
        average(tmp_path / "out", folder, [folder], "average", dtype=write.FLOAT8)
