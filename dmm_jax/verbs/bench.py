"""`dmm-jax bench`: its arguments, and how what is measured is printed."""

import argparse
import itertools
import json
import pathlib
import sys

from dmm_jax.runtime.errors import UserError


def add_arguments(verb: argparse.ArgumentParser) -> None:
    """Describes the arguments of `dmm-jax bench`."""
    verb.add_argument(
        "job",
        choices=("train", "sample", "host", "fid", "numerics", "scaling"),
        help="host: what a step costs it alone; numerics: errors against float32; scaling: train on 1, 2, 4, ... "
        "devices, divided in every way",
    )
    verb.add_argument(
        "--config", default="", help="an experiment file; default: batch 48, for scaling on each device; eight teachers"
    )
    verb.add_argument(
        "--devices", type=_integers, default=[], metavar="N", help="train: on the first N; scaling: on each of 1,2,4,8"
    )
    verb.add_argument("--results", default="", metavar="FILE", help="scaling: rows kept here are not measured again")
    verb.add_argument("--figure", type=pathlib.Path, metavar="PNG", help="scaling: draw it; NAME_dark, too")
    verb.add_argument("--size", default="sd15", help="of the networks: sd15, sd21, sdxl, tiny, narrow")
    verb.add_argument("--num-steps", type=int, default=10, help="timed steps; the median counts")
    verb.add_argument("--batch-size", type=int, default=16, help="images at once, for sample; train has the config's")
    verb.add_argument("--against", choices=("torch",), help="also run the PyTorch peer here; needs the [torch] extra")
    verb.add_argument("--profile", default="", help="a folder for a trace; its kernels are summed up on stderr")
    verb.add_argument("--json", action="store_true", help="print one JSON object a line")


def main(args: argparse.Namespace) -> int | None:
    """Measures what is asked for; with --json each line is printed as soon as it is there."""
    from dmm_jax.bench import jobs
    from dmm_jax.config import arguments
    from dmm_jax.verbs import options

    config = options.read_experiment(args.config or jobs.__file__, args.overrides)
    arguments.whole_number("--num-steps", args.num_steps, 1)
    arguments.whole_number("--batch-size", args.batch_size, 1)
    if args.against and args.job not in ("train", "sample"):
        raise UserError(f"--against is for `bench train` and `bench sample`; PyTorch has no peer of `{args.job}`.")
    if args.job == "scaling":
        return _bench_scaling(args, config)
    if len(args.devices) > 1:
        raise UserError(f"--devices of `{args.job}` is one number; `bench scaling` takes several.")
    batch_size = config.batch_size if args.job == "train" else args.batch_size
    others = jobs.peer(args.job, args.size, batch_size, args.num_steps, len(config.teachers)) if args.against else []
    measured = jobs.bench(args.job, config, args.size, args.num_steps, args.batch_size, args.profile, sum(args.devices))
    lines = []
    for line in itertools.chain(others, jobs.with_ratios(measured, others) if others else measured):
        lines.append(line)
        if args.json:
            print(json.dumps(line), flush=True)
    if not args.json:
        print(jobs.table(lines))


def _bench_scaling(args, config):
    from dmm_jax.bench import jobs, scaling

    def say(row):
        print(json.dumps(row), file=sys.stdout if args.json else sys.stderr, flush=True)

    options = {"profile": args.profile, "results": args.results, "say": say}
    rows = scaling.scaling(config, args.size, args.num_steps, args.devices, **options)
    if not args.json:
        print(jobs.table(rows, scaling.COLUMNS))
    if args.figure:
        scaling.write_figure(rows, args.figure)
    return 1 if all("failed" in row for row in rows) else 0


def _integers(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or several as in 1,2,4; got {text!r}") from None
