"""Checkpoints of the Hugging Face hub, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`: fetched where that is written only.

huggingface_hub does it: what lies in its cache is not fetched again, and HF_HUB_OFFLINE=1 keeps it off the network.
"""

import pathlib
import re

from dmm_jax.checkpoints.abstract import COMPONENTS
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.naming import printable

PREFIX = "hf:"
_TEXT = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
# Of a diffusers folder: configs, weights (no pickles), tokenizers, and the card, which states the licence.
PATTERNS = (
    "model_index.json", "README.md", "scheduler/*.json", *(f"{name}/*.json" for name in COMPONENTS),
    *(f"{name}/*.safetensors" for name in COMPONENTS), "tokenizer/*.json", "tokenizer/merges.txt",
    "tokenizer_2/*.json", "tokenizer_2/merges.txt",
)  # fmt: skip
HALF = "*.fp16.*"  # A second copy of weights that are there, in most repositories; in some the only one.


def is_hub_id(path) -> bool:
    """Tells whether a path is one of the hub's, by how it begins."""
    return str(path).startswith(PREFIX)


def fetched(text) -> tuple[str, pathlib.Path]:
    """Returns a repository's name and the local folder of its checkpoint, fetched where the cache lacks it.

    Raises:
      CheckpointError: it is no such text, there is no such repository, or the network is off and the cache empty.
    """
    found = _TEXT.fullmatch(str(text))
    if not found:
        raise CheckpointError(
            f"{printable(str(text))!r} is no checkpoint of the hub. Write hf:OWNER/NAME or hf:OWNER/NAME@REVISION."
        )
    repository, revision = found.groups()
    import huggingface_hub  # When it is needed: it costs a second.

    def fetch(**options):
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision, allow_patterns=list(PATTERNS), **options
        )
        return pathlib.Path(folder)

    try:
        folder = fetch(ignore_patterns=[HALF])
        if not any((folder / "unet").glob("*.safetensors")):
            folder = fetch()
    except (OSError, ValueError) as error:
        said = printable(str(error), 500)
        raise CheckpointError(
            f"{text} cannot be fetched ({said}). Check the name, and that the network is there; or copy the checkpoint "
            "here yourself and give its path."
        ) from error
    return repository.partition("/")[2], folder
