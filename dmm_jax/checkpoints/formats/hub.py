"""Diffusers folders on the Hugging Face hub, `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`, and uploads to it.

Only text with this prefix, and `export --push`, make dmm_jax use the network. huggingface_hub fetches the files into
its own cache, once; with HF_HUB_OFFLINE=1 it reads the cache only.
"""

import contextlib
import contextvars
import pathlib
import re
from collections.abc import Iterator

from dmm_jax.checkpoints.abstract import COMPONENTS
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.naming import printable
from dmm_jax.runtime.errors import UserError

PREFIX = "hf:"
_HUB_ID = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
# The files that are fetched: configs, weights (no pickles), tokenizers, and the model card, which states the licence.
PATTERNS = (
    "model_index.json", "README.md", "scheduler/*.json", *(f"{name}/*.json" for name in COMPONENTS),
    *(f"{name}/*.safetensors" for name in COMPONENTS), "tokenizer/*.json", "tokenizer/merges.txt",
    "tokenizer_2/*.json", "tokenizer_2/merges.txt",
)  # fmt: skip
_URL = re.compile(r"https?:/+(?:(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+))?", re.ASCII)
_cache_only = contextvars.ContextVar("cache_only", default=False)
HALF = "*.fp16.*"  # In most repositories a second copy of the weights, in some the only one.


@contextlib.contextmanager
def cache_only() -> Iterator[None]:
    """Forbids the network while paths from a run's config.json are opened: the user did not type them."""
    token = _cache_only.set(True)
    try:
        yield
    finally:
        _cache_only.reset(token)


def refuse_url(path) -> None:
    """Raises CheckpointError for an address on the web; a model's page on the hub has a shorter name."""
    if match := _URL.match(str(path)):
        advice = f"Give hf:{match[1]}, or download" if match[1] else "Download"
        raise CheckpointError(
            f"{printable(str(path))} is a web address, which is not fetched. {advice} the checkpoint and give its path."
        )


def is_hub_id(path) -> bool:
    """Tells whether a path has the hub's prefix."""
    return str(path).startswith(PREFIX)


def fetch_folder(text) -> tuple[str, pathlib.Path]:
    """Returns the name of a repository and the local folder of its files; fetches files that the cache lacks.

    Raises:
      CheckpointError: the text is malformed, the repository does not exist, or the network is off and the cache empty.
    """
    match = _HUB_ID.fullmatch(str(text))
    if not match:
        raise CheckpointError(
            f"{printable(str(text))!r} is not a checkpoint on the hub. Write hf:OWNER/NAME or hf:OWNER/NAME@REVISION."
        )
    repository, revision = match.groups()
    import huggingface_hub  # Here, since the import takes a second.

    def download(**options):
        options |= {"local_files_only": _cache_only.get(), "allow_patterns": list(PATTERNS)}
        folder = huggingface_hub.snapshot_download(repository, revision=revision, **options)
        return pathlib.Path(folder)

    try:
        folder = download(ignore_patterns=[HALF])
        if not any((folder / "unet").glob("*.safetensors")):
            folder = download()
    except (OSError, ValueError) as error:
        if _cache_only.get():
            raise CheckpointError(
                f"{text} is named by a run's config.json and is not in the hub's cache: only a name that you type is "
                f"fetched. Run `dmm-jax inspect {text}` first."
            ) from error
        reason = printable(str(error), 500)
        raise CheckpointError(
            f"{text} cannot be fetched ({reason}). Check the name and the network; or copy the checkpoint here "
            "yourself and give its path."
        ) from error
    return repository.partition("/")[2], folder


def push_folder(folder: pathlib.Path, repository: str) -> str:
    """Uploads a folder to a model repository, which is made as a private one if it does not exist; returns its address.

    Raises:
      UserError: the name is not OWNER/NAME, or the hub refuses the upload.
    """
    check_repository(repository)
    import huggingface_hub

    try:
        interface = huggingface_hub.HfApi()
        interface.create_repo(repository, private=True, exist_ok=True)
        return str(interface.upload_folder(folder_path=str(folder), repo_id=repository))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} was not uploaded to {repository} ({printable(str(error), 500)}). It stays here. Log in with "
            "`hf auth login`, and repeat the upload with `hf upload`."
        ) from error


def check_repository(repository: str) -> None:
    """Raises UserError if a text is not the name of a repository, OWNER/NAME."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise UserError(f"--push is OWNER/NAME, the name of a repository on the hub; got {repository!r}.")
