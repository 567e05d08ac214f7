"""Every option of a distillation run, once, with meaning and unit; `config.checks` holds the rules.

`config.meanings` reads the comments of `get_config` for `dmm-jax config`: a comment on an option's line, or directly
above it, is the option's meaning; a comment below an empty line is the heading of a section.

Defaults follow the recipe of DMM (arXiv:2504.12364, A.3), unless the comment names a difference.
"""

from collections.abc import Sequence

import ml_collections

from dmm_jax.config.styles import is_writable
from dmm_jax.runtime.errors import UserError

DTYPES = ("float32", "bfloat16")
IMAGES, PROMPTS, SHAPES_WORLD = "images", "prompts", "shapes_world"  # Values of `data.kind`.


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
    # ((style name, path), ...), one style per teacher, in this order. The name "none" is the null style, for requests
    # without a style; its teacher is the base: ("none", config.base).
    config.teachers = ()

    # The student.
    config.student_prediction = ""  # "epsilon", "v_prediction", or "" for the base's; other teachers are converted.
    config.student_init = "average"  # The mean of the teachers' weights (docs/study.md); or "base", the paper's.
    config.style_init = (
        "zero"  # "zero": the style MLP's last layer is 0, so the first step equals the start; "paper": random.
    )
    config.ema_decay = 0.0  # Per step; 0 keeps no average. Exports and samples use the average if there is one.
    # Keeps the average whose width is this share of the steps so far (EDM2, arXiv:2312.02696); 0.05 to 0.1 is usual.
    config.ema_width = 0.0

    # The student as a LoRA: its UNet is frozen as it starts, and factors of low rank are trained next to its layers,
    # with the style table and its MLP. For cards with little memory; a run saves what it trains alone.
    config.lora = ml_collections.ConfigDict()
    config.lora.rank = 0  # Rank of attention and feed-forward layers; 0 trains the whole student.
    config.lora.conv_rank = 0  # Rank of resnets and of changes of resolution; 0: none.

    # The loss: score + feature_loss_weight * mean over the UNet's blocks.
    config.score_loss = "l2"  # Mean squared error; "pseudo_huber": about its root, so no timestep counts for more.
    config.feature_loss_weight = 0.002  # The released code's; the paper's 0.001 of a sum over 9 blocks is 0.009 here.
    config.feature_loss = "l2"  # Mean squared error; "normalized": over the teacher's variance; "cosine": 1 - cosine.
    config.timestep_draw = "independent"  # Uniform per sample; "spread": evenly over the samples of each step.
    config.timestep_power = 1.0  # The power to which a uniform random number is raised: above 1 prefers low noise.
    config.prompt_dropout = 0.1  # Share of samples whose prompt becomes "", for student and teacher alike.
    # Mixes of styles train too: of so many images of a teacher one is asked of a second teacher as well. The student
    # learns the mean of both predictions, with a random weight, in the mix of both styles. 4 takes a quarter more of
    # the teachers' time; with 0 only single styles are trained.
    config.mix_every = 0

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
    config.num_steps = 100_000  # Length of the run.
    config.batch_size = 48  # Images per step over all rows and devices: a multiple of teachers + grow.replay.
    config.gradient_accumulation = 1  # Micro-batches per step; the result does not depend on it.
    config.optimizer = "adamw"  # "muon" orthogonalises the updates of kernels (arXiv:2502.16982); AdamW has the rest.
    config.learning_rate = 1e-5  # After the warm-up.
    config.learning_rate_schedule = "constant"  # After the warm-up; "cosine" falls to 0 at num_steps.
    config.decay_share = 0.0  # A constant rate falls linearly to 0 over this last share of num_steps.
    config.style_learning_rate_scale = 1.0  # Times learning_rate, for the style table and its MLP alone.
    config.warmup_steps = 500  # Steps in which the rate rises from 0.
    config.adam_b1 = 0.9  # Decay per step of AdamW's mean of the gradients.
    # The optimisers' mean of the gradients; "bfloat16" takes half its memory. The mean of the squares is float32.
    config.first_moment_dtype = "float32"
    config.adam_b2 = 0.999  # Decay per step of AdamW's mean of their squares.
    config.adam_eps = 1e-8  # AdamW adds it to the root of that mean.
    config.weight_decay = 0.01  # Times the learning rate: the share of each weight that a step removes.
    config.max_grad_norm = 1.0  # Clips the global norm; 0 = off.
    config.max_skipped_in_a_row = 10  # The run stops after so many steps without a finite gradient.

    # How it is computed.
    config.dtype = "bfloat16"  # Arithmetic of the networks; parameters, losses, norms and softmax are float32.
    config.attention = "auto"  # "auto": "cudnn" on NVIDIA GPUs in bfloat16, "flash" on TPUs, else "xla".
    # Blocks that the backward pass computes again, for less memory: "none", "finest" (first level), "all" (a third
    # more work), or names: "down_blocks.0,mid_block,up_blocks.3".
    config.remat = "none"
    # Keeps the teachers in the host's memory: the device holds one at a time, and the next one travels to it while the
    # student learns from the last. For cards with little memory; slower where the bus is.
    config.teachers_in_host_memory = False
    # Groups of at least so many equal transformer blocks in the student are compiled once, and run as a loop; 0: none.
    # Stable Diffusion XL has groups of 10 and 2, Stable Diffusion 1.5 none.
    config.loop_blocks = 4
    config.mesh = ml_collections.ConfigDict()  # Devices along each axis; their product is the number of devices.
    config.mesh.teacher = 1  # Must divide the number of teachers (+ grow.replay).
    config.mesh.data = 0  # 0: all remaining devices.
    # As `data`, but gradients are summed in `dtype`, which sends half the bytes; its devices must be of one TPU slice.
    config.mesh.fsdp = 1

    # Data: what `dmm-jax prepare` reads and writes.
    config.data = ml_collections.ConfigDict()
    # "images" with captions; "prompts" alone, whose images the teachers draw; "shapes_world": the demo's own pictures.
    config.data.kind = "images"
    config.data.source = ""  # The folder of the images, or the text file of the prompts, one per line.
    config.data.where = ""  # Which images: "aesthetic > 6 and width >= 512", on columns of the source.
    config.data.cache = ""  # Folder of the latent cache.
    config.data.num_chunks = 1  # Chunks of 75 tokens that a caption may fill; what is longer is cut, and counted.
    config.data.resolution = 512  # Pixels per side of a square image; other sizes have about as many pixels.
    # 1: images are cropped to the square. Above 1: each is cropped to the size of the nearest ratio of sides, up to
    # this one. Every size compiles a program: at 512 pixels there are 5 up to ratio 2, and 11 up to ratio 4.
    config.data.max_aspect_ratio = 1.0
    config.data.num_examples = 0  # How many to prepare; 0: the whole folder, each prompt once. shapes_world needs it.

    # How pictures are drawn: by teachers for `data.kind="prompts"`, along the way, and by `dmm-jax evaluate`.
    config.sampling = ml_collections.ConfigDict()
    config.sampling.num_inference_steps = 25  # Steps of the solver.
    config.sampling.guidance_scale = 7.0  # Classifier-free guidance; 1.0 turns it off.
    config.sampling.guidance_rescale = 0.0  # From 0 to 1; 0.7 for models with zero terminal SNR.
    config.sampling.solver = "dpmpp_2m"  # A name of `dmm-jax list solvers`, or A1111's.
    config.sampling.prompt_grammar = "a1111"  # Weights, BREAK and long prompts; or "plain". Captions are always plain.
    config.sampling.batch_size = 16  # Images computed at once.

    # Written along the way. With 0, logs, validations and checkpoints are written at the last step only.
    config.log_every = 50  # Steps between lines of metrics.jsonl.
    config.checkpoint_every = 1000  # Steps between checkpoints.
    config.checkpoints_kept = 2  # The newest so many; 0 keeps all.
    config.checkpoints_kept_every = 0  # Also every checkpoint whose step is a multiple of this.
    config.validation_every = 1000  # Steps between validations.
    config.validation_size = 16  # Images per teacher in the fixed validation set; 0: no validation.
    config.samples = ml_collections.ConfigDict()
    config.samples.every = 0  # Steps between sample grids (rows: prompts, columns: styles); 0: none.
    config.samples.prompts = ()  # ("a prompt", ...), one per row.
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


def embedding_files(config: ml_collections.ConfigDict, name: str) -> list[str]:
    """Returns the embeddings of "base" or a teacher, as `Pipeline.with_embeddings` takes them."""
    return [entry.partition("=")[2] for entry in config.embeddings if entry.partition("=")[0] == name]


def opening_options(config: ml_collections.ConfigDict, name: str) -> dict:
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
