"""The scale of an adapter's layers in PEFT's config, which adapter_config.json or a file's metadata holds."""

import json
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.lora_keys import PEFT
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.runtime.storage import read_text

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers writes PEFT's config here, as JSON with keys "unet.lora_alpha".
KINDS = ("LORA", "LOHA", "LOKR", "IA3")  # Values of `peft_type` that are read.
CHANGES = ("fan_in_fan_out", "layer_replication", "modules_to_save", "trainable_token_indices", "use_qalora")
INITIALISATION = "init_lora_weights"
OWN_BASES = ("true", "false", "gaussian", "orthogonal", "eva", "mica")  # Its values that leave the base as it is.
_PLAIN = re.compile(r"\^?((?:[\w.-]|\\\.)*)\$?", re.ASCII)  # A name, or the end of one; "." is any character.
_SYMBOL = re.compile(r"\\\.|.")


class PeftOptions(NamedTuple):
    """PEFT's options for one network."""

    where: str  # The name of their source in errors.
    fields: Mapping

    def scale(self, layer: str, rank: int | None) -> float:
        """Returns the factor of a layer's difference: alpha / rank, or alpha / sqrt(rank) for rs-LoRA.

        Args:
          layer: our key without its end.
          rank: of its factors; None if they have none, as two whole matrices of LoKr: the config's rank counts then.

        Raises:
          CheckpointError: the config is malformed.
        """
        alpha = self._of(layer, "alpha_pattern", self.fields.get("lora_alpha", self.fields.get("alpha")))
        if alpha is None:
            return 1.0
        rank = rank or self._of(layer, "rank_pattern", self.fields.get("r"))
        try:
            alpha, rank = float(alpha), float(rank)
            return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)
        except (TypeError, ValueError, ZeroDivisionError, OverflowError):
            raise CheckpointError(f"{self.where} states no number as alpha or rank of {layer}. Correct it.") from None

    def _of(self, layer: str, option: str, default):
        """Returns the value of the first pattern that names a layer or the end of its name."""
        patterns = self.fields.get(option) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"{self.where} has a {option} that is not a JSON object. Correct it.")
        for pattern, value in patterns.items():
            plain = _PLAIN.fullmatch(pattern) if len(pattern) < 1000 else None
            if plain is None:
                raise CheckpointError(
                    f"{self.where}: the {option} {naming.printable(pattern)!r} is not the name of a layer. Write one "
                    "entry per layer."
                )
            symbols = _SYMBOL.findall(plain[1])
            start = len(layer) - len(symbols)
            is_name = start == 0 or start > 0 and layer[start - 1] == "." and not pattern.startswith("^")
            pairs = zip(symbols, layer[start:], strict=True) if is_name else ()
            if is_name and all(symbol in (".", char, f"\\{char}") for symbol, char in pairs):
                return value
        return default


def refuse_changed_base(file: TensorFile) -> None:
    """Raises CheckpointError if an adapter's layers began as a part of the base, which PEFT subtracts from the base."""
    configs = {f"{file.path}: its metadata {METADATA!r}": file.metadata[METADATA]} if METADATA in file.metadata else {}
    path = file.path.parent / CONFIG
    if any(key.startswith(PEFT) for key in file) and path.is_file():
        configs[str(path)] = read_text(path)
    for where, text in configs.items():
        for name, value in _json_object(where, text).items():
            is_initialisation = name.rpartition(".")[2] == INITIALISATION
            if is_initialisation and value is not None and str(value).lower() not in OWN_BASES:
                raise CheckpointError(
                    f"{where} states {INITIALISATION} {naming.printable(str(value))!r}: PEFT takes the adapter's first "
                    "values out of the base, so the file is meaningless on the base as it is. Convert it to a plain "
                    "LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or merge it into "
                    "its base with PEFT's merge_and_unload and give the merged checkpoint."
                )


def _json_object(where: str, text: str) -> dict:
    try:
        return dict(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{where} cannot be read as a JSON object. Fetch the adapter again.") from None


def options_of(file: TensorFile, component: str, key: str) -> PeftOptions | None:
    """Returns the options that go with a key of a file; None if no config goes with it.

    Raises:
      CheckpointError: PEFT's own file lacks its config, or the config is damaged or asks for what is not read.
    """
    if key.startswith(PEFT):
        path = file.path.parent / CONFIG
        if not path.is_file():
            raise CheckpointError(f"{file.path} needs {CONFIG}, which states its alpha, in its folder. Fetch it.")
        where, prefix, text = str(path), "", read_text(path)
    elif METADATA in file.metadata:
        where, prefix = f"{file.path}: its metadata {METADATA!r}", f"{component}."
        text = file.metadata[METADATA]
    else:
        return None
    stated = _json_object(where, text)
    fields = {name.removeprefix(prefix): value for name, value in stated.items() if name.startswith(prefix)}
    kind = str(fields.get("peft_type") or "LORA").upper()
    changes = [name for name in CHANGES if fields.get(name)]
    if kind not in KINDS or changes:
        reason = f"is of the type {naming.printable(kind)}" if kind not in KINDS else f"was trained with {changes[0]}"
        raise CheckpointError(
            f"{file.path} {reason}, which is not read. Merge it into its base with PEFT's merge_and_unload, and give "
            "the merged checkpoint."
        )
    return PeftOptions(where, fields)
