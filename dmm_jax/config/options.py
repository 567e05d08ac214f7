"""Every option of a distillation run, once, with meaning and unit; `config.checks` holds the rules.

Defaults follow the recipe of DMM (arXiv:2504.12364, A.3), unless the comment names a difference.
"""

import json
import os
from collections.abc import Mapping, Sequence

import ml_collections

from dmm_jax.config.styles import is_writable
from dmm_jax.runtime import storage
from dmm_jax.runtime.errors import UserError, refuse

DTYPES = ("float32", "bfloat16")
_GROUP = ml_collections.ConfigDict


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults; an experiment in `configs/` starts here and sets what differs."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # Fixes noise, timesteps, prompt drops, data order and style rows.

    # Checkpoints: diffusers folders or single files.
    config.base = ""  # The checkpoint whose text encoder, VAE, tokenizer and schedule serve all styles.
    # ("NAME=2", ...) for "base" and teachers of Stable Diffusion 1 that are used with clip skip; 1 is the last layer.
    config.clip_skip = ()
    # ("NAME=FILE", ...) textual inversions of "base", which the student uses, and of teachers; prompts name them by the
    # file's name, or by WORD with "NAME=WORD=FILE".
    config.embeddings = ()
    config.prediction_type = ""  # "epsilon" or "v_prediction", for single files that do not say it.
    # ((style name, path), ...): one style per teacher, in this order. The name "none" is the null style, for requests
    # without a style; its teacher is the base: ("none", config.base).
    config.teachers = ()

    # The student.
    config.student_init = "average"  # The mean of the teachers' weights (docs/study.md); or "base", the paper's.
    config.style_init = (
        "zero"  # "zero": the style MLP's last layer is 0, so the first step equals the start; "paper": random.
    )
    config.ema_decay = 0.0  # Per step; 0 keeps no average. Exports and samples use the average if there is one.
    # Keeps the average whose width is this share of the steps so far (EDM2, arXiv:2312.02696); 0.05 to 0.1 is usual.
    config.ema_width = 0.0

    # The loss: score + feature_loss_weight * mean over the UNet's blocks.
    config.score_loss = "l2"  # Mean squared error; "pseudo_huber": about its root, so no timestep counts for more.
    config.feature_loss_weight = 0.002  # The released code's; the paper's 0.001 of a sum over 9 blocks is 0.009 here.
    config.feature_loss = "l2"  # Mean squared error; "normalized": over the teacher's variance; "cosine": 1 - cosine.
    config.timestep_draw = "independent"  # Uniform per sample; "spread": evenly over the samples of each step.
    config.timestep_power = 1.0  # The power to which a uniform random number is raised: above 1 prefers low noise.
    config.prompt_dropout = 0.1  # Share of samples whose prompt becomes "", for student and teacher alike.

    # The adversarial term: a discriminator judges one-step predictions of the clean latents. It has two classes per
    # style: drawn by the teacher, and by the student.
    config.adversarial = ml_collections.ConfigDict()
    config.adversarial.weight = 0.0  # Weight of the student's term (the paper: 0.01); 0 trains without a discriminator.
    config.adversarial.learning_rate = 1e-5  # The discriminator's, constant.
    config.adversarial.train_backbone = True  # False trains its head alone; the rest stays the base's.

    # Incremental merging: a finished student learns the teachers as further styles, and keeps its own.
    config.grow = ml_collections.ConfigDict()
    config.grow.student = ""  # The workdir or DMM folder of the finished student; "" starts a new one.
    config.grow.styles = ()  # Its styles to keep, in this order, as "name" or "new name=name"; () keeps all.
    # Rows of the batch, each as large as a teacher's, in which the finished student teaches its own styles at random:
    # replay / (teachers + replay) of the images. With 0 the old styles are forgotten.
    config.grow.replay = 1

    # Optimisation.
    config.num_steps = 100_000
    config.batch_size = 48  # Images per step over all rows and devices: a multiple of teachers + grow.replay.
    config.gradient_accumulation = 1  # Micro-batches per step; the result does not depend on it.
    config.optimizer = "adamw"  # "muon" orthogonalises the updates of kernels (arXiv:2502.16982); AdamW has the rest.
    config.learning_rate = 1e-5
    config.learning_rate_schedule = "constant"  # After the warm-up; or "cosine" down to 0 at num_steps.
    config.decay_share = 0.0  # A constant rate falls linearly to 0 over this last share of num_steps.
    config.style_learning_rate_scale = 1.0  # Times learning_rate, for the style table and its MLP alone.
    config.warmup_steps = 500
    config.adam_b1 = 0.9
    config.adam_b2 = 0.999
    config.adam_eps = 1e-8
    config.weight_decay = 0.01
    config.max_grad_norm = 1.0  # Clips the global norm; 0 = off.
    config.max_skipped_in_a_row = 10  # The run stops after so many steps without a finite gradient.

    # How it is computed.
    config.dtype = "bfloat16"  # Arithmetic of the networks; parameters, losses, norms and softmax are float32.
    config.attention = "auto"  # "auto": "cudnn" on NVIDIA GPUs in bfloat16, "flash" on TPUs, else "xla".
    # Blocks that the backward pass computes again, for less memory: "none", "finest" (first level), "all" (a third
    # more work), or names: "down_blocks.0,mid_block,up_blocks.3".
    config.remat = "none"
    # Groups of at least so many equal transformer blocks in the student are compiled once, and run as a loop; 0: none.
    # Stable Diffusion XL has groups of 10 and 2, Stable Diffusion 1.5 none. No device has timed the loop yet.
    config.loop_blocks = 0
    config.mesh = ml_collections.ConfigDict()  # Devices along each axis; their product is the number of devices.
    config.mesh.teacher = 1  # Must divide the number of teachers (+ grow.replay).
    config.mesh.data = 0  # 0: all remaining devices.
    # As `data`, but gradients are summed in `dtype`, which sends half the bytes; its devices must be of one TPU slice.
    config.mesh.fsdp = 1

    # Data: what `dmm-jax prepare` reads and writes.
    config.data = ml_collections.ConfigDict()
    config.data.source = ""  # Folder of images and captions; "teachers" for images that they draw; "shapes_world".
    config.data.prompts = ""  # Text file for "teachers", one prompt per line.
    config.data.cache = ""  # Folder of the latent cache.
    config.data.resolution = 512  # Pixels per side; images are scaled by their short side and cropped.
    config.data.num_examples = 0  # How many to prepare; 0: the whole folder, each prompt once. shapes_world needs it.

    # How pictures are drawn: by teachers for `data.prompts`, along the way, and by `dmm-jax evaluate`.
    config.sampling = ml_collections.ConfigDict()
    config.sampling.num_inference_steps = 25
    config.sampling.guidance_scale = 7.0
    config.sampling.guidance_rescale = 0.0  # From 0 to 1; 0.7 for models with zero terminal SNR.
    config.sampling.solver = "dpmpp_2m"
    config.sampling.prompt_grammar = "a1111"  # Weights, BREAK and long prompts; or "plain". Captions are always plain.
    config.sampling.batch_size = 16  # Images computed at once.

    # Written along the way. With 0, logs, validations and checkpoints are written at the last step only.
    config.log_every = 50  # Steps between lines of metrics.jsonl.
    config.checkpoint_every = 1000
    config.checkpoints_kept = 2  # The newest so many; 0 keeps all.
    config.checkpoints_kept_every = 0  # Also every checkpoint whose step is a multiple of this.
    config.validation_every = 1000
    config.validation_size = 16  # Images per teacher in the fixed validation set; 0: no validation.
    config.samples = ml_collections.ConfigDict()
    config.samples.every = 0  # Steps between sample grids (rows: prompts, columns: styles); 0: none.
    config.samples.prompts = ()
    return config


def keeps_average(config: ml_collections.ConfigDict) -> bool:
    """Tells whether a run keeps an average of the student's weights over steps."""
    return bool(config.ema_decay or config.ema_width)


def kept_styles(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the styles that a grown student keeps, {name: name in the old student}, in row order."""
    return as_kept(config.grow.styles)


def as_kept(entries: Sequence[str]) -> dict[str, str]:
    """Reads ("name", "new name=name", ...) as {new name: name}.

    Raises:
      UserError: two have the same new name, or a name cannot be written in a mix.
    """
    names = {}
    for entry in entries:
        new, _, old = entry.partition("=")
        if not is_writable(new):
            raise UserError(
                f"a style to keep is 'name' or 'new name=name'; {entry!r} would be called {new!r}, which cannot be "
                "written in a mix."
            )
        if new in names:
            raise UserError(f"two styles are to be called {new!r}: give each its own name, as in 'new name=name'.")
        names[new] = old or new
    return names


def style_names(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the names of a student's styles in row order: kept ones, then one per teacher."""
    return [*kept_styles(config), *(name for name, _ in config.teachers)]


def solver_options(config: ml_collections.ConfigDict) -> dict[str, object]:
    """Returns the options of `config.sampling` that `Pipeline.__call__` takes."""
    names = ("num_inference_steps", "guidance_scale", "guidance_rescale", "solver")
    return {name: config.sampling[name] for name in names}


def clip_skips(config: ml_collections.ConfigDict) -> dict[str, int]:
    """Returns the clip skips in the config, by "base" or the teacher's name; 0 for what is not a number."""
    pairs = (entry.partition("=") for entry in config.clip_skip)
    return {name: int(number) if number.isdecimal() else 0 for name, _, number in pairs}


def embeddings(config: ml_collections.ConfigDict, name: str) -> list[str]:
    """Returns the embeddings of "base" or a teacher, as `Pipeline.with_embeddings` takes them."""
    return [entry.partition("=")[2] for entry in config.embeddings if entry.partition("=")[0] == name]


def opening(config: ml_collections.ConfigDict, name: str) -> dict:
    """Returns how to open a parent, as arguments of `open_checkpoint`; `name` is "base" or a teacher's."""
    return {"prediction_type": config.prediction_type, "clip_skip": clip_skips(config).get(name, 1)}


def num_rows(config: ml_collections.ConfigDict) -> int:
    """Returns the rows of a batch [rows, B/rows]: one per teacher, and grow.replay if a student grows."""
    return len(config.teachers) + (config.grow.replay if config.grow.student else 0)


def as_teachers(values: Sequence) -> tuple[tuple[str, str], ...]:
    """Reads ((name, path), ...) or ("name=path", ...), the form on a command line.

    Raises:
      UserError: an entry is neither.
    """
    pairs = [tuple(value.split("=", 1)) if isinstance(value, str) else _as_pair(value) for value in values]
    for pair, value in zip(pairs, values, strict=True):
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            raise UserError(
                f"teachers holds {value!r}, which is not a style name with a path. Give --config.teachers=NAME=PATH "
                "once for each teacher, or all at once: --config.teachers=\"(('NAME', 'PATH'), ('NAME', 'PATH'))\"."
            )
    return tuple(pairs)


def _as_pair(value) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def to_json(config: ml_collections.ConfigDict) -> str:
    """Writes a config so that `from_json` reads the same one back."""
    return config.to_json(indent=2, sort_keys=True)


def from_json(text: str, source: str = "config.json") -> ml_collections.ConfigDict:
    """Reads what `to_json` wrote; options that the text lacks keep their defaults, unknown ones are ignored.

    Args:
      source: the name of the text in errors.

    Raises:
      UserError: the text is not a JSON object, or a value does not have its option's type.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not JSON ({error}). Restore it from a copy.") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{source} must hold a JSON object of options; got {_kind(values)}.")
    config = get_config()
    refuse(f"{source} cannot be read", _update(config, values))
    config.teachers = as_teachers(config.teachers)
    return config


def removed_options(values: Mapping) -> list[str]:
    """Returns a line for each option of an older run's config.json that no longer exists."""
    options = flat(get_config().to_dict())
    return [f"{name}: {value!r} -> no longer an option" for name, value in flat(values).items() if name not in options]


def _update(config, values: Mapping, prefix: str = "") -> list[str]:
    """Sets the options that exist; returns a line for each value that does not have its option's type."""
    problems = []
    for name, value in values.items():
        if name not in config:
            continue
        value, default = _as_tuple(value), config[name]
        if not _fits(value, default):
            problems.append(f"{prefix}{name}: expected {_kind(default)}, got {_kind(value)}: {json.dumps(value)[:80]}")
        elif isinstance(value, Mapping):
            problems += _update(default, value, f"{prefix}{name}.")
        else:
            config[name] = value
    return problems


def _fits(value, default) -> bool:
    kinds = (int, float) if isinstance(default, float) else Mapping if isinstance(default, _GROUP) else type(default)
    if isinstance(value, tuple) and not all(isinstance(entry, (str, tuple)) for entry in value):
        return False
    return isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)


def _kind(value) -> str:
    """Returns a word for a value's type that fits JSON."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list of texts"}
    words |= {list: "a list", type(None): "null"}
    return words.get(type(value), "a group of options")


def _as_tuple(value):
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def differences(old: ml_collections.ConfigDict, new: ml_collections.ConfigDict) -> list[str]:
    """Returns the changes between two configs as lines `name: old -> new`, sorted by name."""
    before, after = (flat(json.loads(to_json(config))) for config in (old, new))
    names = sorted(before.keys() | after.keys())
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in names if before.get(name) != after.get(name)
    ]


def flat(tree: Mapping, prefix: str = "") -> dict:
    """Returns a tree's values by their full names, {"mesh.teacher": 8, ...}."""
    return {
        full: leaf
        for name, value in tree.items()
        for full, leaf in (
            flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
        ).items()
    }


def load(path: str | os.PathLike) -> ml_collections.ConfigDict:
    """Reads a workdir's `config.json`.

    Raises:
      UserError: the folder holds no config.json, so no training run wrote it; or one that cannot be read.
    """
    path = storage.locate(path)
    storage.check_bucket(path)
    path = path / "config.json"
    if not path.is_file():
        raise UserError(
            f"{path.parent} is not a training workdir: {path.name} is missing. Give the --workdir of a `train` run."
        )
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Restore it.") from None
