"""config.json files as constructors' arguments: every field that would change the result is computed or refused."""

import inspect
from collections.abc import Callable, Mapping

from dmm_jax.runtime.errors import UserError

MAX_SIZE = 2**20  # The largest number in a config; a vocabulary of CLIP has 49,408.
MAX_LEVELS = 16  # Entries of a list: published networks have 3 or 4.
MAX_LAYERS = 256  # Levels times layers times transformers: 60 in Stable Diffusion XL's UNet.


class Config(dict):
    """A config.json that a graph definition can carry: static arguments of compiled programs must be hashable."""

    def __hash__(self):
        return hash(repr(sorted(self.items(), key=lambda item: item[0])))


def constructor_arguments(build: Callable, config: Mapping, inert: Mapping) -> dict:
    """Returns the fields of a config.json that `build` takes.

    Args:
      build: a constructor whose keyword arguments are named as the config's fields.
      config: the parsed config.json; names that begin with "_" are diffusers' own notes.
      inert: fields that `build` does not take, each with the values under which they change nothing.

    Raises:
      ValueError: names every field that this port does not compute, with its value.
    """
    parameters = _parameters(build)
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    check_sizes(fields)
    refused = [
        f"{name}={value!r}"
        for name, value in fields.items()
        if name not in parameters
        and value not in (allowed := inert.get(name, (None, False)))
        and not (isinstance(value, list) and value and all(item in allowed for item in value))
    ]
    if refused:
        raise UserError(f"this architecture is not supported: {', '.join(sorted(refused))} cannot be computed.")
    # Options of ours, which are keywords alone, are the caller's and never a file's.
    return {
        name: value
        for name, value in fields.items()
        if name in parameters and parameters[name].kind != inspect.Parameter.KEYWORD_ONLY
    }


def check_sizes(config: Mapping) -> None:
    """Refuses sizes that no network comes near, before anything is built from them.

    Raises:
      UserError: a list or a number is too large, or the levels would have too many layers.
    """
    layers = 1
    for name, value in config.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        numbers = [item for item in items if isinstance(item, (int, float))]
        if len(items) > MAX_LEVELS or any(not abs(number) <= MAX_SIZE for number in numbers):
            raise UserError(
                f"{name}={str(value)[:100]} is out of range: no network has numbers beyond {MAX_SIZE} or more than "
                f"{MAX_LEVELS} levels."
            )
        if "layers" in name:
            layers *= max([1, *numbers])
        elif name == "block_out_channels":
            layers *= max(len(items), 1)
    if layers > MAX_LAYERS:
        fields = ", ".join(f"{name}={config[name]}" for name in config if "layers" in name)
        raise UserError(f"{fields[:200]} would give {layers} layers; no network has more than {MAX_LAYERS}.")


def all_arguments(build: Callable, arguments: Mapping) -> Config:
    """Returns every argument of `build`, with defaults for those that `arguments` does not hold."""
    return Config({name: arguments.get(name, parameter.default) for name, parameter in _parameters(build).items()})


def _parameters(build) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(build).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("self", "dtype", "rngs")}
