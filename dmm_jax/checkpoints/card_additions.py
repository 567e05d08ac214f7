"""What a user adds to the model cards of an export: trigger words of its styles, and example pictures."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dmm_jax.checkpoints.model_card import NAME, escaped
from dmm_jax.runtime.errors import UserError

FOLDER = "examples"
MAX_EXAMPLES = 12


class Example(NamedTuple):
    """A picture and how it was asked for."""

    png: bytes
    prompt: str
    style: str


def read_triggers(entries: Sequence[str], styles: Sequence[str]) -> dict[str, str]:
    """Reads ("STYLE=WORDS", ...) as {style: words}.

    Raises:
      UserError: an entry has another form, or names no style.
    """
    triggers = {style: words.strip() for style, _, words in (entry.partition("=") for entry in entries)}
    for style, words in triggers.items():
        if style not in styles or not words:
            raise UserError(f"--trigger is STYLE=WORDS, with a style of {', '.join(styles)}; got {style!r}={words!r}.")
    return triggers


def add_to_cards(folder: pathlib.Path, triggers: Mapping[str, str], examples: Sequence[Example]) -> None:
    """Adds trigger words and pictures to every model card in a folder and its subfolders."""
    for card in sorted(folder.rglob(NAME)):
        if examples:
            (card.parent / FOLDER).mkdir()
            for number, example in enumerate(examples[:MAX_EXAMPLES]):
                (card.parent / FOLDER / f"{number:02d}.png").write_bytes(example.png)
        card.write_text(extended(card.read_text(encoding="utf-8"), triggers, examples), encoding="utf-8")


def extended(text: str, triggers: Mapping[str, str], examples: Sequence[Example]) -> str:
    """Returns a card's text with a section of trigger words and one of pictures, which hubs show as a gallery.

    Only the trigger words of styles that the card lists are added.
    """
    triggers = {style: words for style, words in triggers.items() if f"\n| {escaped(style)} |" in text}
    files = [(f"{FOLDER}/{number:02d}.png", example) for number, example in enumerate(examples[:MAX_EXAMPLES])]
    widget = [{"text": example.prompt, "output": {"url": file}} for file, example in files]
    if widget:  # JSON is YAML.
        text = text.replace("\n---\n", f"\nwidget: {json.dumps(widget)}\n---\n", 1)
    if triggers:
        rows = [f"| {escaped(style)} | {escaped(words)} |" for style, words in triggers.items()]
        text += "\n".join(["\n## Trigger words\n", "| style | words |", "| --- | --- |", *rows, ""])
    if files:
        rows = [f"| ![]({file}) | {escaped(example.style)} | {escaped(example.prompt)} |" for file, example in files]
        text += "\n".join(["\n## Examples\n", "| picture | style | prompt |", "| --- | --- | --- |", *rows, ""])
    return text
