"""What a wrong command line answers: the option or the value that was probably meant, by the name that users type."""

import argparse
import contextlib
import difflib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence

from dmm_jax.config.files import shipped_configs
from dmm_jax.runtime.errors import UserError, meant

NUM_SUGGESTIONS = 3
# {an option's name in our arguments: what A1111, ComfyUI, kohya's scripts and diffusers call it}
OTHER_NAMES = {
    "model": "ckpt checkpoint pretrained m",
    "prompt": "p positive text n n-iter n-samples batch-count count num-images images-per-prompt",
    "prompts": "from-file prompt-file",
    "negative_prompt": "uncond",
    "out": "o output outdir save-dir filename-prefix",
    "workdir": "o out output outdir",
    "num_inference_steps": "s num-steps sampling-steps ddim-steps",
    "guidance_scale": "cfg scale",
    "guidance_rescale": "cfg-rescale rescale-cfg",
    "solver": "sampler sampling-method scheduler ddim plms",
    "width": "w W size resolution",
    "height": "H",
    "batch_size": "b bs",
    "seed": "noise-seed generator",
    "lora": "network adapter strength-model",
    "embedding": "textual-inversion ti",
    "dtype": "fp16 bf16 half no-half precision torch-dtype mixed-precision",
    "prediction_type": "v-parameterization v-pred parameterization",
}


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest choice for a value that is none."""

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            names = list(map(str, action.choices))
            raise argparse.ArgumentError(
                action, f"there is no {value!r}{meant(value, names)} Choose one of {', '.join(names)}."
            )


def check(verb: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuses options that a verb does not have, and an experiment without --config; suggests what was meant.

    It comes before parsing, which asks for missing arguments first. An option that is like none of the verb's stays for
    the parser, or for the config of a verb that has one.
    """
    words = list(itertools.takewhile("--".__ne__, words))  # After "--" nothing is an option.
    options, positionals = verb._option_string_actions, [action.dest for action in verb._get_positional_actions()]
    typed = [word.partition("=")[0] for word in words]
    wants_config = "--config" in options and "--config" not in typed and "config" not in positionals
    for before, word, name in zip(["", *words], words, typed, strict=False):
        is_option = re.match(r"--?[A-Za-z]\S*$", name) and not name.startswith("--config.")
        if is_option and name not in options and (name.startswith("--") or name[:2] not in options):  # -qv is -q -v.
            if near := _near_options(name.lstrip("-"), verb._actions, 0.75 if "--config" in options else 0.6):
                verb.error(f"there is no option {name}; did you mean {' or '.join(near)}?")
        if wants_config and not before.startswith("-") and (word in shipped_configs() or word.endswith(".py")):
            verb.error(f"{word} is an experiment; did you mean --config={word}?")


def _near_options(name: str, actions: Sequence[argparse.Action], likeness: float) -> list[str]:
    """Returns the options that another spelling may mean: by all or the first of its words, else by its letters."""
    own, others = {}, {}  # {spelling: how the option is written here}
    for action in actions:
        text = (
            action.option_strings[-1] if action.option_strings else f"{action.metavar or action.dest} without an option"
        )
        text += ", once or several times" * isinstance(action, argparse._AppendAction)
        own |= dict.fromkeys([action.dest.replace("_", "-"), *(it.lstrip("-") for it in action.option_strings)], text)
        others |= dict.fromkeys(OTHER_NAMES.get(action.dest, "").split(), text)
    name = name if len(name) == 1 else name.replace("_", "-").lower()
    parts = name.split("-")
    for end in range(len(parts), 0, -1):
        if (start := "-".join(parts[:end])) in own or start in others:
            return [own.get(start) or others[start]]
    near = [other for other in own if other.startswith(f"{name}-")]
    near = near or difflib.get_close_matches(name, own, NUM_SUGGESTIONS, likeness)
    return list(dict.fromkeys(own[other] for other in near))


@contextlib.contextmanager
def options_named_as_typed(
    verb: argparse.ArgumentParser, words: Sequence[str], values: Mapping[str, object]
) -> Iterator[None]:
    """Names, in a UserError of the block, the options that the user typed: of a missing path, and of an argument.

    Args:
      values: the parsed arguments.
    """
    typed = {word.partition("=")[0] for word in words}
    options = {action.dest: action.option_strings[-1] for action in verb._actions if typed & {*action.option_strings}}
    positionals = {action.dest: action.metavar for action in verb._get_positional_actions() if action.metavar}
    paths = {}  # {path: the option that names it}
    for dest, option in (positionals | options).items():
        for value in values[dest] if isinstance(values[dest], list) else [values[dest]]:
            paths |= dict.fromkeys([str(value), *re.split("[*=]", str(value))], option)

    def rename(match):
        name = match[1] or match[2]
        return options.get(name) or options.get(name.removeprefix("num_")) or match[0]

    try:
        yield
    except UserError as error:
        text = str(error)
        missing = re.match(r"there is no (?:\w+ )?(?:checkpoint|file) (.+)", text)
        ends = [
            path for path in paths if missing and path and missing[1].startswith(tuple(path + end for end in ".; "))
        ]
        if ends:
            text = f"{paths[max(ends, key=len)]}: {text}"
        elif "--config" not in verb._option_string_actions:  # A config's options have names of arguments, too.
            text = re.sub(r"^(?:a )?(\w+)(?= must )|(?<![\w./])(\w+_\w+)", rename, text)
        error.args = (text,)
        raise
