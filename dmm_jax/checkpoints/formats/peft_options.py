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
_PLAIN = re.compile(r"\^?((?:[\w.-]|\\\.)*)\$?", re.ASCII)  # A pattern that is a name, or the end of one.


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
            name = plain[1].replace("\\.", ".")
            if layer == name or layer.endswith(f".{name}") and not pattern.startswith("^"):
                return value
        return default


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
    try:
        fields = {
            name.removeprefix(prefix): value for name, value in json.loads(text).items() if name.startswith(prefix)
        }
        kind = str(fields.get("peft_type") or "LORA").upper()
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{where} cannot be read as a JSON object. Fetch the adapter again.") from None
    changes = [name for name in CHANGES if fields.get(name)]
    if kind not in KINDS or changes:
        reason = f"is of the type {naming.printable(kind)}" if kind not in KINDS else f"was trained with {changes[0]}"
        raise CheckpointError(
            f"{file.path} {reason}, which is not read. Merge it into its base with PEFT's merge_and_unload, and give "
            "the merged checkpoint."
        )
    return PeftOptions(where, fields)
