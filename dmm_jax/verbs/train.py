"""`dmm-jax train`: distils the teachers into one student, as one process or as one of several."""

import argparse
import pathlib

from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax train --config=sd15 --workdir=runs/sd15",
    "dmm-jax train --config=sd15 --workdir=runs/sd15 --config.teachers=anime=a.safetensors --config.batch_size=48",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="CONFIG",
        help="an experiment file, or a name of `dmm-jax list configs`; "
        "--config.NAME=VALUE changes an option, and --config.help lists all",
    )
    parser.add_argument(
        "--workdir", required=True, type=pathlib.Path, metavar="FOLDER", help="of the run; new, or one to resume"
    )
    parser.add_argument(
        "--tracker",
        action="append",
        default=[],
        choices=("tensorboard", "wandb"),
        help="sends the numbers to TensorBoard or Weights & Biases too, if installed; repeat; default: none",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="read and check everything, compile, print the needs; write nothing"
    )
    options.add_processes(parser)


def main(args: argparse.Namespace) -> None:
    """Trains, or resumes the run in the workdir; SIGTERM and Ctrl-C save the step that was reached."""
    from dmm_jax.runtime import stopping

    with stopping.stop_requests():  # Before all else: importing, and waiting for other processes, take long.
        from dmm_jax.train import run

        with options.joined(args):
            config = options.read_experiment(args.config, args.overrides)
            run(config, args.workdir, args.tracker, args.dry_run)
            if not args.dry_run:
                _print_end(args.workdir)


def _print_end(workdir: pathlib.Path) -> None:
    """Prints the losses of each style, and what to do next."""
    from dmm_jax.config.options import style_names
    from dmm_jax.config.serialization import load_config
    from dmm_jax.runtime.metrics import losses_table, read_log
    from dmm_jax.runtime.processes import say
    from dmm_jax.runtime.storage import locate

    style = style_names(load_config(workdir))[-1]
    say(f"\n{losses_table(read_log(locate(workdir) / 'metrics.jsonl'))}\n\nNext:")
    say(f'  dmm-jax sample {workdir} --prompt "..." --out pictures')
    say(f"  dmm-jax evaluate {workdir}")
    say(f'  dmm-jax export {workdir} exported --format diffusers,single-file --style "{style}"')
