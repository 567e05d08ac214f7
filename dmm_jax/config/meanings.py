"""The meaning of every option, as the comments in `config.options.get_config` state it, for a terminal."""

import ast
import functools
import io
import pathlib
import shutil
import textwrap
import tokenize
from typing import NamedTuple

import ml_collections

from dmm_jax.config import options as config_lib
from dmm_jax.config.checks import CHOICES
from dmm_jax.config.serialization import flat_values
from dmm_jax.runtime.terminal import paint


class Section(NamedTuple):
    """Options that belong together, under a heading; the first section has none."""

    heading: str
    meanings: dict[str, str]  # By the option's full name; a group of options has one, too.


@functools.cache
def sections() -> tuple[Section, ...]:
    """Reads the sections of options, in the order of the file."""
    source = pathlib.Path(config_lib.__file__).read_text(encoding="utf-8")
    lines, comments = source.splitlines(), _comments(source)
    (function,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "get_config"]
    found = [Section("", {})]
    for statement in function.body:
        name = _option_name(statement)
        if not name:
            continue
        block = []
        for number in range(statement.lineno - 1, 0, -1):
            if not lines[number - 1].strip().startswith("#"):
                break
            block.insert(0, comments[number])
        is_heading = block and not lines[statement.lineno - len(block) - 2].strip()
        if is_heading:
            found.append(Section(" ".join(block), {}))
        own = [comments[number] for number in range(statement.lineno, statement.end_lineno + 1) if number in comments]
        found[-1].meanings[name] = " ".join([*([] if is_heading else block), *own])
    return tuple(found)


def _comments(source: str) -> dict[int, str]:
    """Returns {line number: text of its comment}."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}


def _option_name(statement: ast.stmt) -> str:
    """Returns "mesh.data" of the statement `config.mesh.data = 0`; "" of another statement."""
    target = ast.unparse(statement.targets[0]) if isinstance(statement, ast.Assign) else ""
    return target.partition(".")[2]


def render(config: ml_collections.ConfigDict) -> str:
    """Returns every option with its value, its default if that differs, its choices and its meaning."""
    values, defaults = (flat_values(tree.to_dict()) for tree in (config, config_lib.get_config()))
    width = min(shutil.get_terminal_size().columns, 120)
    wrap = functools.partial(textwrap.fill, width=width, break_long_words=False, break_on_hyphens=False)
    blocks = []
    for heading, meanings in sections():
        entries = []
        for name, meaning in meanings.items():
            if name not in values:  # A group.
                heading = " ".join(filter(None, [heading, f"{name}: {meaning}" if meaning else ""]))
                continue
            line = paint(f"--config.{name}={_as_argument(values[name])}", "bold")
            if values[name] != defaults[name]:
                line += paint(f"  (default: {_as_argument(defaults[name])})", "yellow")
            choices = f" One of: {', '.join(filter(None, CHOICES[name]))}." if name in CHOICES else ""
            indent = {"initial_indent": "    ", "subsequent_indent": "    "}
            entries.append(f"{line}\n{wrap(meaning + choices, **indent)}")
        title = [paint(wrap(heading), "cyan")] if heading else []
        blocks.append("\n".join([*title, *entries]))
    return "\n\n".join(blocks) + "\n"


def _as_argument(value: object) -> str:
    return (value or '""') if isinstance(value, str) else str(value)
