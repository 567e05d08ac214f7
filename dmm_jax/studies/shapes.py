"""The paper's two tables in the embedded world: what each part of the method is worth, over seeds (docs/study.md).

    python -m dmm_jax.studies.shapes teachers --out study      # eight teachers, some nearly alike, from one base
    python -m dmm_jax.studies.shapes run --out study --jobs 6  # every row, three seeds each; resumable
    python -m dmm_jax.studies.shapes table --out study         # the table and its figure, from study/results.jsonl

A row is a chain of training runs, each with changes to one config; the last one's student is measured by the trace of
its style matrix (FID_t, arXiv:2504.12364, 4.2) against the same teachers' pictures for all rows.

Where a command may last ten minutes only, cut it off and give it again, until it says nothing more:

    timeout -s KILL 570 python -m dmm_jax.studies.shapes run --out study --num-steps 2000 --jobs 6 --rows "4 + 4" score

Nothing but the last steps is lost: a teacher, a cache and the teachers' pictures are whole or not there, a run keeps a
checkpoint every 500 steps, and a result is a line in results.jsonl at once. `--rows`, `--seeds` and `teachers --styles`
choose a part of the work; lines of other rows stay. `study/runs` may be deleted whenever no command runs.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from dmm_jax.checkpoints.average import parse_method
from dmm_jax.checkpoints.merge import METHODS, merged
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation import figures
from dmm_jax.evaluation.evaluate import OTHER_SEED, TEACHER_SEED
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.networks import SHAPES, open_network
from dmm_jax.evaluation.prompts import PROMPT_SEED
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import compilation
from dmm_jax.studies.shapes_data import make_teachers, prepare
from dmm_jax.studies.shapes_rows import (
    NUM_MADE,
    ROWS,
    SEEDS,
    STYLES,
    Node,
    data_of,
    study_config,
    teacher_path,
    train_node,
)
from dmm_jax.world import recipe
from dmm_jax.world.scenes import sample_scenes

FEW = 78  # Pictures of a distance: 2.4 a feature of the 32, as the paper's 5,000 have of Inception's 2,048 (4.2).
SEEDS_APART = 1_000_000  # Between the noise of one draw of the references and the next, in the first picture's seed.


class Judge:
    """Measures students against the teachers' pictures, which are drawn once and whose features are kept."""

    def __init__(self, out: pathlib.Path, num_images: int):
        self.out, self.num_images = out, num_images
        self.network = open_network(SHAPES)
        self.config = study_config(out, STYLES, 1, 0)
        self.prompts = sample_scenes(np.random.default_rng(PROMPT_SEED), num_images)[1]
        self.base = open_checkpoint(self.config.base)
        self.stock = Pipeline.for_unet(self.base, self.base.unet_config, (), dtype=self.config.dtype)

    def sample(self, pipeline: Pipeline, style: str | None, seed: int) -> Float[np.ndarray, "n D"]:
        """Returns the features of a model's pictures."""
        options = {k: self.config.evaluation[k] for k in ("num_inference_steps", "guidance_scale", "solver")}
        jobs = [(prompt, style, seed + k) for k, prompt in enumerate(self.prompts)]
        drawn = draw(pipeline, jobs, min(self.config.evaluation.batch_size, len(jobs)), **options)
        return np.concatenate([self.network.features(images) for images, _ in drawn])[: self.num_images]

    @functools.cached_property
    def teachers(self) -> dict[str, Float[np.ndarray, "n D"]]:
        """Every teacher's pictures."""
        path = self.out / f"teachers_{self.num_images}.safetensors"
        if not path.exists():
            drawn = {name: self.sample(self._teacher(name), None, TEACHER_SEED) for name in STYLES}
            save_file(drawn, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
        return load_file(path)

    def _teacher(self, name):
        return self.stock.with_unet(open_checkpoint(teacher_path(self.out, name)).params("unet"))

    def references(self, seed: int) -> dict[str, dict]:
        """Returns the distances of what the students are held against: the floor, the base, the weight merges.

        Args:
          seed: of their noise: each is another draw of the same models.
        """
        first = OTHER_SEED + seed * SEEDS_APART
        teachers = [open_checkpoint(teacher_path(self.out, name)) for name in STYLES]
        models = {"base": self.base.params("unet")}
        for method in METHODS:
            models[method] = merged(self.base, teachers, parse_method(method, len(teachers))).params("unet")
        drawn = {name: self.sample(self.stock.with_unet(unet), None, first) for name, unet in models.items()}
        again = {name: self.sample(self._teacher(name), None, first) for name in STYLES}
        found = {what: self._distances(dict.fromkeys(STYLES, one)) for what, one in drawn.items()}
        return found | {"floor": self._distances(again)}

    def student(self, workdir: pathlib.Path) -> dict[str, dict]:
        """Returns the distances of each style to its own teacher."""
        student = open_checkpoint(workdir)
        pipeline = Pipeline.for_unet(self.base, student.unet_config, student.styles, dtype=self.config.dtype)
        pipeline = pipeline.with_unet(student.params("unet"))
        return self._distances({name: self.sample(pipeline, name, OTHER_SEED) for name in STYLES})

    def _distances(self, drawn):
        """Of all pictures; and the mean over their parts of FEW, which have as few a feature as the paper's."""
        parts = {"all": self.num_images, "few": min(FEW, self.num_images)}
        return {
            what: {name: mean_distance(drawn[name], self.teachers[name], size) for name in STYLES}
            for what, size in parts.items()
        }


def mean_distance(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "n D"], size: int) -> float:
    """Returns the mean Frechet distance of the k-th `size` rows of `a` and of `b`; what is left over is not used."""
    empty = Statistics.empty(a.shape[1])
    starts = range(0, len(a) - size + 1, size)
    parts = [[empty.update(rows[start : start + size]) for rows in (a, b)] for start in starts]
    return float(np.mean([frechet_distance(*pair) for pair in parts]))


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all lines of a table share."""

    num_steps: int  # Of a stage.
    n: int  # Pictures a style, for the distances.
    made: int  # Pictures that each teacher draws.


def run(out: pathlib.Path, rows: Sequence[str], seeds: Sequence[int], settings: Settings, jobs: int) -> None:
    """Trains and measures what `results.jsonl` does not hold yet, so many runs at a time, each in a process.

    The networks are so small that one run leaves most of a GPU idle. What rows have in common is trained once.
    """
    results, about = out / "results.jsonl", dataclasses.asdict(settings)
    there = {(line["row"], line["seed"]) for line in read(results) if line["settings"] == about}
    missing = {seed: [row for row in rows if (row, seed) not in there] for seed in seeds}
    nodes = []
    for seed, row in ((seed, row) for seed, rows in missing.items() for row in rows):
        chain = [Node(ROWS[row][:size], seed) for size in range(1, len(ROWS[row]) + 1)]
        nodes += [node for node in chain if node not in nodes]
    nodes.sort(key=lambda node: -node.steps_left(missing[node.seed]))  # The longest first: none is left alone.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=compilation.keep) as pool:
        made = pool.submit(prepare, out, data_of(row for rows in missing.values() for row in rows), settings.made)
        pool.submit(draw_teachers, out, settings).result()
        made.result()
        running = {}
        for seed in seeds:
            if ("references", seed) not in there:
                running[pool.submit(measure_references, out, settings, seed)] = ("references", seed, None)

        def start(parent):
            for node in nodes:
                if node.parent == parent:
                    measured = node.row in missing[node.seed]
                    done = pool.submit(measure_node, out, settings, node, measured)
                    running[done] = (node.row if measured else None, node.seed, node)

        start(None)
        while running:
            for done in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED).done:
                row, seed, node = running.pop(done)
                found = done.result()
                if node:
                    start(node)
                if row:
                    with results.open("a") as file:
                        file.write(json.dumps({"row": row, "seed": seed, "settings": about} | found) + "\n")
                if row and node:
                    print(f"{row}, seed {seed}: {trace(found['distances']):.3f}, {found['seconds']:.0f} s", flush=True)
    shutil.rmtree(out / "runs", ignore_errors=True)


@functools.cache
def judge(out: pathlib.Path, num_images: int) -> Judge:
    """Returns this process's judge."""
    return Judge(out, num_images)


def draw_teachers(out: pathlib.Path, settings: Settings) -> None:
    """Draws what all students are held against."""
    assert judge(out, settings.n).teachers


def measure_references(out: pathlib.Path, settings: Settings, seed: int) -> dict:
    """Measures the floor, the base and the weight merges, from one draw of noise."""
    return judge(out, settings.n).references(seed)


def measure_node(out: pathlib.Path, settings: Settings, node: Node, measured: bool) -> dict:
    """Trains a node's student and, where a row ends, measures it."""
    started = time.perf_counter()
    workdir = train_node(out, node, settings.num_steps)
    seconds = {"train_seconds": time.perf_counter() - started}  # Of the last stage.
    distances = judge(out, settings.n).student(workdir) if measured else {}
    seconds["seconds"] = time.perf_counter() - started
    return {"distances": distances, **seconds, "device": jax.devices()[0].device_kind}


def read(path: pathlib.Path) -> list[dict]:
    """Reads the results that there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def trace(distances: Mapping[str, Mapping[str, float]], pictures: str = "all") -> float:
    """Returns FID_t: the sum over the styles."""
    return sum(distances[pictures].values())


def traces(lines: Sequence[Mapping], pictures: str = "all") -> dict[str, list[float]]:
    """Returns FID_t by row, one a seed; the floor comes last."""
    references = [line for line in lines if line["row"] == "references"]
    found = {name: [trace(line[name], pictures) for line in references] for name in ("base", *METHODS)}
    for name in ROWS:
        runs = [trace(line["distances"], pictures) for line in lines if line["row"] == name]
        found |= {name: runs} if runs else {}
    return found | {"floor": [trace(line["floor"], pictures) for line in references]}


def table(lines: Sequence[Mapping]) -> str:
    """Writes the traces, mean and standard deviation over the seeds, as a Markdown table."""
    text = [
        "| row | trace: mean | spread over seeds | over the floor | few: mean | spread | over the floor | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by_pictures = [traces(lines, pictures) for pictures in ("all", "few")]
    for name in by_pictures[0]:
        cells = []
        for found in by_pictures:
            mean, floor = np.mean(found[name]), np.mean(found["floor"])
            spread = f"{np.std(found[name], ddof=1):.2f}" if len(found[name]) > 1 else ""
            cells += [f"{mean:.2f}", spread, f"{mean / floor - 1:+.1%}"]
        text.append(
            f"| {' | '.join((name, *cells, str(len(found[name])) if name in ROWS or len(found[name]) > 1 else ''))} |"
        )
    return "\n".join(text)


def figure(lines: Sequence[Mapping]) -> dict[str, bytes]:
    """Draws every run's trace beside the floor: PNGs for light and dark pages."""
    found = traces(lines)
    floor = float(np.mean(found.pop("floor")))
    title = "FID_t, the trace of the style matrix in FD (shapes); a mark a seed; the upright line is the floor"
    return figures.render(lambda theme: figures.runs(found, floor, title, theme))


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("teachers", "run", "table"))
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES, help="whose teachers are made")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--num-steps", type=int, default=1500, help="of a stage")
    parser.add_argument("--num-images", type=int, default=2000, help="a style, for the distances")
    parser.add_argument("--num-made", type=int, default=NUM_MADE, help="pictures that each teacher draws")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    args = parser.parse_args()
    if args.command == "teachers":
        make_teachers(args.out, args.styles, recipe.Plan(args.teacher_steps, 512), 32_768)
    elif args.command == "run":
        run(args.out, args.rows, args.seeds, Settings(args.num_steps, args.num_images, args.num_made), args.jobs)
    else:
        lines = read(args.out / "results.jsonl")
        print(table(lines))
        for name, png in figure(lines).items():
            (args.out / f"traces_{name}.png").write_bytes(png)


if __name__ == "__main__":
    main()
