"""The recipe that trained the embedded world's shipped checkpoints.

    python -m dmm_jax.world.recipe --out world                     # everything; about 8 minutes on one H200
    python -m dmm_jax.world.recipe --out world --only blueprint    # one teacher on the shipped base

It trains the VAE, the shape classifier, the base (UNet and text encoder) on the whole family of styles, and five
teachers. A teacher is the base fine-tuned on one style: its UNet, its UNet and text encoder, or a LoRA. The renderer
makes all pictures during training, so the recipe needs no data.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.models.autoencoder_kl import AutoencoderKL
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.runtime.storage import part_of
from dmm_jax.text.tokenizer import Tokenizer
from dmm_jax.world import lora_teacher
from dmm_jax.world.architecture import SCALING_FACTOR, SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG
from dmm_jax.world.classifier import ShapeFeatures
from dmm_jax.world.scenes import IMAGE_SIZE
from dmm_jax.world.shipped_checkpoints import BASE, FOLDER, TEACHERS, save_base, save_teacher
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer
from dmm_jax.world.training import (
    Fit,
    Plan,
    Stretch,
    add_latents,
    denoising_loss,
    graphs_of,
    make_bank,
    params_of,
    pictures_of,
)

PLANS = {
    "classifier": Plan(3_000, 256, 13.0),
    "vae": Plan(8_000, 128, 62.0),
    "base": Plan(16_000, 512, 90.0),
    "teacher": Plan(2_000, 512, 12.0, bank_share=1 / 8),
    "lora": Plan(300, 64, bank_share=1 / 64),
}


@dataclasses.dataclass(frozen=True)
class World:
    """The base, from which teachers are fine-tuned."""

    base: dict  # Parameters of unet, vae and text_encoder.
    text_config: dict
    tokenizer: Tokenizer

    @property
    def configs(self) -> dict:
        """The networks' and the scheduler's configs."""
        return {"unet": UNET_CONFIG, "vae": VAE_CONFIG, "text_encoder": self.text_config, "scheduler": SCHEDULER_CONFIG}


def shipped_world() -> World:
    """Reads the shipped base in float32."""
    base = open_checkpoint(FOLDER / BASE)
    params = {part: base.params(part, np.float32) for part in ("unet", "vae", "text_encoder")}
    return World(params, base.config("text_encoder"), Tokenizer.from_folder(FOLDER / BASE / "tokenizer"))


def train_world(out: pathlib.Path, plans: Mapping[str, Plan], bank_size: int, dtype) -> World:
    """Trains VAE, classifier and base, and writes them to `out`."""
    tokenizer_folder = out / "raw" / "tokenizer"
    write_tokenizer(tokenizer_folder)
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    text_config = TEXT_CONFIG | tokenizer_fields(tokenizer_folder)
    bank = make_bank(0, bank_size, tokenizer)
    load = functools.partial(load_or_train, out / "raw")
    vae = load("vae", lambda: train_vae(VAE_CONFIG, bank, plans["vae"], dtype))
    classifier = load("classifier", lambda: train_classifier(bank, plans["classifier"]))
    networks = {
        "unet": params_of(UNet2DConditionModel.from_config(UNET_CONFIG, rngs=nnx.Rngs(2)))[1],
        "text_encoder": params_of(CLIPTextModel.from_config(text_config, rngs=nnx.Rngs(2)))[1],
    }
    graphs = graphs_of({"unet": UNET_CONFIG, "text_encoder": text_config}, tokenizer, dtype)
    loss_fn = denoising_loss(*graphs, train_text=True)
    fit = Fit(loss_fn, plans["base"], 2e-3, average=0.9995)
    base = load("base", lambda: fit(networks, add_latents(bank, VAE_CONFIG, vae, dtype), "base", seed=2))
    world = World(base | {"vae": vae}, text_config, tokenizer)
    save_base(out, world.configs, world.base, tokenizer_folder, classifier)
    return world


def train_vae(
    config: Mapping, bank: Mapping, plan: Plan, dtype, rate: float = 1e-3, stretch: Stretch | None = None
) -> dict:
    """Trains a VAE on pictures, their edges and a small KL term; scales its latents to unit variance."""
    graph, params = params_of(AutoencoderKL.from_config(config, dtype=dtype, rngs=nnx.Rngs(1)))

    def loss_fn(params, data, rows, key):
        images = pictures_of(data, rows)
        vae = nnx.merge(graph, params)
        posterior = vae.encode(images)
        error = vae.decode(posterior.sample(key)).astype(jnp.float32) - images
        edges = sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
        divergence = 0.5 * jnp.mean(posterior.mean**2 + jnp.exp(posterior.logvar) - 1.0 - posterior.logvar)
        return jnp.mean(jnp.abs(error)) + 2.0 * jnp.mean(error**2) + edges + 1e-4 * divergence

    params = Fit(loss_fn, plan, rate)(params, bank, "vae", seed=1, stretch=stretch)
    encode = jax.jit(lambda params, data, rows: nnx.merge(graph, params).encode(pictures_of(data, rows)).mean)
    size = min(2048, len(bank["input_ids"]))
    means = [encode(params, bank, rows) for rows in np.array_split(np.arange(size), -(-size // 256))]
    return scale_latents(params, 1.0 / (SCALING_FACTOR * float(jnp.std(jnp.concatenate(means)))))


def scale_latents(params: Mapping, scale: float) -> dict:
    """Multiplies a VAE's latents by `scale` within its 1x1 convolutions; decoded images do not change."""
    params = jax.tree.map(jnp.asarray, dict(params))
    channels = params["quant_conv"]["bias"].shape[0] // 2
    factors = jnp.concatenate([jnp.full(channels, scale), jnp.ones(channels)])
    shift = jnp.concatenate([jnp.zeros(channels), jnp.full(channels, 2.0 * np.log(scale))])  # Shifts the log-variances.
    quant, post = params["quant_conv"], params["post_quant_conv"]
    quant = {"kernel": quant["kernel"] * factors[None, None, None], "bias": quant["bias"] * factors + shift}
    post = {"kernel": post["kernel"] / scale, "bias": post["bias"]}
    return params | {"quant_conv": quant, "post_quant_conv": post}


def train_classifier(bank: Mapping, plan: Plan) -> dict:
    """Trains the shape classifier, whose features `FD (shapes)` compares."""
    graph, params = params_of(ShapeFeatures(style_dim=style_vectors(bank["styles"]).shape[1], rngs=nnx.Rngs(3)))

    def loss_fn(params, data, rows, key):
        images = pictures_of(data, rows)
        images = images + 0.05 * jax.random.normal(key, images.shape)
        content, styles = jax.tree.map(lambda leaf: leaf[rows], (data["scenes"].content, data["styles"]))
        return nnx.merge(graph, params).loss(images, content, style_vectors(styles))

    return Fit(loss_fn, plan, 2e-3)(params, bank, "classifier", seed=3)


def style_vectors(styles) -> jax.Array:
    """Returns a batch of styles as vectors (B, S)."""
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in styles], axis=1)


class FineTuner:
    """Fine-tunes the base on single styles; each kind of teacher compiles once."""

    def __init__(self, world: World, plans: Mapping[str, Plan], bank_size: int, dtype):
        self.world, self.bank_size, self.dtype = world, bank_size, dtype
        graphs = graphs_of(world.configs, world.tokenizer, dtype)
        unet_loss = denoising_loss(*graphs, train_text=False)

        def lora_loss(params, data, rows, key):
            return unet_loss({"unet": lora_teacher.folded(data["unet"], params["lora"])}, data, rows, key)

        self.unet_fit = Fit(unet_loss, plans["teacher"], 5e-4)
        self.text_fit = Fit(denoising_loss(*graphs, train_text=True), plans["teacher"], 5e-4)
        self.lora_fit = Fit(lora_loss, plans["lora"], 4e-3)

    def __call__(self, name: str) -> dict:
        """Returns a teacher's trained parameters: unet, unet and text_encoder, or a LoRA's factors under "lora"."""
        number, teacher, base = list(TEACHERS).index(name), TEACHERS[name], self.world.base
        data = {"text_encoder": base["text_encoder"]}
        if teacher.lora:
            data["unet"] = jax.tree.map(jnp.asarray, base["unet"])
            fit, params = self.lora_fit, {"lora": lora_teacher.new_factors(base["unet"], jax.random.key(number))}
        elif teacher.own_text_encoder:
            fit, params, data = self.text_fit, {part: base[part] for part in ("unet", "text_encoder")}, {}
        else:
            fit, params = self.unet_fit, {"unet": base["unet"]}
        bank = make_bank(100 + number, int(self.bank_size * fit.plan.bank_share), self.world.tokenizer, style=name)
        return fit(params, add_latents(bank, VAE_CONFIG, base["vae"], self.dtype) | data, name, seed=10 + number)

    @property
    def lora_training(self) -> dict[str, object]:
        """Facts about the LoRA's training, keyed as in kohya-ss's metadata."""
        plan, rate = self.lora_fit.plan, self.lora_fit.learning_rate
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


def load_or_train(folder: pathlib.Path, name: str, train: Callable[[], dict]) -> dict:
    """Returns the parameters in `folder/name.safetensors`; trains and writes them first if the file is missing."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        leaves = jax.tree_util.tree_leaves_with_path(train())
        folder.mkdir(parents=True, exist_ok=True)
        part = part_of(path)
        save_file({"/".join(str(part.key) for part in keys): np.asarray(leaf) for keys, leaf in leaves}, part)
        os.replace(part, path)
    params: dict = {}
    for key, leaf in load_file(path).items():
        *parents, last = (int(part) if part.isdigit() else part for part in key.split("/"))
        functools.reduce(lambda tree, part: tree.setdefault(part, {}), parents, params)[last] = leaf
    return params


def main() -> None:
    """Trains the world and writes its checkpoints; networks that OUT/raw holds are not trained again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--only", choices=list(TEACHERS), help="train this teacher alone, on the shipped base")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies all numbers of steps (default 1)")
    parser.add_argument("--bank-size", type=int, default=262_144)
    args = parser.parse_args()
    started = time.perf_counter()
    plans = {
        name: dataclasses.replace(plan, num_steps=max(int(args.effort * plan.num_steps), 2))
        for name, plan in PLANS.items()
    }
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    args.out.mkdir(parents=True, exist_ok=True)
    world = shipped_world() if args.only else train_world(args.out, plans, args.bank_size, dtype)
    fine_tune = FineTuner(world, plans, args.bank_size, dtype)
    for name in [args.only] if args.only else TEACHERS:
        params = load_or_train(args.out / "raw", name, functools.partial(fine_tune, name))
        save_teacher(args.out, world.configs, name, world.base | params, fine_tune.lora_training)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
