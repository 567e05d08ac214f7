"""The options of `dmm-jax evaluate`; none of them changes the student."""

import dataclasses
import shlex

from dmm_jax.checkpoints.merge_methods import METHODS
from dmm_jax.config import arguments, options
from dmm_jax.runtime.errors import UserError

FLAGS = {"num_images": "n", "num_pairs": "pairs", "num_inference_steps": "steps", "weight_merges": "merges",
         "clip_folder": "clip", "lpips_file": "lpips", "prompts_file": "prompts"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """What an evaluation draws and measures.

    Raises:
      UserError: a number or a weight merge cannot be used.

    Attributes:
      num_images: pictures per style and model; the distances' bias falls with it.
      features: the network that measures, as `feature_networks.open_feature_network` takes it; "none" compares pairs
        of pictures alone; "" is "shapes" for the embedded world, and "none" for others.
      clip_folder: a CLIP, which adds CLIPScore.
      lpips_file: the weights of LPIPS, which adds it to the fidelity.
      prompts_file: a text file with one prompt per line, best with prompts outside the training data; "" takes new
        captions of the embedded world, or the run's own prompts.
      negative_prompt: for every picture; "" is none, which means zeros for Stable Diffusion XL.
      num_pairs: pictures per style that teacher and student draw from the same noise.
      batch_size: pictures computed at once.
      weight_merges: the weight merges that the student is compared with: "average", and others of `METHODS`.
      num_inference_steps, guidance_scale, guidance_rescale, solver, prompt_grammar: None takes `config.sampling`.
    """

    num_images: int = 2000
    features: str = ""
    clip_folder: str = ""
    lpips_file: str = ""
    prompts_file: str = ""
    negative_prompt: str = ""
    num_pairs: int = 32
    batch_size: int = 50
    weight_merges: tuple[str, ...] = ("average",)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    solver: str | None = None
    prompt_grammar: str | None = None

    def __post_init__(self):
        arguments.whole_number("num_images", self.num_images, 2)  # A distance needs a variance.
        arguments.whole_number("num_pairs", self.num_pairs, 1)
        arguments.whole_number("batch_size", self.batch_size, 1)
        merges = self.weight_merges
        if "average" not in merges or not set(merges) <= set(METHODS) or len(set(merges)) < len(merges):
            raise UserError(
                f"weight_merges must hold average, and each of {', '.join(METHODS)} at most once; got "
                f"{', '.join(merges) or 'none'}."
            )

    def solver_options(self, config) -> dict[str, object]:
        """Returns the solver's options of `Pipeline.__call__`: those of the run's config where these are None."""
        return {name: value if getattr(self, name) is None else getattr(self, name)
                for name, value in options.solver_options(config).items()}  # fmt: skip

    def command(self, workdir: str) -> str:
        """Returns the command that computes the same numbers; options that have their defaults are left out."""
        words = ["dmm-jax", "evaluate", workdir]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = ",".join(value) if isinstance(value, tuple) else str(value)
                words += [f"--{FLAGS.get(field.name, field.name.replace('_', '-'))}", shlex.quote(text)]
        return " ".join(words)
