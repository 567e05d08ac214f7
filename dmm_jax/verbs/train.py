"""`dmm-jax train`: distils the teachers into one student, as one process or as one of several."""

import argparse
import pathlib

from dmm_jax.verbs import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("--config", required=True, help="an experiment file; --config.NAME=VALUE changes an option")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--tensorboard", action="store_true", help="write event files too; needs tensorboardX")
    group = parser.add_argument_group("as one of several processes")
    group.add_argument("--distributed", action="store_true", help="ask the cluster (Cloud TPU, GKE, Slurm, Open MPI)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, without a cluster to ask")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="K", help="0 to N - 1")


def main(args: argparse.Namespace) -> None:
    """Trains, or resumes the run in the workdir; SIGTERM and Ctrl-C save the step that was reached."""
    from dmm_jax.runtime import processes, stopping

    with stopping.stop_requests():  # Before all else: importing, and waiting for other processes, take long.
        from dmm_jax.train import run

        with processes.joined(args.distributed, args.coordinator, args.num_processes, args.process_id):
            run(options.read_experiment(args.config, args.overrides), args.workdir, args.tensorboard)
