"""What a cut prompt costs a student: the demo's teachers draw its data from prompts longer than one chunk.

    python -m dmm_jax.studies.shapes_prompts run --out prompts    # three students, some minutes each on two CPU cores
    python -m dmm_jax.studies.shapes_prompts table --out prompts  # the table, from prompts/prompts.jsonl

A long prompt has 75 words that say nothing ("a"), then a caption: the caption is the second chunk. Cut after one chunk,
as plain text is, it says nothing about the picture. Every student is asked for new captions, and for new long prompts
in chunks. The share of pictures in which the classifier finds all words of the caption measures it, and the distance
to the teachers' pictures of the same prompts. An interrupted run continues from its last checkpoint.
"""

import argparse
import functools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dmm_jax import train
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config.options import solver_options
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.evaluation.evaluate import OTHER_SEED, TEACHER_SEED
from dmm_jax.evaluation.feature_networks import SHAPES, open_feature_network
from dmm_jax.evaluation.prompts import PROMPT_SEED
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.studies.shapes_judge import mean_distance
from dmm_jax.studies.shapes_table import read
from dmm_jax.text.prompt_grammar import A1111, PLAIN
from dmm_jax.world import classifier, demo_config
from dmm_jax.world.scenes import Content, sample_scenes
from dmm_jax.world.shipped_checkpoints import CLASSIFIER, FOLDER

PREFIX = "a " * 75  # One chunk.
TEACHERS = "teachers"
# By row: whether the teachers' prompts are long, how they are read, and the chunks of the student's captions.
ROWS = {
    "captions": (False, PLAIN, 1),
    "long prompts, cut": (True, PLAIN, 1),
    "long prompts, in chunks": (True, A1111, 2),
}


def long_prompts(captions: Sequence[str]) -> list[str]:
    """Returns prompts whose second chunk is the caption."""
    return [PREFIX + caption for caption in captions]


def row_config(out: pathlib.Path, row: str, seed: int, num_steps: int, num_made: int):
    """Returns the config of a row: the demo's, with data that its teachers draw."""
    is_long, grammar, num_chunks = ROWS[row]
    config = demo_config.get_config()
    config.seed, config.num_steps = seed, num_steps
    config.validation_every = config.validation_size = 0
    config.samples.prompts = ()
    config.data.kind, config.data.num_examples, config.data.num_chunks = "prompts", num_made, num_chunks
    config.data.source = str(out / f"{'long' if is_long else 'captions'}.txt")
    config.data.cache = str(out / "caches" / f"{row.replace(' ', '_')}_{seed}")
    config.sampling.prompt_grammar = grammar
    return config


def write_prompts(out: pathlib.Path, num_made: int) -> None:
    """Writes the prompts that the teachers draw."""
    captions = sample_scenes(np.random.default_rng(1), num_made)[1]
    for name, prompts in (("captions", captions), ("long", long_prompts(captions))):
        (out / f"{name}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


class Judge:
    """Draws new prompts, short and long, with the teachers and with students, always read in chunks."""

    def __init__(self, num_images: int):
        self.config = demo_config.get_config()
        scenes, captions = sample_scenes(np.random.default_rng(PROMPT_SEED), num_images)
        self.content: Content = scenes.content
        self.prompts = {"captions": captions, "long prompts": long_prompts(captions)}
        self.network = open_feature_network(SHAPES)
        self.classifier = classifier.load(FOLDER / CLASSIFIER)
        self.base = open_checkpoint(self.config.base)

    @functools.cached_property
    def teachers(self) -> dict[str, dict]:
        """Accuracy and features of the teachers' pictures, by prompts and style."""
        stock = Pipeline.for_unet(self.base, self.base.unet_config, (), dtype="float32")
        pipelines = {name: stock.with_unet(open_checkpoint(path).params("unet")) for name, path in self.config.teachers}
        return self._measure({name: (pipeline, None) for name, pipeline in pipelines.items()}, TEACHER_SEED)

    def student(self, workdir: pathlib.Path) -> dict[str, dict]:
        """Returns a student's accuracy, and its distances to its teachers' pictures, by prompts and style."""
        pipeline = Pipeline.from_pretrained(workdir, dtype="float32")
        measured = self._measure({name: (pipeline, name) for name, _ in self.config.teachers}, OTHER_SEED)
        for kind, styles in measured.items():
            for name, values in styles.items():
                teacher = self.teachers[kind][name]["features"]
                values["distance"] = mean_distance(values.pop("features"), teacher, len(teacher))
        return measured

    def _measure(self, models: Mapping[str, tuple[Pipeline, str | None]], seed: int) -> dict[str, dict]:
        options = solver_options(self.config)
        measured = {kind: {} for kind in self.prompts}
        for kind, prompts in self.prompts.items():
            for name, (pipeline, style) in models.items():
                jobs = [(prompt, style, seed + k) for k, prompt in enumerate(prompts)]
                images = np.concatenate([images for images, _ in draw(pipeline, jobs, 50, **options)])[: len(prompts)]
                accuracy = classifier.scene_accuracy(*self.classifier, images, self.content)
                measured[kind][name] = {"accuracy": accuracy, "features": self.network.features(images)}
        return measured


def run(out: pathlib.Path, rows: Sequence[str], seeds: Sequence[int], sizes: argparse.Namespace) -> None:
    """Trains and measures the rows that `prompts.jsonl` lacks, and the teachers."""
    out.mkdir(parents=True, exist_ok=True)
    write_prompts(out, sizes.num_made)
    judge, results = Judge(sizes.num_images), out / "prompts.jsonl"
    measured = {(line["row"], line["seed"]) for line in read(results)}
    for row, seed in [(TEACHERS, seeds[0]), *((row, seed) for seed in seeds for row in rows)]:
        if (row, seed) in measured or (row == TEACHERS and any(name == row for name, _ in measured)):
            continue
        started = time.perf_counter()
        if row == TEACHERS:
            values = {kind: {name: {"accuracy": style["accuracy"]} for name, style in styles.items()}
                      for kind, styles in judge.teachers.items()}  # fmt: skip
        else:
            workdir = out / "runs" / f"{row.replace(' ', '_')}_{seed}"
            config = row_config(out, row, seed, sizes.num_steps, sizes.num_made)
            prepare_cache(config)
            train.run(config, workdir)
            values = judge.student(workdir)
        line = {"row": row, "seed": seed, "n": sizes.num_images, "steps": sizes.num_steps, "made": sizes.num_made,
                "device": jax.devices()[0].device_kind, "seconds": time.perf_counter() - started}  # fmt: skip
        with results.open("a") as file:
            file.write(json.dumps(line | {"values": values}) + "\n")
        print(table([line | {"values": values}]).splitlines()[-1], flush=True)


def table(lines: Sequence[Mapping]) -> str:
    """Returns a Markdown table: shares of pictures with all words right, and mean distances, over styles and seeds."""
    text = [
        "| data of the student | captions: all right | distance | long prompts: all right | distance | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for row in (*ROWS, TEACHERS):
        runs = [line["values"] for line in lines if line["row"] == row]
        if not runs:
            continue
        cells = [row]
        for kind in ("captions", "long prompts"):
            styles = [style for run in runs for style in run[kind].values()]
            cells.append(f"{np.mean([style['accuracy']['scene'] for style in styles]):.0%}")
            distances = [style["distance"] for style in styles if "distance" in style]
            cells.append(f"{np.mean(distances):.2f}" if distances else "")
        text.append(f"| {' | '.join([*cells, str(len(runs))])} |")
    return "\n".join(text)


def main() -> None:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="rows to run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--num-steps", type=int, default=280, help="training steps of a student")
    parser.add_argument("--num-images", type=int, default=200, help="pictures per style and kind of prompt")
    parser.add_argument("--num-made", type=int, default=1000, help="pictures that the teachers draw as data")
    args = parser.parse_args()
    if args.command == "table":
        if not (lines := read(args.out / "prompts.jsonl")):
            raise SystemExit(f"error: {args.out / 'prompts.jsonl'} is missing or empty. Give the command run first.")
        print(table(lines))
    else:
        run(args.out, args.rows, args.seeds, args)


if __name__ == "__main__":
    main()
