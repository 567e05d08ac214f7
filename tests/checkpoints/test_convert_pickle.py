"""A PyTorch checkpoint becomes a safetensors file that opens, and no code of the pickle runs."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from dmm_jax.checkpoints.convert_pickle import convert
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.runtime.errors import UserError

torch = pytest.importorskip("torch")
RAN = []


def run(text):
    RAN.append(text)


class Callback:
    """A trainer's object, which runs code when a pickle is opened."""

    def __reduce__(self):
        return run, ("ran",)


def save(path, single, legacy=False):
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in TensorFile(single).items()}
    state = {"epoch": 3, "state_dict": tensors, "callbacks": {Callback: {"best": np.float64(1.0)}}, "hook": Callback()}
    torch.save(state if not legacy else {"state_dict": tensors}, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_line_that_the_error_prints_converts_the_file(single, tmp_path, legacy):
    path = tmp_path / "my model.ckpt"
    save(path, single, legacy)
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    command = shlex.split(re.search("python (-m .*)", str(refusal.value))[1])
    printed = subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout
    assert printed == f"{tmp_path / 'my model.safetensors'}\n"
    before, after = (open_checkpoint(file).tensors("unet") for file in (single, printed.strip()))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


def test_no_code_of_the_pickle_runs(single, tmp_path):
    save(tmp_path / "a.ckpt", single)
    RAN.clear()
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert RAN == ["ran"]
    convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert RAN == ["ran"]


def test_what_cannot_be_converted_is_refused_and_leaves_nothing(single, tmp_path):
    torch.save({"step": 3}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(b"\x80\x02.")
    for name, expected in (("a.pt", "holds no tensors by name; its first keys: step"), ("b.pt", "cannot be read")):
        with pytest.raises(CheckpointError, match=expected):
            convert(tmp_path / name, tmp_path / "out.safetensors")
    with pytest.raises(UserError, match="exists"):
        convert(tmp_path / "a.pt", single)
    assert sorted(path.name for path in tmp_path.glob("*.*") if path != single) == ["a.pt", "b.pt"]
