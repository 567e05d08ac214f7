"""`dmm-jax config`: prints every option of an experiment, its value and its meaning."""

import argparse
import pathlib

EXAMPLES = ("dmm-jax config", "dmm-jax config sd15 --config.batch_size=96", "dmm-jax config runs/sd15 --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "config",
        nargs="?",
        default=argparse.SUPPRESS,
        metavar="CONFIG",
        help="an experiment file, the name of one that ships, or a training run; default: the defaults",
    )
    parser.add_argument("--config", default="", metavar="CONFIG", help="CONFIG, as other verbs take it; default: none")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> None:
    """Prints the options; values that differ from the defaults show both."""
    from dmm_jax.config import options as config_lib
    from dmm_jax.config.files import read_config
    from dmm_jax.config.meanings import render
    from dmm_jax.config.serialization import load_config, to_json

    if args.config and (pathlib.Path(args.config) / "config.json").is_file():
        config = load_config(args.config)
    else:
        config = read_config(args.config or config_lib.__file__, args.overrides)
    print(to_json(config) if getattr(args, "json", False) else render(config), end="")
