"""Records how AUTOMATIC1111's web UI reads prompts: python -m tests.text.record_a1111 CHECKOUT

CHECKOUT is a clone of AUTOMATIC1111/stable-diffusion-webui (AGPL-3; the recorded file comes from a fork at commit
1bf01b7, of June 2023). Its own code runs here with stand-ins for everything but the two modules on prompts. The file
holds numbers alone; no test needs the web UI.
"""

import importlib
import json
import pathlib
import sys
import types
from unittest import mock

FILE = pathlib.Path(__file__).parent / "a1111_prompts.json"
LONG = ", ".join(f"a red circle number {k} above a small blue star" for k in range(14))
PROMPTS = (
    "", "normal text", "an (important) word", "(unnecessary)(parens)", r"\(literal\] \\ back\slash",
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", "[[very] faint] (strong:1.75), (weak:.25), (minus:-1)",
    "(a [b) c]", "((a)b", "a)b]c", "time 10:30 :1.2) (ratio:a) (x:1.2", "a BREAK b", "a BREAK  BREAK b BREAK", "BREAK",
    "(red:1.4), BREAKfast BREAK: last", LONG, LONG.replace(",", ""), "(" + LONG + ":1.3)", "word " * 75 + "BREAK after",
    "word " * 74 + ", comma last", "word " * 75 + ", comma first", "word " * 55 + ", " + "late " * 30,
    "word " * 54 + ", " + "late " * 30, "word, " * 60, f"(one:1.2), {LONG} BREAK [two], {LONG}",
)  # fmt: skip


def read_prompts(checkout: str) -> dict[str, dict]:
    """Returns what the web UI makes of every prompt: pieces with weights, and chunks of ids with weights."""
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    from dmm_jax.text.vocabulary import clip_bpe

    options = types.SimpleNamespace(enable_emphasis=True, emphasis="Original", comma_padding_backtrack=20)
    stubs = {f"modules.{name}": mock.MagicMock() for name in ("devices", "sd_hijack", "sd_emphasis")}
    stubs |= {"modules.shared": types.SimpleNamespace(opts=options), "lark": mock.MagicMock()}
    sys.path.insert(0, checkout)
    with mock.patch.dict(sys.modules, stubs):
        prompt_parser = importlib.import_module("modules.prompt_parser")
        hijack = importlib.import_module("modules.sd_hijack_clip")
    bpe = clip_bpe()
    tokenizer = transformers.CLIPTokenizer(vocab=bpe.vocabulary, merges=bpe.merges)
    embeddings = types.SimpleNamespace(find_embedding_at_position=lambda tokens, position: (None, None))
    wrapped = torch.nn.Module()
    wrapped.tokenizer = tokenizer
    encoder = hijack.FrozenCLIPEmbedderWithCustomWords(wrapped, types.SimpleNamespace(embedding_db=embeddings))
    recorded = {}
    for prompt in PROMPTS:
        chunks = encoder.tokenize_line(prompt)[0]
        recorded[prompt] = {
            "pieces": prompt_parser.parse_prompt_attention(prompt),
            "chunks": [_without_padding(chunk, tokenizer.eos_token_id) for chunk in chunks],
        }
    return recorded


def _without_padding(chunk, end: int) -> list[list]:
    """Returns the ids and the weights between start and end."""
    count = chunk.tokens.index(end)
    assert len(chunk.tokens) == 77 and chunk.multipliers[count:] == [1.0] * (77 - count)
    return [chunk.tokens[1:count], [round(weight, 12) for weight in chunk.multipliers[1:count]]]


if __name__ == "__main__":
    FILE.write_text(json.dumps(read_prompts(sys.argv[1]), separators=(",", ":")) + "\n")
