"""`dmm-jax evaluate`: the student against its teachers, with the floor, the base and weight averages beside it.

Teacher j's pictures are M's columns, student style i's its rows (arXiv:2504.12364, 4.2). The student's are drawn from
other noise than the teachers', as the floor's are (a teacher against itself), so that the two can be compared.
"""

import os
import shlex
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import checks
from dmm_jax.config import options as config_lib
from dmm_jax.evaluation import clip, fidelity, lpips
from dmm_jax.evaluation.kid import NUM_SUBSETS, SUBSET_SIZE, Features, kernel_inception_distance
from dmm_jax.evaluation.models import OTHER_DTYPE, Models, merge_options
from dmm_jax.evaluation.networks import SHAPES, FeatureNetwork, of_shapes_world, open_network
from dmm_jax.evaluation.prompts import SHAPES_WORLD, choose
from dmm_jax.evaluation.report import Interpolation, Pairs, write_report
from dmm_jax.evaluation.style_matrix import Kept, style_matrix
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import metrics
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import Location, in_bucket, locate

TEACHER_SEED, OTHER_SEED = 10_000_000, 20_000_000  # Of the first picture's noise.
NUM_SHOWN = 6  # Pairs of pictures a style, of those that are compared one by one.
NUM_MIXES = 11
SAMPLER = ("num_inference_steps", "guidance_scale", "solver")  # Of `config.evaluation`.


def evaluate(
    workdir: str | os.PathLike,
    num_images: int = 0,
    features: str = SHAPES,
    clip_folder: str = "",
    lpips_file: str = "",
    prompts: str = "",
    negative_prompt: str = "",
) -> Location:
    """Writes `report/index.html` and `report/metrics.json` in a training workdir; returns the page's path.

    Args:
      num_images: per style and model; 0 takes the config's, as "" does for what follows `lpips_file`.
      features: the network that measures, as `networks.open_network` takes it.
      clip_folder: of a CLIP, which adds CLIPScore.
      lpips_file: the weights of LPIPS, which adds it to the fidelity.
      prompts: a text file with one a line.
      negative_prompt: of every picture.

    Raises:
      ValueError: the workdir holds no student, an option or the network cannot be used, or it is not for these
        pictures. All of it is found before anything is drawn.
    """
    started, workdir = time.perf_counter(), locate(workdir)
    config = config_lib.load(workdir)
    options = config.evaluation
    options.num_images = num_images or options.num_images
    options.negative_prompt = negative_prompt or options.negative_prompt
    checks.check_evaluation(options)
    _check_report(workdir / "report")
    lines = _training(workdir / "metrics.jsonl")
    _check_features(features, config)
    chosen = choose(config, max(options.num_images, options.num_pairs), prompts)
    network = open_network(features)
    perceptual = lpips.load(lpips_file) if lpips_file else None
    scorer = clip.Scorer.open(clip_folder, chosen.lines) if clip_folder else None
    drawing = Drawing(network, scorer, chosen.lines, options)
    models = Models(config, workdir)
    results, pairs = _compare(models, drawing, perceptual, options.weight_merges)
    results["settings"] |= drawing.facts | chosen.facts | _conditions(config) | merge_options(options.weight_merges)
    results["settings"] |= {} if perceptual is None else perceptual.facts
    results["settings"]["fidelity's floor"] = f"the teacher in {OTHER_DTYPE[config.dtype]} against {config.dtype}"
    results["weights"] = models.digests()
    given = {"n": options.num_images, "features": features, "clip": clip_folder, "lpips": lpips_file}
    given |= {"prompts": prompts, "negative-prompt": negative_prompt}
    results["command"] = _command(workdir.name, given)
    results["timings"] = {"evaluation (s)": time.perf_counter() - started}
    strip = _interpolation(models, drawing)
    return write_report(workdir / "report", results, grids=pairs, interpolation=strip, metrics=lines)


def _check_report(folder: Location) -> None:
    """Raises ValueError where no report can be written: hours of drawing would be lost."""
    if in_bucket(folder):
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; the report is a folder. Move it away.")
    for place in (folder.parent, folder):
        if place.exists() and not os.access(place, os.W_OK | os.X_OK):
            raise UserError(
                f"the report cannot be written: no permission in {place}. Make it writable, or copy the run."
            )


def _training(path: Location) -> list[dict]:
    """Reads what the run said on its way, for the report.

    Raises:
      ValueError: the file is damaged.
    """
    try:
        lines = metrics.read(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error.reason} at byte {error.start}). Move it away.") from None
    wrong = [number for number, line in enumerate(lines, start=1) if not isinstance(line, dict) or "step" not in line]
    if wrong:
        raise UserError(f"{path}, line {wrong[0]}: expected an object with a step, as `train` writes it. Move it away.")
    return lines


def _check_features(features: str, config) -> None:
    """Raises ValueError where FD (shapes) was asked for and the models draw no embedded world."""
    if features != SHAPES or config.data.source == SHAPES_WORLD or of_shapes_world(open_checkpoint(config.base)):
        return
    raise UserError(
        f"FD (shapes) is a distance of the embedded world's pictures, and {config.base} is not of that world: its "
        "tokenizer is another. Give Inception's weights as --features inception:PATH or CLIP's as clip:PATH, or "
        "compare by eye with `dmm-jax sample`."
    )


class Drawing:
    """Draws the same prompts with any model and measures the pictures as they come."""

    def __init__(self, network: FeatureNetwork, scorer: clip.Scorer | None, prompts: Sequence[str], options):
        """Takes `config.evaluation`, its number of pictures and pairs included, as `options`."""
        self.network, self.scorer, self.prompts = network, scorer, prompts
        self.num_images, self.num_pairs, self.batch_size = options.num_images, options.num_pairs, options.batch_size
        self.sampler = {name: options[name] for name in SAMPLER}
        self.negative_prompt = options.negative_prompt

    @property
    def facts(self) -> dict:
        """What has to be known to repeat a number, for the report."""
        scored = {} if self.scorer is None else self.scorer.facts
        return self.sampler | {"negative prompt": self.negative_prompt or "none"} | dict(self.network.facts) | scored

    def batches(self, pipeline: Pipeline, jobs: Sequence) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields pictures and latents of (prompt, style, seed) jobs."""
        negative = self.negative_prompt or None
        return draw(pipeline, jobs, self.batch_size, negative_prompts=negative, **self.sampler)

    def sample(self, pipeline: Pipeline, style: str | None, seed: int, count: int = 0) -> "Sample":
        """Measures `num_images` pictures; draws as many, or `count`."""
        jobs = self._jobs(style, seed, count or self.num_images)
        return measure(self.network, self.batches(pipeline, jobs), self.num_images, self.scorer, self.num_pairs)

    def pairs(self, pipeline: Pipeline, style: str | None, seed: int) -> "Drawn":
        """Returns the pictures that are compared one by one."""
        return drawn(self.batches(pipeline, self._jobs(style, seed, self.num_pairs)))

    def _jobs(self, style, seed, count):
        return [(prompt, style, seed + k) for k, prompt in enumerate(self.prompts[:count])]


def _compare(models: Models, drawing: Drawing, perceptual: lpips.Lpips | None, methods: Sequence[str]):
    """Returns the results but for what they were made with, and the pairs to show, by style."""
    network, prompts = drawing.network, drawing.prompts
    kept, scores, pairs, paired = defaultdict(list), defaultdict(list), {}, defaultdict(dict)
    kernel, shown = {"student": {}, "floor": {}}, min(NUM_SHOWN, drawing.num_pairs)
    for name in models.names:
        teacher = models.teacher(name)
        own, again = (drawing.sample(teacher, None, seed, len(prompts)) for seed in (TEACHER_SEED, OTHER_SEED))
        other = drawing.sample(models.student, name, OTHER_SEED)
        for what, found in (("teacher", own), ("teacher_again", again), ("student", other)):
            kept[what].append(found.kept)
            scores[what].append(found.score)
        if network.kernel:
            kernel["student"][name], kernel["floor"][name] = (kernel_distance(own, one) for one in (other, again))
        same = drawing.pairs(models.student, name, TEACHER_SEED)
        rounded = drawing.pairs(models.teacher_in_other_dtype(name), None, TEACHER_SEED)
        pairs[name] = Pairs(prompts[:shown], own.drawn.images[:shown], same.images[:shown])
        for what, value in paired_fidelity(own.drawn, same, rounded, again.drawn, perceptual).items():
            paired[what][name] = value
    others: dict[str, Kept] = {}
    for what in ("base", *methods):
        found = drawing.sample(models.base if what == "base" else models.merged(what), None, OTHER_SEED)
        others[what], scores[what] = found.kept, [found.score] * len(models.names)
    rows = kept | {"base": others.pop("base"), "merged": others}
    results = style_matrix(models.names, **rows, distance=network.distance, between=network.between)
    results |= {"fidelity": dict(paired), "pairs": drawing.num_pairs}
    results["settings"] = {"pixels": f"{same.images.shape[2]} x {same.images.shape[1]}"}
    if network.kernel:
        size = min(SUBSET_SIZE, drawing.num_images)
        results["kernel"] = {"distance": network.kernel, "subsets": f"{NUM_SUBSETS} of {size}"} | kernel
    if drawing.scorer is not None:
        results["clip_score"] = {"name": drawing.scorer.name} | scores
    return results, pairs


class Drawn(NamedTuple):
    """The first pictures of a model and their latents."""

    images: UInt8[np.ndarray, "k H W 3"]
    latents: Float[np.ndarray, "k h w C"]


def drawn(batches: Iterator[tuple[np.ndarray, np.ndarray]]) -> Drawn:
    """Returns the pictures of all batches."""
    return Drawn(*map(np.concatenate, zip(*batches, strict=True)))


class Sample(NamedTuple):
    """What is kept of a model's pictures: the first few themselves; all features only where a kernel compares.

    Attributes:
      kept: what the network's distance compares.
      features: for KID; empty where it is not measured.
      score: the mean CLIPScore; None without a CLIP.
    """

    kept: Kept
    features: Features
    score: float | None
    drawn: Drawn


def measure(
    network: FeatureNetwork,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    num_images: int,
    scorer: Callable[[np.ndarray, int], np.ndarray] | None = None,
    num_kept: int = 1,
) -> Sample:
    """Measures pictures as they are drawn, batch by batch; those after the first `num_images` are not counted.

    Args:
      scorer: gives pictures their CLIPScores; told how many came before them.
      num_kept: pictures that are kept themselves, counted or not.
    """
    kept, features, scores, shown = network.empty(), Features(), [], []
    for images, latents in batches:
        counted = images[: num_images - kept.count]
        scores += [scorer(counted, kept.count)] if scorer is not None else []
        found = network.features(counted)
        kept = kept.update(found)
        features = features.update(found) if network.kernel else features
        if sum(len(pictures) for pictures, _ in shown) < num_kept:
            shown.append((images, latents))
    first = Drawn(*(of_all[:num_kept] for of_all in drawn(iter(shown))))
    score = float(np.concatenate(scores).mean()) if scores else None
    return Sample(kept, features, score, first)


def kernel_distance(a: Sample, b: Sample) -> dict[str, float]:
    """Returns mean and standard deviation of KID's subsets, which are smaller where there are fewer pictures."""
    one, other = (sample.features.rows for sample in (a, b))
    return kernel_inception_distance(one, other, subset_size=min(SUBSET_SIZE, len(one)))._asdict()


def paired_fidelity(
    teacher: Drawn, student: Drawn, rounded: Drawn, again: Drawn, perceptual: lpips.Lpips | None = None
) -> dict[str, float]:
    """Returns how near the student draws to its teacher from the same noise, each number between two others.

    Args:
      rounded: the teacher's from the same noise in another precision: the floor, below which nothing can be seen.
      again: the teacher's from other noise: how far apart unrelated pictures of one prompt are.
    """
    measures = {  # Two equal pictures have an infinite PSNR: of that, the median.
        "latent MSE": lambda a, b: fidelity.latent_mse(a.latents, b.latents).mean(),
        "PSNR (dB)": lambda a, b: np.median(fidelity.psnr(a.images, b.images)),
    }
    if perceptual is not None:
        measures[perceptual.name] = lambda a, b: lpips.distances(perceptual, a.images, b.images).mean()
    found = {}
    for what, measured in measures.items():
        found[what] = float(measured(teacher, student))
        found[f"{what}, floor"] = float(measured(teacher, rounded))
        found[f"{what}, other noise"] = float(measured(teacher, again))
    return found


def _command(workdir: str, options: Mapping[str, str | int]) -> str:
    """Returns what to type to get the same numbers; options that were not given are left out."""
    given = [f"--{option} {shlex.quote(str(value))}" for option, value in options.items() if value]
    return " ".join(["dmm-jax evaluate", workdir, *given])


def _conditions(config) -> dict[str, str | int]:
    """Returns what else a reader has to know to repeat the numbers."""
    return {
        "noise seeds": f"{TEACHER_SEED} + k (teachers), {OTHER_SEED} + k (all others)",
        "training steps": config.num_steps,
        "images a step": config.batch_size,
        "device": jax.devices()[0].device_kind,
    }


def _interpolation(models: Models, drawing: Drawing) -> Interpolation | None:
    """Draws one prompt from the first style to the last, mixed before the style MLP (arXiv:2504.12364, 4.5)."""
    if len(models.names) < 2:
        return None
    first, last, prompt = models.names[0], models.names[-1], drawing.prompts[1]
    weights = np.linspace(0.0, 1.0, NUM_MIXES).tolist()
    jobs = [(prompt, {first: 1.0 - weight, last: weight}, TEACHER_SEED + 1) for weight in weights]
    return Interpolation(drawn(drawing.batches(models.student, jobs)).images, weights, first, last, prompt)
