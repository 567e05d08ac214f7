"""CLIP's embeddings of pictures and prompts, for CMMD and CLIPScore.

The user gives CLIP as a folder in the hub's layout: config.json, model.safetensors, and, for prompts, vocab.json and
merges.txt. Nothing is downloaded.
"""

import functools
import hashlib
import inspect
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.checkpoint import Place
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.diffusers_folder import read_json, weight_files
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, Tensors
from dmm_jax.evaluation.published_weights import unknown_weights
from dmm_jax.models.clip_text import CLIPTextModelWithProjection
from dmm_jax.models.clip_vision import CLIPVisionModelWithProjection
from dmm_jax.runtime import sharding
from dmm_jax.runtime.chunks import in_chunks
from dmm_jax.text.tokenizer import Tokenizer

# Hub names by the SHA-256 of model.safetensors, as the hub lists it.
PUBLISHED = {"a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": "openai/clip-vit-large-patch14"}
# The config of ViT-L/14 at 336 pixels, CMMD's network. Its weights have no published hash as safetensors.
LARGE_336 = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336, "projection_dim": 768}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # By channel, over CLIP's training pictures.
STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESSING = {"image_mean": list(MEAN), "image_std": list(STD), "resample": int(Image.Resampling.BICUBIC)}
PROJECTION_DIM = 512  # transformers' default.
TEMPERATURE = "logit_scale"  # Only training needs this tensor.
SCORE_SCALE = 100.0
CHUNK_SIZE = 32  # Pictures or prompts per call of a compiled network.


class Encoder(NamedTuple):
    """One of CLIP's two networks: its class and the prefixes of its keys in the file."""

    build: type
    prefixes: tuple[str, ...]


ENCODERS = {
    "text": Encoder(CLIPTextModelWithProjection, ("text_model.", "text_projection.")),
    "vision": Encoder(CLIPVisionModelWithProjection, ("vision_model.", "visual_projection.")),
}


class Clip(NamedTuple):
    """The image encoder with its weights, and the folder that also holds the text encoder.

    Attributes:
      arguments: fields of its CLIPVisionConfig.
      sha256: of the weight file, or of its shards in their order.
    """

    folder: pathlib.Path
    graph: nnx.GraphDef
    params: Mapping
    arguments: Mapping
    sha256: str

    @property
    def image_size(self) -> int:
        """Pixels per side."""
        return self.arguments["image_size"]

    @property
    def is_large_336(self) -> bool:
        """Whether the config is that of CMMD's network; only a hash could identify the weights."""
        return all(self.arguments[name] == value for name, value in LARGE_336.items())

    @property
    def weights_name(self) -> str:
        """The weights' part in the names of distances."""
        unknown = unknown_weights(self.sha256)
        if self.is_large_336:
            unknown = f"ViT-L/14 at 336 pixels by its config, weights SHA-256 {self.sha256[:10]}"
        return PUBLISHED.get(self.sha256, unknown)

    @property
    def settings(self) -> dict[str, str]:
        """What a reader of the report needs to repeat a number."""
        return {
            "features": f"CLIP ViT of {self.arguments['num_hidden_layers']} layers, patches of "
            f"{self.arguments['patch_size']} pixels, embeddings of {self.arguments['projection_dim']} and length 1",
            "weights SHA-256": self.sha256,
            "resize": f"Pillow bicubic of the shorter side to {self.image_size}, centre crop",
        }


@functools.lru_cache(maxsize=1)  # CMMD and CLIPScore may use the same network.
def load(folder: str) -> Clip:
    """Reads the image encoder of a CLIP folder.

    Raises:
      CheckpointError: a file is missing, is a pickle, is damaged, or belongs to another network.
      ValueError: the config needs a feature that our port lacks.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder; expected a CLIP's, with config.json and model.safetensors.")
    _check_preprocessing(path / "preprocessor_config.json")
    files, digest = weight_files(path, "model"), hashlib.sha256()
    graph, params = _read("vision", path, files)
    for file in files:
        with file.path.open("rb") as opened:
            for block in iter(functools.partial(opened.read, 2**24), b""):
                digest.update(block)
    return Clip(path, graph, params, _arguments("vision", path), digest.hexdigest())


def _check_preprocessing(path: pathlib.Path) -> None:
    """Raises CheckpointError if the folder's preprocessing is not CLIP's."""
    config = read_json(path) if path.is_file() else {}
    wrong = [
        f"{key} is {config[key]!r}, not {expected}"
        for key, expected in PREPROCESSING.items()
        if config.get(key, expected) != expected
    ]
    if wrong:
        raise CheckpointError(f"{path} is not CLIP's: {'; '.join(wrong)}. Give a CLIP as it was published.")


def _read(which: str, folder: pathlib.Path, files: Sequence[TensorFile]) -> tuple[nnx.GraphDef, dict]:
    """Returns the graph and the parameters of one of the two encoders."""
    (build, prefixes), arguments = ENCODERS[which], _arguments(which, folder)
    expected = (*(prefix for encoder in ENCODERS.values() for prefix in encoder.prefixes), TEMPERATURE)
    unknown = [key for file in files for key in file if not key.startswith(expected)]
    if unknown:
        raise CheckpointError(f"{folder} is not a CLIP's: unexpected {naming.listed(unknown)}.")
    places = {key: Place(file, key) for file in files for key in file if key.startswith(prefixes)}
    graph, state = nnx.split(abstract_model(lambda rngs: build(**arguments, rngs=rngs)), nnx.Param)
    where = f"CLIP's {which} encoder of {folder}"
    params = naming.from_torch(nnx.to_pure_dict(state), Tensors(places), np.float32, where=where)
    return graph, sharding.on_each_device(params)


def _arguments(which: str, folder: pathlib.Path) -> dict:
    """Returns an encoder's arguments; old configs hold dozens of other fields, which no network uses."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "clip":
        raise CheckpointError(f"{path} has model_type {config.get('model_type')!r}; expected 'clip'.")
    # transformers prefers the `_config_dict`, and always takes the outer `projection_dim`.
    fields = config.get(f"{which}_config_dict") or config.get(f"{which}_config") or {}
    fields = fields | {"projection_dim": config.get("projection_dim", PROJECTION_DIM)}
    parameters = inspect.signature(ENCODERS[which].build.__init__).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD}
    arguments = {name: fields.get(name, default) for name, default in defaults.items() if name != "self"}
    return arguments | ({"with_projection": True} if which == "text" else {})


def preprocess(images: UInt8[np.ndarray, "n H W 3"], size: int) -> Float[np.ndarray, "n size size 3"]:
    """Prepares pictures as CLIP's were: shorter side to `size` by Pillow's bicubic, centre crop, mean 0, variance 1."""
    height, width = images.shape[1:3]
    shorter = min(height, width)
    resized = int(size * width / shorter), int(size * height / shorter)  # Rounded down, as torchvision does.
    x, y = ((length - size) // 2 for length in resized)
    box = (x, y, x + size, y + size)
    cropped = [Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC).crop(box) for image in images]
    pixels = np.stack([np.asarray(image) for image in cropped]).astype(np.float32) / np.float32(255.0)
    return (pixels - np.float32(MEAN)) / np.float32(STD)


def image_embeddings(clip: Clip, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n P"]:
    """Returns the embeddings of pictures on the host, of length 1."""

    def embed(chunk):
        return _embed_images(clip.graph, clip.params, sharding.spread(preprocess(chunk, clip.image_size)))

    return in_chunks(embed, CHUNK_SIZE, (clip.arguments["projection_dim"],), images)


def text_embeddings(clip: Clip, prompts: Sequence[str]) -> Float[np.ndarray, "n P"]:
    """Returns the embeddings of prompts on the host, of length 1; the text encoder is read for this call alone.

    Raises:
      CheckpointError: the folder's text encoder is damaged or is not a CLIP's.
      ValueError: the tokenizer's files are missing.
    """
    ids = Tokenizer.from_folder(clip.folder)(prompts)
    graph, params = _read("text", clip.folder, weight_files(clip.folder, "model"))
    embed = functools.partial(_embed_ids, graph, params)
    return in_chunks(embed, CHUNK_SIZE, (clip.arguments["projection_dim"],), ids)


def clip_scores(images: Float[np.ndarray, "n P"], prompts: Float[np.ndarray, "n P"]) -> Float[np.ndarray, " n"]:
    """Returns 100 max(cos, 0) of each picture and its prompt, from embeddings of length 1 (arXiv:2104.08718).

    The paper's factor is 2.5; 100 is torchmetrics'.
    """
    return SCORE_SCALE * np.maximum(np.sum(images.astype(np.float64) * prompts, axis=1), 0.0)


class Scorer(NamedTuple):
    """Computes CLIPScores of pictures against their prompts, whose order is the same for all models."""

    clip: Clip
    prompts: Float[np.ndarray, "n P"]

    @classmethod
    def open(cls, folder: str, prompts: Sequence[str]) -> "Scorer":
        """Reads a CLIP and embeds the prompts; raises as `load` and `text_embeddings` do."""
        clip = load(folder)
        return cls(clip, text_embeddings(clip, prompts))

    def __call__(self, images: UInt8[np.ndarray, "k H W 3"], first: int) -> Float[np.ndarray, " k"]:
        """Returns the scores of pictures number `first`, first + 1, ..."""
        return clip_scores(image_embeddings(self.clip, images), self.prompts[first : first + len(images)])

    @property
    def name(self) -> str:
        """The score's name, with its weights."""
        return f"CLIPScore ({self.clip.weights_name})"

    @property
    def settings(self) -> dict[str, str]:
        """What a reader of the report needs to repeat a score."""
        rule = {"rule": f"{SCORE_SCALE:g} max(cos, 0), mean over the pictures"}
        return {f"CLIPScore's {key}": value for key, value in (self.clip.settings | rule).items()}


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(
    graph: nnx.GraphDef, params: Mapping, images: Float[Array | np.ndarray, "chunk S S 3"]
) -> Float[Array, "chunk P"]:
    with jax.default_matmul_precision("highest"):
        return _normalize(nnx.merge(graph, params)(images).image_embeds)


@functools.partial(jax.jit, static_argnums=0)
def _embed_ids(
    graph: nnx.GraphDef, params: Mapping, ids: Int[Array | np.ndarray, "chunk L"]
) -> Float[Array, "chunk P"]:
    with jax.default_matmul_precision("highest"):
        return _normalize(nnx.merge(graph, params)(ids).pooled)


def _normalize(embeddings: Float[Array, "chunk P"]) -> Float[Array, "chunk P"]:
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
