"""Published pickles to one safetensors file; the commands are `convert_inception` and `convert_lpips`.

A pickle can run code, so only files with a known SHA-256 are opened. Needs the `[torch]` extra.
"""

import argparse
import hashlib
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation.published_weights import CONTENTS, SOURCE, PublishedFile, contents_sha256, source


def main(description: str, published: Mapping[str, PublishedFile], omitted: tuple[str, ...] = ()) -> int:
    """Runs a conversion as a command; returns 0, or 1 after it printed an error on stderr.

    Args:
      published: the files to convert, by the name of their argument.
      omitted: as in `convert`.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, file in published.items():
        parser.add_argument(name.lower(), metavar=name, help=file.name)
    parser.add_argument("out", metavar="OUT", help="a new .safetensors file")
    *paths, out = vars(parser.parse_args()).values()
    try:
        convert(paths, out, list(published.values()), omitted)
    except (ValueError, OSError) as error:
        print(f"{pathlib.Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(
    paths: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    published: Sequence[PublishedFile],
    omitted: tuple[str, ...] = (),
) -> None:
    """Writes the tensors of published pickles as one safetensors file, whose metadata holds the hashes of both.

    Args:
      paths: local copies of the `published` files, in the same order.
      omitted: tensors whose keys have one of these prefixes are left out.

    Raises:
      CheckpointError: a file is not the published one.
      FileNotFoundError: a file is missing.
    """
    tensors = {}
    for path, file in zip(paths, published, strict=True):
        tensors |= _read_pickle(path, file)
    tensors = {key: array for key, array in tensors.items() if not key.startswith(omitted)}
    metadata = {"format": "pt", SOURCE: source(published), CONTENTS: contents_sha256(tensors)}
    safetensors_io.save(out, tensors, metadata)


def _read_pickle(path: str | pathlib.Path, published: PublishedFile) -> dict[str, np.ndarray]:
    """Returns the state dict of a pickle, which must be the published one."""
    import torch

    content = pathlib.Path(
        path
    ).read_bytes()  # At most 244 MB; the bytes that are hashed are the bytes that are opened.
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != published.sha256:
        raise CheckpointError(
            f"{path} has SHA-256 {sha256}; expected {published.sha256}, that of {published.name}. "
            "It is a pickle, so no other file is opened. Fetch it again."
        )
    state_dict = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return {key: tensor.numpy() for key, tensor in state_dict.items()}
