"""Which spelling of a LoRA's keys each tool reads. Each spelling has a file of its own.

ComfyUI and A1111 read kohya's; diffusers refuses a file without keys of its own form. A file with both names each layer
twice, so a reader could not tell one difference from two, and `BASE + FILE` refuses it.
"""

from collections.abc import Sequence

from dmm_jax.runtime.errors import UserError

KOHYA, DIFFUSERS = "kohya", "diffusers"
TOOLS = {"comfyui": KOHYA, "diffusers": DIFFUSERS, "a1111": KOHYA}  # {tool: the spelling that it reads}
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
