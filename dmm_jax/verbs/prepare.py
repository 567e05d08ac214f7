"""`dmm-jax prepare`: turns images and captions, or prompts alone, into a cache of latents and token ids."""

import argparse
import pathlib
import shlex

from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax prepare --config=sd15",
    "dmm-jax prepare --config=sd15 --config.data.source=images --config.data.cache=cache",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "--config", required=True, metavar="CONFIG", help="an experiment file, or a name of `dmm-jax list configs`"
    )
    parser.add_argument("--strict", action="store_true", help="stop where an image or another file is not used")
    parser.add_argument("--dry-run", action="store_true", help="list and check everything; write nothing")
    options.add_processes(parser)


def main(args: argparse.Namespace) -> None:
    """Writes the cache that the experiment names."""
    from dmm_jax.distill.teacher_samples import prepare_cache
    from dmm_jax.runtime.processes import say

    with options.joined(args):
        prepare_cache(options.read_experiment(args.config, args.overrides), args.strict, args.dry_run)
        if not args.dry_run:
            workdir = f"runs/{pathlib.Path(args.config).stem}"
            command = ["dmm-jax", "train", f"--config={args.config}", f"--workdir={workdir}", *args.overrides]
            say(f"\nNext:\n  {shlex.join(command)}")
