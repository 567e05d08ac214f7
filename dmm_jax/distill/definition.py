"""What a config defines before anything is allocated: networks, objective, optimisers, and the shapes of the step."""

import copy
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from dmm_jax.checkpoints import student_lora
from dmm_jax.checkpoints.abstract import abstract_graph, abstract_model
from dmm_jax.checkpoints.architecture import CELL
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.config.options import keeps_average, kept_styles, num_rows, style_names
from dmm_jax.data.batches import Batch
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import average, clipping, discriminator, streaming
from dmm_jax.distill.layout import Packing, looped_shapes, state_specs, teacher_formats
from dmm_jax.distill.objective import Networks, Objective
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.state import TrainState, abstract_state
from dmm_jax.distill.step import build_gradients, build_predictions, build_step, build_update
from dmm_jax.distill.teachers import Frozen, Teachers, abstract_teachers, described
from dmm_jax.kernels.attention import choose_implementation
from dmm_jax.models.text_encoders import NUM_TIME_IDS, TextEncoders
from dmm_jax.models.unet_config import merged_config
from dmm_jax.runtime import sharding
from dmm_jax.runtime.errors import UserError

STUDENT_OPTIONS = ("remat", "loop_blocks")  # Options of the config that the student's UNet takes, besides its ranks.


class Definition:
    """The networks, the objective and the step that a config describes; nothing is computed or allocated."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        base: Checkpoint,
        mesh: Mesh | AbstractMesh,
        *,
        tokenizer: Callable | None = None,
        platform: str = "",
    ):
        """Defines a run on a mesh.

        Args:
          config: complete and checked.
          base: only configs are read.
          tokenizer: maps prompts to token ids (B, L); None for zeros of the right length.
          platform: as in `kernels.attention.choose_implementation`.
        """
        self.config, self.base, self.mesh = config, base, mesh
        self.styles = tuple(style_names(config))
        self.prediction_type = config.student_prediction or base.prediction_type  # What the student predicts.
        self.dtype = jnp.dtype(config.dtype)
        self.student_config = merged_config(base.unet_config, len(self.styles))
        self.ranks = student_lora.ranks(config)
        num_kept = len(kept_styles(config)) if config.grow.replay else 0
        # One UNet runs all teachers; it has a style table if one of them is a merged student.
        self.teacher_config = merged_config(base.unet_config, num_kept) if num_kept else base.unet_config
        self.attention = choose_implementation(config.attention, self.dtype, platform)
        self.networks, self._built_gradients = self._networks(self.attention), {}
        self.objective = self._objective(tokenizer or self._zero_ids)
        if config.adversarial.weight and self.prediction_type == "epsilon" and self.objective.alphas_cumprod[-1] == 0.0:
            raise UserError(
                "adversarial.weight needs one-step predictions of the clean latents, which epsilon prediction does not "
                "give at a zero terminal SNR (rescale_betas_zero_snr). Set adversarial.weight=0, or use a base that "
                "predicts v."
            )
        self.optimizers = make_optimizers(config)

    def with_attention(self, attention: str) -> "Definition":
        """Returns the same definition with this implementation of attention, whatever the config says."""
        if attention == self.attention:
            return self
        other = copy.copy(self)
        other.attention, other.networks, other._built_gradients = attention, self._networks(attention), {}
        return other

    @property
    def num_tokens(self) -> int:
        """Token ids of one caption, over all its chunks and all text encoders."""
        lengths = [config["max_position_embeddings"] for config in self.base.text_configs.values()]
        return self.config.data.num_chunks * sum(lengths)

    def _zero_ids(self, prompts: Sequence, num_chunks: int) -> np.ndarray:
        return np.zeros((len(prompts), self.num_tokens), np.int32)

    def _networks(self, attention: str) -> Networks:
        options = {"dtype": self.dtype, "attention_implementation": attention}
        judge = None
        if self.config.adversarial.weight:
            judge = discriminator.define(*self._discriminator_arguments, remat=self.config.remat, **options)
            judge = nnx.split(judge)[0]
        student_options = {name: self.config[name] for name in STUDENT_OPTIONS} | self.ranks
        texts = abstract_model(lambda rngs: TextEncoders(self.base.text_configs, dtype=self.dtype, rngs=rngs))
        return Networks(
            student=abstract_graph("unet", self.student_config, **options, **student_options),
            teacher=abstract_graph("unet", self.teacher_config, is_stacked=True, **options),
            text_encoders=nnx.split(texts)[0],
            discriminator=judge,
            check_vma=attention != "flash",
        )

    def _objective(self, tokenizer: Callable) -> Objective:
        config = self.config
        return Objective(
            alphas_cumprod=tuple(NoiseSchedule.from_config(self.base.scheduler_config).alphas_cumprod.tolist()),
            prediction_type=self.prediction_type,
            feature_loss_weight=config.feature_loss_weight,
            feature_loss=config.feature_loss,
            adversarial_weight=config.adversarial.weight,
            prompt_dropout=config.prompt_dropout,
            empty_ids=tuple(map(tuple, np.unique(tokenizer(["", None], config.data.num_chunks), axis=0).tolist())),
            num_chunks=config.data.num_chunks,
            score_loss=config.score_loss,
            timestep_draw=config.timestep_draw,
            timestep_power=config.timestep_power,
            mix_every=config.mix_every,
        )

    @property
    def _discriminator_arguments(self) -> tuple[dict, int, int]:
        """The base's UNet config, the number of styles, latent cells per side."""
        return self.base.unet_config, len(self.styles), self.config.data.resolution // CELL

    def abstract_discriminator(self) -> tuple[dict, dict]:
        """Returns the shapes of the discriminator's trained parameters, and of its frozen ones."""
        params = discriminator.abstract_params(discriminator.define(*self._discriminator_arguments))
        return discriminator.split(params, self.config.adversarial.train_backbone)

    def abstract_state(self, looped: bool = True) -> TrainState:
        """Returns the shapes and shardings of the training state.

        Args:
          looped: as the step takes it, with equal blocks stacked; else as a checkpoint has it.
        """
        fewest = self.config.loop_blocks if looped else 0
        trained = {"student": looped_shapes(student_lora.trained_shapes(self.student_config, self.ranks), fewest)}
        if self.config.adversarial.weight:
            trained["discriminator"], _ = self.abstract_discriminator()
        state = abstract_state(trained, self.optimizers, keeps_average(self.config))
        return sharding.abstract_arrays(state, state_specs(state, self.mesh), self.mesh)

    def abstract_frozen(self, num_encoders: int) -> tuple[Teachers, Frozen]:
        """Returns the shapes and shardings of the frozen networks on the devices at once.

        Args:
          num_encoders: rows of the teachers' own text encoders, over all shards of `teacher`.
        """
        rows = 1 if self.config.teachers_in_host_memory else num_rows(self.config)
        arguments = self.base, self.teacher_config, rows, num_encoders, self.mesh, self.dtype
        teachers, frozen = abstract_teachers(*arguments)
        if self.config.adversarial.weight:
            _, fixed = self.abstract_discriminator()
            frozen = frozen._replace(**described(fixed, self.mesh, self.dtype))
        if self.ranks:
            start = looped_shapes(self.base.abstract("unet"), self.config.loop_blocks)
            frozen = frozen._replace(student=described(start, self.mesh, self.dtype))
        return teachers, frozen

    def abstract_batch(self, size: tuple[int, int] | None = None) -> Batch:
        """Returns the shapes and shardings of a batch (N, B/N, ...).

        Args:
          size: height and width of the images in pixels; None: the square.
        """
        rows, resolution = num_rows(self.config), self.config.data.resolution
        height, width = size or (resolution, resolution)
        leading = rows, self.config.batch_size // rows
        channels = self.base.unet_config.get("in_channels", 4)
        shapes = Batch(
            latents=jax.ShapeDtypeStruct((*leading, height // CELL, width // CELL, channels), jnp.float32),
            input_ids=jax.ShapeDtypeStruct((*leading, self.num_tokens), jnp.int32),
            time_ids=jax.ShapeDtypeStruct((*leading, NUM_TIME_IDS), jnp.int32),
        )
        return sharding.abstract_arrays(shapes, jax.tree.map(lambda _: sharding.BATCH, shapes), self.mesh)

    def gradients(self, trained: Mapping) -> Callable:
        """Returns the function of `distill.step.build_gradients`.

        Args:
          trained: arrays or shapes, by network.
        """
        specs = state_specs(trained, self.mesh)
        leaves, structure = jax.tree.flatten(specs)
        key = structure, tuple(leaves)
        if key not in self._built_gradients:  # One function for all callers, so that it is traced once.
            options = {"dtype": self.dtype, **self._draws}
            self._built_gradients[key] = build_gradients(self.networks, self.objective, self.mesh, specs, **options)
        return self._built_gradients[key]

    def predictions(self) -> Callable:
        """Returns the function of `distill.step.build_predictions`."""
        return build_predictions(self.networks, self.objective, self.mesh, **self._draws)

    @property
    def _draws(self) -> dict[str, int]:
        return {"gradient_accumulation": self.config.gradient_accumulation, "seed": self.config.seed}

    def _update(self, trained: Mapping) -> Callable:
        norms = clipping.build_norm(self.mesh, state_specs(trained, self.mesh))
        return build_update(norms, self.optimizers, average.decay_schedule(self.config))

    def jitted_step(self, state: TrainState, teachers: Teachers, packing: Packing, formats=None):
        """Returns the jitted `step(packed state, teachers, frozen, batch) -> (packed state, metrics)`.

        Args:
          state, teachers: arrays or shapes.
          formats: the layout of the teachers; None leaves it open for `distill.layout.compile_step`.
        """
        step = build_step(self.gradients(state.trained), self._update(state.trained))
        return jax.jit(
            packing.around(step),
            donate_argnums=0,
            in_shardings=(packing.places, formats or teacher_formats(teachers), None, None),
            out_shardings=(packing.places, NamedSharding(self.mesh, sharding.COPY)),
        )

    def streamed_step(self, packing: Packing) -> streaming.StreamedStep:
        """Returns the jitted programs of a step whose teachers are in the host's memory."""
        trained = self.abstract_state().trained
        functions = self.predictions(), self.gradients(trained), self._update(trained)
        return streaming.jitted_step(*functions, packing, trained, self.mesh, num_rows(self.config))
