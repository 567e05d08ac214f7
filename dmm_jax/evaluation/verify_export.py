"""`dmm-jax export --verify`: compares stock diffusers with this library on exported files.

Both compute in float32, diffusers on the CPU. Needs the `[torch]` extra.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import SDXL
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import PIPELINES, state_dict
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError, refuse

TOLERANCE = 1e-5  # For the UNet: the largest difference over the output's maximum.
SAMPLE_TOLERANCE = 1e-4  # A sample accumulates the rounding of all its evaluations.
STOCK = ("diffusers", "single-file")  # The formats that stock diffusers opens.
PROMPT, NUM_STEPS, GUIDANCE_SCALE = "a large red circle", 4, 3.0
TIMESTEPS = (20, 500, 980)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The largest difference between two programs' outputs for one file, over the largest value."""

    path: pathlib.Path
    unet: float
    sample: float

    def __str__(self) -> str:
        return f"{self.path}: UNet {self.unet:.1e}, {NUM_STEPS}-step sample {self.sample:.1e} of the maximum"


def verify(paths: Mapping[str, pathlib.Path]) -> list[Agreement]:
    """Opens stock exports in diffusers and in this library, and compares UNet outputs and one sample.

    Args:
      paths: {"diffusers": folder, "single-file": file}; a single file needs the folder's tokenizer.

    Raises:
      ValueError: torch or diffusers is not installed, or an export differs; the message holds the difference.
    """
    try:
        import diffusers
        import torch
        import transformers
    except ImportError as error:
        raise UserError(
            f"--verify needs the [torch] extra ({error.name} is missing): pip install 'dmm-jax[torch]'."
        ) from error
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    with jax.default_matmul_precision("highest"), torch.no_grad():
        agreements = [
            _compare(
                torch,
                _open_stock(diffusers, torch, fmt, path, paths),
                Pipeline.from_pretrained(path, base=paths["diffusers"]),
                path,
            )
            for fmt, path in paths.items()
        ]
    refuse(
        f"diffusers disagrees by more than {TOLERANCE} (UNet) or {SAMPLE_TOLERANCE} (sample)",
        (str(it) for it in agreements if not (it.unet <= TOLERANCE and it.sample <= SAMPLE_TOLERANCE)),
    )
    return agreements


def verify_export(student: Checkpoint, written: Mapping[str, pathlib.Path], dtype: str) -> list[str]:
    """Compares an export with the student and with stock diffusers; returns one line of text per comparison.

    Args:
      written: {format: path}, as `checkpoints.export` wrote them.

    Raises:
      ValueError: a file differs from the student, or diffusers computes other values.
    """
    lines = []
    if "dmm" in written:
        check_reads_back(student, written["dmm"], dtype)
        lines.append(f"{written['dmm']}: reads back bit for bit")
    return lines + [str(it) for it in verify({fmt: path for fmt, path in written.items() if fmt in STOCK})]


def check_reads_back(student, path: pathlib.Path, dtype: str) -> None:
    """Raises ValueError naming every UNet tensor of a DMM folder that differs from the student's in any bit."""
    written, expected = open_checkpoint(path).tensors("unet"), state_dict(student, "unet", dtype)
    wrong = [key for key in expected if key not in written or written[key].tobytes() != expected[key].tobytes()]
    if wrong:
        raise UserError(f"{path} does not read back as it was written: {naming.listed(wrong)} differ.")


def _open_stock(diffusers, torch, fmt, path, paths):
    family = open_checkpoint(path).architecture
    pipeline_class = getattr(diffusers, PIPELINES[family]["_class_name"])
    options = {"local_files_only": True} | ({} if family == SDXL else {"safety_checker": None})
    if fmt == "diffusers":
        pipe = pipeline_class.from_pretrained(str(path), **options)
    else:
        pipe = pipeline_class.from_single_file(str(path), config=str(paths["diffusers"]), **options)
    pipe = pipe.to(torch.float32)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _compare(torch, stock, pipeline, path) -> Agreement:
    rng, side = np.random.default_rng(0), stock.unet.config.sample_size

    def channels_first(array):
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))

    latents = rng.standard_normal((len(TIMESTEPS), side, side, 4), np.float32)
    pixels = side * stock.vae_scale_factor
    text = pipeline.encode_prompts([PROMPT] * len(TIMESTEPS))
    added = text.added_cond(jnp.tile(jnp.array([pixels, pixels, 0, 0, pixels, pixels], jnp.float32), (len(latents), 1)))
    timesteps, states = np.array(TIMESTEPS), np.array(text.encoder_hidden_states)
    expected = stock.unet(
        channels_first(latents),
        torch.from_numpy(timesteps),
        torch.from_numpy(states),
        added_cond_kwargs=added and {name: torch.from_numpy(np.array(leaf)) for name, leaf in added.items()},
    ).sample
    output = _forward(pipeline, latents, timesteps, states, None, added)
    unet = _difference(output, expected.numpy().transpose(0, 2, 3, 1))
    options = {"num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE_SCALE, "height": pixels, "width": pixels}
    expected = stock(PROMPT, latents=channels_first(latents[:1]), output_type="latent", **options).images
    sample = pipeline([PROMPT], latents=latents[:1], output="latents", solver="dpmpp_2m", **options)
    return Agreement(path, unet, _difference(sample, expected.numpy().transpose(0, 2, 3, 1)))


def _forward(pipeline, *inputs) -> Float[np.ndarray, "B h w C"]:
    network = pipeline.unet

    @jax.jit
    def forward(params, *inputs):
        return dataclasses.replace(network, params=params)(*inputs).sample

    return np.asarray(forward(network.params, *inputs))


def _difference(output, expected) -> float:
    return float(np.abs(output - expected).max() / np.abs(expected).max())
