"""Reads experiment files and applies `--config.NAME=VALUE` from a command line."""

import pathlib
import re
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from dmm_jax.config import options as config_lib
from dmm_jax.runtime.errors import UsageError, UserError, nearest


def read_config(path: str, overrides: Sequence[str] = ()):
    """Runs an experiment file's `get_config()` and applies `--config.NAME=VALUE`; a tuple may take one flag per entry.

    Raises:
      UserError: the file does not exist, cannot be run, or does not return all options.
      UsageError: an option has no such name (the nearest is suggested) or takes no such value.
    """
    if not pathlib.Path(path.partition(":")[0]).is_file():
        raise UserError(f"there is no config file {path}. The experiments are in configs/.")
    try:
        config, _ = _parsed(path, ())
    except Exception as error:  # The file is a program: anything can be wrong in it.
        raise UserError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    _check_complete(path, config, config_lib.get_config())
    config.teachers = config_lib.as_teachers(config.teachers)
    if not overrides:
        return config
    _check_names(config, overrides)
    try:
        config, unused = _parsed(path, overrides)
        config.teachers = config_lib.as_teachers(config.teachers)
    except flags.UnrecognizedFlagError as error:
        raise UsageError(_no_option(error.flagname, config)) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{' '.join(overrides)}: {error} The options are in dmm_jax/config/options.py.") from error
    if unused:
        raise UsageError(f"unexpected arguments: {' '.join(unused)}. Options are set as --config.NAME=VALUE.")
    return config


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
    if missing := sorted(set(_option_names(defaults)) - set(_option_names(config))):
        raise UserError(
            f"{path}: get_config() lacks {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}. "
            "Start from dmm_jax.config.options.get_config(), and set what differs."
        )


def _option_names(config, prefix="") -> list[str]:
    names = []
    for name in config:
        value = config[name]
        names += _option_names(value, f"{prefix}{name}.") if isinstance(value, type(config)) else [prefix + name]
    return names


def _check_names(config, overrides):
    """Refuses `--config.NAME` for an option that does not exist."""
    names = _option_names(config)
    for override in overrides:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", override)
        if match and not any(f"{name}.".startswith(f"{match[1]}.") for name in names):
            raise UsageError(_no_option(f"config.{match[1]}", config))


def _no_option(name, config) -> str:
    own = name.removeprefix("config.")
    near = nearest(own, _option_names(config), 0.5)
    meant = f"; did you mean --config.{near}?" if near else "."
    return f"there is no option --{name}{meant} The options are in dmm_jax/config/options.py."
