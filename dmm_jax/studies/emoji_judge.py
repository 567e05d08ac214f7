"""Measures the emoji study's models: FD (emoji) to each teacher, and the classifier's accuracy of concept and set."""

import functools
import itertools
import json
import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import MIXINGS, Pipeline
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import part_of, read_json, write_text
from dmm_jax.studies import emoji_classifier
from dmm_jax.studies.emoji_pictures import TRAIN
from dmm_jax.studies.emoji_study import Study, slug
from dmm_jax.world.training import Stretch, StretchOver

TEACHER_SEED, OTHER_SEED, PROMPT_SEED = 1_000_000, 2_000_000, 3  # First pictures' seeds; the prompts' choice.
BATCH_SIZE = 500
SEEN_PER_HELD_OUT = 4  # Pictures of concepts that teachers saw, per picture of a held-out concept.
TENTHS, NUM_STRIP_PROMPTS = np.linspace(0.0, 1.0, 11), 32  # Along a strip; prompts for each pair of sets.
WEIGHTED_SUM = "weighted sum of two"
DISTANCE = "FD (emoji)"
ACCURACIES = ("concept", "set", "concept, held out", "set, held out")


class Judge:
    """Draws the same prompts with every model, each once: what the classifier made of the pictures stays on disk.

    Args:
      study: its stages up to the classifier are done.
      stretch: the time in which it must stop.
    """

    def __init__(self, study: Study, stretch: Stretch):
        self.study, self.stretch = study, stretch
        self.classifier = emoji_classifier.load(study.out / "classifier.safetensors", study.size.classifier)
        self.prompts = prompts_of(study.rows, study.size.num_images)

    def references(self) -> dict:
        """Returns the distances and accuracies of floor, base and weight merges, and the strips of weighted sums.

        Raises:
          StretchOver: the time is over; what was drawn is kept.
        """
        names = list(self.study.sets)
        models = {"floor": {name: self._teacher(name, "floor", OTHER_SEED) for name in names}}
        for model, path in self.study.stock_models.items():
            make_pipeline = functools.partial(self.study.pipeline, path)
            models[model] = dict.fromkeys(names, self._outputs(model, make_pipeline, None, OTHER_SEED))
        return {
            "distance": DISTANCE,
            "n": self.study.size.num_images,
            "models": {model: self._lines(by_set) for model, by_set in models.items()},
            "strips": {WEIGHTED_SUM: self._weighted_sums()},
        }

    def student(self, row: str, seed: int) -> dict:
        """Returns the distances and accuracies of a row's student by set, its style matrix, and its mixes.

        Raises:
          StretchOver: the time is over; what was drawn is kept.
        """
        names, size = list(self.study.sets), self.study.size
        pipeline = functools.cache(
            lambda: Pipeline.from_pretrained(self.study.student(row, seed), dtype=self.study.dtype)
        )
        label = slug(row, seed)
        outputs = {name: self._outputs(f"{label}_{name}", pipeline, name, OTHER_SEED) for name in names}
        summaries = [self._teacher_summary(name) for name in names]
        matrix = [
            [frechet_distance(_summary(outputs[name]["features"], size.num_images), teacher) for teacher in summaries]
            for name in names
        ]
        facts = {"row": row, "seed": seed, "distance": DISTANCE, "n": size.num_images, "styles": names}
        strips = {mixing: self._strips(pipeline(), mixing) for mixing in MIXINGS}
        return facts | {"lines": self._lines(outputs), "matrix": matrix, "strips": strips}

    def _lines(self, by_set: Mapping[str, Mapping]) -> dict[str, dict[str, float]]:
        return {name: self._line(outputs, name, self._teacher_summary(name)) for name, outputs in by_set.items()}

    def _line(self, outputs, name, teacher: Statistics) -> dict[str, float]:
        """Returns one model's figures for one set; the held-out concepts are the last rows."""
        num_images, line = self.study.size.num_images, {}
        line[DISTANCE] = frechet_distance(_summary(outputs["features"], num_images), teacher)
        truth = np.array([self.classifier.concepts.index(key) for key, _ in self.prompts])
        style = np.full(len(self.prompts), self.classifier.sets.index(name))
        for part, rows in (("", slice(num_images)), (", held out", slice(num_images, None))):
            line[f"concept{part}"] = emoji_classifier.accuracy(outputs["concept"][rows], truth[rows])
            line[f"set{part}"] = emoji_classifier.accuracy(outputs["set"][rows], style[rows])
        return line

    def _strips(self, pipeline: Pipeline, mixing: str) -> list[dict]:
        """Returns how mixes move from one set to another, for every pair of sets and a few prompts."""
        jobs = [
            (caption, {first: 1.0 - float(weight), last: float(weight)}, OTHER_SEED + number)
            for first, last in self.pairs
            for number, (_, caption) in enumerate(self.prompts[:NUM_STRIP_PROMPTS])
            for weight in TENTHS
        ]
        return self._measured_strips(self._classify(pipeline, jobs, mixing=mixing))

    def _weighted_sums(self) -> list[dict]:
        """Returns the same for weighted sums of two teachers' parameters, as merging tools make them."""
        paths = {name: self.study.teacher(name) for name in self.study.sets}
        teachers = {name: open_checkpoint(path).params("unet", np.float32) for name, path in paths.items()}
        outputs = []
        for first, last in self.pairs:
            tenths = []
            for weight in TENTHS.astype(np.float32):
                both = teachers[first], teachers[last]
                params = jax.tree.map(lambda a, b, w=weight: (1 - w) * a + w * b, *both)
                prompts = enumerate(self.prompts[:NUM_STRIP_PROMPTS])
                jobs = [(caption, None, OTHER_SEED + number) for number, (_, caption) in prompts]
                tenths.append(self._classify(self.study.stock_pipeline.with_unet(params), jobs))
            outputs.append({name: np.stack([each[name] for each in tenths], axis=1) for name in tenths[0]})
        joined = {name: np.stack([each[name] for each in outputs]) for name in outputs[0]}
        return self._measured_strips({name: rows.reshape(-1, rows.shape[-1]) for name, rows in joined.items()})

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """All pairs of sets."""
        return list(itertools.combinations(self.study.sets, 2))

    def _measured_strips(self, outputs: Mapping[str, Float[np.ndarray, "n D"]]) -> list[dict]:
        """Returns the figures of each pair; the outputs are in the order of pairs, prompts and tenths."""
        prompts, pairs = self.prompts[:NUM_STRIP_PROMPTS], self.pairs
        shape = len(pairs), len(prompts), len(TENTHS), -1
        truth = [self.classifier.concepts.index(key) for key, _ in prompts]
        concepts = outputs["concept"].argmax(axis=1).reshape(shape[:-1]) == np.array(truth)[:, None]
        strips = []
        for (first, last), classes, is_right in zip(pairs, outputs["set"].reshape(shape), concepts, strict=True):
            ends = [self.classifier.sets.index(name) for name in (first, last)]
            strips.append({
                "sets": [first, last],
                "largest jump": float(np.mean([emoji_classifier.largest_jump(strip) for strip in classes])),
                "backward": float(np.mean([emoji_classifier.backward_steps(strip, *ends) for strip in classes])),
                "concept": float(np.mean(is_right)),
            })  # fmt: skip
        return strips

    def _teacher(self, name: str, label: str, seed: int) -> dict[str, Float[np.ndarray, "n D"]]:
        make_pipeline = functools.partial(self.study.pipeline, self.study.teacher(name))
        return self._outputs(f"{label}_{name}", make_pipeline, None, seed)

    def _teacher_summary(self, name: str) -> Statistics:
        return _summary(self._teacher(name, "teacher", TEACHER_SEED)["features"], self.study.size.num_images)

    def _outputs(self, label, make_pipeline, style, seed) -> dict[str, Float[np.ndarray, "n D"]]:
        """Returns the classifier's outputs for a model's pictures, which are drawn unless that is done."""
        path = self.study.out / "features" / f"{label}.safetensors"
        if not path.is_file():
            if time.monotonic() > self.stretch.ends:
                raise StretchOver(f"measure: {label} is next.")
            jobs = [(caption, style, seed + k) for k, (_, caption) in enumerate(self.prompts)]
            path.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(path)
            save_file(self._classify(make_pipeline(), jobs), part)
            part.replace(path)
        return load_file(path)

    def _classify(self, pipeline: Pipeline, jobs: Sequence, **options) -> dict[str, Float[np.ndarray, "n D"]]:
        batches = draw(pipeline, jobs, min(BATCH_SIZE, len(jobs)), **self.study.sampling, **options)
        images = np.concatenate([images for images, _ in batches])[: len(jobs)]
        return {name: np.ascontiguousarray(rows) for name, rows in self.classifier(images).items()}


def prompts_of(rows: Sequence[Mapping], num_images: int) -> list[tuple[str, str]]:
    """Returns (concept, caption) of `num_images` pictures of concepts that teachers saw, then of held-out concepts.

    The captions are those of pictures, drawn at random; every held-out concept comes once before one comes twice.
    """
    rng = np.random.default_rng(PROMPT_SEED)
    seen = sorted({(row["concept"], row["caption"]) for row in rows if row["split"] == TRAIN})
    unseen = [(row["concept"], row["caption"]) for row in rows if row["split"] != TRAIN]
    unseen = sorted({(concept, caption) for concept, caption in unseen if " on pale " not in caption})
    chosen = [seen[number] for number in rng.integers(len(seen), size=num_images)]
    order = rng.permutation(len(unseen))
    return chosen + [unseen[order[k % len(order)]] for k in range(max(num_images // SEEN_PER_HELD_OUT, 1))]


def _summary(features: Float[np.ndarray, "n D"], num_images: int) -> Statistics:
    return Statistics.empty(features.shape[1]).update(features[:num_images])


def write(path: pathlib.Path, measures: Mapping) -> None:
    """Writes measures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(measures, indent=1))


def read(study: Study) -> tuple[dict, list[dict]]:
    """Returns the measures of floor, base and weight merges, and those of all students.

    Raises:
      UserError: none are there.
    """
    if not study.references.is_file():
        raise UserError(f"{study.references} is missing: python -m dmm_jax.studies.emoji run {study.folder}")
    paths = sorted(set(study.references.parent.glob("*.json")) - {study.references})
    return read_json(study.references), [read_json(path) for path in paths]


def table(references: Mapping, students: Sequence[Mapping]) -> str:
    """Returns a Markdown table with a line per model: means over the sets, and over the seeds of a row.

    The trace is the sum of distances over the sets. "Closed" is the share of the base's distance above the floor that
    a model closes, its mean and its least over the sets. The last columns are of mixes of all pairs of sets: the
    largest change of a set's probability between neighbouring tenths, its movement backwards, and the share of right
    concepts.
    """
    rows: dict[str, list[Mapping]] = {}
    for student in students:
        rows.setdefault(student["row"], []).append(student)
    models = references["models"]
    columns = list(ACCURACIES)
    heads = ["model", "seeds", f"{DISTANCE}, trace", "closed", "least closed", *columns, "largest jump", "backward",
             "concept, mixes"]  # fmt: skip
    text = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines = [(model, [lines], []) for model, lines in models.items()]
    for row, runs in rows.items():
        rows_mixed, predictions_mixed = (
            [student["strips"][mixing] for student in runs if mixing in student["strips"]] for mixing in MIXINGS
        )
        lines.append((row, [student["lines"] for student in runs], rows_mixed))
        lines += [(f"{row}: predictions mixed", [], predictions_mixed)] if predictions_mixed else []
    lines += [(model, [], [strips]) for model, strips in references["strips"].items()]
    for model, by_seed, strips in lines:
        cells = [model, str(len(strips) or 1), *([""] * (3 + len(columns)))]
        if by_seed:
            closed = [closed_shares(by_set, models) for by_set in by_seed]
            trace = np.mean([_trace(by_set) for by_set in by_seed])
            cells[2:5] = f"{trace:.2f}", f"{np.mean(closed):.1%}", f"{np.min(closed):.1%}"
            every = [line for by_set in by_seed for line in by_set.values()]
            cells[5:] = [f"{np.mean([line[name] for line in every]):.1%}" for name in columns]
        for name, form in (("largest jump", ".2f"), ("backward", ".2f"), ("concept", ".1%")):
            values = [strip[name] for run in strips for strip in run]
            cells.append(format(np.mean(values), form) if values else "")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def closed_shares(by_set: Mapping[str, Mapping], models: Mapping) -> list[float]:
    """Returns for each set the share of the base's distance above the floor that a model closes."""
    shares = []
    for name, line in by_set.items():
        base, floor = (models[model][name][DISTANCE] for model in ("base", "floor"))
        shares.append((base - line[DISTANCE]) / (base - floor))
    return shares


def _trace(by_set: Mapping[str, Mapping]) -> float:
    return sum(line[DISTANCE] for line in by_set.values())
