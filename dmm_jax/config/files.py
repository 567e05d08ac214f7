"""Reads experiment files and applies `--config.NAME=VALUE` from a command line."""

import ast
import pathlib
import re
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dmm_jax.config import options
from dmm_jax.config.options import as_teachers
from dmm_jax.config.serialization import flat_values
from dmm_jax.runtime.errors import UsageError, UserError, meant
from dmm_jax.runtime.home import expand_home


def shipped_configs() -> dict[str, pathlib.Path]:
    """Returns the experiments in `configs/`, {name: file}: of the repository, or of the installed package."""
    package = pathlib.Path(__file__).parents[1]
    folder = next((folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()), package)
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def summary(path: pathlib.Path) -> str:
    """Returns the first line of an experiment file's docstring, without running the file."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def config_file(name: str) -> str:
    """Returns the path of an experiment file: the file itself, or the shipped one of this name, such as "sd15".

    Raises:
      UserError: there is neither.
    """
    path, colon, argument = name.partition(":")  # get_config(argument), as ml_collections has it.
    if pathlib.Path(path).is_file():
        return name
    shipped = shipped_configs()
    if path in shipped:
        return f"{shipped[path]}{colon}{argument}"
    end = meant(pathlib.Path(path).stem, shipped, lambda near: f"--config={near}")
    raise UserError(f"there is no config file {path}{end} The experiments that ship are {', '.join(shipped)}.")


def read_config(path: str, overrides: Sequence[str] = ()):
    """Runs an experiment file's `get_config()`, applies `--config.NAME=VALUE`, and expands `~` in paths.

    The path may be the name of a shipped experiment.

    A tuple takes one flag per entry, whatever the entry holds, or all entries as a Python tuple.

    Raises:
      UserError: the file does not exist, cannot be run, or does not return all options.
      UsageError: an option has no such name (the nearest is suggested) or takes no such value.
    """
    path = config_file(path)
    try:
        config, _ = _parsed(path, ())
    except Exception as error:  # The file is a program: anything can be wrong in it.
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    _check_complete(path, config, options.get_config())
    if not overrides:
        return _finished(config)
    _check_names(config, overrides)
    defaults = _options(config)
    try:
        config, unused = _parsed(path, [_as_entry(override, defaults) for override in overrides])
        config = _finished(config)
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_no_option(error.flagname, config)) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{' '.join(overrides)}: {error} `dmm-jax config` lists the options.") from error
    if unused:
        raise UsageError(f"unexpected arguments: {' '.join(unused)}. Options are set as --config.NAME=VALUE.")
    return config


def _finished(config):
    """Returns a config with its teachers as pairs, and `~` expanded in every text."""

    def expand(value):
        if isinstance(value, tuple):
            return tuple(map(expand, value))
        return expand_home(value) if isinstance(value, str) else value

    texts = {name: value for name, value in _options(config).items() if isinstance(value, (str, tuple))}
    config.teachers = as_teachers(config.teachers)
    config.update_from_flattened_dict({name: expand(value) for name, value in texts.items() if name != "teachers"})
    config.teachers = expand(config.teachers)
    return config


def _as_entry(override: str, defaults) -> str:
    """Quotes the value of a tuple unless it is Python already: a path or a prompt may hold blanks and commas."""
    name, equals, value = override.partition("=")
    if not value or not isinstance(defaults.get(name.lstrip("-").removeprefix("config.")), tuple):
        return override
    try:
        if isinstance(ast.literal_eval(value), (tuple, list, str)):
            return override
    except (ValueError, SyntaxError):
        pass
    return f"{name}{equals}({value!r},)"


def _parsed(path, overrides):
    """Returns the config of a file, and the arguments that set no option."""
    values = flags.FlagValues()
    arguments = ["dmm-jax", f"--config={path}", *overrides]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    unused = values(arguments)[1:]
    return values.config, unused


def _check_complete(path, config, defaults):
    if type(config) is not type(defaults):
        raise UserError(
            f"{path}: get_config() must return a ConfigDict; got {type(config).__name__}. "
            "Start from dmm_jax.config.options.get_config(), and set what differs."
        )
    if missing := sorted(_options(defaults).keys() - _options(config).keys()):
        raise UserError(
            f"{path}: get_config() lacks {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}. "
            "Start from dmm_jax.config.options.get_config(), and set what differs."
        )


def _options(config) -> dict:
    """Returns the values by their full names."""
    return flat_values(config.to_dict())


def _check_names(config, overrides):
    """Refuses `--config.NAME` for an option that does not exist."""
    names = _options(config)
    for override in overrides:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", override)
        if match and not any(f"{name}.".startswith(f"{match[1]}.") for name in names):
            raise UsageError(_no_option(f"config.{match[1]}", config))


def _no_option(name, config) -> str:
    own = name.removeprefix("config.")
    end = meant(own, _options(config), lambda near: f"--config.{near}", 0.5)
    return f"there is no option --{name}{end} `dmm-jax config` lists the options."
