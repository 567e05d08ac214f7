"""`dmm-jax fit-style`: a vector for a new style from a handful of images, by the frozen student's own loss."""

import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from dmm_jax.checkpoints.formats.fitted_style import write_fitted_style
from dmm_jax.config import arguments
from dmm_jax.config.styles import is_writable, parse_style, style_row, style_text
from dmm_jax.data.batches import Batch
from dmm_jax.data.fill_cache import encode_examples
from dmm_jax.data.prepare import IMAGES_AT_ONCE, build_encoder
from dmm_jax.data.sources import FolderSource
from dmm_jax.distill import style_learning as fitting
from dmm_jax.distill.objective import Inputs, Objective
from dmm_jax.pipeline import Pipeline, default_dtype
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.storage import check_writable

HELD_OUT_DRAWS = 256  # Of noise and timestep, in all; at least one an image.


def fit_style(
    model: str,
    images: pathlib.Path,
    name: str,
    out: pathlib.Path,
    base: str | None = None,
    start: str = "",
    mix_only: bool = False,
    steps: int = 500,
    batch_size: int = 8,
    learning_rate: float = 0.03,
    prompt_dropout: float = 0.1,
    resolution: int = 0,
    seed: int = 0,
    dtype: str = "",
) -> dict:
    """Fits one row of the style table to captioned images, writes it, and returns what the file says of itself.

    Arguments as on the command line. "loss" holds the denoising loss on noise and timesteps that were not trained on
    (of the same images): of the start, of each style that exists, and of what was fitted.

    Raises:
      ValueError: the model, the images, the name or the output cannot be used.
      FloatingPointError: the loss is not finite.
    """
    out = pathlib.Path(out)
    _check_new(out)
    for option, given, least in (("steps", steps, 1), ("batch-size", batch_size, 1), ("resolution", resolution, 0)):
        arguments.whole(f"--{option}", given, least)
    arguments.whole("--seed", seed, 0, arguments.MAX_SEED)
    arguments.number("--learning-rate", learning_rate, 0.0)
    if not 0 <= prompt_dropout < 1:
        raise UserError(f"--prompt-dropout must lie in [0, 1); got {prompt_dropout}.")
    dtype = dtype or default_dtype()
    pipeline = Pipeline.from_pretrained(model, dtype=dtype, base=base)
    weights = _start(pipeline, name, start)
    side = resolution or pipeline.unet.merged().config["sample_size"] * pipeline.vae_scale_factor
    arguments.size("--resolution", side, pipeline.vae_scale_factor)
    data = _encoded(pipeline, FolderSource(images, side), side, dtype, seed)
    batch_size = min(batch_size, len(data.latents))
    told = {"batch_size": batch_size, "seed": seed}

    row, mix, found = _fit(
        pipeline,
        data,
        weights,
        _objective(pipeline, prompt_dropout),
        steps,
        learning_rate,
        told | {"mix_only": mix_only},
    )
    if not np.isfinite(fitted := found["loss"]["fitted"]):
        raise FloatingPointError(f"the loss is {fitted} after {steps} steps. Try a lower --learning-rate.")
    said = {
        "name": name,
        "unet_sha256": pipeline.source.digest("unet"),
        "model": pipeline.name,
        "images": len(data.latents),
        "steps": steps,
        "learning_rate": learning_rate,
        "from": start or "equal parts",
        **told,
        **found,
    }
    if mix_only:
        said["mix"] = dict(zip(pipeline.styles, mix.tolist(), strict=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_fitted_style(out, row, said)
    return said


def _check_new(out):
    if out.exists():
        raise UserError(f"{out} is there already; nothing is overwritten. Give a new file.")
    if out.suffix != ".safetensors":
        raise UserError(f"--out must be a .safetensors file; got {out}.")
    check_writable(out)


def _objective(pipeline, prompt_dropout) -> Objective:
    """Returns the score loss alone, on the model's own schedule."""
    return Objective(
        alphas_cumprod=tuple(pipeline.schedule.alphas_cumprod.tolist()),
        prediction_type=pipeline.schedule.prediction_type,
        feature_loss_weight=0.0,
        feature_loss="l2",
        adversarial_weight=0.0,
        prompt_dropout=prompt_dropout,
        empty_ids=tuple(map(tuple, np.unique(pipeline.tokenizers(["", None]), axis=0).tolist())),
    )


def _fit(pipeline, data, weights, objective, steps, learning_rate, told) -> tuple[np.ndarray, np.ndarray, dict]:
    """Learns a row, or a mix, from the mix `weights` (N,) on.

    Returns the row (E,), what was learned, and {"loss": the losses, "seconds": of the learning}.

    Args:
      told: how the step draws and what it learns, as `fitting.build_fit_step` takes it.
    """
    frozen = fitting.Frozen(pipeline.unet.graph, pipeline.text_encoders.graph)
    params = {"unet": pipeline.unet.params, "text_encoders": pipeline.text_encoders.params}
    optimizer = optax.adamw(optax.cosine_decay_schedule(learning_rate, steps), weight_decay=0.0)
    step = fitting.build_fit_step(frozen, objective, optimizer, **told)
    held_out = fitting.build_held_out(frozen, objective)
    inputs = held_out_inputs(data, told["batch_size"], len(objective.alphas_cumprod), told["seed"])

    def loss_of(row):
        return float(held_out(params, row, inputs))

    def row_of(weights):
        return fitting.row_of(jnp.asarray(weights, jnp.float32)[None], params, True)

    learned = jnp.asarray(weights)[None] if told["mix_only"] else row_of(weights)
    loss = {"start": loss_of(row_of(weights))}
    loss["styles"] = {style: loss_of(row_of(style_row(style, pipeline.styles))) for style in pipeline.styles}
    state = {"step": jnp.int32(0), "learned": jnp.copy(learned), "opt_state": optimizer.init(learned)}
    began = time.perf_counter()
    with tqdm(total=steps, unit="step", desc="fit-style", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
        for _ in range(steps):  # One compiled step; the batch is drawn within it, from (seed, step).
            state, now = step(state, params, data)
            bar.update()
            if bar.n % 20 == 0:
                bar.set_postfix(loss=f"{float(now):.4f}")
    row = fitting.row_of(state["learned"], params, told["mix_only"])
    loss["fitted"] = loss_of(row)
    seconds = round(time.perf_counter() - began, 1)
    return np.asarray(row)[0], np.asarray(state["learned"])[0], {"loss": loss, "seconds": seconds}


def report(said: dict) -> str:
    """Says in a few lines whether anything was learned: the losses, the best existing style's beside them."""
    loss = said["loss"]
    best = min(loss["styles"], key=loss["styles"].get)
    lines = [
        f"{said['name']}: {said['steps']} steps on {said['images']} images in {said['seconds']} s. "
        "Denoising loss of these images, on noise that was not trained on:",
        f"  start ({said['from']}): {loss['start']:.5f}",
        f"  best style there was ({best}): {loss['styles'][best]:.5f}",
        f"  fitted: {loss['fitted']:.5f}",
    ]
    if "mix" in said:
        lines.append(f"  as a mix: {style_text(said['mix'])}")
    if not loss["fitted"] < min(loss["start"], loss["styles"][best]):
        lines.append(f"Nothing was gained on {best}: use that style, or try more --steps or another --learning-rate.")
    return "\n".join(lines)


def _start(pipeline, name, start):
    """Returns the weights (N,) of the style to start from."""
    if not pipeline.styles:
        raise UserError(f"{pipeline.source.path} is a stock checkpoint; a style is fitted to a merged model.")
    if name in pipeline.styles:
        raise UserError(f"there is a style {name!r} in {pipeline.source.path}. Give --name another.")
    if not is_writable(name):
        raise UserError(f"a style's name must be writable in a mix, without '=', ',' or line breaks; got {name!r}.")
    if start:
        return style_row(parse_style(start), pipeline.styles)
    return np.full(len(pipeline.styles), 1.0 / len(pipeline.styles), np.float32)


def _encoded(pipeline, source, side, dtype, seed) -> Batch:
    """Returns latents (I, h, w, C), input_ids (I, L) and time_ids (I, 6) of all images, on the device."""
    scaling_factor, encode = build_encoder(pipeline.source, dtype)
    examples = [source[index] for index in range(len(source))]
    parts = [examples[first : first + IMAGES_AT_ONCE] for first in range(0, len(examples), IMAGES_AT_ONCE)]
    at_once = min(IMAGES_AT_ONCE, len(examples))
    latents = np.concatenate([encode_examples(part, encode, at_once, seed) for part in parts]) * scaling_factor
    input_ids = pipeline.tokenizers([example["caption"] for example in examples])
    time_ids = np.tile(np.array([side, side, 0, 0, side, side], np.float32), (len(examples), 1))
    return jax.device_put(Batch(np.float32(latents), np.int32(input_ids), time_ids))


def held_out_inputs(data, batch_size: int, num_timesteps: int, seed: int) -> Inputs:
    """Returns fixed samples (K, B, ...): every image equally often, evenly spread timesteps, noise of their own."""
    num_images = len(data.latents)
    num_batches = -(-max(HELD_OUT_DRAWS, num_images) // batch_size)
    places = np.arange(num_batches * batch_size) % num_images
    rng = np.random.default_rng([seed, 1])
    timesteps = rng.permutation((np.arange(len(places)) + 0.5) / len(places) * num_timesteps).astype(np.int32)
    noise = rng.standard_normal((len(places), *data.latents.shape[1:]), np.float32)
    latents, input_ids, time_ids = (np.asarray(leaf)[places] for leaf in data)
    flat = Inputs(latents, input_ids, time_ids, noise, timesteps, style_ids=np.zeros(len(places), np.int32))
    return jax.device_put(jax.tree.map(lambda leaf: leaf.reshape(num_batches, batch_size, *leaf.shape[1:]), flat))
