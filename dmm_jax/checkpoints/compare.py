"""What stands in the way of merging checkpoints: the one comparison, for `inspect` to show and for training to raise.

Teachers run on the base's graph, and their errors are weighed against each other at the same timesteps. So networks
must agree in tensors and in what no tensor tells (heads, activation, epsilon), predictions and noise levels in kind.
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

COMPARED = ("unet", *CLASSES)  # Of a teacher; its VAE is never used.
# Fields that change what a network computes and leave no trace in its tensors' shapes.
UNSEEN = {
    "unet": ("attention_head_dim", "norm_num_groups", "norm_eps", "flip_sin_to_cos", "freq_shift"),
    **dict.fromkeys(CLASSES, ("num_attention_heads", "hidden_act", "layer_norm_eps")),
}
# Of a scheduler_config.json; the others say how to draw, and a teacher does not.
NOISE_FIELDS = (
    "_class_name", "_use_default_values", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
    "trained_betas", "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
MOST_LISTED = 5


class Obstacle(str):
    """A sentence that says what stands in the way; in which network, and all its tensors that do."""

    component: str
    tensors: tuple[str, ...]

    def __new__(cls, text: str, component: str = "", tensors: Sequence[str] = ()):
        """Makes the sentence."""
        made = super().__new__(cls, text)
        made.component, made.tensors = component, tuple(tensors)
        return made


def merge_obstacles(base: Checkpoint, teachers: Sequence[tuple[str, Checkpoint]]) -> list[str]:
    """Returns a sentence for each thing that keeps `teachers` from being merged on `base`; empty where nothing does.

    Args:
      base: the checkpoint that the student starts from.
      teachers: (how to call it in a sentence, checkpoint) of each.
    """
    lines = base_obstacles(base, f"base {base.path}")
    return lines + [line for who, teacher in teachers for line in teacher_obstacles(base, who, teacher)]


def base_obstacles(base: Checkpoint, who: str) -> list[str]:
    """Returns what keeps a checkpoint from being the base of a merge; `who` is how to call it in a sentence."""
    if base.styles is not None:
        return [f"{who} is a merged model already; give the stock checkpoint that the teachers come from."]
    return whole_obstacles(who, base)


def whole_obstacles(who: str, checkpoint: Checkpoint) -> list[str]:
    """Returns what keeps a checkpoint from drawing by itself; `who` is how to call it in a sentence."""
    if not checkpoint.has("unet"):
        return [f"{who} holds no unet. Give the whole checkpoint."]
    lacks = [component for component in components(checkpoint.architecture) if not checkpoint.has(component)]
    lacks += ["tokenizer", "tokenizer_2"][len(checkpoint.tokenizer_folders) : len(checkpoint.text_encoders)]
    if lacks:
        return [f"{who} holds no {', '.join(lacks)}; give a diffusers folder that has them as the base."]
    lines = _conditioning_obstacles(who, checkpoint) + _prediction_obstacles(who, checkpoint)
    return lines or _schedule_obstacles(who, checkpoint)


def _conditioning_obstacles(who, checkpoint):
    """Returns in what the text encoders of a checkpoint do not give what its UNet is conditioned on."""
    unet, encoders = checkpoint.unet_config, list(checkpoint.text_configs.values())
    found = {"cross_attention_dim": sum(encoder.get("hidden_size", 512) for encoder in encoders)}
    if len(encoders) > 1:
        times = NUM_TIME_IDS * (unet.get("addition_time_embed_dim") or 0)
        found["projection_class_embeddings_input_dim"] = encoders[-1].get("projection_dim", 512) + times
    return [
        f"{who} has a UNet of {name} {unet.get(name)}, but its text encoders give {width}: they do not belong "
        "together. Give the text encoders of this model's family."
        for name, width in found.items()
        if unet.get(name, width) != width
    ]


def teacher_obstacles(base: Checkpoint, who: str, teacher: Checkpoint) -> list[str]:
    """Returns what keeps one teacher from being merged on `base`."""
    if not teacher.has("unet"):
        return [f"{who} holds no unet, and a teacher is one. Give the whole checkpoint."]
    if teacher.styles is not None:
        return [f"{who} is a merged model: export one of its styles and use that."]
    lines = []
    for component in COMPARED:
        if teacher.has(component) and base.has(component):
            found = _differing_shapes(component, base, who, teacher)
            lines += found or _differing_fields(component, base, who, teacher)
    lines += _prediction_obstacles(who, teacher)
    if UNKNOWN not in (teacher.prediction_type, base.prediction_type):
        lines += _differing_targets(base, who, teacher)
    return lines


def _differing_shapes(component, base, who, teacher):
    ours, theirs = (checkpoint.shapes(component) for checkpoint in (base, teacher))
    lines = [
        f"{key}: base {ours.get(key, 'absent')}, teacher {theirs.get(key, 'absent')}"
        for key in sorted(ours | theirs)
        if ours.get(key) != theirs.get(key)
    ]
    if not lines:
        return []
    more = f", and {len(lines) - MOST_LISTED} more" if len(lines) > MOST_LISTED else ""
    shown = "; ".join(lines[:MOST_LISTED])
    text = f"{who} differs from the base in {len(lines)} {component} tensors: {shown}{more}."
    return [Obstacle(text, component, lines)]


def _differing_fields(component, base, who, teacher):
    if "single-file" in (base.kind, teacher.kind):
        return []  # Such a file says nothing of these fields; what stands there is our guess.
    ours, theirs = (_unseen(component, checkpoint.config(component)) for checkpoint in (base, teacher))
    fields = [f"{name} (base {ours[name]}, teacher {theirs[name]})" for name in ours if ours[name] != theirs[name]]
    if not fields:
        return []
    text = f"{who} has the base's {component} tensors, but its config.json differs in {', '.join(fields)}."
    return [Obstacle(text, component)]


def _unseen(component, config):
    defaults = inspect.signature(COMPONENTS[component].__init__).parameters
    found = {name: config.get(name, defaults[name].default) for name in UNSEEN[component]}
    if component == "unet" and isinstance(found["attention_head_dim"], int):
        found["attention_head_dim"] = [found["attention_head_dim"]] * len(config["block_out_channels"])
    return found


def _prediction_obstacles(who, checkpoint):
    if checkpoint.prediction_type != UNKNOWN:
        return []
    return [
        f"{who} does not say whether it predicts the noise or the velocity, and its tensors do not tell. Give it as a "
        "diffusers folder, whose scheduler says it, or say it: --prediction-type, in a config prediction_type."
    ]


def _schedule_obstacles(who, checkpoint):
    try:
        _noise_levels(checkpoint, checkpoint)
    except (ValueError, TypeError) as error:
        return [f"{who} has a scheduler_config.json that cannot be used: {printable(str(error), 500)}"]
    return []


def _differing_targets(base, who, teacher):
    if teacher.prediction_type != base.prediction_type:
        predicts = printable(str(teacher.prediction_type))
        return [
            f"{who} predicts {predicts}, the base {base.prediction_type}: their errors cannot be compared. Use "
            "teachers of one prediction type."
        ]
    try:
        ours, theirs = (_noise_levels(base, checkpoint) for checkpoint in (base, teacher))
    except (ValueError, TypeError) as error:
        return [f"{who} or the base has a scheduler_config.json that cannot be used: {printable(str(error), 500)}"]
    if ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=1e-3, atol=1e-6):
        return []
    return [
        f"{who} was trained at other noise levels than the base (alphas_cumprod falls to {theirs[-1]:.4g} after "
        f"{len(theirs)} timesteps, the base's to {ours[-1]:.4g} after {len(ours)}). Use teachers of one noise "
        "schedule, or correct scheduler_config.json."
    ]


def _noise_levels(base, checkpoint):
    config = checkpoint.scheduler_config
    if checkpoint.kind == "single-file":  # It tells no more than this flag, and only where somebody set it.
        zero_snr = config.get("rescale_betas_zero_snr", False)
        config = base.scheduler_config | ({"rescale_betas_zero_snr": True} if zero_snr else {})
    told = {name: value for name, value in config.items() if name in NOISE_FIELDS}
    return NoiseSchedule.from_config(told).alphas_cumprod


def check_mergeable(base: Checkpoint, teachers: Mapping[str, Checkpoint]) -> None:
    """Raises CheckpointError that names everything in which a teacher does not fit the base."""
    named = [(f"teacher {name!r} ({teacher.path})", teacher) for name, teacher in teachers.items()]
    refuse("These checkpoints cannot be merged", merge_obstacles(base, named), CheckpointError)
