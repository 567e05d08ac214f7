"""`dmm-jax evaluate`: the student against its teachers, with the floor, the base and the weight average beside it.

Teacher j's pictures are M's columns, student style i's its rows (arXiv:2504.12364, 4.2). The student's are drawn from
other noise than the teachers', as the floor's are (a teacher against itself), so that the two can be compared.
"""

import pathlib
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from dmm_jax import config as config_lib
from dmm_jax import metrics as metrics_lib
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.demo import world
from dmm_jax.demo.layout import CLASSIFIER, FOLDER
from dmm_jax.evaluation import fidelity
from dmm_jax.evaluation.features import NUM_FEATURES, features, load
from dmm_jax.evaluation.frechet import Statistics
from dmm_jax.evaluation.report import Interpolation, Pairs, write_report
from dmm_jax.evaluation.style_matrix import style_matrix
from dmm_jax.pipeline import Pipeline
from dmm_jax.sample import draw

SHAPES_WORLD = "shapes_world"
PROMPT_SEED = 20_000  # Of the prompts; training draws its own.
TEACHER_SEED, OTHER_SEED = 10_000_000, 20_000_000  # Of the first picture's noise.
NUM_PAIRS = 32  # Pictures per style that teacher and student draw from the same noise.
NUM_SHOWN = 6
NUM_MIXES = 11


def evaluate(workdir: str | pathlib.Path, num_images: int = 0) -> pathlib.Path:
    """Writes `report/index.html` and `report/metrics.json` in a training workdir; returns the page's path.

    Args:
      num_images: per style and model; 0 takes the config's.

    Raises:
      ValueError: the workdir holds no student, or the run was not on the embedded world, for which alone a distance is
        built in: FID needs Inception weights that this version does not read yet.
    """
    started, workdir = time.perf_counter(), pathlib.Path(workdir)
    config = config_lib.load(workdir)
    if config.data.source != SHAPES_WORLD:
        raise ValueError(
            f"FD (shapes) is a distance of the embedded world's pictures; data.source is {config.data.source!r}. "
            "Compare by eye with `dmm-jax sample`, teacher and student from the same seeds."
        )
    options = config.evaluation.to_dict()
    num_images, batch_size = num_images or options.pop("num_images"), options.pop("batch_size")
    options.pop("num_images", None)
    models = Models(config, workdir)
    _, prompts = world.sample_scenes(np.random.default_rng(PROMPT_SEED), max(num_images, NUM_PAIRS))

    def pictures(pipeline, style, seed, count=num_images):
        jobs = [(prompt, style, seed + k) for k, prompt in enumerate(prompts[:count])]
        return tuple(map(np.concatenate, zip(*draw(pipeline, jobs, batch_size, **options), strict=True)))

    classifier = load(FOLDER / CLASSIFIER)

    def statistics(images):
        return Statistics.empty(NUM_FEATURES).update(features(*classifier, images))

    teacher, again, student, pairs, paired = [], [], [], {}, {"latent MSE": {}, "PSNR (dB)": {}}
    for name in models.names:
        images, latents = pictures(models.teacher(name), None, TEACHER_SEED, max(num_images, NUM_PAIRS))
        teacher.append(statistics(images[:num_images]))
        again.append(statistics(pictures(models.teacher(name), None, OTHER_SEED)[0]))
        student.append(statistics(pictures(models.student, name, OTHER_SEED)[0]))
        same, same_latents = pictures(models.student, name, TEACHER_SEED, NUM_PAIRS)
        pairs[name] = Pairs(prompts[:NUM_SHOWN], images[:NUM_SHOWN], same[:NUM_SHOWN])
        paired["latent MSE"][name] = float(fidelity.latent_mse(latents[:NUM_PAIRS], same_latents).mean())
        paired["PSNR (dB)"][name] = float(np.median(fidelity.psnr(images[:NUM_PAIRS], same)))
    base, average = (statistics(pictures(model, None, OTHER_SEED)[0]) for model in (models.base, models.average))

    results = style_matrix(models.names, student, teacher, again, base, average)
    results["fidelity"] = paired
    results["settings"] = options | {
        "prompts": f"the embedded world's captions, seed {PROMPT_SEED}",
        "noise seeds": f"{TEACHER_SEED} + k (teachers), {OTHER_SEED} + k (all others)",
        "training steps": config.num_steps,
        "images a step": config.batch_size,
        "device": jax.devices()[0].device_kind,
    }
    results["command"] = f"dmm-jax evaluate {workdir.name}"
    results["timings"] = {"evaluation (s)": time.perf_counter() - started}
    strip = _interpolation(models, prompts, batch_size, options)
    lines = metrics_lib.read(workdir / "metrics.jsonl")
    return write_report(workdir / "report", results, grids=pairs, interpolation=strip, metrics=lines)


class Models:
    """The pipelines that are compared; the stock ones share their compiled programs."""

    def __init__(self, config, workdir: pathlib.Path):
        """Opens the run's checkpoints; each UNet is brought to the device when it is asked for."""
        self.names = [name for name, _ in config.teachers]
        self._base = open_checkpoint(config.base, prediction_type=config.prediction_type)
        self._teachers = {name: open_checkpoint(path) for name, path in config.teachers}
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

    @property
    def average(self) -> Pipeline:
        """The plain mean of the teachers' weights, text encoders included: what merging was before distillation."""
        teachers = list(self._teachers.values())
        unet = mean_params([teacher.params("unet") for teacher in teachers])
        encoders = mean_params([teacher.text_params(self._base) for teacher in teachers])
        return self._stock.with_unet(unet).with_text_encoders(encoders)


def mean_params(networks: Sequence[Mapping]) -> dict:
    """Returns the mean of equal networks' parameters, in float32."""
    return jax.tree.map(lambda *leaves: sum(np.asarray(leaf, np.float32) for leaf in leaves) / len(leaves), *networks)


def _interpolation(models: Models, prompts: Sequence[str], batch_size: int, options: Mapping) -> Interpolation | None:
    """Draws one prompt from the first style to the last, mixed before the style MLP (arXiv:2504.12364, 4.5)."""
    if len(models.names) < 2:
        return None
    first, last = models.names[0], models.names[-1]
    weights = np.linspace(0.0, 1.0, NUM_MIXES).tolist()
    jobs = [(prompts[1], {first: 1.0 - weight, last: weight}, TEACHER_SEED + 1) for weight in weights]
    images = np.concatenate([batch for batch, _ in draw(models.student, jobs, batch_size, **options)])
    return Interpolation(images, weights, first, last, prompts[1])
