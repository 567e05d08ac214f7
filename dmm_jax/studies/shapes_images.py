"""Distance over images seen: how few images a student of the shapes world needs (docs/study.md).

    python -m dmm_jax.studies.shapes_images run --out study --jobs 12 --minutes 9    # teachers, data, the rows of ROUND
    python -m dmm_jax.studies.shapes_images run --out study --seeds 0 1 2 --rows "images=120000 batch_size=48"
    python -m dmm_jax.studies.shapes_images table --out study

A row is a line of changes: `images=N` is the number of images that the student sees, `data=made` trains on pictures
that the teachers drew, and everything else is an option of the config. `images=480000` is the reference, the row `from
the weight average` of docs/study.md. Several rows share one GPU.

images.jsonl gets a line as soon as a row is measured. A command that ends early, also one that is killed, can be given
again: it trains only what is missing, and a run that was interrupted continues from its last checkpoint.
"""

import argparse
import ast
import collections
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import time
import traceback
from collections.abc import Sequence

import jax
import numpy as np

from dmm_jax import train
from dmm_jax.runtime import compilation
from dmm_jax.studies import shapes_data
from dmm_jax.studies.shapes_judge import Judge
from dmm_jax.studies.shapes_rows import NUM_MADE, RENDERED, STYLES, cache_path, study_config, teacher_path
from dmm_jax.studies.shapes_table import read, trace
from dmm_jax.world.training import Plan

WARMUP_IMAGES = 4_800  # As many as in the reference's 20 steps of 240.
REFERENCES = "references"  # The line of results with the distances of base, weight merges and floor.
ROUND = (
    "images=480000",
    "images=120000",
    "images=120000 batch_size=48",
    "images=120000 optimizer=muon",
    "images=120000 optimizer=muon learning_rate=4e-3",
    "images=120000 optimizer=muon learning_rate=1e-2",
    "images=120000 learning_rate=4.5e-3",
    "images=120000 learning_rate=1.5e-2",
    "images=120000 batch_size=48 learning_rate=8e-4",
    "images=120000 batch_size=48 optimizer=muon",
    "images=120000 batch_size=120",
    "images=120000 optimizer=muon learning_rate=4e-3 style_learning_rate_scale=0.4",
    "images=120000 batch_size=48 optimizer=muon learning_rate=4e-3",
    "images=120000 batch_size=48 learning_rate=3e-3",
    "images=120000 adam_b2=0.95",
    "images=120000 timestep_draw=spread",
    "images=120000 score_loss=pseudo_huber feature_loss_weight=0.0",
    "images=120000 feature_loss_weight=0.0",
    "images=120000 timestep_power=1.5",
    "images=120000 timestep_power=0.7",
    "images=120000 style_learning_rate_scale=5.0",
    "images=120000 learning_rate=3e-3 learning_rate_schedule=constant decay_share=0.5",
    "images=120000 learning_rate_schedule=constant ema_width=0.1",
    "images=120000 feature_loss=normalized feature_loss_weight=0.1",
    "images=120000 batch_size=48 adam_b2=0.99",
    "images=120000 batch_size=24 learning_rate=8e-4",
    "images=120000 batch_size=24 optimizer=muon learning_rate=8e-4",
)


def parse(row: str) -> dict[str, object]:
    """Returns the changes that a row names, {"images": 120000, "batch_size": 48, ...}."""
    return {name: _value(text) for name, _, text in (part.partition("=") for part in row.split())}


def _value(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def row_config(out: pathlib.Path, row: str, seed: int):
    """Returns the config of a row."""
    changes = parse(row)
    images, data = changes.pop("images"), changes.pop("data", RENDERED)
    config = study_config(out, STYLES, 0, seed)
    config.student_init = "average"
    config.data.cache = cache_path(out, data)
    config.batch_size = changes.pop("batch_size", config.batch_size)
    config.num_steps = max(images // config.batch_size, 1)
    config.warmup_steps = WARMUP_IMAGES // config.batch_size
    config.update_from_flattened_dict(changes)
    return config


def run(out: pathlib.Path, tasks: Sequence[tuple[str, int]], sizes: argparse.Namespace) -> None:
    """Trains and measures the (row, seed) pairs that `images.jsonl` lacks, the first ones first."""
    started, results = time.monotonic(), out / "images.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    data = {parse(row).get("data", RENDERED) for row, _ in tasks if row != REFERENCES}
    measured = {(line["row"], line["seed"]) for line in read(results)}
    missing = [task for task in tasks if task not in measured]
    with multiprocessing.get_context("spawn").Pool(sizes.jobs, compilation.use_cache) as pool:
        untrained = [name for name in STYLES if not teacher_path(out, name).exists()]
        pool.map(functools.partial(_make_teacher, out, sizes), untrained, chunksize=1)
        print(f"Teachers after {time.monotonic() - started:.0f} s.", flush=True)
        preparations = [("pictures", out, sizes), *(("data", out, sizes, name) for name in sorted(data))]
        pool.starmap(_prepare, preparations, chunksize=1)
        print(f"Data after {time.monotonic() - started:.0f} s.", flush=True)
        lines = pool.imap_unordered(functools.partial(_measure, out, sizes.num_images), missing, chunksize=1)
        for _ in missing:
            try:
                line = lines.next(timeout=max(60 * sizes.minutes - (time.monotonic() - started), 0.1))
            except multiprocessing.TimeoutError:
                print("The time is over; give the command again.", flush=True)
                for process in multiprocessing.active_children():
                    process.kill()  # A run continues from its last checkpoint.
                break
            if "error" in line:
                print(f"{line['row']}, seed {line['seed']}:\n{line['error']}", flush=True)
                continue
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{time.monotonic() - started:.0f} s: {summary(line)}", flush=True)


def _make_teacher(out, sizes, name):
    shapes_data.make_teachers(out, [name], Plan(sizes.teacher_steps, 512), sizes.bank_size)


def _prepare(kind, out, sizes, data=None):
    if kind == "pictures":
        assert _judge(out, sizes.num_images).teachers
    else:
        shapes_data.prepare(out, [data], sizes.num_made)


@functools.cache
def _judge(out, num_images) -> Judge:
    """Returns this process's judge."""
    return Judge(out, num_images)


def _measure(out, num_images, task) -> dict:
    """Returns one line of results, or the error that prevented it: other rows go on."""
    row, seed = task
    line = {"row": row, "seed": seed, "n": num_images, "device": jax.devices()[0].device_kind}
    try:
        if row == REFERENCES:
            return line | _judge(out, num_images).references(seed)
        return line | _train_and_measure(out, row, seed, num_images)
    except FloatingPointError as error:
        return line | {"diverged": str(error)}
    except Exception:
        return line | {"error": traceback.format_exc()[-2000:]}


def _train_and_measure(out, row, seed, num_images):
    started, config = time.perf_counter(), row_config(out, row, seed)
    workdir = out / "image_runs" / f"{hashlib.sha256(row.encode()).hexdigest()[:12]}_{seed}"
    last = train.run(config, workdir)
    train_seconds = time.perf_counter() - started
    distances = _judge(out, num_images).student(workdir)
    shutil.rmtree(workdir)
    return {
        "images": config.num_steps * config.batch_size,
        "steps": config.num_steps,
        "distances": distances,
        "score": float(np.mean(list(last["score"].values()))) if last else None,
        "images_per_s": last.get("images_per_s"),
        "train_seconds": train_seconds,
        "seconds": time.perf_counter() - started,
    }


def summary(line: dict) -> str:
    """Returns one measured line in words."""
    if line["row"] == REFERENCES or "diverged" in line:
        return f"{line['row']}, seed {line['seed']}: {line.get('diverged', 'measured')[:200]}"
    few, every = trace(line["distances"], "few"), trace(line["distances"])
    return f"{line['row']}, seed {line['seed']}: few {few:.2f}, trace {every:.2f}, {line['seconds']:.0f} s"


def table(lines: Sequence[dict]) -> str:
    """Returns a Markdown table of all rows, the nearest to the teachers first; the floor is the last line."""
    text = ["| row | steps | few: mean | spread | trace: mean | spread | seeds |", "|---|---|---|---|---|---|---|"]
    floors = [line["floor"] for line in lines if line["row"] == REFERENCES]
    rows = collections.defaultdict(list)
    for line in lines:
        if "distances" in line:
            rows[line["row"], line["steps"]].append(line["distances"])
    ranked = sorted(rows.items(), key=lambda item: np.mean([trace(run, "few") for run in item[1]]))
    for (row, steps), runs in [*ranked, *([(("floor", ""), floors)] if floors else [])]:
        cells = [row, f"{steps:,}" if steps else ""]
        for pictures in ("few", "all"):
            values = [trace(distances, pictures) for distances in runs]
            cells += [f"{np.mean(values):.2f}", f"{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""]
        text.append(f"| {' | '.join([*cells, str(len(runs))])} |")
    text += [f"| {line['row']} (seed {line['seed']}) | | diverged | | | | |" for line in lines if "diverged" in line]
    return "\n".join(text)


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--rows", nargs="+", default=[], help="rows to run, in this order; default: the first round")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=1e6, help="the command ends after this time")
    parser.add_argument("--num-images", type=int, default=2000, help="pictures per style, for the distances")
    parser.add_argument("--num-made", type=int, default=NUM_MADE, help="pictures that each teacher draws as data")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="training steps per teacher")
    parser.add_argument("--bank-size", type=int, default=32_768, help="pictures that a teacher is trained on")
    args = parser.parse_args()
    if args.command == "table":
        print(table(read(args.out / "images.jsonl")))
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # The processes share one device's memory.
    tasks = [(row, seed) for row in args.rows or ROUND for seed in args.seeds]
    if not args.rows:
        tasks += [(row, seed) for row in ROUND[:2] for seed in (1, 2)]
        tasks += [(REFERENCES, seed) for seed in (0, 1, 2)]
    run(args.out, tasks, args)


if __name__ == "__main__":
    main()
