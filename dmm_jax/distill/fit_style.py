"""Fits one new style to a handful of images: every network is frozen, and one vector learns by the denoising loss.

The vector is a row of the style table, before the MLP (DMM, arXiv:2504.12364, A.1), as textual inversion
(arXiv:2208.01618) learns a word.
"""

import dataclasses
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float
from tqdm import tqdm

from dmm_jax.checkpoints.formats.fitted_style import write_fitted_style
from dmm_jax.config import arguments
from dmm_jax.config.styles import is_writable, parse_style, style_row, style_text
from dmm_jax.data.batches import Batch
from dmm_jax.data.fill_cache import encode_examples
from dmm_jax.data.prepare import IMAGES_AT_ONCE, build_encoder
from dmm_jax.data.sources import ImageSource
from dmm_jax.distill import style_learning
from dmm_jax.distill.objective import Inputs, Objective
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError

HELD_OUT_DRAWS = 256  # Samples of noise and timestep behind each reported loss; at least one per image.


@dataclasses.dataclass(frozen=True)
class FittedStyle:
    """A row of the style table, and facts about the fit."""

    row: Float[np.ndarray, " E"]
    facts: dict  # "name", "unet_sha256", "loss" and others, as JSON holds them.

    def save(self, path: str | os.PathLike) -> pathlib.Path:
        """Writes the file that `Pipeline.from_pretrained(extra_styles=...)` and `export` read."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_fitted_style(path, self.row, self.facts)

    def summary(self) -> str:
        """Returns a few lines that tell whether the fit has gained anything over the styles that exist."""
        facts, loss = self.facts, self.facts["loss"]
        best = min(loss["styles"], key=loss["styles"].get)
        lines = [
            f"{facts['name']}: {facts['steps']} steps on {facts['images']} images in {facts['seconds']} s. "
            "Denoising loss on these images, with noise that was not trained on:",
            f"  start ({facts['from']}): {loss['start']:.5f}",
            f"  best existing style ({best}): {loss['styles'][best]:.5f}",
            f"  fitted: {loss['fitted']:.5f}",
        ]
        if "mix" in facts:
            lines.append(f"  as a mix: {style_text(facts['mix'])}")
        if not loss["fitted"] < min(loss["start"], loss["styles"][best]):
            lines.append(f"The fit gains nothing over {best}: use that style, or try more steps or another rate.")
        return "\n".join(lines)


def fit_style(
    pipeline: Pipeline,
    images: ImageSource,
    name: str,
    *,
    start: str = "",
    mix_only: bool = False,
    steps: int = 500,
    batch_size: int = 8,
    learning_rate: float = 0.03,
    prompt_dropout: float = 0.1,
    seed: int = 0,
) -> FittedStyle:
    """Fits one row of a merged model's style table to captioned images.

    Args:
      images: captioned square images of one size (`data.sources.FolderSource(folder, resolution)`).
      name: the new style's.
      start: the style or mix to start from; "" for all styles in equal parts.
      mix_only: learn the weights of a mix of the existing styles, and no free row.
      learning_rate: AdamW's first one; it falls to 0 as a cosine.

    Returns:
      The row and facts about the fit. "loss" holds the denoising loss on noise and timesteps that were not trained on:
      "start", "styles" (each existing style) and "fitted".

    Raises:
      UserError: an argument is out of range, the model is a stock checkpoint, or the name is taken or not writable.
      FloatingPointError: the loss is not finite.
    """
    check_arguments(steps, batch_size, learning_rate, prompt_dropout, seed)
    weights = _start_weights(pipeline, name, start)
    data = _encode(pipeline, images, seed)
    batch_size = min(batch_size, len(data.latents))
    learning = {"batch_size": batch_size, "seed": seed, "mix_only": mix_only}
    row, learned, results = _learn(
        pipeline, data, weights, _objective(pipeline, prompt_dropout), steps, learning_rate, learning
    )
    if not np.isfinite(fitted := results["loss"]["fitted"]):
        raise FloatingPointError(f"the loss is {fitted} after {steps} steps. Try a lower learning rate.")
    facts = {
        "name": name,
        "unet_sha256": pipeline.source.digest("unet"),
        "model": pipeline.name,
        "images": len(data.latents),
        "steps": steps,
        "learning_rate": learning_rate,
        "from": start or "equal parts",
        "batch_size": batch_size,
        "seed": seed,
        **results,
    }
    if mix_only:
        facts["mix"] = dict(zip(pipeline.styles, learned.tolist(), strict=True))
    return FittedStyle(row, facts)


def check_arguments(steps: int, batch_size: int, learning_rate: float, prompt_dropout: float, seed: int) -> None:
    """Raises UserError for an argument of `fit_style` that is out of range."""
    arguments.whole_number("steps", steps, 1)
    arguments.whole_number("batch_size", batch_size, 1)
    arguments.whole_number("seed", seed, 0, arguments.MAX_SEED)
    arguments.number("learning_rate", learning_rate, 0.0)
    if not 0 <= prompt_dropout < 1:
        raise UserError(f"prompt_dropout must lie in [0, 1); got {prompt_dropout}.")


def _start_weights(pipeline, name, start) -> np.ndarray:
    """Returns the weights (N,) of the style to start from; refuses a name that the model cannot take."""
    if not pipeline.styles:
        raise UserError(f"{pipeline.source.path} is a stock checkpoint; a style is fitted to a merged model.")
    if name in pipeline.styles:
        raise UserError(f"{pipeline.source.path} already has a style {name!r}. Give --name another.")
    if not is_writable(name):
        raise UserError(f"a style's name must be writable in a mix, without '=', ',' or line breaks; got {name!r}.")
    if start:
        return style_row(parse_style(start), pipeline.styles)
    return np.full(len(pipeline.styles), 1.0 / len(pipeline.styles), np.float32)


def _objective(pipeline, prompt_dropout) -> Objective:
    """Returns the denoising loss on the model's own schedule."""
    return Objective(
        alphas_cumprod=tuple(pipeline.schedule.alphas_cumprod.tolist()),
        prediction_type=pipeline.schedule.prediction_type,
        feature_loss_weight=0.0,
        feature_loss="l2",
        adversarial_weight=0.0,
        prompt_dropout=prompt_dropout,
        empty_ids=tuple(map(tuple, np.unique(pipeline.tokenizers(["", None]), axis=0).tolist())),
    )


def _encode(pipeline, source: ImageSource, seed: int) -> Batch:
    """Returns latents (I, h, w, C), input_ids (I, L) and time_ids (I, 6) of all images, on the device."""
    scaling_factor, encode = build_encoder(pipeline.source, str(pipeline.dtype))
    examples = [source[index] for index in range(len(source))]
    parts = [examples[first : first + IMAGES_AT_ONCE] for first in range(0, len(examples), IMAGES_AT_ONCE)]
    at_once = min(IMAGES_AT_ONCE, len(examples))
    latents = np.concatenate([encode_examples(part, encode, at_once, seed) for part in parts]) * scaling_factor
    input_ids = pipeline.tokenizers([example["caption"] for example in examples])
    height, width = examples[0]["image"].shape[:2]
    time_ids = np.tile(np.array([height, width, 0, 0, height, width], np.float32), (len(examples), 1))
    return jax.device_put(Batch(np.float32(latents), np.int32(input_ids), time_ids))


def _learn(pipeline, data, weights, objective, steps, learning_rate, learning) -> tuple[np.ndarray, np.ndarray, dict]:
    """Learns a row, or a mix, starting from the mix `weights` (N,).

    Returns the row (E,), the learned values (the row, or N weights), and {"loss": losses, "seconds": of the learning}.

    Args:
      learning: batch_size, seed and mix_only of `style_learning.build_fit_step`.
    """
    networks = style_learning.FrozenNetworks(pipeline.unet.graph, pipeline.text_encoders.graph)
    params = {"unet": pipeline.unet.params, "text_encoders": pipeline.text_encoders.params}
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=0.0)
    step = style_learning.build_fit_step(networks, objective, optimizer, **learning)
    held_out = style_learning.build_held_out(networks, objective)
    inputs = held_out_inputs(data, learning["batch_size"], len(objective.alphas_cumprod), learning["seed"])

    def loss_of(row):
        return float(held_out(params, row, inputs))

    def mixed_row(weights):
        return style_learning.row_of(jnp.asarray(weights, jnp.float32)[None], params, True)

    learned = jnp.asarray(weights)[None] if learning["mix_only"] else mixed_row(weights)
    loss = {"start": loss_of(mixed_row(weights))}
    loss["styles"] = {style: loss_of(mixed_row(style_row(style, pipeline.styles))) for style in pipeline.styles}
    state = {"step": jnp.int32(0), "learned": jnp.copy(learned), "opt_state": optimizer.init(learned)}
    started = time.perf_counter()
    with tqdm(total=steps, unit="step", desc="fit-style", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for _ in range(steps):  # One compiled step, which draws its batch from (seed, step).
            state, train_loss = step(state, params, data)
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{float(train_loss):.4f}")
    row = style_learning.row_of(state["learned"], params, learning["mix_only"])
    loss["fitted"] = loss_of(row)
    seconds = round(time.perf_counter() - started, 1)
    return np.asarray(row)[0], np.asarray(state["learned"])[0], {"loss": loss, "seconds": seconds}


def held_out_inputs(data: Batch, batch_size: int, num_timesteps: int, seed: int) -> Inputs:
    """Returns fixed samples (K, B, ...): every image equally often, with evenly spread timesteps and fresh noise."""
    num_images = len(data.latents)
    num_batches = -(-max(HELD_OUT_DRAWS, num_images) // batch_size)
    image_ids = np.arange(num_batches * batch_size) % num_images
    rng = np.random.default_rng([seed, 1])
    timesteps = rng.permutation((np.arange(len(image_ids)) + 0.5) / len(image_ids) * num_timesteps).astype(np.int32)
    noise = rng.standard_normal((len(image_ids), *data.latents.shape[1:]), np.float32)
    latents, input_ids, time_ids = (np.asarray(leaf)[image_ids] for leaf in data)
    flat = Inputs(latents, input_ids, time_ids, noise, timesteps, style_ids=np.zeros(len(image_ids), np.int32))
    return jax.device_put(jax.tree.map(lambda leaf: leaf.reshape(num_batches, batch_size, *leaf.shape[1:]), flat))
