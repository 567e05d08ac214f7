"""Opens checkpoints of every kind: diffusers folders, DMM folders, single files, hub repositories, training runs.

Opening reads headers and configs alone; a network's tensors are memory-mapped views until somebody asks for them.
"""

import dataclasses
import functools
import itertools
import os
import pathlib

from dmm_jax.checkpoints import naming, shipped
from dmm_jax.checkpoints.checkpoint import Checkpoint, Component
from dmm_jax.checkpoints.clip_skip import with_clip_skip
from dmm_jax.checkpoints.errors import CheckpointError
from dmm_jax.checkpoints.formats import hub, lora
from dmm_jax.checkpoints.formats.diffusers_folder import open_folder
from dmm_jax.checkpoints.formats.safetensors_io import PICKLES
from dmm_jax.checkpoints.open_single_file import open_single_file
from dmm_jax.checkpoints.shipped import is_checkpoint_folder
from dmm_jax.models.unet_config import merged_config
from dmm_jax.runtime.errors import UserError, naming_option, nearest
from dmm_jax.runtime.storage import Location, check_bucket, check_local, in_bucket, locate
from dmm_jax.text import vocabulary

SUGGESTION_CUTOFF, MOST_NEIGHBOURS = 0.8, 1000
# What a folder may hold, as a message calls it.
KINDS = CHECKPOINTS, ADAPTERS, OLD_FILES, OTHERS = (
    "the checkpoints", "the LoRAs or other adapters", "files to convert to safetensors first:", "other files:",
)  # fmt: skip
WEIGHTS = (".safetensors", *PICKLES)


def open_checkpoint(
    path: str | os.PathLike,
    base: str | os.PathLike | None = None,
    *,
    prediction_type: str = "",
    clip_skip: int = 1,
    allow_unsupported: bool = False,
) -> Checkpoint:
    """Opens a checkpoint without reading its weights. It uses the network only for a path that begins with `hf:`.

    Args:
      path: a diffusers or DMM folder; a .safetensors single file; the workdir of a training run, which may be in a
        bucket; `hf:OWNER/NAME@REVISION`, which is fetched from the Hugging Face hub (see `hub`); or, with LoRAs folded
        in, `BASE + LORA.safetensors*0.8 + OTHER.safetensors` (the default weight is 1); or `demo` or `emoji`,
        the students that come with this package, unless there is a file or a checkpoint's folder of that name.
      base: another checkpoint, for the networks, tokenizers and sizes that `path` lacks.
      prediction_type: "epsilon" or "v_prediction", for a checkpoint that does not state it, such as most single files.
      clip_skip: the layer of Stable Diffusion 1's text encoder that conditions, from its end: 1 is the last.
      allow_unsupported: also open a checkpoint that can be inspected but neither trained nor sampled from.

    Raises:
      CheckpointError: it is missing, damaged, a pickle, of an unknown or unsupported kind, or it states another
        prediction type.
    """
    hub.refuse_url(path)
    if not os.fspath(path):
        raise CheckpointError("no checkpoint is given: the path is empty.")
    if clip_skip != 1:
        opened = open_checkpoint(path, base, prediction_type=prediction_type, allow_unsupported=allow_unsupported)
        return with_clip_skip(opened, clip_skip)
    if in_bucket(path):
        return _completed(_open_in_bucket(path), base)
    path = pathlib.Path(path)
    options = {"prediction_type": prediction_type, "allow_unsupported": allow_unsupported}
    if shipped.is_shipped(path):
        student = shipped.FOLDER / path
        opened = open_checkpoint(student, base or shipped.base_of(path), **options)
        return dataclasses.replace(opened, from_base=() if base is None else opened.from_base)
    if not path.exists() and lora.PLUS in str(path):
        root, files = lora.parse(path)
        return lora.with_loras(open_checkpoint(root, base, **options), path, files)
    if hub.is_hub_id(path):
        name, folder = hub.fetch_folder(path)
        return dataclasses.replace(open_checkpoint(folder, base, **options), hub_name=name)
    if not path.exists():
        raise CheckpointError(
            f"there is no checkpoint {path}{_suggestion(path)}. Give a diffusers folder, a .safetensors file, the "
            f"workdir of a training run, {' or '.join(shipped.STUDENTS)} (students that come with dmm_jax), or "
            "hf:OWNER/NAME to fetch it from the Hugging Face hub."
        )
    if path.is_file():
        checkpoint = open_single_file(path)
    elif (path / "model_index.json").is_file():
        checkpoint = open_folder(path)
    elif (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        checkpoint = _open_workdir(path)
    else:
        if not (path / "config.json").is_file():  # With one, it is a network of a diffusers folder.
            _refuse_folder_of_files(path)
        raise CheckpointError(
            f"{path} is no checkpoint: it holds neither model_index.json (a diffusers folder) nor a training run's "
            "config.json and checkpoints/. Give the folder that holds unet/, vae/, text_encoder/."
        )
    if prediction_type and not checkpoint.unsupported:
        checkpoint = _with_prediction_type(checkpoint, prediction_type)
    checkpoint = _completed(checkpoint, base)
    if checkpoint.unsupported and not allow_unsupported:
        raise CheckpointError(f"{path} cannot be used: {checkpoint.unsupported}")
    return checkpoint


def open_teacher(
    path: str | os.PathLike,
    base: str | os.PathLike,
    *,
    prediction_type: str = "",
    clip_skip: int = 1,
    allow_unsupported: bool = False,
) -> Checkpoint:
    """Opens a teacher of a merge on `base`. LoRAs and clip skip may change a text encoder that only the base holds.

    Raises:
      CheckpointError: see `open_checkpoint`.
    """
    # Any other teacher keeps what it holds, so that callers can tell which networks are the base's.
    completed_by = base if lora.PLUS in str(path) or clip_skip != 1 else None
    options = {"prediction_type": prediction_type, "clip_skip": clip_skip, "allow_unsupported": allow_unsupported}
    return open_checkpoint(path, completed_by, **options)


def _suggestion(path: pathlib.Path) -> str:
    """Returns " (did you mean X?)" for a missing path if its folder, or this package, has a similar name; else ""."""
    is_readable = path.parent.is_dir() and os.access(path.parent, os.R_OK)
    beside = itertools.islice(path.parent.iterdir(), MOST_NEIGHBOURS) if is_readable else ()
    shipped_names = shipped.STUDENTS if path.parent == pathlib.Path() else ()
    near = nearest(path.name, [*shipped_names, *(neighbour.name for neighbour in beside)], SUGGESTION_CUTOFF)
    return f" (did you mean {path.parent / near}?)" if near else ""


def _refuse_folder_of_files(folder: pathlib.Path) -> None:
    """Raises CheckpointError if a folder holds checkpoints or files with weights; the message names them by kind."""
    entries = sorted(itertools.islice(folder.iterdir(), MOST_NEIGHBOURS))
    kinds = {path: _kind(path) for path in entries if is_checkpoint_folder(path) or path.suffix in WEIGHTS}
    if not kinds:
        return
    lists = [
        f"{kind} {naming.listed([path.name for path in kinds if kinds[path] == kind])}"
        for kind in dict.fromkeys(sorted(kinds.values(), key=KINDS.index))
    ]
    first = min(kinds, key=lambda path: KINDS.index(kinds[path]))
    given = f"'BASE + {first}'" if kinds[first] == ADAPTERS else str(first)
    has_several = list(kinds.values()).count(CHECKPOINTS) > 1
    comparison = " `dmm-jax inspect BASE OTHERS` tells whether several can be merged." if has_several else ""
    raise CheckpointError(
        f"{naming.printable(str(folder), 1000)} is a folder and no checkpoint. It holds {'; '.join(lists)}. "
        f"Give one of them, for example {naming.printable(given, 1000)}.{comparison}"
    )


def _kind(path: pathlib.Path) -> str:
    """Returns what a file or folder is, one of `KINDS`."""
    if path.suffix in PICKLES:
        return OLD_FILES
    try:
        open_checkpoint(path, allow_unsupported=True)
    except lora.AdapterAlone:
        return ADAPTERS
    except (ValueError, OSError):
        return OTHERS
    return CHECKPOINTS


def _with_prediction_type(checkpoint: Checkpoint, prediction_type: str) -> Checkpoint:
    """Returns a checkpoint with the prediction type that the user sets; refuses to override an explicit other one."""
    if "prediction_type" in checkpoint.explicit_fields and checkpoint.prediction_type != prediction_type:
        raise CheckpointError(
            f"{checkpoint.path} states that it predicts {naming.printable(str(checkpoint.prediction_type))}, "
            f"prediction_type says {prediction_type}. Leave prediction_type out, or correct the checkpoint."
        )
    return dataclasses.replace(
        checkpoint,
        scheduler_config=checkpoint.scheduler_config | {"prediction_type": prediction_type},
        explicit_fields={*checkpoint.explicit_fields, "prediction_type"},
    )


def _completed(checkpoint: Checkpoint, base: str | os.PathLike | None) -> Checkpoint:
    """Returns a checkpoint with everything that it lacks: from the base, then from the tokenizers of this package."""
    if base is not None and not checkpoint.unsupported:
        checkpoint = _with_base(checkpoint, open_checkpoint(base))
    return _with_checked_vocabularies(_with_bundled_tokenizers(checkpoint))


def _with_base(checkpoint: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Adds the base's networks and tokenizers; a single file of the same architecture also takes its UNet's config."""
    components = {**base.components, **checkpoint.components}
    is_file = checkpoint.kind == "single-file"
    if is_file and checkpoint.has("unet") and base.has("unet") and checkpoint.shapes("unet") == base.shapes("unet"):
        components["unet"] = Component(dict(base.unet_config), checkpoint.components["unet"].load)
    return dataclasses.replace(
        checkpoint,
        components=components,
        tokenizer_folder=checkpoint.tokenizer_folder or base.tokenizer_folder,
        tokenizer_2_folder=checkpoint.tokenizer_2_folder or base.tokenizer_2_folder,
        scheduler_config=checkpoint.schedule_beside(base),
        zeros_for_no_prompt=(base if checkpoint.zeros_for_no_prompt is None else checkpoint).zeros_for_no_prompt,
        from_base=tuple(name for name in components if not checkpoint.has(name)),
    )


def _with_bundled_tokenizers(checkpoint: Checkpoint) -> Checkpoint:
    """Adds the tokenizers of this package for text encoders of CLIP's vocabulary that have none."""
    bundled, fields = {}, ("tokenizer_folder", "tokenizer_2_folder")
    for field, name in zip(fields, checkpoint.text_encoders if checkpoint.has("unet") else (), strict=False):
        config = checkpoint.config(name) if checkpoint.has(name) else {}
        rows = config.get("vocab_size")
        if getattr(checkpoint, field) is None and isinstance(rows, int) and rows >= vocabulary.CLIP_VOCAB_SIZE:
            # Only OpenCLIP's encoders have this activation; their tokenizers pad differently.
            bundled[field] = vocabulary.OPEN_CLIP if config.get("hidden_act") == "gelu" else vocabulary.CLIP
    return dataclasses.replace(checkpoint, **bundled)


def _with_checked_vocabularies(checkpoint: Checkpoint) -> Checkpoint:
    """Compares each text encoder with its tokenizer; a single file's encoders also learn their end token from it.

    Token ids past an encoder's rows would read NaN. Training of textual inversions can leave such a tokenizer.
    """
    components, problems = dict(checkpoint.components), []
    folders = {"text_encoder": checkpoint.tokenizer_folder, "text_encoder_2": checkpoint.tokenizer_2_folder}
    for name in checkpoint.text_encoders if checkpoint.has("unet") else ():
        folder = folders[name]
        if folder is None or not checkpoint.has(name):
            continue
        config = checkpoint.config(name)
        try:
            ids = vocabulary.all_ids(folder)
        except UserError as error:
            problems.append(str(error))
            continue
        rows, num_ids = config.get("vocab_size", vocabulary.CLIP_VOCAB_SIZE), max(ids.values(), default=-1) + 1
        if isinstance(rows, int) and num_ids > rows:
            problems.append(
                f"its {name} has {rows} rows, but {folder} has {num_ids} tokens, so that some would read no row (NaN). "
                "Give the text encoder that was trained with these tokens, or remove the added tokens."
            )
        if checkpoint.kind == "single-file" and vocabulary.END in ids:
            end = ids[vocabulary.END]
            config = config | {"eos_token_id": end, "bos_token_id": ids.get(vocabulary.START, end - 1)}
            components[name] = Component(config, components[name].load)
    unsupported = " ".join(filter(None, [checkpoint.unsupported, *problems]))
    return dataclasses.replace(checkpoint, components=components, unsupported=unsupported)


def _open_in_bucket(path: str | os.PathLike) -> Checkpoint:
    """Opens a training run in a bucket; any other checkpoint must be copied, since its files are memory-mapped."""
    try:
        path = locate(path)
        check_bucket(path)
        if not (path / "config.json").is_file():
            check_local(path, "a checkpoint that is no training run")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return _open_workdir(path)


@hub.cache_only()
def _open_workdir(path: Location) -> Checkpoint:
    """Opens a training run: the newest student's UNet, with the other networks of its base."""
    # Imported here: a checkpoint from elsewhere opens without Orbax and ml_collections.
    from dmm_jax.checkpoints import student_lora
    from dmm_jax.checkpoints.states import restore_student
    from dmm_jax.config.options import opening_options, style_names
    from dmm_jax.config.serialization import load_config

    config = load_config(path)
    with naming_option(f"config.base of {path}"):
        base = open_checkpoint(config.base, **opening_options(config, "base"))
    styles = tuple(style_names(config))
    unet = merged_config(base.unet_config, len(styles))
    ranks, sources = student_lora.ranks(config), [base]
    if ranks and config.student_init == "average":
        teachers = ((teacher, opening_options(config, name)) for name, teacher in config.teachers)
        teachers = [open_teacher(teacher, config.base, **options) for teacher, options in teachers]
        sources = student_lora.start_sources(config, base, teachers)

    @functools.cache
    def saved():
        notes = {student_lora.START: student_lora.digest(sources)} if ranks else {}
        return naming.to_torch(restore_student(path, student_lora.trained_shapes(unet, ranks), notes))

    def load():
        return student_lora.folded_tensors(student_lora.mean(base, sources), saved()) if ranks else saved()

    return Checkpoint(
        path=path,
        kind="workdir",
        components={**base.components, "unet": Component(unet, load)},
        scheduler_config=base.predicting(config.student_prediction).scheduler_config,
        clip_skip=base.clip_skip,
        explicit_fields=base.explicit_fields,
        zeros_for_no_prompt=base.zeros_for_no_prompt,
        tokenizer_folder=base.tokenizer_folder,
        tokenizer_2_folder=base.tokenizer_2_folder,
        styles=styles,
        factors=functools.partial(student_lora.factors, saved) if ranks and sources == [base] else None,
    )
