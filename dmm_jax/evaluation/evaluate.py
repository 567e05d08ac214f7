"""`dmm-jax evaluate`: the student against its teachers, with the floor, the base and weight averages beside it.

Teacher j's pictures are M's columns, student style i's its rows (arXiv:2504.12364, 4.2). The student's are drawn from
other noise than the teachers', as the floor's are (a teacher against itself), so that the two can be compared.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8

from dmm_jax import config as config_lib
from dmm_jax import metrics as metrics_lib
from dmm_jax.average import networks_of, parse_method
from dmm_jax.checkpoints.average import METHODS, merged
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.data.sources import FolderSource
from dmm_jax.demo import world
from dmm_jax.distill.incremental import origins
from dmm_jax.evaluation import clip, fidelity, lpips
from dmm_jax.evaluation.kid import NUM_SUBSETS, SUBSET_SIZE, Features, kernel_inception_distance
from dmm_jax.evaluation.networks import SHAPES, FeatureNetwork, open_network
from dmm_jax.evaluation.report import Interpolation, Pairs, write_report
from dmm_jax.evaluation.style_matrix import Kept, style_matrix
from dmm_jax.folders import Location, locate
from dmm_jax.pipeline import Pipeline
from dmm_jax.sample import draw

SHAPES_WORLD = "shapes_world"
PROMPT_SEED = 20_000  # Of the prompts; training draws its own.
TEACHER_SEED, OTHER_SEED = 10_000_000, 20_000_000  # Of the first picture's noise.
NUM_PAIRS = 32  # Pictures per style that teacher and student draw from the same noise.
NUM_SHOWN = 6
NUM_MIXES = 11


def evaluate(
    workdir: str | os.PathLike,
    num_images: int = 0,
    features: str = SHAPES,
    clip_folder: str = "",
    lpips_file: str = "",
) -> Location:
    """Writes `report/index.html` and `report/metrics.json` in a training workdir; returns the page's path.

    Args:
      num_images: per style and model; 0 takes the config's.
      features: the network that measures, as `networks.open_network` takes it.
      clip_folder: of a CLIP, which adds CLIPScore.
      lpips_file: the weights of LPIPS, which adds it to the fidelity.

    Raises:
      ValueError: the workdir holds no student, the network cannot be used, or it is not for these pictures.
    """
    started, workdir = time.perf_counter(), locate(workdir)
    config = config_lib.load(workdir)
    if features == SHAPES and config.data.source != SHAPES_WORLD:
        raise ValueError(
            f"FD (shapes) is a distance of the embedded world's pictures; data.source is {config.data.source!r}. "
            "Give Inception's weights as --features inception:PATH or CLIP's as clip:PATH, or compare by eye with "
            "`dmm-jax sample`."
        )
    network = open_network(features)
    perceptual = lpips.load(lpips_file) if lpips_file else None
    options = config.evaluation.to_dict()
    configured, batch_size = options.pop("num_images"), options.pop("batch_size")
    methods = options.pop("weight_merges")
    num_images = num_images or configured
    models = Models(config, workdir)
    prompts, told = _prompts(config, max(num_images, NUM_PAIRS))
    scorer = clip.Scorer.open(clip_folder, prompts) if clip_folder else None

    def sample(pipeline, style, seed, count=num_images):
        jobs = [(prompt, style, seed + k) for k, prompt in enumerate(prompts[:count])]
        return measure(network, draw(pipeline, jobs, batch_size, **options), num_images, scorer)

    kept, scores, pairs, paired = defaultdict(list), defaultdict(list), {}, defaultdict(dict)
    kernel = {"student": {}, "floor": {}}
    for name in models.names:
        own, again = (sample(models.teacher(name), None, seed, len(prompts)) for seed in (TEACHER_SEED, OTHER_SEED))
        other = sample(models.student, name, OTHER_SEED)
        for what, drawn in (("teacher", own), ("teacher_again", again), ("student", other)):
            kept[what].append(drawn.kept)
            scores[what].append(drawn.score)
        if network.kernel:
            kernel["student"][name], kernel["floor"][name] = (kernel_distance(own, one) for one in (other, again))
        same = sample(models.student, name, TEACHER_SEED, NUM_PAIRS)
        pairs[name] = Pairs(prompts[:NUM_SHOWN], own.images[:NUM_SHOWN], same.images[:NUM_SHOWN])
        for what, value in paired_fidelity(own, same, again, perceptual).items():
            paired[what][name] = value
    others: dict[str, Kept] = {}
    for what in ("base", *methods):
        drawn = sample(models.base if what == "base" else models.merged(what), None, OTHER_SEED)
        others[what], scores[what] = drawn.kept, [drawn.score] * len(models.names)

    rows = kept | {"base": others.pop("base"), "merged": others}
    results = style_matrix(models.names, **rows, distance=network.distance, between=network.between)
    results["fidelity"] = dict(paired)
    if network.kernel:
        size = min(SUBSET_SIZE, num_images)
        results["kernel"] = {"distance": network.kernel, "subsets": f"{NUM_SUBSETS} of {size}"} | kernel
    facts = dict(network.facts)
    if scorer is not None:
        results["clip_score"] = {"name": scorer.name} | scores
        facts |= scorer.facts
    facts |= {} if perceptual is None else perceptual.facts
    told = {"prompts": told, "pixels": f"{same.images.shape[2]} x {same.images.shape[1]}"}
    results["settings"] = options | facts | told | _conditions(config) | _merge_options(methods)
    results["command"] = _command(workdir.name, n=num_images, features=features, clip=clip_folder, lpips=lpips_file)
    results["timings"] = {"evaluation (s)": time.perf_counter() - started}
    strip = _interpolation(models, prompts, batch_size, options)
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    return write_report(workdir / "report", results, grids=pairs, interpolation=strip, metrics=lines)


class Sample(NamedTuple):
    """What is kept of a model's pictures: the first NUM_PAIRS themselves; all features only where a kernel compares.

    Attributes:
      kept: what the network's distance compares.
      features: for KID; empty where it is not measured.
      score: the mean CLIPScore; None without a CLIP.
    """

    kept: Kept
    features: Features
    score: float | None
    images: UInt8[np.ndarray, "k H W 3"]
    latents: Float[np.ndarray, "k h w C"]


def measure(
    network: FeatureNetwork,
    batches: Iterator[tuple[np.ndarray, np.ndarray]],
    num_images: int,
    scorer: Callable[[np.ndarray, int], np.ndarray] | None = None,
) -> Sample:
    """Measures pictures as they are drawn, batch by batch; those after the first `num_images` are not counted.

    Args:
      scorer: gives pictures their CLIPScores; told how many came before them.
    """
    kept, features, scores, shown = network.empty(), Features(), [], []
    for images, latents in batches:
        counted = images[: num_images - kept.count]
        scores += [scorer(counted, kept.count)] if scorer is not None else []
        found = network.features(counted)
        kept = kept.update(found)
        features = features.update(found) if network.kernel else features
        if sum(len(pictures) for pictures, _ in shown) < NUM_PAIRS:
            shown.append((images, latents))
    images, latents = map(np.concatenate, zip(*shown, strict=True))
    score = float(np.concatenate(scores).mean()) if scores else None
    return Sample(kept, features, score, images[:NUM_PAIRS], latents[:NUM_PAIRS])


def kernel_distance(a: Sample, b: Sample) -> dict[str, float]:
    """Returns mean and standard deviation of KID's subsets, which are smaller where there are fewer pictures."""
    one, other = (sample.features.rows for sample in (a, b))
    return kernel_inception_distance(one, other, subset_size=min(SUBSET_SIZE, len(one)))._asdict()


def paired_fidelity(
    teacher: Sample, student: Sample, again: Sample, perceptual: lpips.Lpips | None = None
) -> dict[str, float]:
    """Returns how near the student draws to its teacher from the same noise, each number with its floor.

    The floor is the teacher against itself from other noise: what the prompt alone makes alike.
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
        found[f"{what}, floor"] = float(measured(teacher, again))
    return found


def _command(workdir: str, **options: str | int) -> str:
    """Returns what to type to get the same numbers; options that were not given are left out."""
    given = [f"--{option} {value}" for option, value in options.items() if value]
    return " ".join(["dmm-jax evaluate", workdir, *given])


def _conditions(config) -> dict[str, str | int]:
    """Returns what else a reader has to know to repeat the numbers."""
    return {
        "noise seeds": f"{TEACHER_SEED} + k (teachers), {OTHER_SEED} + k (all others)",
        "training steps": config.num_steps,
        "images a step": config.batch_size,
        "device": jax.devices()[0].device_kind,
    }


def _merge_options(methods: Sequence[str]) -> dict[str, str]:
    """Returns the numbers that weight merges were made with, of those that take any."""
    taken = {method: METHODS[method].items() for method in methods if METHODS[method]}
    return {method: ", ".join(f"{option} {value:g}" for option, value in given) for method, given in taken.items()}


def _prompts(config, count: int) -> tuple[list[str], str]:
    """Returns prompts for as many pictures, and what they are; a folder's captions come again where they are fewer."""
    rng = np.random.default_rng(PROMPT_SEED)
    if config.data.source == SHAPES_WORLD:
        return world.sample_scenes(rng, count)[1], f"the embedded world's captions, seed {PROMPT_SEED}"
    captions = [caption for _, caption in FolderSource(config.data.source).rows]
    order = rng.permutation(len(captions))
    told = f"{min(count, len(captions))} captions of {config.data.source}, seed {PROMPT_SEED}"
    return [captions[order[k % len(order)]] for k in range(count)], told


class Models:
    """The pipelines that are compared; the stock ones share their compiled programs."""

    def __init__(self, config, workdir: Location):
        """Opens the run's checkpoints; each UNet is brought to the device when it is asked for."""
        self.names = config_lib.style_names(config)
        self._base = open_checkpoint(config.base, prediction_type=config.prediction_type)
        self._teachers = origins(config)
        student = open_checkpoint(workdir)
        frame = Pipeline.of_student(self._base, student.unet_config, self.names, dtype=config.dtype)
        self.student = frame.with_unet(student.params("unet"))
        self._stock = Pipeline.of_student(self._base, self._base.unet_config, (), dtype=config.dtype)

    @property
    def base(self) -> Pipeline:
        """The base model."""
        return self._stock.with_unet(self._base.params("unet"))

    def teacher(self, name: str) -> Pipeline:
        """One teacher, behind its own text encoders where it has them."""
        teacher = self._teachers[name]
        pipeline = self._stock.with_unet(teacher.params("unet"))
        return pipeline.with_text_encoders(teacher.text_params(self._base))

    def merged(self, method: str) -> Pipeline:
        """One network of the teachers' weights, text encoders included: what merging was before distillation."""
        teachers = list(self._teachers.values())
        found = merged(self._base, teachers, parse_method(method, len(teachers)), networks_of(self._base))
        return self._stock.with_unet(found.params("unet")).with_text_encoders(found.text_params())


def _interpolation(models: Models, prompts: Sequence[str], batch_size: int, options: Mapping) -> Interpolation | None:
    """Draws one prompt from the first style to the last, mixed before the style MLP (arXiv:2504.12364, 4.5)."""
    if len(models.names) < 2:
        return None
    first, last = models.names[0], models.names[-1]
    weights = np.linspace(0.0, 1.0, NUM_MIXES).tolist()
    jobs = [(prompts[1], {first: 1.0 - weight, last: weight}, TEACHER_SEED + 1) for weight in weights]
    images = np.concatenate([batch for batch, _ in draw(models.student, jobs, batch_size, **options)])
    return Interpolation(images, weights, first, last, prompts[1])
