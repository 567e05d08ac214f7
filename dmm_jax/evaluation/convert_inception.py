"""`python -m dmm_jax.evaluation.convert_inception PTH OUT`: the published Inception of FID as a safetensors file.

The published file is a pickle, so nothing but the one whose SHA-256 is known is opened. Needs the `[torch]` extra.
"""

import argparse
import hashlib
import io
import pathlib
import sys

import numpy as np

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation.inception import CONTENTS, PUBLISHED_SHA256, SOURCE, contents_sha256


def convert(source: str | pathlib.Path, out: str | pathlib.Path, sha256: str = PUBLISHED_SHA256) -> None:
    """Writes the tensors of a `.pth` as safetensors, with the hashes of the file and of the tensors as metadata.

    Args:
      sha256: of the file; no other is opened.

    Raises:
      CheckpointError: the file is another one.
      FileNotFoundError: there is no such file.
    """
    tensors = published_tensors(source, sha256, "pt_inception-2015-12-05-6726825d.pth")
    said = {"format": "pt", SOURCE: sha256, CONTENTS: contents_sha256(tensors)}
    safetensors_io.save(out, tensors, said)


def published_tensors(source: str | pathlib.Path, sha256: str, name: str) -> dict[str, np.ndarray]:
    """Returns the state dict of a pickle whose hash is known.

    Args:
      name: of the published file, for errors.

    Raises:
      CheckpointError: the file is another one.
      FileNotFoundError: there is no such file.
    """
    import torch

    raw = pathlib.Path(source).read_bytes()  # At most 244 MB; what is hashed is what is opened.
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"{source} has SHA-256 {found}; expected {sha256}, that of {name}. "
            "It is a pickle, so no other file is opened. Fetch it again."
        )
    state_dict = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    return {key: tensor.numpy() for key, tensor in state_dict.items()}


def main() -> int:
    """Converts; returns 0, or 1 for an error that was said on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", metavar="PTH", help="pt_inception-2015-12-05-6726825d.pth")
    parser.add_argument("out", metavar="OUT", help="a new .safetensors file")
    args = parser.parse_args()
    try:
        convert(args.source, args.out)
    except (ValueError, OSError) as error:
        print(f"convert_inception: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
