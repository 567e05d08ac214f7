"""The models that an evaluation compares: the student, its teachers, the base and merges of the teachers' weights."""

import functools
from collections.abc import Sequence

from dmm_jax.checkpoints.average import networks_of
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.merge_methods import METHODS, merge_networks, parse_method
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.parents import open_base
from dmm_jax.config.options import embedding_files, style_names
from dmm_jax.distill.incremental import origins
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.storage import Location

OTHER_DTYPE = {"float32": "bfloat16", "bfloat16": "float32"}


class ComparedModels:
    """One pipeline per model; all except the student's share their compiled programs."""

    def __init__(self, config, workdir: Location):
        """Opens the run's checkpoints; each method moves its UNet to the device."""
        self.names = style_names(config)
        self.dtype, self._options = config.dtype, {"prompt_grammar": config.sampling.prompt_grammar}
        self._embeddings = {name: embedding_files(config, name) for name in ("base", *self.names)}
        self._base = open_base(config)
        self._teachers = origins(config)
        self._student = open_checkpoint(workdir)
        options = {"dtype": self.dtype, **self._options}
        base = self._base.predicting(self._student.prediction_type)
        pipeline = Pipeline.for_unet(base, self._student.unet_config, self.names, **options)
        self.student = pipeline.with_unet(self._student.params("unet")).with_embeddings(self._embeddings["base"])

    @property
    def base(self) -> Pipeline:
        """The base model."""
        return self._stock.with_checkpoint(self._base, self._base, self._embeddings["base"])

    def teacher(self, name: str) -> Pipeline:
        """Returns one teacher, with its own text encoders if it has them."""
        return self._with_teacher(self._stock, name)

    def teacher_in_other_dtype(self, name: str) -> Pipeline:
        """Returns a teacher that computes in `OTHER_DTYPE`; its pictures differ from the teacher's by rounding."""
        return self._with_teacher(self._stock_in_other_dtype, name)

    def merged(self, method: str) -> Pipeline:
        """Returns one network of the teachers' merged weights, text encoders included."""
        teachers = list(self._teachers.values())
        checkpoint = merge_networks(self._base, teachers, parse_method(method, len(teachers)), networks_of(self._base))
        return self._stock.with_checkpoint(checkpoint, self._base, self._embeddings["base"])

    def digests(self) -> dict[str, dict[str, str]]:
        """Returns the SHA-256 of the contents of every network that draws, by model and network."""
        networks = ("unet", *self._base.text_encoders)
        models = {"student": _digests(self._student, ("unet",)), "base": _digests(self._base, (*networks, "vae"))}
        teachers = {f"teacher {name}": _digests(teacher, networks) for name, teacher in self._teachers.items()}
        return models | teachers

    def _with_teacher(self, pipeline: Pipeline, name: str) -> Pipeline:
        return pipeline.with_checkpoint(self._teachers[name], self._base, self._embeddings[name])

    @functools.cached_property
    def _stock(self) -> Pipeline:
        return Pipeline.for_unet(self._base, self._base.unet_config, (), dtype=self.dtype, **self._options)

    @functools.cached_property
    def _stock_in_other_dtype(self) -> Pipeline:
        options = {"dtype": OTHER_DTYPE[self.dtype], **self._options}
        return Pipeline.for_unet(self._base, self._base.unet_config, (), **options)


def _digests(checkpoint: Checkpoint, networks: Sequence[str]) -> dict[str, str]:
    """Returns the hashes of the networks that a checkpoint holds itself; the base provides the rest."""
    return {network: checkpoint.digest(network) for network in networks if checkpoint.has(network)}


def merge_settings(methods: Sequence[str]) -> dict[str, str]:
    """Returns the options of the weight merges that have any, by method."""
    return {
        method: ", ".join(f"{option} {value:g}" for option, value in METHODS[method].items())
        for method in methods
        if METHODS[method]
    }
