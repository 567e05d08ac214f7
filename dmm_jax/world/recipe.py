"""How the embedded world was trained: VAE, base (UNet + text encoder), one teacher per style, and the shape classifier.

    python -m dmm_jax.world.recipe --out world        # about 8 minutes on one H200
    python -m dmm_jax.world.recipe --out world --only blueprint        # the LoRA, on the base that ships

Everything is drawn by the renderer while it trains, so the recipe needs no data. The base learns the whole family of
styles without being told which; each teacher is the base fine-tuned on one style, as people fine-tune Stable Diffusion:
whole, or by a LoRA.
"""

import argparse
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
from safetensors.numpy import load_file, save_file

from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.diffusion.schedule import NoiseSchedule, add_noise
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.text.tokenizer import Tokenizer
from dmm_jax.world import lora_teacher
from dmm_jax.world.architecture import SCALING_FACTOR, SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from dmm_jax.world.classifier import ShapeFeatures
from dmm_jax.world.renderer import render
from dmm_jax.world.scenes import IMAGE_SIZE, sample_scenes
from dmm_jax.world.shipped_checkpoints import BASE, FOLDER, TEACHERS, save_base, save_teacher
from dmm_jax.world.styles import STYLES, sample_styles
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer


def params_of(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """Splits a module into its structure and its parameters."""
    graph, state = nnx.split(module, nnx.Param)
    return graph, nnx.to_pure_dict(state)


class Fit:
    """AdamW with warm-up and cosine decay on `loss_fn(params, data, rows, key)`; compiled once, used for many fits."""

    def __init__(self, loss_fn: Callable, plan: "Plan", learning_rate: float, average: float = 0.999):
        self.plan, self.learning_rate = plan, learning_rate
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.99), optax.add_decayed_weights(1e-4)
        )

        def step(state, data, number, num_steps, key):
            params, mean, opt_state = state
            for_rows, for_loss = jax.random.split(jax.random.fold_in(key, number))
            rows = jax.random.randint(for_rows, (plan.batch_size,), 0, len(data["input_ids"]))
            loss, grads = jax.value_and_grad(loss_fn)(params, data, rows, for_loss)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            done = number / num_steps
            rate = learning_rate * jnp.minimum(1.0, 20.0 * done + 1e-3) * (0.505 + 0.495 * jnp.cos(jnp.pi * done))
            params = optax.apply_updates(params, jax.tree.map(lambda leaf: -rate * leaf, updates))
            decay = jnp.minimum(average, (1.0 + number) / (10.0 + number))
            mean = optax.incremental_update(params, mean, 1.0 - decay)
            return (params, mean, opt_state), loss

        self.step = jax.jit(step, donate_argnums=0)

    def __call__(self, params, data: Mapping, what: str, seed: int):
        """Returns the averaged parameters; prints the loss and the time now and then."""
        state = (jax.tree.map(jnp.array, params), jax.tree.map(jnp.array, params), self.optimizer.init(params))
        key, num_steps, started = jax.random.key(seed), self.plan.num_steps, time.perf_counter()
        number, report = 0, 0
        while number < num_steps:
            state, loss = self.step(state, data, number, num_steps, key)
            number += 1
            if number in (1, 40) or number >= report:
                print(
                    f"{what}: step {number}/{num_steps} loss {float(loss):.5f} {time.perf_counter() - started:.1f} s",
                    flush=True,
                )
                if number == 1:
                    started = time.perf_counter()  # Compilation is not counted.
                if number == 40 and self.plan.seconds:
                    num_steps = min(num_steps, max(int(self.plan.seconds * 39 / (time.perf_counter() - started)), 80))
                report = number + max(num_steps // 4, 1) if number > 1 else 40
        jax.block_until_ready(state)
        return state[1]


class OneHotEmbed(nnx.Embed):
    """The same table, read by a product: a look-up's gradient adds 39,000 rows, mostly the padding's, one by one."""

    @classmethod
    def like(cls, table: nnx.Embed) -> "OneHotEmbed":
        """Returns an equal table."""
        new = cls(table.num_embeddings, table.features, dtype=table.dtype, rngs=nnx.Rngs(0))
        new.embedding[...] = table.embedding[...]
        return new

    def __call__(self, ids):
        """Returns rows of the table."""
        return jax.nn.one_hot(ids, self.num_embeddings, dtype=self.dtype) @ self.embedding[...].astype(self.dtype)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long one network is trained."""

    num_steps: int
    batch_size: int
    seconds: float = 0.0  # Ends earlier, learning rate and all, where the device would take longer; 0 = no limit.
    bank_share: float = 1.0  # Pictures to train on, as a share of the bank.


def make_bank(seed: int, size: int, tokenizer: Tokenizer, style: str | None = None) -> dict:
    """Draws scenes, styles (all of `style`, or of the whole family) and captions' token ids, kept on the device."""
    rng = np.random.default_rng(seed)
    scenes, captions = sample_scenes(rng, size)
    styles = STYLES[style].repeat(size) if style else sample_styles(rng, size)
    return jax.tree.map(jnp.asarray, {"input_ids": tokenizer(captions), "scenes": scenes, "styles": styles})


def render_bank(data: Mapping, rows) -> jax.Array:
    """Renders pictures (B, 64, 64, 3) in [-1, 1]."""
    return 2.0 * render(*jax.tree.map(lambda leaf: leaf[rows], (data["scenes"], data["styles"]))) - 1.0


def train_vae(bank: Mapping, plan: Plan, dtype) -> dict:
    """Trains the VAE on pictures, their edges, and a faint KL term; scales its latents to unit variance."""
    graph, params = params_of(AutoencoderKL.from_config(VAE_CONFIG, dtype=dtype, rngs=nnx.Rngs(1)))

    def loss_fn(params, data, rows, key):
        images = render_bank(data, rows)
        vae = nnx.merge(graph, params)
        posterior = vae.encode(images)
        error = vae.decode(posterior.sample(key)).astype(jnp.float32) - images
        edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
        divergence = 0.5 * jnp.mean(posterior.mean**2 + jnp.exp(posterior.logvar) - 1.0 - posterior.logvar)
        return jnp.mean(jnp.abs(error)) + 2.0 * jnp.mean(error**2) + edges + 1e-4 * divergence

    params = Fit(loss_fn, plan, 1e-3)(params, bank, "vae", seed=1)
    rows = jnp.arange(min(2048, len(bank["input_ids"])))
    means = jax.jit(lambda params, data: nnx.merge(graph, params).encode(render_bank(data, rows)).mean)(params, bank)
    return scale_latents(params, 1.0 / (SCALING_FACTOR * float(jnp.std(means))))


def scale_latents(params: Mapping, scale: float) -> dict:
    """Multiplies a VAE's latents by `scale` within its 1x1 convolutions, so that images do not change."""
    params = jax.tree.map(jnp.asarray, dict(params))
    channels = params["quant_conv"]["bias"].shape[0] // 2
    factors = jnp.concatenate([jnp.full(channels, scale), jnp.ones(channels)])
    shift = jnp.concatenate([jnp.zeros(channels), jnp.full(channels, 2.0 * np.log(scale))])
    quant, post = params["quant_conv"], params["post_quant_conv"]
    quant = {"kernel": quant["kernel"] * factors, "bias": quant["bias"] * factors + shift}
    post = {"kernel": post["kernel"] / scale, "bias": post["bias"]}
    return params | {"quant_conv": quant, "post_quant_conv": post}


def add_latents(bank: Mapping, vae_params, dtype) -> dict:
    """Encodes every picture of a bank once: scaled latents (size, 8, 8, 4)."""
    graph = nnx.split(nnx.eval_shape(lambda: AutoencoderKL.from_config(VAE_CONFIG, dtype=dtype, rngs=nnx.Rngs(0))))[0]

    @jax.jit
    def encode(params, data, rows, key):
        return nnx.merge(graph, params).encode(render_bank(data, rows)).sample(key) * SCALING_FACTOR

    size = len(bank["input_ids"])
    chunk = min(1024, size)
    parts = [encode(vae_params, bank, k + jnp.arange(chunk), jax.random.key(k)) for k in range(0, size, chunk)]
    return dict(bank) | {"latents": jnp.concatenate(parts)[:size]}


def denoising_loss(graphs: Mapping, empty_ids, train_text: bool) -> Callable:
    """Returns the loss of noise prediction (DDPM, arXiv:2006.11239, eq. 14) with 10 % of the prompts dropped."""
    alphas_cumprod = jnp.asarray(NoiseSchedule.from_config(SCHEDULER_CONFIG).alphas_cumprod)

    def loss_fn(params, data, rows, key):
        for_noise, for_time, for_drop = jax.random.split(key, 3)
        clean = data["latents"][rows]
        noise = jax.random.normal(for_noise, clean.shape)
        timesteps = jax.random.randint(for_time, (len(rows),), 0, len(alphas_cumprod))
        dropped = jax.random.uniform(for_drop, (len(rows), 1)) < 0.1
        ids = jnp.where(dropped, empty_ids, data["input_ids"][rows])
        text = nnx.merge(graphs["text_encoder"], (params if train_text else data)["text_encoder"])
        noisy = add_noise(clean, noise, timesteps, alphas_cumprod)
        output = nnx.merge(graphs["unet"], params["unet"])(noisy, timesteps, text(ids).last_hidden_state)
        return jnp.mean((output.sample - noise) ** 2)

    return loss_fn


def train_classifier(bank: Mapping, plan: Plan) -> dict:
    """Trains the shape classifier whose features `FD (shapes)` compares."""
    graph, params = params_of(ShapeFeatures(style_dim=style_vectors(bank["styles"]).shape[1], rngs=nnx.Rngs(3)))

    def loss_fn(params, data, rows, key):
        images = render_bank(data, rows)
        images = images + 0.05 * jax.random.normal(key, images.shape)
        truth = jax.tree.map(lambda leaf: leaf[rows], (data["scenes"].content, data["styles"]))
        return nnx.merge(graph, params).loss(images, truth[0], style_vectors(truth[1]))

    return Fit(loss_fn, plan, 2e-3)(params, bank, "classifier", seed=3)


def style_vectors(styles) -> jax.Array:
    """Lays a batch of styles out as vectors (B, S)."""
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in styles], axis=1)


PLANS = {
    "classifier": Plan(3_000, 256, 13.0),
    "vae": Plan(8_000, 128, 62.0),
    "base": Plan(16_000, 512, 90.0),
    "teacher": Plan(2_000, 512, 12.0, bank_share=1 / 8),
    "lora": Plan(300, 64, bank_share=1 / 64),
}


@dataclasses.dataclass(frozen=True)
class World:
    """What teachers are fine-tuned from."""

    base: dict  # Parameters of unet, vae and text_encoder.
    text_config: dict
    tokenizer: Tokenizer

    @property
    def configs(self) -> dict:
        """config.json of the networks, and the scheduler's."""
        return {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "text_encoder": self.text_config, "scheduler": SCHEDULER_CONFIG}


def shipped_world() -> World:
    """Reads the base that ships, in float32."""
    base = open_checkpoint(FOLDER / BASE)
    params = {part: base.params(part, np.float32) for part in ("unet", "vae", "text_encoder")}
    return World(params, base.config("text_encoder"), Tokenizer.from_folder(FOLDER / BASE / "tokenizer"))


def train_world(out: pathlib.Path, plans: Mapping[str, Plan], bank_size: int, dtype) -> World:
    """Trains VAE, classifier and base, and writes them to `out`."""
    words = out / "raw" / "tokenizer"
    write_tokenizer(words)
    tokenizer = Tokenizer.from_folder(words)
    text_config = TEXT_CONFIG | tokenizer_fields(words)
    bank = make_bank(0, bank_size, tokenizer)
    raw = functools.partial(once, out / "raw")
    vae = raw("vae", lambda: train_vae(bank, plans["vae"], dtype))
    classifier = raw("classifier", lambda: train_classifier(bank, plans["classifier"]))
    unet = params_of(UNet2DConditionModel.from_config(UNET_CONFIG, rngs=nnx.Rngs(2)))[1]
    text = params_of(CLIPTextModel.from_config(text_config, rngs=nnx.Rngs(2)))[1]
    loss_fn = denoising_loss(*graphs_of(text_config, tokenizer, dtype), train_text=True)
    fit = Fit(loss_fn, plans["base"], 2e-3, average=0.9995)
    base = raw("base", lambda: fit({"unet": unet, "text_encoder": text}, add_latents(bank, vae, dtype), "base", seed=2))
    found = World(base | {"vae": vae}, text_config, tokenizer)
    save_base(out, found.configs, found.base, words, classifier)
    return found


def graphs_of(text_config: Mapping, tokenizer: Tokenizer, dtype) -> tuple[dict[str, nnx.GraphDef], jax.Array]:
    """Returns the structures of UNet and text encoder, and the token ids of the empty prompt."""
    unet = UNet2DConditionModel.from_config(UNET_CONFIG, dtype=dtype, rngs=nnx.Rngs(0))
    text = CLIPTextModel.from_config(text_config, dtype=dtype, rngs=nnx.Rngs(0))
    text.text_model.embeddings.token_embedding = OneHotEmbed.like(text.text_model.embeddings.token_embedding)
    return {"unet": params_of(unet)[0], "text_encoder": params_of(text)[0]}, jnp.asarray(tokenizer([""])[0])


class Tuner:
    """Fine-tunes the base on one style after the other; each way of training is compiled once."""

    def __init__(self, source: World, plans: Mapping[str, Plan], bank_size: int, dtype):
        self.source, self.bank_size, self.dtype = source, bank_size, dtype
        graphs = graphs_of(source.text_config, source.tokenizer, dtype)
        unet_alone = denoising_loss(*graphs, train_text=False)

        def lora_loss(params, data, rows, key):
            return unet_alone({"unet": lora_teacher.folded(data["unet"], params["lora"])}, data, rows, key)

        self.unet_alone = Fit(unet_alone, plans["teacher"], 5e-4)
        self.with_text = Fit(denoising_loss(*graphs, train_text=True), plans["teacher"], 5e-4)
        self.lora = Fit(lora_loss, plans["lora"], 4e-3)

    def __call__(self, name: str) -> dict:
        """Returns a teacher's parameters of unet and perhaps text_encoder; of a LoRA, its factors under "lora"."""
        number, teacher, base = list(TEACHERS).index(name), TEACHERS[name], self.source.base
        fit = self.lora if teacher.lora else self.with_text if teacher.own_text_encoder else self.unet_alone
        bank = make_bank(100 + number, int(self.bank_size * fit.plan.bank_share), self.source.tokenizer, style=name)
        data = add_latents(bank, base["vae"], self.dtype)
        if teacher.own_text_encoder:
            return fit({"unet": base["unet"], "text_encoder": base["text_encoder"]}, data, name, seed=10 + number)
        data["text_encoder"] = base["text_encoder"]
        if not teacher.lora:
            return fit({"unet": base["unet"]}, data, name, seed=10 + number)
        data["unet"] = jax.tree.map(jnp.asarray, base["unet"])
        factors = lora_teacher.new_factors(base["unet"], jax.random.key(number))
        return fit({"lora": factors}, data, name, seed=10 + number)

    @property
    def said(self) -> dict[str, object]:
        """What a LoRA's metadata tells of its training, under kohya-ss's names."""
        plan, rate = self.lora.plan, self.lora.learning_rate
        return {
            "learning_rate": rate,
            "unet_lr": rate,
            "lr_scheduler": "cosine",
            "max_train_steps": plan.num_steps,
            "total_batch_size": plan.batch_size,
            "num_train_images": int(self.bank_size * plan.bank_share),
            "resolution": f"({IMAGE_SIZE}, {IMAGE_SIZE})",
            "sd_model_name": BASE,
        }


def main() -> None:
    """Trains the world and writes it in the formats found in the wild; what `raw/` holds is not trained again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", choices=list(TEACHERS), help="this teacher alone, on the base that ships")
    parser.add_argument("--effort", type=float, default=1.0, help="times every number of steps; 1 is the shipped world")
    parser.add_argument("--bank-size", type=int, default=262_144)
    args = parser.parse_args()
    started = time.perf_counter()
    plans = {
        name: dataclasses.replace(plan, num_steps=max(int(args.effort * plan.num_steps), 2))
        for name, plan in PLANS.items()
    }
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    args.out.mkdir(parents=True, exist_ok=True)
    source = shipped_world() if args.only else train_world(args.out, plans, args.bank_size, dtype)
    tune = Tuner(source, plans, args.bank_size, dtype)
    for name in [args.only] if args.only else TEACHERS:
        params = once(args.out / "raw", name, functools.partial(tune, name))
        save_teacher(args.out, source.configs, name, source.base | params, tune.said)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {time.perf_counter() - started:.0f} s")


def once(folder: pathlib.Path, name: str, train: Callable[[], dict]) -> dict:
    """Returns the parameters in `folder/name.safetensors`, training and writing them first if they are not there."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        leaves = jax.tree_util.tree_leaves_with_path(train())
        save_file({"/".join(str(part.key) for part in keys): np.asarray(leaf) for keys, leaf in leaves}, path)
    params: dict = {}
    for key, leaf in load_file(path).items():
        *parents, last = (int(part) if part.isdigit() else part for part in key.split("/"))
        functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, params)[last] = leaf
    return params


if __name__ == "__main__":
    main()
