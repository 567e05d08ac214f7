"""`dmm-jax verify` and `export --verify`: compares stock diffusers with this library on exported files.

Both compute in float32, diffusers on the CPU. Needs the `[torch]` extra.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from dmm_jax.checkpoints import naming
from dmm_jax.checkpoints.architecture import SDXL
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.formats.safetensors_io import TensorFile
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import PIPELINES, state_dict
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime.errors import UserError, refuse

TOLERANCE = 1e-5  # For the UNet: the largest difference over the output's maximum.
SAMPLE_TOLERANCE = 1e-4  # A sample accumulates the rounding of all its evaluations.
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
            f"verifying needs the [torch] extra ({error.name} is missing): pip install 'dmm-jax[torch]'."
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


def verify_folder(folder: str | os.PathLike, against="", student: Checkpoint | None = None) -> list[str]:
    """Compares what an export's folder holds with stock diffusers; returns one line of text per comparison.

    Args:
      against: the path of the student, whose tensors a DMM folder must hold bit for bit; "" for no such comparison.
      student: the same, opened and reduced to the styles of the export.

    Raises:
      UserError: the folder holds no export, a file differs from the student, or diffusers computes other values.
    """
    lines, found = [], exports_in(pathlib.Path(folder))
    if not found:
        raise UserError(f"{folder} holds no export: neither dmm/ nor diffusers/ with a single file. Give its folder.")
    for place, paths in found.items():
        files = [path for path in paths if path.is_file()]
        if files and place / "diffusers" not in paths:
            raise UserError(
                f"{files[0]} is compared with the help of a diffusers folder: add diffusers to --format of its export."
            )
        for path in paths:
            if path.name == "dmm" and against:
                check_reads_back(student or open_checkpoint(against), path)
                lines.append(f"{path}: reads back bit for bit")
        stock = {"diffusers": path for path in filter(_is_stock, paths)}  # noqa: B035 - At most one.
        for single in [{"single-file": file} for file in files] or [{}]:
            lines += [str(agreement) for agreement in verify(single | stock)] if stock else []
    if not lines:
        raise UserError(f"{folder} holds a DMM folder alone, which stock diffusers does not open: give --against.")
    return lines


def exports_in(folder: pathlib.Path) -> dict[pathlib.Path, list[pathlib.Path]]:
    """Returns {folder: its exports} of an export's folder, and of its subfolders, one per style."""
    if (folder / "model_index.json").is_file():
        return {folder.parent: [folder]}
    found = {}
    for place in (folder, *sorted(path for path in folder.glob("*") if path.is_dir())):
        if (place / "model_index.json").is_file():
            continue
        paths = [place / name for name in ("dmm", "diffusers") if (place / name / "model_index.json").is_file()]
        paths += [path for path in sorted(place.glob("*.safetensors")) if not _is_lora(path)]
        found |= {place: paths} if paths else {}
    return found


def _is_lora(path: pathlib.Path) -> bool:
    """Tells whether a file that `export` wrote is a LoRA or style-lora."""
    return TensorFile(path).metadata.get("modelspec.architecture", "").endswith("/lora")


def _is_stock(path: pathlib.Path) -> bool:
    return path.is_dir() and path.name != "dmm" and open_checkpoint(path).styles is None


def check_reads_back(student: Checkpoint, path: pathlib.Path) -> None:
    """Raises UserError naming every UNet tensor of a DMM folder that differs from the student's in any bit."""
    written = open_checkpoint(path).tensors("unet")
    dtype = str(next(iter(written.values())).dtype)
    expected = state_dict(student, "unet", dtype)
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
    ours = options | {"solver": "dpmpp_2m", "guidance_rescale": 0.0}  # Whatever the run drew with.
    sample = pipeline([PROMPT], latents=latents[:1], output="latents", **ours)
    return Agreement(path, unet, _difference(sample, expected.numpy().transpose(0, 2, 3, 1)))


def _forward(pipeline, *inputs) -> Float[np.ndarray, "B h w C"]:
    network = pipeline.unet

    @jax.jit
    def forward(params, *inputs):
        return dataclasses.replace(network, params=params)(*inputs).sample

    return np.asarray(forward(network.params, *inputs))


def _difference(output, expected) -> float:
    return float(np.abs(output - expected).max() / np.abs(expected).max())
