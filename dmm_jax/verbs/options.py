"""Options that several verbs share, and the experiment file that `--config` names."""

import argparse
import contextlib
import pathlib

from dmm_jax.config.files import read_config
from dmm_jax.config.options import DTYPES
from dmm_jax.text.prompt_grammar import A1111, GRAMMARS

_OF_COMMAND_LINE = ("verb", "overrides", "verbosity")  # Arguments that no function of the library takes.


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the options by which `open_pipeline` opens it."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a workdir, a diffusers or DMM folder, a single file, or demo or emoji: students that come with dmm_jax",
    )
    parser.add_argument(
        "--base",
        default=None,
        metavar="CKPT",
        help="provides what a single file lacks (VAE, text encoder, tokenizer); default: none",
    )
    parser.add_argument(
        "--extra-style",
        action="append",
        default=[],
        type=pathlib.Path,
        metavar="FILE",
        help="a style of fit-style; repeat; default: none",
    )
    parser.add_argument(
        "--embedding",
        action="append",
        default=[],
        metavar="FILE",
        help="a textual inversion, or NAME=FILE; prompts use it by name; repeat; default: none",
    )
    parser.add_argument(
        "--clip-skip",
        type=int,
        default=1,
        metavar="N",
        help="for Stable Diffusion 1: the text encoder's N-th layer from its end conditions; default: 1, the last",
    )
    add_vae(parser)
    add_prediction_type(parser)
    add_prompt_grammar(parser)
    add_dtype(parser)


def open_pipeline(args: argparse.Namespace):
    """Opens MODEL as a `Pipeline`; prints what it takes from elsewhere."""
    from dmm_jax.pipeline import Pipeline, default_dtype
    from dmm_jax.runtime import compilation
    from dmm_jax.runtime.processes import say

    compilation.use_cache()
    say(f"Reading {args.model}")
    pipeline = Pipeline.from_pretrained(
        args.model,
        dtype=args.dtype or default_dtype(),
        base=args.base,
        extra_styles=args.extra_style,
        prediction_type=args.prediction_type,
        clip_skip=args.clip_skip,
        embeddings=args.embedding,
        prompt_grammar=args.prompt_grammar,
        vae=args.vae,
    )
    for line in pipeline.source.fallbacks:
        say(line)
    return pipeline


def add_prediction_type(parser: argparse.ArgumentParser) -> None:
    """Adds --prediction-type."""
    parser.add_argument(
        "--prediction-type",
        default="",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts, for single files whose metadata does not record it; default: as recorded",
    )


def add_prompt_grammar(parser: argparse.ArgumentParser) -> None:
    """Adds --prompt-grammar, by which prompts are read."""
    parser.add_argument(
        "--prompt-grammar",
        default=A1111,
        choices=GRAMMARS,
        help="a1111: (word:1.2), [word], BREAK and prompts of any length; plain: text, cut after 75 tokens",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds how this process joins others."""
    group = parser.add_argument_group("as one of several processes")
    group.add_argument("--distributed", action="store_true", help="ask the cluster (Cloud TPU, GKE, Slurm, Open MPI)")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, without a cluster to ask; default: none"
    )
    group.add_argument("--num-processes", type=int, metavar="N", help="processes of the run; default: none")
    group.add_argument("--process-id", type=int, metavar="K", help="number of this process, 0 to N - 1; default: none")


def joined(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """Returns the context in which this process is one of several, if the arguments say so; see `processes.joined`."""
    from dmm_jax.runtime import processes

    return processes.joined(args.distributed, args.coordinator, args.num_processes, args.process_id)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, in which the networks compute."""
    parser.add_argument(
        "--dtype",
        default="",
        choices=DTYPES,
        help="of the arithmetic; default: bfloat16 on accelerators, float32 on CPUs",
    )


def add_file_dtype(parser: argparse.ArgumentParser) -> None:
    """Adds --dtype, in which tensors are stored."""
    parser.add_argument(
        "--dtype",
        default="float16",
        choices=("float32", "float16", "bfloat16", "float8_e4m3fn"),
        help="of the tensors in the written files; float8_e4m3fn, with scales, for single files",
    )


def add_vae(parser: argparse.ArgumentParser) -> None:
    """Adds --vae."""
    parser.add_argument(
        "--vae",
        default="",
        metavar="FILE",
        help="a VAE, or a checkpoint with one, that replaces the base's; default: none",
    )


def keywords(args: argparse.Namespace) -> dict:
    """Returns the arguments of a verb as keyword arguments, for a function that has parameters of the same names."""
    return {name: value for name, value in vars(args).items() if name not in _OF_COMMAND_LINE}


def read_experiment(path: str, overrides: list[str]):
    """Reads a config as `read_config` does, and keeps compiled programs for the next run."""
    from dmm_jax.runtime import compilation

    compilation.use_cache()
    return read_config(path, overrides)
