"""Teacher-made data: from prompts alone, the teachers draw the latents that the student is trained on.

DMM's second stage fine-tunes on such images (arXiv:2504.12364, A.3).
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.compare import check_mergeable
from dmm_jax.checkpoints.parents import open_base
from dmm_jax.checkpoints.provenance import sha256
from dmm_jax.config.options import PROMPTS, embedding_files, solver_options, style_names
from dmm_jax.data import prepare
from dmm_jax.data.buckets import Size
from dmm_jax.data.cache import LatentCache
from dmm_jax.data.fill_cache import sample_prompts
from dmm_jax.data.prompts import Draws, read_prompts
from dmm_jax.diffusion import guidance, solvers
from dmm_jax.distill import incremental
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import processes
from dmm_jax.runtime.errors import UserError
from dmm_jax.text.prompt_grammar import A1111, plain_text


def prepare_cache(config, strict: bool = False, dry_run: bool = False) -> LatentCache | None:
    """Writes and opens a config's latent cache, from images or, if `data.kind` is "prompts", from prompts alone.

    Args:
      strict: whether a file of the source that is not used is an error.
      dry_run: reads and checks everything, prints what would be done, and writes nothing.

    Raises:
      UserError: the source, the teachers, the base or the cache folder cannot be used.
    """
    if config.data.kind == PROMPTS:
        return prepare_teacher_samples(config, dry_run)
    return prepare.prepare_images(config, strict, dry_run)


def prepare_teacher_samples(config, dry_run: bool = False) -> LatentCache | None:
    """Writes and opens a latent cache that the teachers of all styles draw from the prompts of `config.data.source`.

    Raises:
      UserError: prompts, sampler, teachers, base or the cache folder cannot be used.
    """
    prepare.check_config(config)
    config = incremental.resolved(config)
    options = solver_options(config)
    base = open_base(config)
    sizes = prepare.sizes_of(config, base)
    draws = _draws(config, len(sizes))
    teachers = incremental.origins(config)
    check_mergeable(base, teachers, by_distillation=True)
    sampler = TeacherSampler(config, base, teachers, draws.prompts, options)
    if sampler.pipeline.schedule.rescale_betas_zero_snr and not options["guidance_rescale"]:
        processes.say(f"{guidance.ADVICE} Set sampling.guidance_rescale.")
    if config.embeddings:
        files = [pathlib.Path(entry.rpartition("=")[2]) for entry in config.embeddings]
        options["embeddings"] = " ".join(sha256(file)[:16] for file in files)
    options |= {"dtype": config.dtype, "prompt_grammar": config.sampling.prompt_grammar}
    if dry_run:
        processes.say(f"{len(teachers)} teachers would draw {len(draws):,d} images into {config.data.cache}")
        return None
    return sample_prompts(
        draws,
        sampler,
        sampler.caption_ids,
        config.data.cache,
        min(config.sampling.batch_size, len(draws)),
        sizes=sizes,
        latent_shape=sampler.latent_shape,
        scaling_factor=sampler.pipeline.vae.merged().scaling_factor,
        vae=base.digest("vae"),
        tokenizer=sampler.pipeline.tokenizers.digest,
        source=_describe_source(base, teachers, draws, options),
    )


class TeacherSampler:
    """Draws with one teacher at a time, with its own text encoders; only that teacher is in device memory.

    Raises:
      UserError: the base is incomplete, or the solver cannot run.
    """

    def __init__(
        self, config, base: Checkpoint, teachers: Mapping[str, Checkpoint], prompts: Sequence[str], options: Mapping
    ):
        """Builds the pipeline that the teachers share.

        Args:
          prompts: all that will be drawn: a picture depends on the number of their chunks, and so not on its batch.
          options: arguments of `Pipeline.__call__`, solver and num_inference_steps among them.
        """
        self.base, self.teachers, self.prompts, self.options = base, list(teachers.values()), prompts, dict(options)
        self.resolution, self.caption_chunks = config.data.resolution, config.data.num_chunks
        self.embeddings = [embedding_files(config, name) for name in teachers]
        settings = {"dtype": config.dtype, "prompt_grammar": config.sampling.prompt_grammar}
        self.pipeline = Pipeline.for_unet(base, base.unet_config, (), **settings)
        solvers.plan(options["solver"], self.pipeline.schedule, options["num_inference_steps"])  # Refuses early.
        self.pipeline.num_chunks(prompts)
        self._loaded: tuple[int, Pipeline, int] | None = None

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the latents."""
        side = self.resolution // self.pipeline.vae_scale_factor
        return side, side, self.pipeline.vae.params["decoder"]["conv_in"]["kernel"].shape[2]

    def caption_ids(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns the token ids by which the student learns: of the prompts' words, in `data.num_chunks` chunks."""
        if self.pipeline.prompt_grammar == A1111:
            prompts = [plain_text(prompt) for prompt in prompts]
        return self.pipeline.tokenizers(prompts, self.caption_chunks)

    def __call__(self, teacher: int, prompts: Sequence[str], seeds: Sequence[int], size: Size) -> np.ndarray:
        """Returns scaled latents (B, h, w, C), float32, of pictures of `size`, height and width in pixels."""
        if self._loaded is None or self._loaded[0] != teacher:
            self._loaded = None  # Frees the previous teacher before the next one is loaded.
            pipeline = self.pipeline.with_checkpoint(self.teachers[teacher], self.base, self.embeddings[teacher])
            self._loaded = teacher, pipeline, pipeline.num_chunks(self.prompts)
        _, pipeline, num_chunks = self._loaded
        options = {"height": size[0], "width": size[1], "num_chunks": num_chunks, **self.options}
        return pipeline(prompts, seeds=seeds, output="latents", **options)


def _draws(config, num_buckets: int) -> Draws:
    if not config.data.source:
        raise UserError("data.source is empty: set a text file with one prompt per line, for the teachers to draw.")
    if not config.teachers:
        raise UserError("teachers is empty: list at least one (style name, path) to draw the prompts.")
    prompts = read_prompts(config.data.source)
    count = config.data.num_examples or len(prompts)
    return Draws(prompts, len(style_names(config)), count, config.seed, num_buckets)


def _describe_source(base: Checkpoint, teachers: Mapping[str, Checkpoint], draws: Draws, options: Mapping) -> str:
    """Returns what fixes the latents besides seed, VAE, tokenizer and resolution; caches are compared by this text."""
    contents = {name: f"{teacher.digest('unet')} {teacher.text_digest(base)}" for name, teacher in teachers.items()}
    contents |= {"prompts": json.dumps(list(draws.prompts)), "schedule": json.dumps(base.scheduler_config)}
    facts = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in contents.items()}
    facts |= {"num_examples": len(draws), **options}
    return "teachers: " + ", ".join(f"{name}={value}" for name, value in facts.items())
