"""The paper's two tables in the embedded world: what each part of the method is worth, over seeds (docs/study.md).

    python -m dmm_jax.demo.study teachers --out study      # eight teachers, some nearly alike: fine-tuned from the base
    python -m dmm_jax.demo.study run --out study --jobs 6  # every row, three seeds each; goes on where it was stopped
    python -m dmm_jax.demo.study table --out study         # the table and its figure, from study/results.jsonl

A row is a chain of training runs, each with changes to one config; the last one's student is measured by the trace of
its style matrix (FID_t, arXiv:2504.12364, 4.2) against the same teachers' pictures for all rows.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from dmm_jax import compilation, train
from dmm_jax.average import parse_method
from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.average import METHODS, merged
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.export import Recipe, write_single_file
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.demo import experiment, recipe, world
from dmm_jax.evaluation import figures
from dmm_jax.evaluation.evaluate import OTHER_SEED, TEACHER_SEED
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.networks import SHAPES, open_network
from dmm_jax.evaluation.prompts import PROMPT_SEED
from dmm_jax.pipeline import Pipeline
from dmm_jax.prepare import prepare_from_config
from dmm_jax.sample import draw

STYLES = ("comic", "cartoon", "pastel", "ink", "sepia", "neon", "night", "blueprint")  # Neighbours are nearly alike.
SEEDS = (0, 1, 2)
NUM_PICTURES, NUM_MADE = 8192, 1500  # Of the renderer; and of each teacher, as in the paper (A.3).
FEW = 78  # Pictures of a distance: 2.4 a feature of the 32, as the paper's 5,000 have of Inception's 2,048 (4.2).
NO_FEATURES = {"feature_loss_weight": 0.0}
ADVERSARIAL = {"adversarial.weight": 0.01, "adversarial.learning_rate": 1e-4}
MADE = {"data.source": "teachers"}  # Of the last stage: it reads what the teachers drew.


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run: what it changes in the config, which styles it learns, and whether it grows the one before."""

    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    styles: tuple[str, ...] = STYLES
    replay: int | None = None  # Grows the last stage's student, with so many rows of replay.
    steps: float = 1.0  # Times the study's number of steps.


def _grown(*groups: int, replay: int, steps: float = 1.0) -> tuple[Stage, ...]:
    """Returns the stages that learn so many styles after each other."""
    ends = np.cumsum(groups).tolist()
    parts = [STYLES[end - size : end] for end, size in zip(ends, groups, strict=True)]
    later = [Stage(styles=part, replay=replay, steps=steps) for part in parts[1:]]
    return (Stage(styles=parts[0]), *later)


ROWS: dict[str, tuple[Stage, ...]] = {
    "score": (Stage(NO_FEATURES),),
    "+ feature": (Stage(),),
    "+ feature, twice the steps": (Stage(steps=2.0),),
    "+ adversarial": (Stage(ADVERSARIAL),),
    "+ teacher-made data": (Stage(ADVERSARIAL), Stage(ADVERSARIAL | MADE, steps=0.5)),
    "+ as many steps without it": (Stage(ADVERSARIAL), Stage(ADVERSARIAL, steps=0.5)),
    "teacher-made data alone": (Stage(MADE),),
    "4 + 4, not regularised": _grown(4, 4, replay=0),
    "4 + 4": _grown(4, 4, replay=1),
    "4 + 2 + 2": _grown(4, 2, 2, replay=1),
    "random style MLP": (Stage({"style_init": "paper"}),),
    "from the weight average": (Stage({"student_init": "average"}),),
    "features over their variance": (Stage({"feature_loss": "normalized", "feature_loss_weight": 0.1}),),
    "average, teacher-made data, twice the steps": (Stage({"student_init": "average"} | MADE, steps=2.0),),
}


def study_config(out: pathlib.Path, styles: Sequence[str], num_steps: int, seed: int) -> ml_collections.ConfigDict:
    """Returns the config that all rows share: the demo's, with the study's teachers."""
    config = experiment.get_config()
    config.teachers = tuple((name, str(teacher_path(out, name))) for name in styles)
    config.student_init = "base"
    config.seed, config.num_steps = seed, num_steps
    config.dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    config.batch_size = 240  # Of 8, 4 + 1 and 2 + 1 rows.
    config.data.num_examples = NUM_PICTURES
    config.data.cache = str(out / "cache")
    config.data.prompts = str(out / "prompts.txt")
    config.data.sampling.update({"num_inference_steps": 10, "guidance_scale": 2.5, "batch_size": 512})
    config.warmup_steps, config.validation_size, config.validation_every = 20, 0, 0
    config.log_every, config.checkpoint_every, config.checkpoints_kept = 250, 0, 1
    config.evaluation.batch_size = 500
    return config


def stage_config(config: ml_collections.ConfigDict, stage: Stage, before: pathlib.Path | None):
    """Returns the config of a stage behind the one that trained in `before`.

    A stage that grows starts a student of its own; another one goes on with the same.
    """
    config = config.copy_and_resolve_references()
    config.num_steps = int(config.num_steps * stage.steps)
    for name, value in stage.changes.items():
        if name == "data.source":
            config.data.cache += "_made"
        else:
            config.update_from_flattened_dict({name: value})
    if stage.replay is not None:
        config.grow.student, config.grow.replay = str(before), stage.replay
    return config


def teacher_path(out: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where a teacher of the study lies."""
    return out / "teachers" / f"{name}.safetensors"


def make_teachers(out: pathlib.Path, styles: Sequence[str], plan: recipe.Plan, bank_size: int) -> None:
    """Fine-tunes the base that ships on each of some styles of the study; what is there is not trained again."""
    source, dtype = recipe.shipped_world(), jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    graphs = recipe.graphs_of(source.text_config, source.tokenizer, dtype)
    fit = recipe.Fit(recipe.denoising_loss(*graphs, train_text=False), plan, 5e-4)
    (out / "teachers").mkdir(parents=True, exist_ok=True)
    for name in styles:
        number, path = STYLES.index(name), teacher_path(out, name)
        if path.exists():
            continue
        bank = recipe.make_bank(100 + number, bank_size, source.tokenizer, style=name)
        data = recipe.add_latents(bank, source.base["vae"], dtype) | {"text_encoder": source.base["text_encoder"]}
        params = fit({"unet": source.base["unet"]}, data, name, seed=10 + number)
        unet = Component(dict(recipe.UNET_CONFIG), lambda params=params: naming.to_torch(params["unet"]))
        stock = Checkpoint(path, "single-file", {"unet": unet}, dict(recipe.SCHEDULER_CONFIG), None, None)
        write_single_file(path, stock, "float16", Recipe(f"study, {name}", [], None))


class Judge:
    """Measures students against the teachers' pictures, which are drawn once and whose features are kept."""

    def __init__(self, out: pathlib.Path, num_images: int):
        self.out, self.num_images = out, num_images
        self.network = open_network(SHAPES)
        self.config = study_config(out, STYLES, 1, 0)
        self.prompts = world.sample_scenes(np.random.default_rng(PROMPT_SEED), num_images)[1]
        self.base = open_checkpoint(self.config.base)
        self.stock = Pipeline.of_student(self.base, self.base.unet_config, (), dtype=self.config.dtype)

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

    def references(self) -> dict[str, dict]:
        """Returns the distances of what the students are held against: the floor, the base, the weight merges."""
        teachers = [open_checkpoint(teacher_path(self.out, name)) for name in STYLES]
        models = {"base": self.base.params("unet")}
        for method in METHODS:
            models[method] = merged(self.base, teachers, parse_method(method, len(teachers))).params("unet")
        drawn = {name: self.sample(self.stock.with_unet(unet), None, OTHER_SEED) for name, unet in models.items()}
        again = {name: self.sample(self._teacher(name), None, OTHER_SEED) for name in STYLES}
        found = {what: self._distances(dict.fromkeys(STYLES, one)) for what, one in drawn.items()}
        return found | {"floor": self._distances(again)}

    def student(self, workdir: pathlib.Path) -> dict[str, dict]:
        """Returns the distances of each style to its own teacher."""
        student = open_checkpoint(workdir)
        pipeline = Pipeline.of_student(self.base, student.unet_config, student.styles, dtype=self.config.dtype)
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


@dataclasses.dataclass(frozen=True)
class Node:
    """A chain of stages that one or more rows begin with, for one seed: trained once, whatever goes on from it."""

    stages: tuple[Stage, ...]
    seed: int

    @property
    def parent(self) -> "Node | None":
        """The chain without its last stage."""
        return Node(self.stages[:-1], self.seed) if len(self.stages) > 1 else None

    @property
    def row(self) -> str | None:
        """The row that ends here."""
        return next((row for row, stages in ROWS.items() if stages == self.stages), None)

    def folder(self, out: pathlib.Path, num_steps: int) -> pathlib.Path:
        """Returns where it is trained: what its stages say gives the name, so that no other chain finds it."""
        chain = hashlib.sha256(repr(self.stages).encode()).hexdigest()[:12]
        return out / "runs" / f"{chain}_{num_steps}_{self.seed}"

    def steps_left(self, rows: Iterable[str]) -> float:
        """Returns the stages that rows still train from here on, this one's included, in units of a stage."""
        size = len(self.stages)
        through = [ROWS[row][size - 1 :] for row in rows if ROWS[row][:size] == self.stages]
        return max((sum(stage.steps for stage in stages) for stages in through), default=0.0)


def train_node(out: pathlib.Path, node: Node, num_steps: int) -> pathlib.Path:
    """Trains a node's last stage behind its parent's run; returns its workdir. One that is trained is left alone."""
    workdir, stage, steps = node.folder(out, num_steps), node.stages[-1], 0
    before = node.parent and node.parent.folder(out, num_steps)
    if before and stage.replay is None:  # A stage that does not grow goes on with the run, in a copy of it.
        steps = json.loads((before / "config.json").read_text())["num_steps"]
        if not workdir.exists():
            shutil.copytree(before, workdir.with_suffix(".part"), dirs_exist_ok=True)
            os.replace(workdir.with_suffix(".part"), workdir)
    config = stage_config(study_config(out, stage.styles, num_steps, node.seed), stage, before)
    config.num_steps += steps
    train.run(config, workdir)
    return workdir


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
        made = pool.submit(prepare, out, settings.made)
        pool.submit(draw_teachers, out, settings).result()
        made.result()
        running = {}
        if ("references", 0) not in there:
            running[pool.submit(measure_references, out, settings)] = ("references", 0, None)

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


def measure_references(out: pathlib.Path, settings: Settings) -> dict:
    """Measures the floor, the base and the weight merges."""
    return judge(out, settings.n).references()


def measure_node(out: pathlib.Path, settings: Settings, node: Node, measured: bool) -> dict:
    """Trains a node's student and, where a row ends, measures it."""
    started = time.perf_counter()
    workdir = train_node(out, node, settings.num_steps)
    seconds = {"train_seconds": time.perf_counter() - started}  # Of the last stage.
    distances = judge(out, settings.n).student(workdir) if measured else {}
    seconds["seconds"] = time.perf_counter() - started
    return {"distances": distances, **seconds, "device": jax.devices()[0].device_kind}


def prepare(out: pathlib.Path, num_made: int) -> None:
    """Makes the two caches: of rendered pictures, and of what the teachers draw, `num_made` each."""
    config = study_config(out, STYLES, 1, 0)
    prepare_from_config(config)
    captions = world.sample_scenes(np.random.default_rng(1), num_made)[1]
    (out / "prompts.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    made = config.copy_and_resolve_references()
    made.data.source, made.data.num_examples = "teachers", num_made * len(STYLES)
    made.data.cache += "_made"
    prepare_from_config(made)


def read(path: pathlib.Path) -> list[dict]:
    """Reads the results that there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def trace(distances: Mapping[str, Mapping[str, float]], pictures: str = "all") -> float:
    """Returns FID_t: the sum over the styles."""
    return sum(distances[pictures].values())


def traces(lines: Sequence[Mapping], pictures: str = "all") -> dict[str, list[float]]:
    """Returns FID_t by row: of the references one, of a row one a seed; the floor comes last."""
    references = next(line for line in lines if line["row"] == "references")
    found = {name: [trace(references[name], pictures)] for name in ("base", *METHODS)}
    for name in ROWS:
        runs = [trace(line["distances"], pictures) for line in lines if line["row"] == name]
        found |= {name: runs} if runs else {}
    return found | {"floor": [trace(references["floor"], pictures)]}


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
            mean, floor = np.mean(found[name]), found["floor"][0]
            spread = f"{np.std(found[name], ddof=1):.2f}" if len(found[name]) > 1 else ""
            cells += [f"{mean:.2f}", spread, f"{mean / floor - 1:+.1%}"]
        text.append(f"| {' | '.join((name, *cells, str(len(found[name])) if name in ROWS else ''))} |")
    return "\n".join(text)


def figure(lines: Sequence[Mapping]) -> dict[str, bytes]:
    """Draws every run's trace beside the floor: PNGs for light and dark pages."""
    found = traces(lines)
    floor = found.pop("floor")[0]
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
