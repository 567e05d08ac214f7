"""The paper's two tables in the embedded world: what each part of the method is worth, over seeds (docs/study.md).

    python -m dmm_jax.demo.study teachers --out study      # eight teachers, some nearly alike: fine-tuned from the base
    python -m dmm_jax.demo.study run --out study           # every row, three seeds each; goes on where it was stopped
    python -m dmm_jax.demo.study table --out study         # the tables, from study/results.jsonl

A row is a chain of training runs, each with changes to one config; the last one's student is measured by the trace of
its style matrix (FID_t, arXiv:2504.12364, 4.2) against the same teachers' pictures for all rows.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dmm_jax import train
from dmm_jax.average import parse_method
from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.average import METHODS, merged
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.export import Recipe, write_single_file
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.demo import experiment, recipe, world
from dmm_jax.evaluation.evaluate import OTHER_SEED, PROMPT_SEED, TEACHER_SEED, measure
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.networks import SHAPES, open_network
from dmm_jax.pipeline import Pipeline
from dmm_jax.prepare import prepare_from_config
from dmm_jax.sample import draw

STYLES = ("comic", "cartoon", "pastel", "ink", "sepia", "neon", "night", "blueprint")  # Neighbours are nearly alike.
SEEDS = (0, 1, 2)
NUM_PICTURES, NUM_MADE = 8192, 1500  # Of the renderer; and of each teacher, as in the paper (A.3).
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
}


def study_config(out: pathlib.Path, styles: Sequence[str], num_steps: int, seed: int) -> ml_collections.ConfigDict:
    """Returns the config that all rows share: the demo's, with the study's teachers."""
    config = experiment.get_config()
    config.teachers = tuple((name, str(teacher_path(out, name))) for name in styles)
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


def make_teachers(out: pathlib.Path, plan: recipe.Plan, bank_size: int) -> None:
    """Fine-tunes the base that ships on each style of the study; what is there is not trained again."""
    source, dtype = recipe.shipped_world(), jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    graphs = recipe.graphs_of(source.text_config, source.tokenizer, dtype)
    fit = recipe.Fit(recipe.denoising_loss(*graphs, train_text=False), plan, 5e-4)
    (out / "teachers").mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(STYLES):
        path = teacher_path(out, name)
        if path.exists():
            continue
        bank = recipe.make_bank(100 + number, bank_size, source.tokenizer, style=name)
        data = recipe.add_latents(bank, source.base["vae"], dtype) | {"text_encoder": source.base["text_encoder"]}
        params = fit({"unet": source.base["unet"]}, data, name, seed=10 + number)
        unet = Component(dict(recipe.UNET_CONFIG), lambda params=params: naming.to_torch(params["unet"]))
        stock = Checkpoint(path, "single-file", {"unet": unet}, dict(recipe.SCHEDULER_CONFIG), None, None)
        write_single_file(path, stock, "float16", Recipe(f"study, {name}", [], None))


class Judge:
    """Measures students against the teachers' pictures, which are drawn once."""

    def __init__(self, out: pathlib.Path, num_images: int):
        self.out, self.num_images = out, num_images
        self.network = open_network(SHAPES)
        self.config = study_config(out, STYLES, 1, 0)
        self.prompts = world.sample_scenes(np.random.default_rng(PROMPT_SEED), num_images)[1]
        self.base = open_checkpoint(self.config.base)
        self.stock = Pipeline.of_student(self.base, self.base.unet_config, (), dtype=self.config.dtype)

    def sample(self, pipeline: Pipeline, style: str | None, seed: int) -> Statistics:
        """Returns the statistics of a model's pictures."""
        options = {k: self.config.evaluation[k] for k in ("num_inference_steps", "guidance_scale", "solver")}
        jobs = [(prompt, style, seed + k) for k, prompt in enumerate(self.prompts)]
        drawn = draw(pipeline, jobs, min(self.config.evaluation.batch_size, len(jobs)), **options)
        return measure(self.network, drawn, self.num_images).statistics

    @functools.cached_property
    def teachers(self) -> dict[str, Statistics]:
        """Every teacher's pictures."""
        return {name: self.sample(self._teacher(name), None, TEACHER_SEED) for name in STYLES}

    def _teacher(self, name):
        return self.stock.with_unet(open_checkpoint(teacher_path(self.out, name)).params("unet"))

    def references(self) -> dict[str, dict[str, float]]:
        """Returns each style's distance of what the students are held against: the floor, the base, the average."""
        teachers = [open_checkpoint(teacher_path(self.out, name)) for name in STYLES]
        models = {"base": self.base.params("unet")}
        for method in METHODS:
            models[method] = merged(self.base, teachers, parse_method(method, len(teachers))).params("unet")
        drawn = {name: self.sample(self.stock.with_unet(unet), None, OTHER_SEED) for name, unet in models.items()}
        again = {name: self.sample(self._teacher(name), None, OTHER_SEED) for name in STYLES}
        found = {what: self._distances(dict.fromkeys(STYLES, one)) for what, one in drawn.items()}
        return found | {"floor": self._distances(again)}

    def _distances(self, drawn: Mapping[str, Statistics]) -> dict[str, float]:
        return {name: frechet_distance(drawn[name], self.teachers[name]) for name in STYLES}

    def student(self, workdir: pathlib.Path) -> dict[str, float]:
        """Returns the distance of each style to its own teacher."""
        student = open_checkpoint(workdir)
        pipeline = Pipeline.of_student(self.base, student.unet_config, student.styles, dtype=self.config.dtype)
        pipeline = pipeline.with_unet(student.params("unet"))
        return self._distances({name: self.sample(pipeline, name, OTHER_SEED) for name in STYLES})


def train_row(
    out: pathlib.Path, stages: Sequence[Stage], num_steps: int, seed: int, folder: pathlib.Path
) -> pathlib.Path:
    """Trains a row's stages below `folder`; returns the workdir of the last."""
    workdir, done = None, 0
    for number, stage in enumerate(stages):
        config = stage_config(study_config(out, stage.styles, num_steps, seed), stage, workdir)
        if stage.replay is not None or workdir is None:
            workdir, done = folder / f"stage_{number}", 0
        config.num_steps += done  # A stage that does not grow goes on with the run.
        done = config.num_steps
        train.run(config, workdir)
    return workdir


def run(
    out: pathlib.Path, rows: Sequence[str], seeds: Sequence[int], num_steps: int, num_images: int, num_made: int
) -> None:
    """Trains and measures what `results.jsonl` does not hold yet."""
    prepare(out, num_made)
    results, judge = out / "results.jsonl", Judge(out, num_images)
    settings = {"num_steps": num_steps, "n": num_images, "made": num_made}
    there = {(line["row"], line["seed"]) for line in read(results) if line["settings"] == settings}
    if ("references", 0) not in there:
        _append(results, {"row": "references", "seed": 0, "settings": settings} | judge.references())
    for seed in seeds:
        for row in rows:
            if (row, seed) in there:
                continue
            started, folder = time.perf_counter(), out / "runs" / f"{list(ROWS).index(row)}_{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            distances = judge.student(train_row(out, ROWS[row], num_steps, seed, folder))
            shutil.rmtree(folder)
            line = {"row": row, "seed": seed, "settings": settings, "distances": distances}
            _append(results, line | {"seconds": time.perf_counter() - started, "device": jax.devices()[0].device_kind})
            print(f"{row}, seed {seed}: {sum(distances.values()):.2f}", flush=True)


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


def _append(path, line):
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def table(lines: Sequence[Mapping]) -> str:
    """Writes the traces, mean and standard deviation over the seeds, as a Markdown table."""
    references = next(line for line in lines if line["row"] == "references")
    floor = sum(references["floor"].values())
    text = ["| row | trace: mean | spread over seeds | over the floor | seeds |", "|---|---|---|---|---|"]
    for name in ("base", *METHODS, "floor"):
        trace = sum(references[name].values())
        text.append(f"| {name} | {trace:.2f} | | {trace / floor - 1:+.1%} | |")
    for row in ROWS:
        traces = [sum(line["distances"].values()) for line in lines if line["row"] == row]
        if traces:
            spread = f"{np.std(traces, ddof=1):.2f}" if len(traces) > 1 else ""
            mean = np.mean(traces)
            text.append(f"| {row} | {mean:.2f} | {spread} | {mean / floor - 1:+.1%} | {len(traces)} |")
    return "\n".join(text)


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("teachers", "run", "table"))
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--num-steps", type=int, default=1500, help="of a stage")
    parser.add_argument("--num-images", type=int, default=2000, help="a style, for the distances")
    parser.add_argument("--num-made", type=int, default=NUM_MADE, help="pictures that each teacher draws")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    args = parser.parse_args()
    if args.command == "teachers":
        make_teachers(args.out, recipe.Plan(args.teacher_steps, 512), 32_768)
    elif args.command == "run":
        run(args.out, args.rows, args.seeds, args.num_steps, args.num_images, args.num_made)
    else:
        print(table(read(args.out / "results.jsonl")))


if __name__ == "__main__":
    main()
