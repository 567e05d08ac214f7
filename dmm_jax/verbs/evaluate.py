"""`dmm-jax evaluate`: measures fidelity, the style matrix, and FD or FID of a trained student."""

import argparse
import pathlib

from dmm_jax.text.prompt_grammar import GRAMMARS
from dmm_jax.verbs import options

EXAMPLES = (
    "dmm-jax evaluate demo-run --n 500",
    "dmm-jax evaluate runs/sd15 --features inception:inception.safetensors --prompts prompts.txt",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the verb."""
    parser.add_argument("workdir", type=pathlib.Path, metavar="WORKDIR", help="a training run")

    def add(flag, name, help, **arguments):
        parser.add_argument(flag, dest=name, help=help, default=argparse.SUPPRESS, **arguments)

    add("--n", "num_images", "images per style and model, at least 2; default: 2000", type=int)
    add(
        "--prompts",
        "prompts_file",
        "one prompt per line; default: new captions of the embedded world, or the captions of the run",
        metavar="FILE",
    )
    add("--negative-prompt", "negative_prompt", "for every picture; default: none")
    add("--pairs", "num_pairs", "images per style that teacher and student draw from one noise; default: 32", type=int)
    add("--batch-size", "batch_size", "images computed at once; default: 50", type=int)
    add(
        "--steps",
        "num_inference_steps",
        "of the solver; default: config.sampling's of the run, as for the next four",
        type=int,
    )
    add("--guidance-scale", "guidance_scale", "1 turns guidance off; default: the run's", type=float)
    add(
        "--guidance-rescale",
        "guidance_rescale",
        "0 to 1; 0.7 for models with zero terminal SNR; default: the run's",
        type=float,
    )
    add(
        "--prompt-grammar",
        "prompt_grammar",
        "a1111 or plain; captions of the run are always plain; default: the run's",
        choices=GRAMMARS,
    )
    add("--solver", "solver", "for example euler, or 'DPM++ 2M Karras' (`dmm-jax list solvers`); default: the run's")
    add(
        "--merges",
        "weight_merges",
        "comma list of average, task_arithmetic, ties, dare, for comparison; default: average",
        type=lambda text: tuple(text.split(",")),
    )
    add(
        "--features",
        "features",
        "none (pairs of pictures alone), shapes (of the embedded world), inception:PATH or clean-inception:PATH (FID's "
        "weights), clip:PATH (folder of a CLIP: CMMD with ViT-L/14 at 336 pixels, else MMD); default: shapes for its "
        "world, else none",
    )
    add("--clip", "clip_folder", "folder of a CLIP: adds CLIPScore; default: none", metavar="PATH")
    add("--lpips", "lpips_file", "weights of LPIPS: adds it to the fidelity; default: none", metavar="PATH")


def main(args: argparse.Namespace) -> None:
    """Writes metrics.json and the report, and prints the path of its page."""
    from dmm_jax.evaluation.evaluate import evaluate
    from dmm_jax.evaluation.options import Options
    from dmm_jax.runtime import compilation

    arguments = options.keywords(args)
    compilation.use_cache()
    print(evaluate(arguments.pop("workdir"), Options(**arguments)).page)
