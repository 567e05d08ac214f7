"""Which spelling of a LoRA's keys each tool reads. Each spelling has a file of its own.

ComfyUI and A1111 read kohya's; diffusers refuses a file without keys of its own form. A file with both names each layer
twice, so a reader could not tell one difference from two, and `BASE + FILE` refuses it.
"""

import collections
import json
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints.formats.peft_options import METADATA
from dmm_jax.runtime.errors import UserError

DOWN = ".lora_A.weight"
KOHYA, DIFFUSERS = "kohya", "diffusers"
TOOLS = {"comfyui": KOHYA, "diffusers": DIFFUSERS, "a1111": KOHYA}  # {tool: the spelling that it reads}
# {tool: who reads a file that is written for it}
READERS = {
    "comfyui": "ComfyUI and dmm_jax (`BASE + FILE`) read everything in it",
    "a1111": "AUTOMATIC1111 reads it without the differences of biases, except the bias of the style",
    "diffusers": "`load_lora_weights` of diffusers 0.40 or later reads the file with `_diffusers` in its name, "
    "which holds no differences of norms",
}
SUFFIXES = {KOHYA: "", DIFFUSERS: "_diffusers"}  # The ends of file names.


def spellings(tools: Sequence[str]) -> list[str]:
    """Returns the spellings of the keys that tools read.

    Raises:
      UserError: a tool is unknown, or there is none.
    """
    unknown = sorted(set(tools) - set(TOOLS))
    if unknown or not tools:
        raise UserError(f"--lora-for takes {', '.join(TOOLS)}; got {', '.join(unknown) or 'nothing'}.")
    return [spelling for spelling in SUFFIXES if spelling in {TOOLS[tool] for tool in tools}]


def adapter_metadata(tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the metadata by which diffusers reads a file of its spelling: PEFT's config of every network.

    Without it, diffusers before 0.40 takes the rank of the first layer as the alpha of all. Here alpha equals the rank.
    """
    networks = collections.defaultdict(dict)
    for key, tensor in tensors.items():
        if key.endswith(DOWN):
            network, _, layer = key.removesuffix(DOWN).partition(".")
            # transformers has dropped this part of the names; PEFT compares the ends of names.
            networks[network][layer.removeprefix("text_model.")] = len(tensor)
    config = {}
    for network, ranks in networks.items():
        rank = collections.Counter(ranks.values()).most_common(1)[0][0]
        pattern = {layer: it for layer, it in ranks.items() if it != rank}
        fields = {
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": list(ranks),
            "lora_bias": any(key.startswith(f"{network}.") and key.endswith(".lora_B.bias") for key in tensors),
        }
        config |= {f"{network}.{name}": value for name, value in fields.items()}
    return {METADATA: json.dumps(config, sort_keys=True)}
