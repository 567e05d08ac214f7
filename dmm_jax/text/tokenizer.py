"""Prompts to token ids: CLIP's byte-level BPE, read from a checkpoint's own files (arXiv:2103.00020, section 2.4)."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int

from dmm_jax.runtime.errors import UserError
from dmm_jax.text.vocabulary import BUNDLED, read_words

DEFAULT_MAX_LENGTH = 77
NO_PROMPT = -1  # The id that fills the row of a prompt that is not there.
_UNSET_LENGTH = 10**6  # transformers says 1e30 where a config names no length.
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """Turns prompts into rows of token ids of one length, as Stable Diffusion's text encoders expect them."""

    def __init__(self, clip_tokenizer):
        """Wraps a `transformers.CLIPTokenizer`; see `from_folder`.

        Raises:
          ValueError: a special token is not in the vocabulary, so that the text encoder has no row for it.
        """
        vocab = clip_tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        tokens = {name: getattr(clip_tokenizer, name) for name in _TOKENS}
        missing = [f"{name} {token!r}" for name, token in tokens.items() if token not in vocab]
        if missing:
            raise UserError(
                f"the vocabulary ({len(vocab)} tokens) lacks {', '.join(missing)}; "
                "use the vocab.json and the tokenizer_config.json of one and the same checkpoint."
            )
        length = clip_tokenizer.model_max_length
        self.max_length = length if length < _UNSET_LENGTH else DEFAULT_MAX_LENGTH
        self._tokenizer = clip_tokenizer

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer` folder, old or new (see `vocabulary`), and what pads from tokenizer_config.json.

        Raises:
          ValueError: the folder or one of its files is missing, or they do not fit together.
        """
        folder = Path(path)
        words = read_words(folder)
        if folder.parent == BUNDLED:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            return cls(_clip_tokenizer_class()(vocab=words.vocabulary, merges=words.merges, **config))
        tokenizer = _read(folder, _clip_tokenizer_class().from_pretrained, folder, local_files_only=True)
        for name in ("local_files_only", "is_local"):  # How it was opened is no part of it: `save` would write it down.
            tokenizer.init_kwargs.pop(name, None)
        return cls(tokenizer)

    @property
    def pad_id(self) -> int:
        """The id that fills a row: the end token's in Stable Diffusion 1, "!" (0) in the OpenCLIP encoders' folders."""
        return self._tokenizer.pad_token_id

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included: a text encoder needs as many rows."""
        return len(self._tokenizer)

    def __call__(self, prompts: Sequence[str | None]) -> Int[np.ndarray, "B L"]:
        """Returns int32 ids: start, the prompt, end, padding; None is "".

        A prompt that is too long is cut at the end, with a warning that quotes the lost text.

        Raises:
          ValueError: a lone string where a sequence of them is expected.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a sequence of strings; got one string. Use [{prompts[:40]!r}].")
        rows = np.full((len(prompts), self.max_length), self.pad_id, np.int32)
        for row, prompt in zip(rows, prompts, strict=True):
            ids = self._ids(prompt or "")
            row[: len(ids)] = ids
        return rows

    def _ids(self, prompt: str) -> list[int]:
        tokenizer, room = self._tokenizer, self.max_length - 2
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        if len(ids) > room:
            warnings.warn(
                f"a prompt of {len(ids)} tokens was cut to {room} (rows hold {self.max_length} with start and end); "
                f'lost: "{prompt[encoded["offset_mapping"][room][0] :]}"',
                stacklevel=3,
            )
        return [tokenizer.bos_token_id, *ids[:room], tokenizer.eos_token_id]

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `from_folder`, diffusers and transformers (old and new) open to the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.model_max_length = self.max_length
        self._tokenizer.save_pretrained(folder)  # tokenizer_config.json, and tokenizer.json for the newer readers.
        self._tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for all others.
        special = {name: getattr(self._tokenizer, name) for name in _TOKENS}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


class Tokenizers:
    """The tokenizers of a checkpoint's text encoders, one or SDXL's two, as one: their rows of ids side by side."""

    def __init__(self, tokenizers: Sequence[Tokenizer], digest: str = ""):
        """Joins tokenizers; see `from_folders`."""
        self.tokenizers, self.digest = tuple(tokenizers), digest

    @classmethod
    def from_folders(cls, folders: Sequence[str | Path]) -> "Tokenizers":
        """Reads `tokenizer`, and `tokenizer_2` where there is one.

        `digest` is a hash of vocabularies, merges and padding: what decides on the ids of a prompt, whatever the form
        of the files.

        Raises:
          ValueError: there is no folder, or one cannot be read.
        """
        if not folders:
            raise UserError("the checkpoint has no tokenizer folder; a single file has none: give its base as `base`.")
        tokenizers, digest = [Tokenizer.from_folder(folder) for folder in folders], hashlib.sha256()
        for folder, tokenizer in zip(folders, tokenizers, strict=True):
            words = read_words(Path(folder))
            said = [sorted(words.vocabulary.items()), words.merges, tokenizer.pad_id, tokenizer.max_length]
            digest.update(json.dumps(said).encode())
        return cls(tokenizers, digest.hexdigest())

    def __call__(self, prompts: Sequence[str | None]) -> Int[np.ndarray, "B EL"]:
        """Returns int32 ids, each tokenizer's row behind the other's.

        None is no prompt: "" for one tokenizer, a row of -1 for two, which stands for zeros (`models.text_encoders`).
        """
        ids = np.concatenate([tokenizer(prompts) for tokenizer in self.tokenizers], axis=1)
        if len(self.tokenizers) > 1:
            ids[[prompt is None for prompt in prompts]] = NO_PROMPT
        return ids


def _read(folder: Path, reader, *args, **kwargs):
    try:
        return reader(*args, **kwargs)
    except Exception as error:  # The tokenizers package raises bare Exceptions.
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"the tokenizer in {folder} cannot be read ({said}). Get its vocab.json and merges.txt anew."
        ) from error


def _clip_tokenizer_class():
    """Imports the class when it is needed: importing transformers costs a second, and says that it misses PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    return CLIPTokenizer
