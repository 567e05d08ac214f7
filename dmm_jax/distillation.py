"""What a config describes: its networks, what is minimised, and the jitted step; nothing is computed or allocated."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.open import CELL
from dmm_jax.config import options as config_lib
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.distill import clipping
from dmm_jax.distill import discriminator as discriminator_lib
from dmm_jax.distill import step as distill_step
from dmm_jax.distill.packing import Packing
from dmm_jax.models import layers
from dmm_jax.models.text_encoders import TextEncoders
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel, merged_config
from dmm_jax.runtime import sharding


def attention_implementation(config, platform: str = "") -> str:
    """Resolves "auto": a fused kernel on TPUs, and on NVIDIA GPUs in bfloat16; XLA's products elsewhere.

    Args:
      platform: "cpu", "gpu" or "tpu", where it is not this process's.
    """
    platform = platform or jax.default_backend()
    if config.attention != "auto":
        return config.attention
    if platform == "gpu" and config.dtype == "bfloat16":
        return "cudnn"
    return "flash" if platform == "tpu" else "xla"


def define_networks(config, base, platform: str = "", attention: str = "") -> tuple[distill_step.Networks, dict]:
    """Returns the graph definitions of a config's networks, and the student's config.

    Args:
      platform: as in `attention_implementation`.
      attention: in place of the config's.
    """
    dtype = jnp.dtype(config.dtype)
    attention = attention or attention_implementation(config, platform)
    unet = {"dtype": dtype, "attention_implementation": attention}
    student_config = merged_config(base.unet_config, len(config_lib.style_names(config)))
    discriminator = None
    if config.adversarial.weight:
        described = discriminator_lib.define(*discriminator_arguments(config, base), remat=config.remat, **unet)
        discriminator = nnx.split(described)[0]

    def unet_of(described, **options):
        return abstract_model(lambda rngs: UNet2DConditionModel.from_config(described, rngs=rngs, **options))

    texts = abstract_model(lambda rngs: TextEncoders(base.text_configs, dtype=dtype, rngs=rngs))
    networks = distill_step.Networks(
        student=nnx.split(unet_of(student_config, remat=config.remat, **unet))[0],
        teacher=nnx.split(layers.for_stacks(unet_of(teacher_config(config, base), **unet)))[0],
        text_encoders=nnx.split(texts)[0],
        discriminator=discriminator,
        check_vma=attention != "flash",
    )
    return networks, student_config


def teacher_config(config, base) -> dict:
    """Returns the config of the UNet that runs all teachers': with a style table where an old student is one."""
    kept = len(config_lib.kept_styles(config))
    return merged_config(base.unet_config, kept) if kept and config.grow.replay else base.unet_config


def discriminator_arguments(config, base) -> tuple[dict, int, int]:
    """Returns the discriminator's: the base's UNet config, the number of styles, cells of a side of the latents."""
    return base.unet_config, len(config_lib.style_names(config)), config.data.resolution // CELL


def abstract_discriminator(config, base) -> tuple[dict, dict]:
    """Returns the shapes of what is trained of the discriminator, and of what is not."""
    model = discriminator_lib.define(*discriminator_arguments(config, base))
    return discriminator_lib.split(discriminator_lib.abstract_params(model), config.adversarial.train_backbone)


def define_objective(config, base, tokenizer) -> distill_step.Objective:
    """Gathers what is minimised: the base's noise schedule and the config's weights."""
    return distill_step.Objective(
        alphas_cumprod=tuple(NoiseSchedule.from_config(base.scheduler_config).alphas_cumprod.tolist()),
        prediction_type=base.prediction_type,
        feature_loss_weight=config.feature_loss_weight,
        feature_loss=config.feature_loss,
        adversarial_weight=config.adversarial.weight,
        prompt_dropout=config.prompt_dropout,
        empty_ids=tuple(map(tuple, np.unique(tokenizer(["", None]), axis=0).tolist())),
    )


def define_gradients(config, networks, objective, mesh, trained) -> Callable:
    """Returns `f(trained, teachers, encoders, batch, step) -> (grads, errors)`; `trained` are arrays or shapes."""
    return distill_step.build_loss_and_grads(
        networks,
        objective,
        mesh,
        sharding.state_specs(trained, mesh),
        dtype=jnp.dtype(config.dtype),
        gradient_accumulation=config.gradient_accumulation,
        seed=config.seed,
    )


def define_step(config, networks, objective, optimizers, mesh, state, teachers, packing: Packing | None = None):
    """Returns the jitted `step(state, teachers, encoders, batch) -> (state, metrics)`, its state donated.

    Args:
      state, teachers: as arrays or as shapes; for `distill_step.compile_step`, since the teachers' layout is left open.
      packing: of the state, where the step is to take and return it packed.
    """
    gradients = define_gradients(config, networks, objective, mesh, distill_step.trained(state))
    norms = clipping.build_norm(mesh, sharding.state_specs(distill_step.trained(state), mesh))
    step = distill_step.build_step(gradients, norms, optimizers, config.ema_decay)
    places = sharding.shardings(mesh, sharding.state_specs(state, mesh))
    given = None
    if packing:
        step, places = packing.around(step), packing.places
        given = places
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(given, distill_step.teacher_formats(teachers), None, None),
        out_shardings=(places, NamedSharding(mesh, sharding.COPY)),
    )
