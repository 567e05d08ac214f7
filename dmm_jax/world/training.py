"""How small worlds' networks are trained: sets of pictures, the denoising loss, and AdamW in stretches of time."""

import collections
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dmm_jax.checkpoints.states import StateStore
from dmm_jax.diffusion.schedule import NoiseSchedule, add_noise
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.text.tokenizer import Tokenizer
from dmm_jax.world.architecture import SCALING_FACTOR, SCHEDULER_CONFIG
from dmm_jax.world.renderer import render
from dmm_jax.world.scenes import sample_scenes
from dmm_jax.world.styles import STYLES, sample_styles

SAVE_EVERY_S = 120  # A fit in stretches that is killed loses at most this time.
STEPS_AHEAD = 2  # At most so many are dispatched but not done: a stretch ends in time.
REPORTS = 40  # Lines that a fit in stretches reports.


class StretchOver(Exception):
    """The time of a stretch is over and its state is saved; the next stretch continues there."""


@dataclasses.dataclass(frozen=True)
class Stretch:
    """A limited time in which a fit goes on."""

    folder: pathlib.Path  # Keeps the fit's state, in checkpoints/.
    ends: float  # In the seconds of `time.monotonic`.
    report: Callable[[Mapping[str, float]], None]  # Receives step, num_steps, loss and seconds of this stretch.


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long one network is trained."""

    num_steps: int
    batch_size: int
    seconds: float = 0.0  # Shortens the whole schedule to fit this time on a slow device; 0 = no limit.
    bank_share: float = 1.0  # Share of the bank's pictures to train on.


class Fit:
    """AdamW with warm-up and cosine decay on `loss_fn(params, data, rows, key)`; one compilation serves many fits.

    The arrays of `data` have one row per example. With "num_examples" in it, rows from there on are not read: sets of
    different sizes, padded to one size, share the compilation.
    """

    def __init__(self, loss_fn: Callable, plan: Plan, learning_rate: float, average: float = 0.999):
        self.plan, self.learning_rate = plan, learning_rate
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(1e-4)
        )

        def step(state, data, number, num_steps, key):
            params, mean, opt_state = state
            rows_key, loss_key = jax.random.split(jax.random.fold_in(key, number))
            num_examples = data.get("num_examples", len(data["input_ids"]))
            rows = jax.random.randint(rows_key, (plan.batch_size,), 0, num_examples)
            loss, grads = jax.value_and_grad(loss_fn)(params, data, rows, loss_key)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            progress = number / num_steps
            warm_up = jnp.minimum(1.0, 20.0 * progress + 1e-3)
            rate = learning_rate * warm_up * (0.505 + 0.495 * jnp.cos(jnp.pi * progress))
            params = optax.apply_updates(params, jax.tree.map(lambda leaf: -rate * leaf, updates))
            decay = jnp.minimum(average, (1.0 + number) / (10.0 + number))
            mean = optax.incremental_update(params, mean, 1.0 - decay)
            return (params, mean, opt_state), loss

        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, params, data: Mapping, label: str, seed: int, stretch: Stretch | None = None):
        """Returns the exponential average of the trained parameters; prints loss and time after each quarter.

        Args:
          stretch: continues from its folder instead, if a state is there, and saves there. The parameters do not depend
            on the number of stretches.

        Raises:
          StretchOver: the stretch ended before the last step.
        """
        state = (jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params), self.optimizer.init(params))
        if stretch:
            return self._in_stretch(state, data, label, seed, stretch)
        key, num_steps, started = jax.random.key(seed), self.plan.num_steps, time.perf_counter()
        number, next_report = 0, 1
        while number < num_steps:
            state, loss = self.step(state, data, number, num_steps, key)
            number += 1
            if number < next_report:
                continue
            loss = float(loss)  # Waits for the device.
            seconds = time.perf_counter() - started
            print(f"{label}: step {number}/{num_steps} loss {loss:.5f} {seconds:.1f} s", flush=True)
            if number == 1:
                started = time.perf_counter()  # Leaves out the compilation.
            if number == 40 and self.plan.seconds:
                num_steps = min(num_steps, max(int(self.plan.seconds * 39 / seconds), 80))
            next_report = number + max(num_steps // 4, 1) if number > 1 else 40
        jax.block_until_ready(state)
        return state[1]

    def _in_stretch(self, state, data, label, seed, stretch):
        """Takes the steps from the last saved state to the last step or the end of the stretch."""
        key, num_steps, started = jax.random.key(seed), self.plan.num_steps, time.monotonic()
        leaves, structure = jax.tree.flatten(state)
        running = collections.deque()
        with StateStore(stretch.folder, keep_last=1) as store:

            def save(number, state):
                leaves = jax.tree.leaves(state)
                store.save(number, {f"{place:05d}": leaf for place, leaf in enumerate(leaves)})

            number, saved = store.resume({f"{place:05d}": jnp.asarray(leaf) for place, leaf in enumerate(leaves)})
            state, saved_at = jax.tree.unflatten(structure, [saved[name] for name in sorted(saved)]), time.monotonic()
            while number < num_steps:
                state, loss = self.step(state, data, number, num_steps, key)
                number += 1
                running.append(loss)
                if len(running) > STEPS_AHEAD:
                    jax.block_until_ready(running.popleft())
                seconds = time.monotonic()
                is_over = seconds > stretch.ends or number == num_steps
                if is_over or number % max(num_steps // REPORTS, 1) == 0:
                    line = {"step": number, "num_steps": num_steps, "loss": float(loss)}
                    print(f"{label}: step {number}/{num_steps} loss {line['loss']:.5f}", flush=True)
                    stretch.report(line | {"seconds": round(time.monotonic() - started, 1)})
                if is_over or seconds > saved_at + SAVE_EVERY_S:
                    save(number, state)
                    saved_at = time.monotonic()
                if is_over and number < num_steps:
                    raise StretchOver(f"{label}: step {number} of {num_steps} is saved.")
        return state[1]


class OneHotEmbed(nnx.Embed):
    """An embedding table read by a matrix product: the gradient of a look-up would add 39,000 rows one by one."""

    @classmethod
    def like(cls, table: nnx.Embed) -> "OneHotEmbed":
        """Returns an equal table."""
        new = cls(table.num_embeddings, table.features, dtype=table.dtype, rngs=nnx.Rngs(0))
        new.embedding[...] = table.embedding[...]
        return new

    def __call__(self, ids):
        """Returns rows of the table."""
        return jax.nn.one_hot(ids, self.num_embeddings, dtype=self.dtype) @ self.embedding[...].astype(self.dtype)


def params_of(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Returns a module's structure and its parameters."""
    graph, state = nnx.split(module, nnx.Param)
    return graph, nnx.to_pure_dict(state)


def graphs_of(configs: Mapping, tokenizer: Tokenizer, dtype) -> tuple[dict[str, nnx.GraphDef], jax.Array]:
    """Returns the structures of UNet and text encoder, and the token ids of the empty prompt.

    Args:
      configs: contents of config.json for "unet" and "text_encoder".
    """
    unet = UNet2DConditionModel.from_config(configs["unet"], dtype=dtype, rngs=nnx.Rngs(0))
    text = CLIPTextModel.from_config(configs["text_encoder"], dtype=dtype, rngs=nnx.Rngs(0))
    text.text_model.embeddings.token_embedding = OneHotEmbed.like(text.text_model.embeddings.token_embedding)
    return {"unet": params_of(unet)[0], "text_encoder": params_of(text)[0]}, jnp.asarray(tokenizer([""])[0])


def make_bank(seed: int, size: int, tokenizer: Tokenizer, style: str | None = None) -> dict:
    """Returns a training set on the device: scenes, styles (one, or random ones) and the captions' token ids."""
    rng = np.random.default_rng(seed)
    scenes, captions = sample_scenes(rng, size)
    styles = STYLES[style].repeat(size) if style else sample_styles(rng, size)
    return jax.tree.map(jnp.asarray, {"input_ids": tokenizer(captions), "scenes": scenes, "styles": styles})


def pictures_of(bank: Mapping, rows) -> jax.Array:
    """Returns rows of a bank as pictures (B, 64, 64, 3) in [-1, 1]: its images uint8, or its scenes rendered."""
    if "images" in bank:
        return bank["images"][rows].astype(jnp.float32) / 127.5 - 1.0
    return 2.0 * render(*jax.tree.map(lambda leaf: leaf[rows], (bank["scenes"], bank["styles"]))) - 1.0


def add_latents(bank: Mapping, vae_config: Mapping, vae_params, dtype) -> dict:
    """Returns the bank with each picture's scaled latents (size, 8, 8, 4), sampled once from the VAE's posterior."""
    graph = nnx.split(nnx.eval_shape(lambda: AutoencoderKL.from_config(vae_config, dtype=dtype, rngs=nnx.Rngs(0))))[0]
    pictures = jax.jit(pictures_of)
    size = len(bank["input_ids"])
    chunk = min(1024, size)
    parts = [
        _sample_latents(graph, vae_params, pictures(bank, k + jnp.arange(chunk)), jax.random.key(k))
        for k in range(0, size, chunk)
    ]
    return dict(bank) | {"latents": jnp.concatenate(parts)[:size]}


@functools.partial(jax.jit, static_argnums=0)
def _sample_latents(graph: nnx.GraphDef, params, images, key):
    return nnx.merge(graph, params).encode(images).sample(key) * SCALING_FACTOR


def denoising_loss(graphs: Mapping, empty_ids, train_text: bool) -> Callable:
    """Returns the loss of noise prediction (DDPM, arXiv:2006.11239, eq. 14) with 10 % of the prompts dropped.

    Args:
      graphs, empty_ids: as `graphs_of` returns them.
      train_text: whether the text encoder is trained; else its parameters come with the data.
    """
    alphas_cumprod = jnp.asarray(NoiseSchedule.from_config(SCHEDULER_CONFIG).alphas_cumprod)

    def loss_fn(params, data, rows, key):
        noise_key, time_key, drop_key = jax.random.split(key, 3)
        clean = data["latents"][rows]
        noise = jax.random.normal(noise_key, clean.shape)
        timesteps = jax.random.randint(time_key, (len(rows),), 0, len(alphas_cumprod))
        dropped = jax.random.uniform(drop_key, (len(rows), 1)) < 0.1
        ids = jnp.where(dropped, empty_ids, data["input_ids"][rows])
        text = nnx.merge(graphs["text_encoder"], (params if train_text else data)["text_encoder"])
        noisy = add_noise(clean, noise, timesteps, alphas_cumprod)
        output = nnx.merge(graphs["unet"], params["unet"])(noisy, timesteps, text(ids).last_hidden_state)
        return jnp.mean((output.sample - noise) ** 2)

    return loss_fn
