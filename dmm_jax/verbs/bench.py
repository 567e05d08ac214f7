"""`dmm-jax bench`: its arguments, and the printing of its rows."""

import argparse
import itertools
import json
import pathlib
import sys

from dmm_jax.runtime.errors import UserError

EXAMPLES = (
    "dmm-jax bench train --num-steps 12",
    "dmm-jax bench sample --batch-size 8 --json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument(
        "job",
        choices=("train", "sample", "serve", "prepare", "data", "host", "fid", "numerics", "scaling"),
        help="serve: the engine under load, next to other ways to serve; prepare: from JPEGs to a cache; "
        "data: batches of a cache; host: the host's time of a step; numerics: errors relative to float32; "
        "scaling: train on 1, 2, 4, ... devices, divided in every way",
    )
    parser.add_argument(
        "--config",
        default="",
        metavar="CONFIG",
        help="an experiment file; default: batch 48, for scaling on each device; eight teachers",
    )
    parser.add_argument(
        "--devices",
        type=_integers,
        default=[],
        metavar="N",
        help="train: the first N; scaling: each of 1,2,4,8; default: all",
    )
    parser.add_argument(
        "--teachers",
        type=_integers,
        default=[],
        metavar="N",
        help="train: with the first N teachers, each of 1,4,8; default: the config's",
    )
    parser.add_argument(
        "--results", default="", metavar="FILE", help="scaling: a file of rows, not measured again; default: none"
    )
    parser.add_argument(
        "--figure", type=pathlib.Path, metavar="PNG", help="scaling, serve: draw it, and NAME_dark.png; default: none"
    )
    parser.add_argument("--size", default="sd15", help="of the networks: sd15, sd21, sdxl, tiny, tiny_xl, narrow")
    parser.add_argument("--num-steps", type=int, default=10, help="timed steps; the median counts")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="images at once, for sample, serve and prepare; train has the config's",
    )
    parser.add_argument(
        "--loads", default="0.5,0.8,0.95", metavar="X", help="serve: requests/s, as shares of images/s at saturation"
    )
    parser.add_argument(
        "--requests", type=int, default=0, metavar="N", help="serve: of each row; default: 12 for each image at once"
    )
    parser.add_argument(
        "--sampling-steps", type=_integers, default=[20, 25, 30], metavar="N", help="serve: of the requests"
    )
    parser.add_argument(
        "--against", choices=("torch",), help="run the PyTorch peer as well; needs the [torch] extra; default: none"
    )
    parser.add_argument(
        "--profile", default="", help="a folder for a trace; prints its kernels, summed, on stderr; default: none"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")


def main(args: argparse.Namespace) -> int | None:
    """Runs the job; with --json prints each row as soon as it is measured."""
    from dmm_jax.bench import comparison, jobs, table
    from dmm_jax.config import arguments
    from dmm_jax.verbs import options

    config = options.read_experiment(args.config or jobs.__file__, args.overrides)
    arguments.whole_number("--num-steps", args.num_steps, 1)
    arguments.whole_number("--batch-size", args.batch_size, 1)
    if args.against and args.job not in ("train", "sample"):
        raise UserError(f"--against is for `bench train` and `bench sample`; PyTorch has no peer of `{args.job}`.")
    if args.job == "scaling":
        return _run_scaling(args, config)
    if args.job == "serve":
        return _run_serve(args, config)
    if len(args.devices) > 1:
        raise UserError(f"--devices of `{args.job}` is one number; `bench scaling` takes several.")
    if args.teachers and args.job != "train":
        raise UserError(f"--teachers is for `bench train`; `{args.job}` takes the config's.")
    configs = [jobs.with_teachers(config, number) for number in sorted(args.teachers)] or [config]
    peer_rows = []
    if args.against:
        batch_size = config.batch_size if args.job == "train" else args.batch_size
        counts = [len(each.teachers) for each in configs]
        peer_rows = comparison.run_peer(args.job, args.size, batch_size, args.num_steps, *counts)
    options = args.size, args.num_steps, args.batch_size, args.profile, sum(args.devices)
    # The fewest teachers come first: a device's peak memory is that of all jobs so far.
    measured = itertools.chain.from_iterable(jobs.bench(args.job, each, *options) for each in configs)
    rows = []
    for row in itertools.chain(peer_rows, comparison.with_ratios(measured, peer_rows) if peer_rows else measured):
        rows.append(row)
        if args.json:
            print(json.dumps(row), flush=True)
    if not args.json:
        print(table.render(rows))


def _run_scaling(args, config):
    from dmm_jax.bench import scaling, table

    def say(row):
        print(json.dumps(row), file=sys.stdout if args.json else sys.stderr, flush=True)

    options = {"profile": args.profile, "results": args.results, "say": say}
    rows = scaling.scaling(config, args.size, args.num_steps, args.devices, **options)
    if not args.json:
        print(table.render(rows, scaling.COLUMNS))
    if args.figure:
        scaling.write_figure(rows, args.figure)
    return 1 if all("failed" in row for row in rows) else 0


def _run_serve(args, config):
    from dmm_jax.bench import serve, table

    loads = [_load(part) for part in args.loads.split(",")]
    rows = []
    for row in serve.measure(config, args.size, args.batch_size, args.requests, loads, args.sampling_steps):
        rows.append(row | serve.device() | {"size": args.size})
        if args.json:
            print(json.dumps(rows[-1]), flush=True)
    if not args.json:
        print(table.render(rows, serve.COLUMNS))
    if args.figure:
        serve.write_figure(rows, args.figure)
    return 0


def _load(text):
    try:
        load = float(text)
    except ValueError:
        load = 0.0
    if not 0.0 < load <= 10.0:
        raise UserError(f"--loads must be numbers above 0, as in 0.5,0.8; got {text!r}.")
    return load


def _integers(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, or several as in 1,2,4; got {text!r}") from None
