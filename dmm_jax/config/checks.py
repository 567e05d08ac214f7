"""Checks of a config; each raises one error that names every option out of range, and what to set."""

from collections.abc import Mapping

import ml_collections

from dmm_jax.config.arguments import MAX_SEED
from dmm_jax.config.options import DTYPES, IMAGES, PROMPTS, SHAPES_WORLD, clip_skips, num_rows, style_names
from dmm_jax.config.serialization import flat_values
from dmm_jax.config.styles import is_writable
from dmm_jax.runtime.errors import UserError, meant, refuse
from dmm_jax.text.prompt_grammar import A1111, GRAMMARS, parse

TITLE = "The config cannot be run (set options in its file, or as --config.NAME=VALUE)"
CHOICES = {
    "student_init": ("base", "average"),
    "style_init": ("zero", "paper"),
    "score_loss": ("l2", "pseudo_huber"),
    "feature_loss": ("l2", "normalized", "cosine"),
    "timestep_draw": ("independent", "spread"),
    "dtype": DTYPES,
    "attention": ("auto", "xla", "cudnn", "flash"),
    "prediction_type": ("", "epsilon", "v_prediction"),
    "student_prediction": ("", "epsilon", "v_prediction"),
    "optimizer": ("adamw", "muon"),
    "data.kind": (IMAGES, PROMPTS, SHAPES_WORLD),
    "sampling.prompt_grammar": GRAMMARS,
    "learning_rate_schedule": ("constant", "cosine"),
}
SHARES = ("prompt_dropout", "ema_decay", "decay_share", "adam_b1", "adam_b2")
COUNTS = ("num_steps", "gradient_accumulation", "max_skipped_in_a_row", "num_inference_steps", "resolution",
          "batch_size", "num_chunks", "teacher", "fsdp")  # fmt: skip
MAX_EMA_WIDTH = 0.28  # The width of a plain mean of all steps is 0.289.
FLOAT32_MAX, FLOAT32_TINY = 3.4e38, 1.2e-38


def check(config: ml_collections.ConfigDict) -> None:
    """Raises UserError that names every option out of range, what was expected, and what to set."""
    refuse(TITLE, _problems(config))


def check_training(config: ml_collections.ConfigDict) -> None:
    """As `check`, and that there is a latent cache to read."""
    missing = "data.cache is empty: set the folder of a latent cache that `dmm-jax prepare` has written."
    refuse(TITLE, [*_problems(config), not config.data.cache and missing])


def check_mesh(config: ml_collections.ConfigDict, mesh_shape: Mapping[str, int]) -> None:
    """Raises ValueError when the images do not divide among the devices; names the numbers that would.

    Args:
      mesh_shape: devices along teacher, data and fsdp.
    """
    columns = mesh_shape["data"] * mesh_shape["fsdp"]
    unit = num_rows(config) * config.gradient_accumulation * columns * max(config.mix_every, 1)
    layout = f"mesh.data x mesh.fsdp = {mesh_shape['data']} x {mesh_shape['fsdp']} = {columns} devices per teacher"
    problems = []
    if config.batch_size % unit:
        problems.append(
            f"batch_size {config.batch_size} cannot be divided: {describe_rows(config)} x "
            f"gradient_accumulation {config.gradient_accumulation}{_mixes(config)} on {layout} want a multiple of "
            f"{unit}. Use {_nearest(config.batch_size, unit)}, or fewer devices per teacher."
        )
    if config.validation_size % columns:
        problems.append(
            f"validation_size {config.validation_size} cannot be divided: {layout} want a multiple of {columns}. "
            f"Use {_nearest(config.validation_size, columns)}."
        )
    refuse("The config does not fit the devices", problems)


def describe_rows(config: ml_collections.ConfigDict) -> str:
    """Returns what the rows of a batch are, in words."""
    replay = f" and {config.grow.replay} of grow.replay" if config.grow.student else ""
    return f"{len(config.teachers)} teachers{replay}"


def _mixes(config: ml_collections.ConfigDict) -> str:
    return f" x mix_every {config.mix_every}" if config.mix_every else ""


def _nearest(value: int, unit: int) -> int:
    return max((value + unit // 2) // unit, 1) * unit


def _problems(config):
    names, num_teachers, rows = style_names(config), len(config.teachers), num_rows(config)
    yield not config.base and "base is empty: set the checkpoint that the teachers were fine-tuned from."
    yield num_teachers == 0 and "teachers is empty: list at least one (style name, path)."
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"the style {name!r} is listed twice: give each teacher, and each style that is kept, its own name."
    for name in names:
        if not is_writable(name):
            yield f"style name {name!r} is empty or holds '=', ',' or a line break: such a mix could not be written."
    parents = ("base", *(teacher for teacher, _ in config.teachers))
    for name, number in clip_skips(config).items():
        yield (name not in parents or number < 1) and (
            f"clip_skip has {name!r} with {number}; expected 'NAME=2' with a name of {', '.join(parents)}."
        )
    for entry in config.embeddings:
        yield (entry.partition("=")[0] not in parents or not entry.partition("=")[2]) and (
            f"embeddings has {entry!r}; expected 'NAME=FILE' with a name of {', '.join(parents)}."
        )
    yield bool(config.grow.styles) and not config.grow.student and "grow.styles needs grow.student: set the student."
    parts = max(rows, 1) * max(config.gradient_accumulation, 1) * max(config.mix_every, 1)
    if config.batch_size % parts and not _broken_rule("batch_size", config.batch_size):
        fit = max(config.batch_size - config.batch_size % parts, parts)
        yield (
            f"batch_size must be a positive multiple of {describe_rows(config)} x gradient_accumulation"
            f"{_mixes(config)} = {parts}; got {config.batch_size}. Use {fit}."
        )
    yield from _values(config)
    if config.ema_decay and config.ema_width:
        yield "ema_decay and ema_width are two averages: set one of them to 0."
    if config.decay_share and config.learning_rate_schedule != "constant":
        yield "decay_share ends a constant rate: set learning_rate_schedule='constant', or decay_share=0."
    if config.samples.every and not config.samples.prompts:
        yield "samples.every is set but samples.prompts is empty: list the prompts to draw, or set samples.every=0."
    if config.samples.every and config.sampling.prompt_grammar == A1111:
        for prompt in config.samples.prompts:
            try:
                parse(prompt)
            except UserError as error:
                yield f"samples.prompts: {error}"
    if config.lora.rank and config.grow.student:
        yield "a student that grows trains whole: set lora.rank=0, or remove grow.student."
    if config.lora.conv_rank and not config.lora.rank:
        yield "lora.conv_rank needs lora.rank: set both, or neither."
    if config.mix_every and rows < 2:
        yield "mix_every mixes two teachers: list a second one, or set mix_every=0."
    if config.mix_every and config.adversarial.weight:
        yield "mix_every and adversarial.weight: the discriminator knows no mixes. Set one of them to 0."
    if config.mix_every and config.mesh.teacher != 1:
        yield "mix_every asks two teachers of one image, which must lie on one device: set mesh.teacher=1."
    if config.mix_every and config.teachers_in_host_memory:
        yield "mix_every asks two teachers of one image: set teachers_in_host_memory=False, or mix_every=0."
    shards = config.mesh.teacher
    if config.teachers_in_host_memory and shards != 1:
        yield (
            f"teachers_in_host_memory brings one teacher at a time to every device, and mesh.teacher={shards} divides "
            "the teachers among devices: set mesh.teacher=1, or teachers_in_host_memory=False."
        )
    if not _broken_rule("mesh.teacher", shards) and rows % shards:
        yield f"mesh.teacher must divide the {describe_rows(config)}; got {shards}. Use a divisor of {rows}, or 1."


def check_values(config: ml_collections.ConfigDict) -> None:
    """As `check`, for each option by itself: rules that training and preparing data share."""
    refuse(TITLE, _values(config))


def _values(config):
    values = flat_values(config.to_dict())
    for name, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and (rule := _broken_rule(name, value)):
            yield f"{name} must {rule}; got {value}."
    for name, allowed in CHOICES.items():
        end = meant(str(values[name]), allowed)
        yield values[name] not in allowed and f"{name} must be one of {', '.join(allowed)}; got {values[name]!r}{end}"


def _broken_rule(name: str, value: int | float) -> str:
    """Returns the rule that a number breaks, or "". Every number is finite in float32, and none is negative."""
    own = name.rpartition(".")[2]
    if not abs(value) <= FLOAT32_MAX:
        return "be a finite number"
    if isinstance(value, int) and value > MAX_SEED:
        return f"be at most {MAX_SEED}"
    if own in SHARES and not 0 <= value < 1:
        return "lie in [0, 1)"
    if own == "ema_width" and value > MAX_EMA_WIDTH:
        return f"be at most {MAX_EMA_WIDTH}"
    if own == "max_aspect_ratio" and not 1 <= value <= 4:
        return "be from 1 to 4"
    if own == "timestep_power" and value < 0.1:
        return "be at least 0.1"
    if own == "guidance_rescale" and not 0 <= value <= 1:
        return "be from 0 to 1"
    if own in COUNTS and value < 1:
        return "be at least 1"
    if name == "adam_eps" and value < FLOAT32_TINY:
        return f"be at least {FLOAT32_TINY}"
    return "not be negative" if value < 0 else ""
