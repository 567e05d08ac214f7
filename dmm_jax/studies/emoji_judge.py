"""Measures the emoji study's models: FD (emoji) to each teacher, and the classifier's accuracy of concept and set."""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.storage import part_of, write_text
from dmm_jax.studies import emoji_classifier
from dmm_jax.studies.emoji_pictures import TRAIN
from dmm_jax.world.training import Stretch, StretchOver

TEACHER_SEED, OTHER_SEED, PROMPT_SEED = 1_000_000, 2_000_000, 3  # First pictures' seeds; the prompts' choice.
BATCH_SIZE = 500
SEEN_PER_HELD_OUT = 4  # Pictures of concepts that teachers saw, per picture of a held-out concept.
TENTHS = 11  # Points along a strip.
DISTANCE = "FD (emoji)"


class Judge:
    """Draws the same prompts with every model, each once: features that are on disk are read.

    Args:
      study: the `emoji_stages.Study`, whose stages up to the classifier are done.
      stretch: the time in which it must stop; each model's features are kept in its folder.
    """

    def __init__(self, study, stretch: Stretch):
        self.study, self.stretch = study, stretch
        self.classifier = emoji_classifier.load(study.out / "classifier.safetensors", study.size.classifier)
        self.prompts = prompts_of(study.rows, study.size.num_images)

    def measure(self) -> dict:
        """Returns the distances and accuracies of all models.

        Raises:
          StretchOver: the time is over; what was drawn is kept.
        """
        names, num_images = list(self.study.sets), self.study.size.num_images
        study = self.study
        teachers = {name: self._outputs(f"teacher_{name}", self._stock(study.teacher(name)), None, TEACHER_SEED)
                    for name in names}  # fmt: skip
        floor = {name: self._outputs(f"floor_{name}", self._stock(study.teacher(name)), None, OTHER_SEED)
                 for name in names}  # fmt: skip
        student = {name: self._outputs(f"student_{name}", lambda: study.student_pipeline, name, OTHER_SEED)
                   for name in names}  # fmt: skip
        models = {"floor": floor, "student": student}
        for model, path in study.stock_models.items():
            outputs = self._outputs(model, self._stock(path), None, OTHER_SEED)
            models[model] = dict.fromkeys(names, outputs)
        summaries = {name: _summary(outputs["features"], num_images) for name, outputs in teachers.items()}
        lines = {
            model: {name: self._line(outputs, name, summaries[name]) for name, outputs in by_set.items()}
            for model, by_set in models.items()
        }
        matrix = [
            [frechet_distance(_summary(student[row]["features"], num_images), summaries[column]) for column in names]
            for row in names
        ]
        strips = [self._strip(first, last) for first, last in zip(names, [*names[1:], names[0]], strict=True)]
        return {"styles": names, "distance": DISTANCE, "n": num_images, "models": lines, "matrix": matrix,
                "strips": strips}  # fmt: skip

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

    def _strip(self, first: str, last: str) -> dict:
        """Returns how a mix of two sets moves from one to the other, over a few prompts."""
        prompts = [caption for _, caption in self.prompts[: min(32, len(self.prompts))]]
        weights = np.linspace(0.0, 1.0, TENTHS)
        mixes = [{first: 1.0 - float(weight), last: float(weight)} for weight in weights]
        jobs = [(prompt, mix, OTHER_SEED + k) for k, prompt in enumerate(prompts) for mix in mixes]
        classes = self._classify(self.study.student_pipeline, jobs)["set"].reshape(len(prompts), TENTHS, -1)
        ends = [self.classifier.sets.index(name) for name in (first, last)]
        jumps = [emoji_classifier.largest_jump(strip) for strip in classes]
        backward = [emoji_classifier.backward_steps(strip, *ends) for strip in classes]
        return {"sets": [first, last], "largest jump": float(np.mean(jumps)), "backward": float(np.mean(backward))}

    def _outputs(self, name, make_pipeline, style, seed) -> dict[str, Float[np.ndarray, "n D"]]:
        """Returns the classifier's outputs for a model's pictures, which are drawn unless that is done."""
        path = self.stretch.folder / f"{name}.safetensors"
        if not path.is_file():
            if time.monotonic() > self.stretch.ends:
                raise StretchOver(f"measure: {name} is next.")
            jobs = [(caption, style, seed + k) for k, (_, caption) in enumerate(self.prompts)]
            path.parent.mkdir(parents=True, exist_ok=True)
            part = part_of(path)
            save_file(self._classify(make_pipeline(), jobs), part)
            part.replace(path)
        return load_file(path)

    def _classify(self, pipeline: Pipeline, jobs: Sequence) -> dict[str, Float[np.ndarray, "n D"]]:
        sampling = self.study.sampling
        batches = draw(pipeline, jobs, min(BATCH_SIZE, len(jobs)), **sampling)
        images = np.concatenate([images for images, _ in batches])[: len(jobs)]
        return {name: np.ascontiguousarray(rows) for name, rows in self.classifier(images).items()}

    def _stock(self, path: pathlib.Path) -> Callable[[], Pipeline]:
        return functools.partial(self.study.pipeline, path)


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
    """Writes the measures as JSON."""
    write_text(path, json.dumps(measures, indent=1))


def table(measures: Mapping) -> str:
    """Returns a Markdown table: for each model the trace (sum of distances over the sets) and the mean accuracies."""
    names = list(next(iter(next(iter(measures["models"].values())).values())))
    text = [f"| model | {DISTANCE}, trace | {' | '.join(names[1:])} |", "|---|---|" + "---|" * (len(names) - 1)]
    for model, by_set in measures["models"].items():
        trace = sum(line[DISTANCE] for line in by_set.values())
        means = [np.mean([line[name] for line in by_set.values()]) for name in names[1:]]
        text.append(f"| {model} | {trace:.2f} | {' | '.join(f'{mean:.1%}' for mean in means)} |")
    jumps = [strip["largest jump"] for strip in measures["strips"]]
    text.append(f"\nLargest jump per tenth along {len(jumps)} strips: mean {np.mean(jumps):.2f}.")
    return "\n".join(text)
