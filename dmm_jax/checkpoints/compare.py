"""Finds what prevents a merge of checkpoints: the one comparison, which `inspect` prints and training raises.

Teachers run on the base's graph, and their errors are compared at the same timesteps. So networks must have equal
tensors and equal settings that no tensor shows (heads, activation, epsilon), and all must predict the same quantity at
the same noise levels.
"""

import inspect
from collections.abc import Mapping, Sequence

import numpy as np

from dmm_jax.checkpoints.abstract import COMPONENTS
from dmm_jax.checkpoints.architecture import UNKNOWN, components
from dmm_jax.checkpoints.checkpoint import Checkpoint
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.naming import printable
from dmm_jax.diffusion.schedule import NoiseSchedule
from dmm_jax.models.text_encoders import CLASSES, NUM_TIME_IDS
from dmm_jax.runtime.errors import refuse

COMPARED = ("unet", *CLASSES)  # The networks that a teacher is used for; its VAE never is.
# Config fields that change what a network computes and do not change its tensors' shapes.
SHAPELESS_FIELDS = {
    "unet": ("attention_head_dim", "norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift"),
    **dict.fromkeys(CLASSES, ("num_attention_heads", "hidden_act", "layer_norm_eps")),
}
# Fields of scheduler_config.json that define the noise levels. The rest describe sampling, which is not compared.
NOISE_FIELDS = (
    "_class_name", "_use_default_values", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
    "trained_betas", "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
ADVICE = "Give a checkpoint that holds it as the base, which is --base of `sample`, `serve` and `fit-style`."
MAX_LISTED = 5  # Differing tensors that a sentence names.


class Problem(str):
    """A sentence about something that prevents a merge, with the network and the tensors that it is about."""

    component: str
    tensors: tuple[str, ...]

    def __new__(cls, text: str, component: str = "", tensors: Sequence[str] = ()):
        """Makes the sentence."""
        problem = super().__new__(cls, text)
        problem.component, problem.tensors = component, tuple(tensors)
        return problem


def check_mergeable(base: Checkpoint, teachers: Mapping[str, Checkpoint], by_distillation: bool = False) -> None:
    """Checks that named teachers can be merged on a base.

    Args:
      by_distillation: whether their predictions are compared, and not their weights: then each may predict noise or
        velocity.

    Raises:
      CheckpointError: lists every problem of every checkpoint.
    """
    named = [(f"teacher {name!r} ({teacher.path})", teacher) for name, teacher in teachers.items()]
    refuse("These checkpoints cannot be merged", merge_problems(base, named, by_distillation), CheckpointError)


def merge_problems(
    base: Checkpoint, teachers: Sequence[tuple[str, Checkpoint]], by_distillation: bool = False
) -> list[str]:
    """Returns a sentence for each thing that prevents a merge of `teachers` on `base`; an empty list if nothing does.

    Args:
      base: the checkpoint that the student starts from.
      teachers: pairs of a teacher's name, as the sentences call it, and its checkpoint.
      by_distillation: as in `check_mergeable`.
    """
    problems = base_problems(base, f"base {base.path}")
    for name, teacher in teachers:
        problems += teacher_problems(base, name, teacher, by_distillation)
    return problems


def base_problems(base: Checkpoint, name: str) -> list[str]:
    """Returns what prevents a checkpoint from being the base of a merge; `name` is its name in the sentences."""
    if base.styles is not None:
        return [f"{name} is a merged model already; give the stock checkpoint that the teachers come from."]
    return standalone_problems(base, name, "Give a complete checkpoint, such as a diffusers folder.")


def standalone_problems(checkpoint: Checkpoint, name: str, advice: str = ADVICE) -> list[str]:
    """Returns what prevents a checkpoint from sampling by itself.

    Args:
      name: its name in the sentences.
      advice: what to do if it lacks a network or a tokenizer.
    """
    if not checkpoint.has("unet"):
        return [f"{name} holds no unet. Give the whole checkpoint."]
    missing = [component for component in components(checkpoint.architecture) if not checkpoint.has(component)]
    missing += ["tokenizer", "tokenizer_2"][len(checkpoint.tokenizer_folders) : len(checkpoint.text_encoders)]
    if missing:
        return [f"{name} holds no {', '.join(missing)}. {advice}"]
    return contradictions(checkpoint, name) + _prediction_problems(checkpoint.prediction_type, name)


def contradictions(checkpoint: Checkpoint, name: str) -> list[str]:
    """Returns what prevents any use of a checkpoint although each of its files is sound by itself."""
    for component in checkpoint.components:
        checkpoint.abstract(component)
    problems = []
    if all(map(checkpoint.has, ("unet", *checkpoint.text_encoders))):
        problems = _conditioning_problems(checkpoint, name)
    try:
        if checkpoint.prediction_type != UNKNOWN:
            _noise_levels(checkpoint, checkpoint)
    except (ValueError, TypeError) as error:
        problems.append(f"{name} has a scheduler_config.json that cannot be used: {printable(str(error), 500)}")
    return problems


def _conditioning_problems(checkpoint, name) -> list[str]:
    """Returns a sentence for each input width of the UNet that the text encoders do not have as their output width."""
    unet, encoders = checkpoint.unet_config, list(checkpoint.text_configs.values())
    widths = {"cross_attention_dim": sum(encoder.get("hidden_size", 512) for encoder in encoders)}
    if len(encoders) > 1:
        times = NUM_TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
        widths["projection_class_embeddings_input_dim"] = encoders[-1].get("projection_dim", 512) + times
    return [
        f"{name} has a UNet of {field} {unet.get(field)}, but its text encoders give {width}: they do not belong "
        "together. Give the text encoders of this model's family."
        for field, width in widths.items()
        if unet.get(field, width) != width
    ]


def _prediction_problems(prediction_type, name) -> list[str]:
    if prediction_type != UNKNOWN:
        return []
    return [
        f"{name} does not say whether it predicts the noise or the velocity, and its tensors do not show it. Give it "
        "as a diffusers folder, whose scheduler says it, or set it: prediction_type in a config, --prediction-type of "
        "`inspect`, `sample`, `serve` and `average`."
    ]


def teacher_problems(base: Checkpoint, name: str, teacher: Checkpoint, by_distillation: bool = False) -> list[str]:
    """Returns what prevents a merge of one teacher on `base`; `name` is the teacher's name in the sentences."""
    if not teacher.has("unet"):
        return [f"{name} holds no unet, and a teacher is one. Give the whole checkpoint."]
    if teacher.styles is not None:
        return [f"{name} is a merged model: export one of its styles and use that."]
    if base.has("unet") and teacher.architecture != base.architecture:
        return [
            f"{name} is a model of the family {teacher.architecture}, the base of {base.architecture}: only models of "
            "one family can be merged."
        ]
    problems = []
    for component in COMPARED:
        if teacher.has(component) and base.has(component):
            problems += _differing_shapes(component, base, name, teacher) or _differing_fields(
                component, base, name, teacher
            )
    prediction_type = teacher.prediction_beside(base)
    problems += _prediction_problems(prediction_type, name)
    if UNKNOWN not in (prediction_type, base.prediction_type):
        problems += _differing_targets(base, name, teacher, prediction_type, by_distillation)
    return problems


def _differing_shapes(component, base, name, teacher) -> list[str]:
    base_shapes, teacher_shapes = base.shapes(component), teacher.shapes(component)
    lines = [
        f"{key}: base {base_shapes.get(key, 'absent')}, teacher {teacher_shapes.get(key, 'absent')}"
        for key in sorted(base_shapes | teacher_shapes)
        if base_shapes.get(key) != teacher_shapes.get(key)
    ]
    if not lines:
        return []
    shown = "; ".join(lines[:MAX_LISTED])
    rest = f", and {len(lines) - MAX_LISTED} more" if len(lines) > MAX_LISTED else ""
    return [
        Problem(f"{name} differs from the base in {len(lines)} {component} tensors: {shown}{rest}.", component, lines)
    ]


def _differing_fields(component, base, name, teacher) -> list[str]:
    if "single-file" in (base.kind, teacher.kind):
        return []  # Such a file does not state these fields: its config holds our defaults.
    base_fields, teacher_fields = (_shapeless_fields(component, each.config(component)) for each in (base, teacher))
    differing = [
        f"{field} (base {base_fields[field]}, teacher {teacher_fields[field]})"
        for field in base_fields
        if base_fields[field] != teacher_fields[field]
    ]
    if not differing:
        return []
    text = f"{name} has the base's {component} tensors, but its config.json differs in {', '.join(differing)}."
    return [Problem(text, component)]


def _shapeless_fields(component, config) -> dict:
    defaults = inspect.signature(COMPONENTS[component].__init__).parameters
    fields = {field: config.get(field, defaults[field].default) for field in SHAPELESS_FIELDS[component]}
    if component == "unet" and isinstance(fields["attention_head_dim"], int):
        fields["attention_head_dim"] = [fields["attention_head_dim"]] * len(config["block_out_channels"])
    return fields


def _differing_targets(base, name, teacher, prediction_type, by_distillation) -> list[str]:
    if prediction_type != base.prediction_type and not by_distillation:
        return [
            f"{name} predicts {printable(str(prediction_type))}, the base {base.prediction_type}: their weights have "
            "different meanings. Only `dmm-jax train` merges both, by converting predictions."
        ]
    try:
        base_levels, teacher_levels = (_noise_levels(base, checkpoint) for checkpoint in (base, teacher))
    except (ValueError, TypeError) as error:
        return [f"{name} or the base has a scheduler_config.json that cannot be used: {printable(str(error), 500)}"]
    if base_levels.shape == teacher_levels.shape and np.allclose(base_levels, teacher_levels, rtol=1e-3, atol=1e-6):
        return []
    return [
        f"{name} was trained at other noise levels than the base (alphas_cumprod falls to {teacher_levels[-1]:.4g} "
        f"after {len(teacher_levels)} timesteps, the base's to {base_levels[-1]:.4g} after {len(base_levels)}). Use "
        "teachers of one noise schedule, or correct scheduler_config.json."
    ]


def _noise_levels(base, checkpoint):
    config = checkpoint.schedule_beside(base)
    return NoiseSchedule.from_config({f: v for f, v in config.items() if f in NOISE_FIELDS}).alphas_cumprod
