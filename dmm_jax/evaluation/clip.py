"""CLIP's embeddings of pictures and prompts, for CMMD and CLIPScore, from a folder that the user gives.

The folder is as hubs publish it: config.json, model.safetensors, and, for prompts, vocab.json and merges.txt. Nothing
is fetched.
"""

import functools
import hashlib
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped, UInt8
from PIL import Image

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.abstract import abstract_model
from dmm_jax.checkpoints.checkpoint import Place
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats.diffusers_folder import read_json, weight_files
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile, Tensors
from dmm_jax.models.clip_text import CLIPTextModelWithProjection
from dmm_jax.models.clip_vision import CLIPVisionModelWithProjection
from dmm_jax.runtime import sharding
from dmm_jax.text.tokenizer import Tokenizer

# By the SHA-256 of model.safetensors, as the hub lists it.
PUBLISHED = {"a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb": "openai/clip-vit-large-patch14"}
# Of ViT-L/14 at 336 pixels, CMMD's network; no hash of its weights as safetensors is known to us.
LARGE_336 = {"hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14, "image_size": 336, "projection_dim": 768}
MEAN = (0.48145466, 0.4578275, 0.40821073)  # By channel, of what CLIP was trained on; so are the deviations.
STD = (0.26862954, 0.26130258, 0.27577711)
PREPROCESSING = {"image_mean": list(MEAN), "image_std": list(STD), "resample": int(Image.Resampling.BICUBIC)}
PROJECTION_DIM = 512  # transformers' default.
TEMPERATURE = "logit_scale"  # Of the training; a cosine does without.
SCORE_SCALE = 100.0
CHUNK_SIZE = 32  # Pictures or prompts a call of a compiled network takes; the last chunk is padded to it.


class Encoder(NamedTuple):
    """One of CLIP's two networks: its class and where its tensors lie in the file."""

    build: type
    prefixes: tuple[str, ...]


ENCODERS = {
    "text": Encoder(CLIPTextModelWithProjection, ("text_model.", "text_projection.")),
    "vision": Encoder(CLIPVisionModelWithProjection, ("vision_model.", "visual_projection.")),
}


class Clip(NamedTuple):
    """The image encoder with its weights, and the folder, where the text encoder lies.

    Attributes:
      arguments: fields of its CLIPVisionConfig.
      sha256: of the weight file, or of its parts one behind the other.
    """

    folder: pathlib.Path
    graph: nnx.GraphDef
    params: Mapping
    arguments: Mapping
    sha256: str

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.arguments["image_size"]

    @property
    def large_336(self) -> bool:
        """Tells whether its config is that of CMMD's network; of the weights only their own hash can be told."""
        return all(self.arguments[name] == value for name, value in LARGE_336.items())

    @property
    def weights(self) -> str:
        """Says which weights these are, for the names of numbers."""
        unknown = f"unknown weights SHA-256 {self.sha256[:10]}"
        if self.large_336:
            unknown = f"ViT-L/14 at 336 pixels by its config, weights SHA-256 {self.sha256[:10]}"
        return PUBLISHED.get(self.sha256, unknown)

    @property
    def facts(self) -> dict[str, str]:
        """What has to be known to repeat a number, for the report."""
        return {
            "features": f"CLIP ViT of {self.arguments['num_hidden_layers']} layers, patches of "
            f"{self.arguments['patch_size']} pixels, embeddings of {self.arguments['projection_dim']} and length 1",
            "weights SHA-256": self.sha256,
            "resize": f"Pillow bicubic of the shorter side to {self.image_size}, centre crop",
        }


@functools.lru_cache(maxsize=1)  # CMMD and CLIPScore may be of one network.
def load(folder: str) -> Clip:
    """Reads the image encoder of a CLIP folder.

    Raises:
      CheckpointError: a file is missing, is a pickle, is damaged, or is not a CLIP's.
      ValueError: the config asks for what our port does not compute.
    """
    path = pathlib.Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder; expected a CLIP's, with config.json and model.safetensors.")
    _check_preprocessing(path / "preprocessor_config.json")
    files, digest = weight_files(path, "model"), hashlib.sha256()
    graph, params = _read("vision", path, files)
    for file in files:
        with file.path.open("rb") as opened:
            for block in iter(functools.partial(opened.read, 2**24), b""):
                digest.update(block)
    return Clip(path, graph, params, _arguments("vision", path), digest.hexdigest())


def _check_preprocessing(path: pathlib.Path) -> None:
    """Raises CheckpointError where the folder says that its pictures are prepared in another way than CLIP's."""
    said = read_json(path) if path.is_file() else {}
    wrong = [f"{key} is {said[key]!r}, not {one}" for key, one in PREPROCESSING.items() if said.get(key, one) != one]
    if wrong:
        raise CheckpointError(f"{path} is not CLIP's: {'; '.join(wrong)}. Give a CLIP as it was published.")


def _read(which: str, folder: pathlib.Path, files: Sequence[TensorFile]) -> tuple[nnx.GraphDef, dict]:
    """Returns the graph and the parameters of one of the two encoders."""
    (build, prefixes), arguments = ENCODERS[which], _arguments(which, folder)
    known = (*(prefix for one in ENCODERS.values() for prefix in one.prefixes), TEMPERATURE)
    unknown = [key for file in files for key in file if not key.startswith(known)]
    if unknown:
        raise CheckpointError(f"{folder} is not a CLIP's: unexpected {naming.listed(unknown)}.")
    places = {key: Place(file, key) for file in files for key in file if key.startswith(prefixes)}
    graph, state = nnx.split(abstract_model(lambda rngs: build(**arguments, rngs=rngs)), nnx.Param)
    where = f"CLIP's {which} encoder of {folder}"
    params = naming.from_torch(nnx.to_pure_dict(state), Tensors(places), np.float32, where=where)
    return graph, sharding.on_each_device(params)


def _arguments(which: str, folder: pathlib.Path) -> dict:
    """Returns an encoder's arguments, all of them; old configs hold dozens of fields more, of no network."""
    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "clip":
        raise CheckpointError(f"{path} has model_type {config.get('model_type')!r}; expected 'clip'.")
    # transformers goes by the `_config_dict` where there is one, and by the outer `projection_dim` always.
    fields = config.get(f"{which}_config_dict") or config.get(f"{which}_config") or {}
    fields = fields | {"projection_dim": config.get("projection_dim", PROJECTION_DIM)}
    parameters = inspect.signature(ENCODERS[which].build.__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD}
    arguments = {name: fields.get(name, default) for name, default in defaults.items() if name != "self"}
    return arguments | ({"with_projection": True} if which == "text" else {})


def preprocess(images: UInt8[np.ndarray, "n H W 3"], size: int) -> Float[np.ndarray, "n size size 3"]:
    """Prepares pictures as CLIP's were: shorter side to `size` by Pillow's bicubic, centre crop, mean 0, variance 1."""
    height, width = images.shape[1:3]
    short = min(height, width)
    resized = int(size * width / short), int(size * height / short)  # Rounded down, as torchvision does.
    left, top = ((length - size) // 2 for length in resized)
    box = (left, top, left + size, top + size)
    cropped = [Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC).crop(box) for image in images]
    pixels = np.stack([np.asarray(image) for image in cropped]).astype(np.float32) / np.float32(255.0)
    return (pixels - np.float32(MEAN)) / np.float32(STD)


def image_embeddings(clip: Clip, images: UInt8[np.ndarray, "n H W 3"]) -> Float[np.ndarray, "n P"]:
    """Returns the embeddings of pictures on the host, of length 1."""

    def embed(chunk):
        return _embed_images(clip.graph, clip.params, sharding.spread(preprocess(chunk, clip.image_size)))

    return _in_chunks(embed, images, clip.arguments["projection_dim"])


def text_embeddings(clip: Clip, prompts: Sequence[str]) -> Float[np.ndarray, "n P"]:
    """Returns the embeddings of prompts on the host, of length 1; the text encoder is read, used and let go.

    Raises:
      CheckpointError: the folder's text encoder is damaged or is not a CLIP's.
      ValueError: the tokenizer's files are missing.
    """
    ids = Tokenizer.from_folder(clip.folder)(prompts)
    graph, params = _read("text", clip.folder, weight_files(clip.folder, "model"))
    return _in_chunks(functools.partial(_embed_ids, graph, params), ids, clip.arguments["projection_dim"])


def clip_scores(images: Float[np.ndarray, "n P"], prompts: Float[np.ndarray, "n P"]) -> Float[np.ndarray, " n"]:
    """Returns 100 max(cos, 0) of each picture and its prompt, from embeddings of length 1 (arXiv:2104.08718).

    The paper's factor is 2.5; 100 is torchmetrics'.
    """
    return SCORE_SCALE * np.maximum(np.sum(images.astype(np.float64) * prompts, axis=1), 0.0)


class Scorer(NamedTuple):
    """Gives pictures the CLIPScores of the prompts that they were drawn from, in one order for all models."""

    clip: Clip
    prompts: Float[np.ndarray, "n P"]

    @classmethod
    def open(cls, folder: str, prompts: Sequence[str]) -> "Scorer":
        """Reads a CLIP and embeds the prompts; raises as `load` and `text_embeddings` do."""
        clip = load(folder)
        return cls(clip, text_embeddings(clip, prompts))

    def __call__(self, images: UInt8[np.ndarray, "k H W 3"], first: int) -> Float[np.ndarray, " k"]:
        """Returns the scores of the pictures from number `first` on."""
        return clip_scores(image_embeddings(self.clip, images), self.prompts[first : first + len(images)])

    @property
    def name(self) -> str:
        """What the score is called, with its weights."""
        return f"CLIPScore ({self.clip.weights})"

    @property
    def facts(self) -> dict[str, str]:
        """What has to be known to repeat a score, for the report."""
        rule = {"rule": f"{SCORE_SCALE:g} max(cos, 0), mean over the pictures"}
        return {f"CLIPScore's {key}": value for key, value in (self.clip.facts | rule).items()}


def _in_chunks(embed: Callable, rows: Shaped[np.ndarray, "n ..."], width: int) -> Float[np.ndarray, "n P"]:
    found = np.empty((len(rows), width), np.float32)
    for start in range(0, len(rows), CHUNK_SIZE):
        chunk = rows[start : start + CHUNK_SIZE]
        padded = np.pad(chunk, ((0, CHUNK_SIZE - len(chunk)), *((0, 0),) * (chunk.ndim - 1)))
        found[start : start + len(chunk)] = embed(padded)[: len(chunk)]
    return found


@functools.partial(jax.jit, static_argnums=0)
def _embed_images(
    graph: nnx.GraphDef, params: Mapping, images: Float[Array | np.ndarray, "chunk S S 3"]
) -> Float[Array, "chunk P"]:
    with jax.default_matmul_precision("highest"):
        return _of_length_one(nnx.merge(graph, params)(images).image_embeds)


@functools.partial(jax.jit, static_argnums=0)
def _embed_ids(
    graph: nnx.GraphDef, params: Mapping, ids: Int[Array | np.ndarray, "chunk L"]
) -> Float[Array, "chunk P"]:
    with jax.default_matmul_precision("highest"):
        return _of_length_one(nnx.merge(graph, params)(ids).pooled)


def _of_length_one(embeddings: Float[Array, "chunk P"]) -> Float[Array, "chunk P"]:
    return embeddings / jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
