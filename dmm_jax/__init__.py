"""Distils many Stable Diffusion checkpoints into one UNet with selectable, mixable styles, in JAX.

Start at `Distillation` (a config becomes networks, state and a step) and `Pipeline` (prompts and styles become images).
The folders, from the command line down; a folder imports those below it in this list, never those above:

    verbs/         the command line, one file per verb
    studies/       experiments behind docs/study.md
    bench/         speed of training and sampling, measured
    train          the loop around a Distillation
    planning/      memory, work and time of a run, before a machine is rented
    distillation   Distillation
    distill/       the compiled step, losses, teachers, student, growing, fitting a style
    evaluation/    distances, fidelity, style matrix, report
    data/          images, captions, the latent cache, batches
    gallery/       images, grids and pages on disk
    world/         the embedded world: drawings, captions, tiny trained checkpoints
    pipeline       Pipeline
    checkpoints/   reading, comparing, merging and writing checkpoints; training states
    models/        UNet, VAE, CLIP, Inception, LPIPS; attributes are diffusers' state-dict keys
    text/          tokenizers and vocabularies
    config/        every option of a run, its checks, styles as users write them
    diffusion/     noise schedules, predictions, guidance, solvers: mathematics on arrays
    kernels/       operations with a plain and a fast form
    runtime/       mesh, processes, storage, errors, logs, compiled programs
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "Distillation": "distillation",
    "Pipeline": "pipeline",
    "UserError": "runtime.errors",
    "average": "checkpoints.average",
    "evaluate": "evaluation.evaluate",
    "export": "checkpoints.export",
    "fit_style": "distill.fit_style",
    "get_config": "config.options",
    "inspect": "checkpoints.inspect",
    "open_checkpoint": "checkpoints.open",
    "parse_style": "config.styles",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    """Imports a public name when it is first used, so that `import dmm_jax` stays light."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dmm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dmm_jax.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
