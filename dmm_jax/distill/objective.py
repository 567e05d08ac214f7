"""What the student minimises: its distance from the teachers on the same noisy latents (DMM, arXiv:2504.12364, 3.3)."""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array

from dmm_jax.data.batches import Batch
from dmm_jax.diffusion.prediction import converted, to_x0
from dmm_jax.diffusion.schedule import add_noise
from dmm_jax.distill import adversarial, losses, mixed_styles
from dmm_jax.distill.teachers import Frozen, Teachers, stacked
from dmm_jax.models.lora import joined
from dmm_jax.models.text_encoders import TextConditioning
from dmm_jax.models.unet_2d_condition import UNetOutput

GOLDEN_RATIO = 2_654_435_769  # Its fractional part, times 2^32.
# They name the random numbers that all samples of a step share; no sample has such an id.
START_ID, SHIFT_ID = 2**32 - 1, 2**32 - 2


@dataclasses.dataclass(frozen=True)
class Networks:
    """The structure (NNX graph definitions) of the networks; their parameters are arguments of the step."""

    student: nnx.GraphDef
    teacher: nnx.GraphDef
    text_encoders: nnx.GraphDef  # One encoder, or the two of SDXL.
    discriminator: nnx.GraphDef | None = None  # None without an adversarial term.
    check_vma: bool = True  # Whether shard_map checks which values differ between devices; Pallas kernels forbid it.


@dataclasses.dataclass(frozen=True)
class Objective:
    """The weights of the loss, the noise schedule, and how samples are drawn."""

    alphas_cumprod: tuple[float, ...]
    prediction_type: str  # What the student predicts.
    feature_loss_weight: float
    feature_loss: str
    adversarial_weight: float
    prompt_dropout: float
    empty_ids: tuple[tuple[int, ...], ...]  # Token rows for "no prompt", drawn equally often: "", and SDXL's zeros.
    num_chunks: int = 1  # Chunks in each row of token ids.
    score_loss: str = "l2"
    timestep_draw: str = "independent"
    timestep_power: float = 1.0
    mix_every: int = 0  # Every so-many-th image of a teacher is a mix with another; 0: none.

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each error's mean in the student's loss (DMM, arXiv:2504.12364, eq. 13)."""
        weights = {"score": 1.0, "feature": self.feature_loss_weight, "adversarial": self.adversarial_weight}
        return {name: weight for name, weight in weights.items() if weight}


class Inputs(NamedTuple):
    """What the networks read: a batch with noise, timesteps and styles; leaves (T, b, ...) for the T teachers here."""

    latents: Array  # float32 (T, b, h, w, C), clean and scaled
    input_ids: Array  # int32 (T, b, L), prompts partly replaced by the empty one
    time_ids: Array | None  # (T, b, 6), for SDXL
    noise: Array  # float32 (T, b, h, w, C)
    timesteps: Array  # int32 (T, b)
    style_ids: Array  # int32 (T, b), rows of the student's style table
    renoising: adversarial.Renoising | None = None  # With an adversarial term.
    mix: mixed_styles.Mix | None = None  # With `mix_every`.


def draw_inputs(
    objective: Objective, step_key: jax.Array, sample_ids: jax.Array, styles: jax.Array, batch: Batch
) -> Inputs:
    """Draws noise, timesteps, dropped prompts and styles for the samples (B,) of one teacher.

    Each number follows from the key of its own sample. ONE drop mask serves student and teacher: with two, guidance of
    the student would be ruined (a fault of the released code).

    Args:
      styles: (2,) the teacher's first style, and how many styles it teaches: each sample gets one of them.
    """
    num_timesteps = len(objective.alphas_cumprod)

    def draw(sample_id):
        keys = jax.random.split(jax.random.fold_in(step_key, sample_id), 5)
        noise_key, timestep_key, drop_key, style_key, renoising_key = keys
        noise = jax.random.normal(noise_key, batch.latents.shape[1:])
        timestep = _draw_timestep(objective, timestep_key, step_key, sample_id)
        style_id = styles[0] + jax.random.randint(style_key, (), 0, styles[1])
        renoising = None
        if objective.adversarial_weight:
            renoising = adversarial.draw(renoising_key, noise.shape, num_timesteps)
        return noise, timestep, jax.random.uniform(drop_key), style_id, renoising

    noise, timesteps, uniform, style_ids, renoising = jax.vmap(draw)(sample_ids)
    # One number decides whether a prompt is dropped, and which empty prompt replaces it: given that it is below the
    # dropout, their ratio is uniform in [0, 1) again.
    is_dropped, ratio = uniform < objective.prompt_dropout, uniform / max(objective.prompt_dropout, 1e-9)
    empty_prompts = jnp.asarray(objective.empty_ids)  # (R, L)
    choice = jnp.clip(jnp.floor(ratio * len(empty_prompts)), 0, len(empty_prompts) - 1).astype(jnp.int32)
    input_ids = jnp.where(is_dropped[:, None], empty_prompts[choice], batch.input_ids)
    return Inputs(batch.latents, input_ids, batch.time_ids, noise, timesteps, style_ids, renoising)


def _draw_timestep(objective: Objective, sample_key: jax.Array, step_key: jax.Array, sample_id: jax.Array) -> jax.Array:
    """Draws the timestep () of one sample.

    With "spread", the samples of a step are multiples of the golden ratio after a common random start, modulo 1: any
    consecutive ones are spread evenly, so the mean over a batch varies less from step to step.
    """
    num_timesteps = len(objective.alphas_cumprod)
    if objective.timestep_draw == "independent" and objective.timestep_power == 1.0:
        return jax.random.randint(sample_key, (), 0, num_timesteps)
    uniform = jax.random.uniform(sample_key)
    if objective.timestep_draw == "spread":
        start = jax.random.bits(jax.random.fold_in(step_key, START_ID))
        uniform = (start + sample_id.astype(jnp.uint32) * jnp.uint32(GOLDEN_RATIO)).astype(jnp.float32) / 2.0**32
    return jnp.minimum(num_timesteps * uniform**objective.timestep_power, num_timesteps - 1).astype(jnp.int32)


def sample_errors(
    networks: Networks,
    objective: Objective,
    trained: dict,
    teachers: Teachers,
    frozen: Frozen,
    inputs: Inputs,
    predictions: UNetOutput | None = None,
) -> dict[str, jax.Array]:
    """Returns the errors of every sample, each (T, b), for the teachers on this device.

    Args:
      trained: {"student": its parameters, whole or those that are trained}, and those of a "discriminator".
      predictions: as `ask_teachers` returns them; None: the teachers are asked here.

    Returns:
      {"score", "feature"}; with a discriminator also "adversarial" (the student's term) and "discriminator" (its own).
    """
    teachers_and_samples, mix = inputs.timesteps.shape, inputs.mix  # (T, b)
    inputs = inputs._replace(mix=None)
    samples = jax.tree.map(_merge_rows, inputs)
    alphas_cumprod = jnp.asarray(objective.alphas_cumprod, jnp.float32)
    noisy, text = _noisy_and_text(networks, objective, frozen, samples)
    rows = jax.tree.map(lambda leaf: leaf.reshape(teachers_and_samples + leaf.shape[1:]), (noisy, text))
    teacher_inputs, *rows = mixed_styles.with_second_rows((inputs, *rows), mix)
    teacher_inputs = teacher_inputs._replace(style_ids=mixed_styles.own_styles(inputs.style_ids, mix))
    target = predictions
    if target is None:
        target = predict_teachers(networks, objective, teachers, teacher_inputs, *rows)
    if teachers.is_converted is not None:
        arguments = target.sample, rows[0], teacher_inputs.timesteps, teachers.is_converted
        target = target._replace(sample=_as_the_student_predicts(objective, *arguments))
    target = jax.tree.map(_merge_rows, mixed_styles.mean_of_both(target, mix))

    params = trained["student"] if frozen.student is None else joined(frozen.student, trained["student"])
    student = nnx.merge(networks.student, params)
    style = student.style_embedding(_merge_rows(mixed_styles.style_weights(inputs.style_ids, student.num_models, mix)))
    added_cond = text.added_cond(samples.time_ids)
    output = student(noisy, samples.timesteps, text.encoder_hidden_states, style_embedding=style, added_cond=added_cond)
    score_error = {"l2": losses.score_error, "pseudo_huber": losses.pseudo_huber_error}[objective.score_loss]
    errors = {"score": score_error(output.sample, target.sample)}
    errors["feature"] = jnp.zeros_like(errors["score"])
    if objective.feature_loss_weight:
        errors["feature"] = losses.feature_error(output.features, target.features, objective.feature_loss)
        if teachers.is_converted is not None:  # Such features lead to another quantity than the student's.
            is_converted = mixed_styles.of_either(teachers.is_converted, teachers_and_samples[1], mix)
            errors["feature"] = jnp.where(is_converted.ravel(), 0.0, errors["feature"])
    if objective.adversarial_weight:
        alpha_bar = alphas_cumprod[samples.timesteps]
        clean = [to_x0(unet.sample, noisy, alpha_bar, objective.prediction_type) for unet in (output, target)]
        params = {"backbone": frozen.backbone} | trained["discriminator"]
        judge = adversarial.judge(networks.discriminator, samples.renoising, alphas_cumprod, text, added_cond)
        errors |= adversarial.errors(judge, params, *clean, samples.style_ids, student.num_models)
    return jax.tree.map(lambda error: error.reshape(teachers_and_samples), errors)


def _as_the_student_predicts(objective, sample: jax.Array, noisy: jax.Array, timesteps, is_converted) -> jax.Array:
    """Returns the teachers' predictions (T, n, h, w, C), those of the other type converted; `is_converted` is (T,)."""
    sample, alphas_cumprod = sample.astype(jnp.float32), jnp.asarray(objective.alphas_cumprod, jnp.float32)
    convert = jax.vmap(partial(converted, prediction_type=objective.prediction_type))
    other = convert(sample, noisy, alphas_cumprod[timesteps])
    return jnp.where(is_converted[:, None, None, None, None], other, sample)


def ask_teachers(
    networks: Networks, objective: Objective, teachers: Teachers, frozen: Frozen, inputs: Inputs
) -> UNetOutput:
    """Returns the teachers' predictions of their own rows, (T, b, ...), each in its own type."""
    read = _noisy_and_text(networks, objective, frozen, jax.tree.map(_merge_rows, inputs))
    rows = jax.tree.map(lambda leaf: leaf.reshape(inputs.timesteps.shape + leaf.shape[1:]), read)
    return predict_teachers(networks, objective, teachers, inputs, *rows)


def _noisy_and_text(networks, objective, frozen, samples) -> tuple[Array, TextConditioning]:
    """Returns the noisy latents (B, h, w, C) and the base's conditioning of the prompts of samples (B, ...)."""
    alphas_cumprod = jnp.asarray(objective.alphas_cumprod, jnp.float32)
    noisy = add_noise(samples.latents, samples.noise, samples.timesteps, alphas_cumprod)
    return noisy, encode_prompts(networks, objective, frozen.text_encoders, samples.input_ids)


def predict_teachers(
    networks: Networks, objective: Objective, teachers: Teachers, inputs: Inputs, noisy: jax.Array, text
) -> UNetOutput:
    """Returns each teacher's prediction for its own row of the noisy latents (T, n, h, w, C); no gradient passes.

    All teachers run as one batch of networks: operations without parameters run once for all images, dense layers are
    batched products, and convolutions run network by network (`layers.for_stacks`). Eight teachers one after the other
    would be thousands of small kernels more. The `vmap` is safe inside shard_map, where arrays are one device's own;
    under plain jit on several devices the partitioner gets it wrong.

    Args:
      text: the base's conditioning of all prompts; a teacher with its own text encoders encodes its prompts itself.
    """

    def encode(encoder, input_ids, base_text):
        params = jax.tree.map(lambda leaf: leaf[encoder], teachers.text)
        own_text = partial(encode_prompts, networks, objective, params, input_ids)
        return jax.lax.cond(encoder < 0, lambda: base_text, own_text)

    def predict(unet, noisy, timesteps, style_ids, time_ids, text):
        model = nnx.merge(networks.teacher, unet)
        style = model.style_embedding(jax.nn.one_hot(style_ids, model.num_models)) if model.num_models else None
        states, added_cond = text.encoder_hidden_states, text.added_cond(time_ids)
        output = model(noisy, timesteps, states, style_embedding=style, added_cond=added_cond)
        return output._replace(features=output.features if objective.feature_loss_weight else ())

    if teachers.text is not None:
        text = jax.lax.map(lambda row: encode(*row), (teachers.encoder, inputs.input_ids, text))
    conditions = inputs.timesteps, inputs.style_ids, inputs.time_ids, text
    return jax.lax.stop_gradient(jax.vmap(predict)(stacked(teachers.unet), noisy, *conditions))


def encode_prompts(networks: Networks, objective: Objective, text_encoders, input_ids) -> TextConditioning:
    """Runs the text encoders of one checkpoint on token ids (B, L), all chunks; no gradient passes."""
    chunks = rearrange(input_ids, "B (K L) -> B K L", K=objective.num_chunks)
    return jax.lax.stop_gradient(nnx.merge(networks.text_encoders, text_encoders).encode_chunks(chunks))


def _merge_rows(leaf):
    return leaf.reshape((-1,) + leaf.shape[2:])  # (T, b, ...) -> (T b, ...)
