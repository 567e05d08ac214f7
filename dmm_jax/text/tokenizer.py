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
from dmm_jax.text.vocabulary import BUNDLED, SPECIAL_TOKENS, WORD_END, read_bpe

DEFAULT_MAX_LENGTH = 77
NO_PROMPT = -1  # Fills a row of ids that stands for no prompt at all.
_UNSET_LENGTH = 10**6  # transformers sets 1e30 if a config has no length.


class Tokenizer:
    """Turns prompts into rows of token ids of one length, as Stable Diffusion's text encoders expect them."""

    def __init__(self, clip_tokenizer):
        """Wraps a `transformers.CLIPTokenizer`; see `from_folder`.

        Raises:
          ValueError: a special token is not in the vocabulary, so that the text encoder has no row for it.
        """
        vocab = clip_tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
        tokens = {name: getattr(clip_tokenizer, name) for name in SPECIAL_TOKENS}
        missing = [f"{name} {token!r}" for name, token in tokens.items() if token not in vocab]
        if missing:
            raise UserError(
                f"the vocabulary ({len(vocab)} tokens) lacks {', '.join(missing)}; "
                "use the vocab.json and the tokenizer_config.json of one and the same checkpoint."
            )
        length = clip_tokenizer.model_max_length
        self.max_length = length if length < _UNSET_LENGTH else DEFAULT_MAX_LENGTH
        self.comma_id = vocab.get("," + WORD_END)  # A lone comma: a chunk may end after it.
        self._tokenizer = clip_tokenizer

    @classmethod
    def from_folder(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer` folder, old or new (see `vocabulary`); tokenizer_config.json sets padding and length.

        Raises:
          ValueError: the folder or one of its files is missing, or the files do not fit together.
        """
        folder = Path(path)
        bpe = read_bpe(folder)
        if folder.parent == BUNDLED:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            return cls(_clip_tokenizer_class()(vocab=bpe.vocabulary, merges=bpe.merges, **config))
        try:
            tokenizer = _clip_tokenizer_class().from_pretrained(folder, local_files_only=True)
            for name in ("local_files_only", "is_local"):  # Otherwise `save` writes down how the folder was opened.
                tokenizer.init_kwargs.pop(name, None)
            made = cls(tokenizer)
            made([""])  # A config of wrong types fails here, not at the first prompt.
            return made
        except UserError:
            raise
        except Exception as error:  # The tokenizers package raises bare Exceptions.
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({reason}). Get its vocab.json, merges.txt and "
                "tokenizer_config.json again."
            ) from error

    @property
    def pad_id(self) -> int:
        """The id that fills a row: the end token's in Stable Diffusion 1, "!" (0) in the OpenCLIP encoders' folders."""
        return self._tokenizer.pad_token_id

    @property
    def end_id(self) -> int:
        """The id of the end token."""
        return self._tokenizer.eos_token_id

    @property
    def room(self) -> int:
        """The tokens of a prompt that a row holds, without start and end."""
        return self.max_length - 2

    def token(self, number: int) -> str:
        """Returns the token of an id."""
        return self._tokenizer.convert_ids_to_tokens(number)

    def token_ids(self, text: str) -> list[int]:
        """Returns the ids of a text, as many as it has, without start and end."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @property
    def vocab_size(self) -> int:
        """The number of ids including special ones, which a text encoder needs as rows of its table."""
        return len(self._tokenizer)

    def __call__(self, prompts: Sequence[str | None], num_chunks: int = 1) -> Int[np.ndarray, "B KL"]:
        """Returns int32 ids in K chunks, each with start, up to `room` tokens of the prompt, end and padding.

        None is "". A prompt that is too long is cut at the end, with a warning that quotes the lost text.

        Raises:
          ValueError: `prompts` is a single string, not a sequence of strings.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a sequence of strings; got one string. Use [{prompts[:40]!r}].")
        rows = np.full((len(prompts), num_chunks, self.max_length), self.pad_id, np.int32)
        for chunks, prompt in zip(rows, prompts, strict=True):
            ids = self._cut_ids(prompt or "", num_chunks * self.room)
            for number, row in enumerate(chunks):
                part = ids[number * self.room : (number + 1) * self.room]
                row[: len(part) + 2] = [self._tokenizer.bos_token_id, *part, self.end_id]
        return rows.reshape(len(prompts), num_chunks * self.max_length)

    def _cut_ids(self, prompt: str, room: int) -> list[int]:
        tokenizer = self._tokenizer
        encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = encoded["input_ids"]
        if len(ids) > room:
            warnings.warn(
                f"a prompt of {len(ids)} tokens was cut to {room} (rows hold {self.max_length} with start and end); "
                f'lost: "{prompt[encoded["offset_mapping"][room][0] :]}"',
                stacklevel=3,
            )
        return ids[:room]

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `from_folder`, diffusers and transformers (old and new) open to the same ids."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.model_max_length = self.max_length
        self._tokenizer.save_pretrained(folder)  # tokenizer_config.json, and tokenizer.json for newer readers.
        self._tokenizer.backend_tokenizer.model.save(str(folder))  # vocab.json and merges.txt, for older readers.
        special = {name: getattr(self._tokenizer, name) for name in SPECIAL_TOKENS}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


class Tokenizers:
    """The tokenizers of a checkpoint's text encoders, one or SDXL's two; concatenates their rows of ids."""

    def __init__(self, tokenizers: Sequence[Tokenizer], digest: str = "", zeros_for_no_prompt: bool = True):
        """Joins tokenizers; see `from_folders`."""
        self.tokenizers, self.digest = tuple(tokenizers), digest
        self.has_zeros = zeros_for_no_prompt and len(self.tokenizers) > 1  # Whether no prompt is a row of NO_PROMPT.

    @classmethod
    def from_folders(cls, folders: Sequence[str | Path], zeros_for_no_prompt: bool = True) -> "Tokenizers":
        """Reads the folder `tokenizer`, and for SDXL `tokenizer_2`.

        `digest` is a hash of all that determines the ids of a prompt: vocabularies, merges, padding and length.

        Args:
          zeros_for_no_prompt: whether SDXL conditions on zeros without a prompt, or on "" like the other models:
            diffusers' `force_zeros_for_empty_prompt`.

        Raises:
          ValueError: `folders` is empty, or a folder cannot be read.
        """
        if not folders:
            raise UserError("the checkpoint has no tokenizer folder; a single file has none: give its base as `base`.")
        tokenizers, digest = [Tokenizer.from_folder(folder) for folder in folders], hashlib.sha256()
        for folder, tokenizer in zip(folders, tokenizers, strict=True):
            bpe = read_bpe(Path(folder))
            contents = [sorted(bpe.vocabulary.items()), bpe.merges, tokenizer.pad_id, tokenizer.max_length]
            digest.update(json.dumps(contents).encode())
        return cls(tokenizers, digest.hexdigest(), zeros_for_no_prompt)

    def num_chunks(self, prompt: str) -> int:
        """Returns the chunks that a prompt fills without being cut."""
        return max(-(-len(tokenizer.token_ids(prompt)) // tokenizer.room) for tokenizer in self.tokenizers) or 1

    def __call__(self, prompts: Sequence[str | None], num_chunks: int = 1) -> Int[np.ndarray, "B KEL"]:
        """Returns int32 ids: for each prompt K chunks, each with the rows of all tokenizers one after the other.

        None means no prompt. It is encoded as ""; with two tokenizers and `zeros_for_no_prompt` it is a row of -1, for
        which `models.text_encoders` outputs zeros.
        """
        rows = [tokenizer(prompts, num_chunks) for tokenizer in self.tokenizers]
        chunks = [np.split(row, num_chunks, axis=1) for row in rows]
        ids = np.concatenate([part for chunk in zip(*chunks, strict=True) for part in chunk], axis=1)
        if self.has_zeros:
            ids[[prompt is None for prompt in prompts]] = NO_PROMPT
        return ids


def _clip_tokenizer_class():
    """Imports the class on demand: importing transformers takes a second and prints that PyTorch is missing."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    return CLIPTokenizer
