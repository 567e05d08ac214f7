"""The paper's two tables in the embedded world: the effect of each part of the method, over seeds (docs/study.md).

    python -m dmm_jax.studies.shapes teachers --out study      # eight teachers, some nearly alike, from one base
    python -m dmm_jax.studies.shapes run --out study --jobs 6  # every row with three seeds; can be resumed
    python -m dmm_jax.studies.shapes table --out study         # the table and its figure, from study/results.jsonl

A row is a chain of training runs, each with changes to one config. The trace of the last student's style matrix (FID_t,
arXiv:2504.12364, 4.2) measures the row, against the same pictures of the teachers for all rows.

Any command may be interrupted and given again; it loses only the steps since the last checkpoint (every 500). For
example, on a machine that ends commands after ten minutes, repeat this until it prints nothing:

    timeout -s KILL 570 python -m dmm_jax.studies.shapes run --out study --num-steps 2000 --jobs 6 --rows "4 + 4" score

`--rows`, `--seeds` and `teachers --styles` choose a part of the work; results.jsonl keeps the lines of other rows.
`study/runs` may be deleted while no command runs.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import jax

from dmm_jax.runtime import compilation
from dmm_jax.studies.shapes_data import make_teachers, prepare
from dmm_jax.studies.shapes_judge import Judge
from dmm_jax.studies.shapes_rows import NUM_MADE, ROWS, SEEDS, STYLES, Node, data_of, train_node
from dmm_jax.studies.shapes_table import figure, read, table, trace
from dmm_jax.world.training import Plan


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all lines of a table share; results.jsonl records them."""

    num_steps: int  # Steps per stage.
    n: int  # Pictures per style, for the distances.
    made: int  # Pictures that each teacher draws as training data.


def run(out: pathlib.Path, rows: Sequence[str], seeds: Sequence[int], settings: Settings, jobs: int) -> None:
    """Trains and measures the rows that `results.jsonl` lacks, in `jobs` processes.

    Several runs share one GPU, since the networks are small. Rows that begin alike share their first stages.
    """
    results, shared = out / "results.jsonl", dataclasses.asdict(settings)
    measured = {(line["row"], line["seed"]) for line in read(results) if line["settings"] == shared}
    missing = {seed: [row for row in rows if (row, seed) not in measured] for seed in seeds}
    nodes = nodes_of(missing)
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=compilation.use_cache) as pool:
        caches = pool.submit(prepare, out, data_of(row for rows in missing.values() for row in rows), settings.made)
        pool.submit(draw_teachers, out, settings).result()
        caches.result()
        running = {}
        for seed in seeds:
            if ("references", seed) not in measured:
                running[pool.submit(measure_references, out, settings, seed)] = ("references", seed, None)

        def start_children(parent):
            for node in nodes:
                if node.parent == parent:
                    row = node.row if node.row in missing[node.seed] else None
                    running[pool.submit(run_node, out, settings, node, row is not None)] = (row, node.seed, node)

        start_children(None)
        while running:
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                row, seed, node = running.pop(future)
                result = future.result()
                if node:
                    start_children(node)
                if row:
                    with results.open("a") as file:
                        file.write(json.dumps({"row": row, "seed": seed, "settings": shared} | result) + "\n")
                if row and node:
                    value, seconds = trace(result["distances"]), result["seconds"]
                    print(f"{row}, seed {seed}: {value:.3f}, {seconds:.0f} s", flush=True)
    shutil.rmtree(out / "runs", ignore_errors=True)


def nodes_of(missing: Mapping[int, Sequence[str]]) -> list[Node]:
    """Returns each chain of stages that the missing rows of each seed need once; the longest work comes first."""
    nodes = []
    for seed, rows in missing.items():
        chains = [ROWS[row][:size] for row in rows for size in range(1, len(ROWS[row]) + 1)]
        nodes += [Node(chain, seed) for k, chain in enumerate(chains) if chain not in chains[:k]]
    return sorted(nodes, key=lambda node: -node.steps_left(missing[node.seed]))


@functools.cache
def judge(out: pathlib.Path, num_images: int) -> Judge:
    """Returns this process's judge."""
    return Judge(out, num_images)


def draw_teachers(out: pathlib.Path, settings: Settings) -> None:
    """Draws and stores the teachers' pictures, which all students are compared with."""
    assert judge(out, settings.n).teachers


def measure_references(out: pathlib.Path, settings: Settings, seed: int) -> dict:
    """Returns the distances of base, weight merges and floor, with one seed of noise."""
    return judge(out, settings.n).references(seed)


def run_node(out: pathlib.Path, settings: Settings, node: Node, measured: bool) -> dict:
    """Trains a node's last stage; returns its times and, if it is to be measured, its student's distances."""
    started = time.perf_counter()
    workdir = train_node(out, node, settings.num_steps)
    train_seconds = time.perf_counter() - started
    distances = judge(out, settings.n).student(workdir) if measured else {}
    seconds = time.perf_counter() - started
    device = jax.devices()[0].device_kind
    return {"distances": distances, "train_seconds": train_seconds, "seconds": seconds, "device": device}


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("teachers", "run", "table"))
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES, help="teachers to train")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--num-steps", type=int, default=1500, help="steps per stage")
    parser.add_argument("--num-images", type=int, default=2000, help="pictures per style, for the distances")
    parser.add_argument("--num-made", type=int, default=NUM_MADE, help="pictures that each teacher draws as data")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="training steps per teacher")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train at the same time")
    args = parser.parse_args()
    if args.command == "teachers":
        make_teachers(args.out, args.styles, Plan(args.teacher_steps, 512), 32_768)
    elif args.command == "run":
        run(args.out, args.rows, args.seeds, Settings(args.num_steps, args.num_images, args.num_made), args.jobs)
    else:
        lines = read(args.out / "results.jsonl")
        print(table(lines))
        for name, png in figure(lines).items():
            (args.out / f"traces_{name}.png").write_bytes(png)


if __name__ == "__main__":
    main()
