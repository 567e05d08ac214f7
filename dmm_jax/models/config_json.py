"""config.json files as constructors' arguments: every field that would change the result is computed or refused."""

import inspect
from collections.abc import Callable, Mapping

from dmm_jax.runtime.errors import UserError


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
    refused = [
        f"{name}={value!r}"
        for name, value in fields.items()
        if name not in parameters and value not in inert.get(name, (None, False))
    ]
    if refused:
        raise UserError(f"this architecture is not supported: {', '.join(sorted(refused))} cannot be computed.")
    return {name: value for name, value in fields.items() if name in parameters}


def all_arguments(build: Callable, arguments: Mapping) -> Config:
    """Returns every argument of `build`, with defaults for those that `arguments` does not hold."""
    return Config({name: arguments.get(name, parameter.default) for name, parameter in _parameters(build).items()})


def _parameters(build) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(build).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ("self", "dtype", "rngs")}
