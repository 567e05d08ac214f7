"""Writes checkpoints of random weights in published layouts, to measure the cost of a run without real weights.

    python -m dmm_jax.world.random_checkpoints OUT --teachers 8 --images 1024

OUT/base is a diffusers folder. OUT/teacher_0.safetensors ... are single files: the base plus noise, whose size is
`--strength` times each tensor's root mean square. OUT/images has pictures of the embedded world with captions.
"""

import argparse
import json
import pathlib
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.published import CONFIGS
from dmm_jax.checkpoints.write import write_folder, write_single_file
from dmm_jax.models.text_encoders import CLASSES
from dmm_jax.world.source import ShapesSource
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer

DTYPE = "float16"
_TINY = {  # For tests: the same kinds of layers, and few of them.
    "unet": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "sample_size": 8,
    },
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 64},
    "text_encoder": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1},
    "scheduler": {},
}
_NARROW = _TINY | {  # All layers of Stable Diffusion 1.5 with few channels: shows the cost of the number of arrays.
    "unet": {"block_out_channels": [32] * 4, "cross_attention_dim": 64, "sample_size": 8},
    "text_encoder": _TINY["text_encoder"] | {"num_hidden_layers": 12},
}
_TINY_XL = _TINY | {  # As Stable Diffusion XL: two text encoders, a group of blocks that is a loop.
    "unet": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 4],
        "attention_head_dim": [1, 2],
        "layers_per_block": 1,
        "cross_attention_dim": 128,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 64 + 6 * 16,
        "sample_size": 8,
    },
    "text_encoder_2": _TINY["text_encoder"] | {"projection_dim": 64},
}
SIZES = CONFIGS | {
    size: {name: config | changes[name] for name, config in CONFIGS[family].items()}
    for size, family, changes in (("tiny", "sd15", _TINY), ("narrow", "sd15", _NARROW), ("tiny_xl", "sdxl", _TINY_XL))
}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Returns float32 tensors at PyTorch's initial scale, each from (seed, key) alone; norms are 1, biases 0."""

    def tensor(key):
        shape, leaf = shapes[key], key.rpartition(".")[2]
        if len(shape) == 1:
            return np.full(shape, float(leaf == "weight"), np.float32)
        scale = 0.02 if "embedding.weight" in key else (3 * np.prod(shape[1:])) ** -0.5
        return scale * _normal(key, seed, shape)

    return _map_keys(tensor, shapes)


def perturbed(tensors: Mapping[str, np.ndarray], strength: float, seed: int) -> dict[str, np.ndarray]:
    """Returns tensors plus normal noise of `strength` times their root mean square, as fine-tuning moves weights."""

    def moved(key):
        tensor = tensors[key]
        size = strength * float(np.sqrt(np.mean(np.square(tensor)))) or strength * 0.1  # Biases are 0.
        return tensor + size * _normal(key, seed, tensor.shape)

    return _map_keys(moved, tensors)


def _normal(key, seed, shape):
    return np.random.default_rng((seed, zlib.crc32(key.encode()))).standard_normal(shape, np.float32)


def _map_keys(function, keys):
    """Returns {key: function(key)}, computed by several threads."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(keys, pool.map(function, keys), strict=True))


def write_checkpoints(out: pathlib.Path, configs: Mapping, num_teachers: int, strength: float, seed: int = 0) -> None:
    """Writes the base, the embedded world's tokenizers, and the teachers one by one to save memory."""
    encoders, tokenizers = [name for name in configs if name in CLASSES], {}
    for encoder in encoders:
        folder = encoder.replace("text_encoder", "tokenizer")
        tokenizers[f"{folder}_folder"] = out / folder
        # A pad id of 0 marks OpenCLIP's encoders, whose tokenizers pad with "!".
        write_tokenizer(out / folder, *(["!"] if configs[encoder]["pad_token_id"] == 0 else []))
        configs = {**configs, encoder: configs[encoder] | tokenizer_fields(out / folder)}

    def checkpoint(name, tokenizer_folders, networks):
        components = {part: Component(configs[part], lambda part=part: networks[part]) for part in networks}
        folders = {"tokenizer_folder": None} | tokenizer_folders
        return Checkpoint(out / name, "diffusers", components, dict(configs["scheduler"]), styles=None, **folders)

    networks = {
        name: random_tensors(naming.torch_shapes(abstract_params(name, configs[name])), seed)
        for name in ("unet", "vae", *encoders)
    }
    write_folder(out / "base", checkpoint("base", tokenizers, networks), DTYPE, Recipe("random", [], None))
    for number in range(num_teachers):
        name = f"teacher_{number}"
        teacher = checkpoint(name, {}, {"unet": perturbed(networks["unet"], strength, seed + 1 + number)})
        write_single_file(out / f"{name}.safetensors", teacher, DTYPE, Recipe(name, [], None))


def write_images(out: pathlib.Path, count: int, seed: int = 0) -> None:
    """Writes pictures of the embedded world as PNGs, and their captions to captions.jsonl."""
    out.mkdir(parents=True)
    source = ShapesSource(count, seed=seed)
    with (out / "captions.jsonl").open("w", encoding="utf-8") as listing:
        for index in range(count):
            example = source[index]
            Image.fromarray(example["image"]).save(out / f"{index:06d}.png", compress_level=1)
            listing.write(json.dumps({"file": f"{index:06d}.png", "caption": example["caption"]}) + "\n")


def main() -> None:
    """Writes the folder that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--architecture", default="sd15", choices=sorted(SIZES))
    parser.add_argument("--teachers", type=int, default=8)
    parser.add_argument("--strength", type=float, default=0.1)
    parser.add_argument("--images", type=int, default=1024)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_checkpoints(args.out, SIZES[args.architecture], args.teachers, args.strength)
    write_images(args.out / "images", args.images)


if __name__ == "__main__":
    main()
