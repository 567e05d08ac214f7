"""The emoji study at one size: where its files are, and its networks as they are read from there."""

import collections
import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from dmm_jax.checkpoints.licenses import together
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import options
from dmm_jax.data.sources import FolderSource
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError
from dmm_jax.studies.emoji_networks import Size
from dmm_jax.studies.emoji_pictures import PICTURES, SIZE_PX, TRAIN, read_rows
from dmm_jax.studies.emoji_sets import SETS, Package
from dmm_jax.text.tokenizer import Tokenizer
from dmm_jax.world import training
from dmm_jax.world.recipe import load_or_train
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer
from dmm_jax.world.training import Fit

MERGES = ("average", "ties")
GUIDANCE = 3.0


@dataclasses.dataclass(frozen=True)
class Study:
    """The study at one size, on the pictures that `emoji_pictures.fetch` drew."""

    folder: pathlib.Path
    size: Size
    sets: Mapping[str, Package] = dataclasses.field(default_factory=lambda: SETS)

    @property
    def out(self) -> pathlib.Path:
        """The folder of this size's files."""
        return self.folder / self.size.name

    @property
    def dtype(self) -> str:
        """The dtype of the networks' arithmetic."""
        return "bfloat16" if jax.default_backend() == "gpu" else "float32"

    @property
    def base(self) -> pathlib.Path:
        """The base's diffusers folder."""
        return self.out / "base"

    @property
    def references(self) -> pathlib.Path:
        """The measures of floor, base and weight merges."""
        return self.out / "measures" / "references.json"

    def measures(self, row: str, seed: int) -> pathlib.Path:
        """The measures of a row's student."""
        return self.out / "measures" / f"{slug(row, seed)}.json"

    def student(self, row: str, seed: int) -> pathlib.Path:
        """The DMM folder of a row's student."""
        return self.out / "students" / slug(row, seed)

    def cache(self, is_made: bool) -> pathlib.Path:
        """The latents that students are trained on: of the pictures, or drawn by the teachers."""
        return self.out / ("latents_made" if is_made else "latents")

    @property
    def licenses(self) -> str:
        """The licences of all sets in one line."""
        return together(package.license for package in self.sets.values())

    def teacher(self, name: str) -> pathlib.Path:
        """The path of a set's teacher."""
        return self.out / "teachers" / f"{name}.safetensors"

    @property
    def stock_models(self) -> dict[str, pathlib.Path]:
        """The paths of the base and of the weight merges, by name."""
        return {"base": self.base} | {name: self.out / f"{name}.safetensors" for name in MERGES}

    def config(self) -> ml_collections.ConfigDict:
        """Returns what the configs of all training runs share; they say how pictures are drawn, too."""
        config = options.get_config()
        config.base, config.dtype, config.data.resolution = str(self.base), self.dtype, SIZE_PX
        config.sampling.num_inference_steps = self.size.num_inference_steps
        config.sampling.guidance_scale = GUIDANCE
        return config

    @property
    def sampling(self) -> dict[str, object]:
        """How pictures are drawn, as arguments of `Pipeline.__call__`."""
        return options.solver_options(self.config())

    @functools.cached_property
    def rows(self) -> list[dict]:
        """The rows of the pictures' list."""
        return read_rows(self.folder)

    @functools.cached_property
    def tokenizer_folder(self) -> pathlib.Path:
        """The folder of a tokenizer in which each word of all captions is one token; a base that exists has its own."""
        if self.base.exists():
            return self.base / "tokenizer"
        folder = self.out / "raw" / "tokenizer"
        words = {word for row in self.rows for word in re.findall("[a-z]+", row["caption"])}
        write_tokenizer(folder, words=sorted(words))
        return folder

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return Tokenizer.from_folder(self.tokenizer_folder)

    @functools.cached_property
    def configs(self) -> dict[str, dict]:
        """Contents of config.json by component."""
        return self.size.configs(tokenizer_fields(self.tokenizer_folder))

    def bank(self, where: str) -> dict[str, jax.Array]:
        """Returns the "images" and "input_ids" of the pictures that fulfil a condition, in the order of the list."""
        source = FolderSource(self.folder / PICTURES, resolution=SIZE_PX, where=where)
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(lambda number: source[number]["image"], range(len(source)))))
        return {
            "images": jnp.asarray(images),
            "input_ids": jnp.asarray(self.tokenizer([text for _, text in source.rows])),
        }

    @functools.cached_property
    def raw(self) -> Callable[[str, Callable[[], dict]], dict]:
        """Returns float32 parameters by name; trains those that are missing."""
        return functools.partial(load_or_train, self.out / "raw")

    @functools.cached_property
    def base_params(self) -> dict:
        """The base's float32 parameters by component, as its folder has them.

        Raises:
          UserError: the stage "base" is not done.
        """
        if not self.base.exists():
            missing_stage()
        base = open_checkpoint(self.base)
        return {part: base.params(part, np.float32) for part in ("unet", "vae", "text_encoder")}

    @functools.cached_property
    def stock_pipeline(self) -> Pipeline:
        """The base without parameters of a UNet: `pipeline` adds them."""
        base = open_checkpoint(self.base)
        return Pipeline.for_unet(base, base.unet_config, (), dtype=self.dtype)

    def pipeline(self, path: pathlib.Path) -> Pipeline:
        """Returns a teacher, the base or a weight merge, ready to draw."""
        return self.stock_pipeline.with_unet(open_checkpoint(path).params("unet"))

    @functools.cached_property
    def largest_set(self) -> int:
        """The most pictures that a teacher is trained on."""
        return max(collections.Counter(row["set"] for row in self.rows if row["split"] == TRAIN).values())

    @functools.cached_property
    def teacher_fit(self) -> Fit:
        """The training of teachers, compiled once."""
        graphs = training.graphs_of(self.configs, self.tokenizer, jnp.dtype(self.dtype))
        loss_fn = training.denoising_loss(*graphs, train_text=False)
        return Fit(loss_fn, self.size.plans["teacher"], self.size.rates["teacher"])


def slug(row: str, seed: int) -> str:
    """Returns the name of a row's files."""
    return f"{re.sub('[^a-z0-9]+', '_', row)}-{seed}"


def missing_stage():
    """Raises UserError: what a stage reads has not been made."""
    raise UserError("an earlier stage is not done. Give the command without --only.")
