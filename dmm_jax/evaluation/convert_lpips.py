"""`python -m dmm_jax.evaluation.convert_lpips ALEXNET LINEAR OUT`: LPIPS's published weights as one safetensors file.

Both are pickles, so nothing but the files whose SHA-256 is known is opened. Needs the `[torch]` extra.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from dmm_jax.checkpoints.formats import safetensors_io
from dmm_jax.evaluation.convert_inception import published_tensors
from dmm_jax.evaluation.inception import CONTENTS, SOURCE, contents_sha256
from dmm_jax.evaluation.lpips import PUBLISHED_SHA256

NAMES = ("alexnet-owt-7be5be79.pth of torchvision", "weights/v0.1/alex.pth of the package lpips 0.1.4")
CLASSIFIER = "classifier."  # Of AlexNet; LPIPS looks at what lies before it.


def convert(
    sources: Sequence[str | pathlib.Path], out: str | pathlib.Path, sha256: Sequence[str] = PUBLISHED_SHA256
) -> None:
    """Writes the tensors of both `.pth` as safetensors, with the hashes of the files and of the tensors as metadata.

    Args:
      sources: AlexNet's file and the linear layers'.
      sha256: of the two; no others are opened.

    Raises:
      CheckpointError: a file is another one.
      FileNotFoundError: there is no such file.
    """
    tensors = {}
    for source, expected, name in zip(sources, sha256, NAMES, strict=True):
        tensors |= published_tensors(source, expected, name)
    tensors = {key: array for key, array in tensors.items() if not key.startswith(CLASSIFIER)}
    said = {"format": "pt", SOURCE: " ".join(sha256), CONTENTS: contents_sha256(tensors)}
    safetensors_io.save(out, tensors, said)


def main() -> int:
    """Converts; returns 0, or 1 for an error that was said on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("alexnet", metavar="ALEXNET", help=NAMES[0])
    parser.add_argument("linear", metavar="LINEAR", help=NAMES[1])
    parser.add_argument("out", metavar="OUT", help="a new .safetensors file")
    args = parser.parse_args()
    try:
        convert((args.alexnet, args.linear), args.out)
    except (ValueError, OSError) as error:
        print(f"convert_lpips: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
