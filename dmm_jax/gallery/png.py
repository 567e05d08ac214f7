"""PNG files that carry the parameters of their picture, as AUTOMATIC1111's web UI writes them and as exact JSON."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from dmm_jax.config.styles import Style, style_text
from dmm_jax.diffusion import solvers
from dmm_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Everything that is needed to draw one picture again.

    `guidance_scale` 1.0 means no guidance; `width` and `height` are in pixels.
    """

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    solver: str
    guidance_scale: float | int
    width: int
    height: int
    model: str
    model_hash: str
    styles: Style = None
    guidance_rescale: float | int = 0.0
    clip_skip: int = 1
    prompt_grammar: str = "a1111"
    mixing: str = "rows"

    def a1111_text(self) -> str:
        """Returns the text that AUTOMATIC1111's web UI writes as `parameters`; its readers can parse the result.

        Raises:
          ValueError: the solver is unknown.
        """
        fields = {
            "Steps": self.steps,
            "Sampler": sampler_name(self.solver),
            "CFG scale": f"{self.guidance_scale:g}",
            "Seed": self.seed,
            "Size": f"{self.width}x{self.height}",
            "Model hash": self.model_hash,
            "Model": self.model,
            "Style": style_text(self.styles),
            "Style mixing": self.mixing if self.mixing != "rows" else None,
            "Clip skip": self.clip_skip if self.clip_skip != 1 else None,
            "CFG Rescale phi": f"{self.guidance_rescale:g}" if self.guidance_rescale else None,
        }
        lines = [self.prompt]
        if self.negative_prompt:
            lines.append(f"Negative prompt: {self.negative_prompt}")
        lines.append(", ".join(f"{name}: {_quote(value)}" for name, value in fields.items() if value not in (None, "")))
        return "\n".join(lines).strip()


def sampler_name(solver: str) -> str:
    """Returns AUTOMATIC1111's name for `solver`.

    Raises:
      ValueError: the solver is unknown.
    """
    return solvers.a1111_name(solvers.canonical(solver))


def _quote(value):
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def save_png(path: str | pathlib.Path | io.BytesIO, image: UInt8[np.ndarray, "H W 3"], parameters: Parameters) -> None:
    """Writes a PNG with two text chunks: `parameters` (AUTOMATIC1111's text) and `dmm_jax` (the same as exact JSON)."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", parameters.a1111_text())  # tEXt, or iTXt if the text is not Latin-1.
    values = dataclasses.asdict(dataclasses.replace(parameters, styles=None))
    styles = dict(parameters.styles) if isinstance(parameters.styles, Mapping) else parameters.styles
    chunks.add_text("dmm_jax", json.dumps(values | {"styles": styles}))
    Image.fromarray(image).save(path, format="PNG", pnginfo=chunks)


def read_parameters(path: str | pathlib.Path) -> Parameters:
    """Reads the parameters that `save_png` wrote.

    Raises:
      UserError: the file is no PNG of this package.
    """
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.load()
            return Parameters(**json.loads(image.info["dmm_jax"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a PNG with parameters ({error}). Delete it, and draw it again.") from None
