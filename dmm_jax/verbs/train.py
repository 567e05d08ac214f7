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
    parser.add_argument("--tensorboard", action="store_true", help="write event files too; needs tensorboardX")
    group = parser.add_argument_group("as one of several processes")
    group.add_argument("--distributed", action="store_true", help="ask the cluster (Cloud TPU, GKE, Slurm, Open MPI)")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, without a cluster to ask; default: none"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="processes of the run; default: none")
    group.add_argument("--process-id", type=int, metavar="K", help="number of this process, 0 to N - 1; default: none")


def main(args: argparse.Namespace) -> None:
    """Trains, or resumes the run in the workdir; SIGTERM and Ctrl-C save the step that was reached."""
    from dmm_jax.runtime import processes, stopping

    with stopping.stop_requests():  # Before all else: importing, and waiting for other processes, take long.
        from dmm_jax.train import run

        with processes.joined(args.distributed, args.coordinator, args.num_processes, args.process_id):
            run(options.read_experiment(args.config, args.overrides), args.workdir, args.tensorboard)
