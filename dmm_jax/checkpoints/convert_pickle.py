"""Converts a PyTorch checkpoint to safetensors: `python -m dmm_jax.checkpoints.convert_pickle IN.ckpt OUT.safetensors`.

No code of the pickle runs: `torch.load(weights_only=True)` builds tensors and plain containers, and an object of any
other class, such as PyTorch Lightning's callbacks, becomes an empty `Skipped`. Needs the `[torch]` extra.
"""

import argparse
import os
import pathlib
import zipfile

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.naming import listed
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_output_file, part_of

NESTED = "state_dict"  # PyTorch Lightning keeps the tensors below this key, next to the state of the training.


class Skipped:
    """Takes the place of an object that is no tensor."""

    def __init__(self, *args):
        """Ignores the arguments."""

    def __setstate__(self, state):
        """Ignores the object's state."""


def convert(source: str | os.PathLike, out: str | os.PathLike) -> pathlib.Path:
    """Writes the tensors of a pickle as a safetensors file; returns its path.

    Raises:
      CheckpointError: the pickle is damaged, or holds no tensors.
      UserError: PyTorch is not installed, or `out` exists.
    """
    try:
        import safetensors.torch
        import torch
    except ImportError as error:
        raise UserError(f"converting needs PyTorch ({error.name} is missing): pip install 'dmm-jax[torch]'.") from error
    out = check_output_file(pathlib.Path(out))
    try:
        is_zip = zipfile.is_zipfile(source)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(source) if is_zip else []
        with torch.serialization.safe_globals([(type("Skipped", (Skipped,), {}), name) for name in names]):
            state = torch.load(source, map_location="cpu", weights_only=True)
    except (ValueError, RuntimeError, EOFError, LookupError, torch.serialization.pickle.UnpicklingError) as error:
        raise CheckpointError(f"{source} cannot be read: {str(error).splitlines()[0]} Fetch it again.") from error
    state = state.get(NESTED, state) if isinstance(state, dict) else {}
    tensors = {str(key): value.contiguous() for key, value in state.items() if torch.is_tensor(value)}
    if not tensors:
        raise CheckpointError(
            f"{source} holds no tensors by name; its first keys: {listed(list(map(str, state))[:5])}."
        )
    part = part_of(out)
    try:
        safetensors.torch.save_file(tensors, part, {"format": "pt"})
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return out


def main() -> None:
    """Converts the file that the command line names, and prints the new path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="a .ckpt, .pt, .pth or .bin file")
    parser.add_argument("out", metavar="OUT", help="a new .safetensors file")
    args = parser.parse_args()
    try:
        print(convert(args.source, args.out))
    except (UserError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
