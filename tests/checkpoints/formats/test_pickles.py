"""A PyTorch checkpoint is refused with a command that converts it."""

import re
import subprocess
import sys

import numpy as np
import pytest

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.open import open_checkpoint

torch = pytest.importorskip("torch")


class Hook:
    """A trainer's object, which runs code when a pickle is opened."""

    def __reduce__(self):
        return print, ("the pickle's code ran",)


def convert(path) -> subprocess.CompletedProcess:
    """Runs the command that the refusal of a file prints."""
    with pytest.raises(CheckpointError) as refusal:
        open_checkpoint(path)
    command = re.search(r"python (-c .*\.safetensors'?) \(If", str(refusal.value))[1]
    return subprocess.run(f"{sys.executable} {command}", shell=True, capture_output=True, text=True, check=False)


def test_the_command_converts_the_tensors_below_state_dict(single, tmp_path):
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in TensorFile(single).items()}
    torch.save({"epoch": 3, "state_dict": tensors}, tmp_path / "my model.ckpt")
    assert convert(tmp_path / "my model.ckpt").returncode == 0
    before, after = (open_checkpoint(path).tensors("unet") for path in (single, tmp_path / "my model.safetensors"))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)


def test_the_command_runs_no_code_of_the_pickle(tmp_path):
    torch.save({"state_dict": {}, "hook": Hook()}, tmp_path / "a.ckpt")
    done = convert(tmp_path / "a.ckpt")
    assert done.returncode and "the pickle's code ran" not in done.stdout
    assert not (tmp_path / "a.safetensors").exists()
