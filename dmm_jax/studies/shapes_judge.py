"""Judge: measures the study's students, and what they are compared with, by distances to the teachers' pictures."""

import functools
import pathlib

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file

from dmm_jax.checkpoints.formats.safetensors_io import save
from dmm_jax.checkpoints.merge_methods import METHODS, merge_networks, parse_method
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config.options import solver_options
from dmm_jax.evaluation.evaluate import OTHER_SEED, TEACHER_SEED
from dmm_jax.evaluation.feature_networks import SHAPES, open_feature_network
from dmm_jax.evaluation.frechet import Statistics, frechet_distance
from dmm_jax.evaluation.prompts import PROMPT_SEED
from dmm_jax.gallery.sample import draw
from dmm_jax.pipeline import Pipeline
from dmm_jax.studies.shapes_rows import STYLES, study_config, teacher_path
from dmm_jax.world.scenes import sample_scenes

FEW = 78  # Pictures per distance: 2.4 per feature (32 here), as the paper has 5,000 for Inception's 2,048 (4.2).
BATCH_SIZE, NUM_INFERENCE_STEPS = 500, 8
SEED_STRIDE = 1_000_000  # Difference between the first picture's seeds of two draws of the references.


class Judge:
    """Measures students; draws each teacher's pictures once and stores their features."""

    def __init__(self, out: pathlib.Path, num_images: int):
        self.out, self.num_images = out, num_images
        self.network = open_feature_network(SHAPES)
        self.config = study_config(out, STYLES, 1, 0)
        self.sampling = solver_options(self.config) | {"num_inference_steps": NUM_INFERENCE_STEPS}
        self.prompts = sample_scenes(np.random.default_rng(PROMPT_SEED), num_images)[1]
        self.base = open_checkpoint(self.config.base)
        self.stock = Pipeline.for_unet(self.base, self.base.unet_config, (), dtype=self.config.dtype)

    @functools.cached_property
    def teachers(self) -> dict[str, Float[np.ndarray, "n D"]]:
        """The features of every teacher's pictures."""
        path = self.out / f"teachers_{self.num_images}.safetensors"
        if not path.exists():
            features = {name: self._sample(self._teacher(name), None, TEACHER_SEED) for name in STYLES}
            save(path, features)
        return load_file(path)

    def references(self, seed: int) -> dict[str, dict]:
        """Returns the distances of the base, of the weight merges and of the floor: the teachers with other noise.

        Args:
          seed: seed of the noise; each value gives a new draw of the same models.
        """
        first_seed = OTHER_SEED + seed * SEED_STRIDE
        teachers = [open_checkpoint(teacher_path(self.out, name)) for name in STYLES]
        unets = {"base": self.base.params("unet")}
        for method in METHODS:
            unets[method] = merge_networks(self.base, teachers, parse_method(method, len(teachers))).params("unet")
        features = {name: self._sample(self.stock.with_unet(unet), None, first_seed) for name, unet in unets.items()}
        distances = {name: self._distances(dict.fromkeys(STYLES, values)) for name, values in features.items()}
        floor = {name: self._sample(self._teacher(name), None, first_seed) for name in STYLES}
        return distances | {"floor": self._distances(floor)}

    def student(self, workdir: pathlib.Path) -> dict[str, dict]:
        """Returns the distances of each style to its own teacher."""
        student = open_checkpoint(workdir)
        pipeline = Pipeline.for_unet(self.base, student.unet_config, student.styles, dtype=self.config.dtype)
        pipeline = pipeline.with_unet(student.params("unet"))
        return self._distances({name: self._sample(pipeline, name, OTHER_SEED) for name in STYLES})

    def _teacher(self, name):
        return self.stock.with_unet(open_checkpoint(teacher_path(self.out, name)).params("unet"))

    def _sample(self, pipeline, style, seed) -> Float[np.ndarray, "n D"]:
        """Returns the features of a model's pictures."""
        jobs = [(prompt, style, seed + k) for k, prompt in enumerate(self.prompts)]
        batches = draw(pipeline, jobs, min(BATCH_SIZE, len(jobs)), **self.sampling)
        return np.concatenate([self.network.features(images) for images, _ in batches])[: self.num_images]

    def _distances(self, features) -> dict[str, dict[str, float]]:
        """Returns each style's distance by all pictures, and its mean over parts of FEW pictures."""
        sizes = {"all": self.num_images, "few": min(FEW, self.num_images)}
        return {
            pictures: {name: mean_distance(features[name], self.teachers[name], size) for name in STYLES}
            for pictures, size in sizes.items()
        }


def mean_distance(a: Float[np.ndarray, "n D"], b: Float[np.ndarray, "n D"], size: int) -> float:
    """Returns the mean Frechet distance between parts of `size` rows of `a` and `b`; an incomplete part is ignored."""
    empty = Statistics.empty(a.shape[1])
    starts = range(0, len(a) - size + 1, size)
    parts = [[empty.update(rows[start : start + size]) for rows in (a, b)] for start in starts]
    return float(np.mean([frechet_distance(*pair) for pair in parts]))
