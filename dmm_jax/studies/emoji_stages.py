"""The emoji study's stages: VAE, base, a teacher per set, the merge, weight merges, classifier, measurements.

Each stage writes one output in FOLDER/SIZE, and is done when that exists. `run` continues with the first one that is
missing, and ends in time; what a stage has done so far is saved in FOLDER/SIZE/fits or in its run's workdir.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from dmm_jax import train
from dmm_jax.checkpoints.average import average
from dmm_jax.checkpoints.export import export
from dmm_jax.checkpoints.licenses import together
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.write import write_folder, write_single_file
from dmm_jax.config import options
from dmm_jax.data.sources import FolderSource
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.pipeline import Pipeline
from dmm_jax.runtime import locks
from dmm_jax.runtime.errors import Preempted, UserError
from dmm_jax.runtime.processes import say
from dmm_jax.studies import emoji_classifier, emoji_judge
from dmm_jax.studies.emoji_networks import Size
from dmm_jax.studies.emoji_pictures import HELD_OUT, PICTURES, SIZE_PX, TRAIN, read_rows
from dmm_jax.studies.emoji_sets import SETS, Package
from dmm_jax.text.tokenizer import Tokenizer
from dmm_jax.world import training
from dmm_jax.world.recipe import load_or_train, train_vae
from dmm_jax.world.shipped_checkpoints import stock_checkpoint
from dmm_jax.world.tokenizer import tokenizer_fields, write_tokenizer
from dmm_jax.world.training import Fit, Stretch, StretchOver

RESULTS = "results.jsonl"
MERGES = ("average", "ties")
MIN_MERGE_S = 20  # A stretch with less time left does not start the merge, which compiles for a while.


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the recipe."""

    name: str
    output: pathlib.Path
    make: Callable[[Stretch], None]
    contained_in: pathlib.Path | None = None  # A later stage's output; once it exists, this stage is not needed.

    @property
    def is_done(self) -> bool:
        """Whether the stage need not run."""
        return self.output.exists() or bool(self.contained_in and self.contained_in.exists())


@dataclasses.dataclass(frozen=True)
class Study:
    """The study at one size, on the pictures that `emoji_pictures.fetch` drew."""

    folder: pathlib.Path
    size: Size
    sets: Mapping[str, Package] = dataclasses.field(default_factory=lambda: SETS)

    @property
    def out(self) -> pathlib.Path:
        """The folder of this size's files."""
        return self.folder / self.size.name

    @property
    def dtype(self) -> str:
        """The dtype of the networks' arithmetic."""
        return "bfloat16" if jax.default_backend() == "gpu" else "float32"

    @property
    def base(self) -> pathlib.Path:
        """The base's diffusers folder."""
        return self.out / "base"

    @property
    def student(self) -> pathlib.Path:
        """The student's DMM folder."""
        return self.out / "student"

    @property
    def licenses(self) -> str:
        """The licences of all sets in one line."""
        return together(package.license for package in self.sets.values())

    def teacher(self, name: str) -> pathlib.Path:
        """The path of a set's teacher."""
        return self.out / "teachers" / f"{name}.safetensors"

    @property
    def stock_models(self) -> dict[str, pathlib.Path]:
        """The paths of the base and of the weight merges, by name."""
        return {"base": self.base} | {name: self.out / f"{name}.safetensors" for name in MERGES}

    @property
    def sampling(self) -> dict[str, object]:
        """How pictures are drawn, as arguments of `Pipeline.__call__`."""
        return options.solver_options(merge_config(self))

    @functools.cached_property
    def rows(self) -> list[dict]:
        """The rows of the pictures' list."""
        return read_rows(self.folder)

    @functools.cached_property
    def tokenizer_folder(self) -> pathlib.Path:
        """The folder of a tokenizer in which each word of all captions is one token."""
        folder = self.out / "raw" / "tokenizer"
        words = {word for row in self.rows for word in re.findall("[a-z]+", row["caption"])}
        write_tokenizer(folder, words=sorted(words))
        return folder

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer."""
        return Tokenizer.from_folder(self.tokenizer_folder)

    @functools.cached_property
    def configs(self) -> dict[str, dict]:
        """Contents of config.json by component."""
        return self.size.configs(tokenizer_fields(self.tokenizer_folder))

    def bank(self, where: str) -> dict[str, jax.Array]:
        """Returns the "images" and "input_ids" of the pictures that fulfil a condition, in the order of the list."""
        source = FolderSource(self.folder / PICTURES, resolution=SIZE_PX, where=where)
        with ThreadPoolExecutor() as pool:
            images = np.stack(list(pool.map(lambda number: source[number]["image"], range(len(source)))))
        return {
            "images": jnp.asarray(images),
            "input_ids": jnp.asarray(self.tokenizer([text for _, text in source.rows])),
        }

    @functools.cached_property
    def raw(self) -> Callable[[str, Callable[[], dict]], dict]:
        """Returns float32 parameters by name; trains those that are missing."""
        return functools.partial(load_or_train, self.out / "raw")

    @functools.cached_property
    def base_params(self) -> dict:
        """The base's float32 parameters by component, as its folder has them.

        Raises:
          UserError: the stage "base" is not done.
        """
        if not self.base.exists():
            _missing()
        base = open_checkpoint(self.base)
        return {part: base.params(part, np.float32) for part in ("unet", "vae", "text_encoder")}

    @functools.cached_property
    def stock_pipeline(self) -> Pipeline:
        """The base without parameters of a UNet: `pipeline` adds them."""
        base = open_checkpoint(self.base)
        return Pipeline.for_unet(base, base.unet_config, (), dtype=self.dtype)

    def pipeline(self, path: pathlib.Path) -> Pipeline:
        """Returns a teacher, the base or a weight merge, ready to draw."""
        return self.stock_pipeline.with_unet(open_checkpoint(path).params("unet"))

    @functools.cached_property
    def student_pipeline(self) -> Pipeline:
        """The student, ready to draw."""
        return Pipeline.from_pretrained(self.student, dtype=self.dtype)

    @functools.cached_property
    def largest_set(self) -> int:
        """The most pictures that a teacher is trained on."""
        return max(collections.Counter(row["set"] for row in self.rows if row["split"] == TRAIN).values())

    @functools.cached_property
    def teacher_fit(self) -> Fit:
        """The training of teachers, compiled once."""
        graphs = training.graphs_of(self.configs, self.tokenizer, jnp.dtype(self.dtype))
        loss_fn = training.denoising_loss(*graphs, train_text=False)
        return Fit(loss_fn, self.size.plans["teacher"], self.size.rates["teacher"])


def stages(study: Study) -> list[Stage]:
    """Returns the stages in their order."""
    out, raw = study.out, study.out / "raw"
    bind = functools.partial
    merges = [Stage(name, out / f"{name}.safetensors", bind(merge_weights, study, name)) for name in MERGES]
    return [
        Stage("vae", raw / "vae.safetensors", bind(make_vae, study), contained_in=study.base),
        Stage("base", study.base, bind(make_base, study)),
        *(Stage(f"teacher {name}", study.teacher(name), bind(make_teacher, study, name)) for name in study.sets),
        Stage("merge", study.student, bind(merge, study)),
        *merges,
        Stage("classifier", out / "classifier.safetensors", bind(make_classifier, study)),
        Stage("measure", out / "measures.json", bind(measure, study)),
    ]


def run(study: Study, minutes: float, only: Sequence[str] = ()) -> bool:
    """Runs stages that are not done, one after another, for so many minutes; returns whether all are done.

    Args:
      only: names of stages; () for all.

    Raises:
      UserError: the minutes are negative or no number, a stage is unknown, or there are no pictures. Nothing is
        written then.
    """
    if not minutes >= 0:
        raise UserError(f"--minutes must be a number of at least 0; got {minutes:g}.")
    names = [stage.name for stage in stages(study)]
    if unknown := sorted(set(only) - set(names)):
        raise UserError(f"there is no stage {', '.join(unknown)}. The stages are {', '.join(names)}.")
    if not study.rows:
        raise UserError(
            f"{study.folder / PICTURES} lists no pictures: python -m dmm_jax.studies.emoji fetch {study.folder}"
        )
    ends = time.monotonic() + 60 * minutes
    chosen = [stage for stage in stages(study) if not only or stage.name in only]
    with locks.lock(study.out):
        for stage in chosen:
            if stage.is_done:
                continue
            started, label = time.monotonic(), stage.name.replace(" ", "_")
            report = functools.partial(write_line, study, stage=stage.name)
            say(f"{study.size.name}: {stage.name}")
            try:
                if started > ends:
                    raise StretchOver(f"{stage.name}: not begun.")
                stage.make(Stretch(study.out / "fits" / label, ends, lambda line, report=report: report(**line)))
            except StretchOver as over:
                say(f"{over} The time is over; give the command again.")
                return False
            report(done=True, seconds=round(time.monotonic() - started, 1))
    return all(stage.is_done for stage in chosen)


def write_line(study: Study, **line) -> None:
    """Adds a line to results.jsonl."""
    study.out.mkdir(parents=True, exist_ok=True)
    with (study.out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"device": jax.devices()[0].device_kind}) + "\n")


def status(study: Study) -> str:
    """Returns a Markdown table: each stage, whether it is done, and the step and loss of its last line."""
    path = study.out / RESULTS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    text = ["| stage | done | step | of | loss |", "|---|---|---|---|---|"]
    for stage in stages(study):
        last = next((line for line in reversed(lines) if line["stage"] == stage.name and "step" in line), {})
        cells = [stage.name, "yes" if stage.is_done else "no"]
        cells += [f"{last[name]:,}" if name in last else "" for name in ("step", "num_steps")]
        cells.append(f"{last['loss']:.4f}" if "loss" in last else "")
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def make_vae(study: Study, stretch: Stretch) -> None:
    """Trains the VAE on the pictures that the base sees."""
    plan, config = study.size.plans["vae"], study.configs["vae"]
    bank = study.bank(f"split != '{HELD_OUT}'")
    rate, dtype = study.size.rates["vae"], jnp.dtype(study.dtype)
    study.raw("vae", lambda: train_vae(config, bank, plan, dtype, rate, stretch))


def make_base(study: Study, stretch: Stretch) -> None:
    """Trains UNet and text encoder on all sets, and writes the base with its VAE and tokenizer."""
    vae, dtype = study.raw("vae", _missing), jnp.dtype(study.dtype)

    def train_base():
        params = {
            "unet": training.params_of(UNet2DConditionModel.from_config(study.configs["unet"], rngs=nnx.Rngs(2)))[1],
            "text_encoder": training.params_of(
                CLIPTextModel.from_config(study.configs["text_encoder"], rngs=nnx.Rngs(2))
            )[1],
        }
        graphs = training.graphs_of(study.configs, study.tokenizer, dtype)
        loss_fn = training.denoising_loss(*graphs, train_text=True)
        bank = training.add_latents(study.bank(f"split != '{HELD_OUT}'"), study.configs["vae"], vae, dtype)
        fit = Fit(loss_fn, study.size.plans["base"], study.size.rates["base"], average=0.9995)
        return fit(params, bank, "base", seed=2, stretch=stretch)

    params = study.raw("base", train_base) | {"vae": vae}
    stock = stock_checkpoint("base", study.configs, params, ("unet", "vae", "text_encoder"), study.tokenizer_folder)
    write_folder(study.base, stock, "float16", Recipe("emoji, base", [], None, study.licenses))


def make_teacher(study: Study, name: str, stretch: Stretch) -> None:
    """Fine-tunes the base's UNet on the pictures of one set, and writes it as a single file."""

    def train_teacher():
        base = study.base_params
        bank = padded(study.bank(f"split == '{TRAIN}' and set == '{name}'"), study.largest_set)
        data = training.add_latents(bank, study.configs["vae"], base["vae"], jnp.dtype(study.dtype))
        del data["images"]
        data |= {"text_encoder": base["text_encoder"]}
        seed = 10 + list(study.sets).index(name)
        return study.teacher_fit({"unet": base["unet"]}, data, name, seed=seed, stretch=stretch)

    params = study.raw(name, train_teacher)
    path = study.teacher(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    stock = stock_checkpoint(name, study.configs, params, ("unet",))
    write_single_file(path, stock, "float16", Recipe(f"emoji, {name}", [], None, study.sets[name].license))


def _missing():
    raise UserError("an earlier stage is not done. Give the command without --only.")


def padded(bank: Mapping[str, jax.Array], size: int) -> dict[str, jax.Array]:
    """Returns a bank with zeros up to `size` rows; "num_examples" is the number of its own."""
    count = len(bank["input_ids"])
    rows = {name: jnp.pad(leaf, ((0, size - count), *[(0, 0)] * (leaf.ndim - 1))) for name, leaf in bank.items()}
    return rows | {"num_examples": jnp.asarray(count)}


def merge_config(study: Study) -> ml_collections.ConfigDict:
    """Returns the config of the joint distillation of all teachers."""
    config, plan = options.get_config(), study.size.plans["merge"]
    config.base = str(study.base)
    config.teachers = tuple((name, str(study.teacher(name))) for name in study.sets)
    config.dtype = study.dtype
    config.data.source, config.data.where = str(study.folder / PICTURES), f"split == '{TRAIN}'"
    config.data.cache, config.data.resolution = str(study.out / "cache"), SIZE_PX
    config.batch_size = plan.batch_size - plan.batch_size % len(study.sets)
    config.num_steps, config.learning_rate = plan.num_steps, study.size.rates["merge"]
    config.learning_rate_schedule, config.weight_decay = "cosine", 0.0
    config.warmup_steps = plan.num_steps // 50
    config.log_every = config.checkpoint_every = max(plan.num_steps // 20, 1)
    config.validation_every, config.validation_size = 0, 0
    config.sampling.num_inference_steps = study.size.num_inference_steps
    config.sampling.guidance_scale = 3.0
    return config


def merge(study: Study, stretch: Stretch) -> None:
    """Distils all teachers into one student, and writes it as a DMM folder with VAE and text encoder."""
    config, workdir = merge_config(study), study.out / "merge"
    prepare_cache(config)
    if stretch.ends - time.monotonic() < MIN_MERGE_S:
        raise StretchOver("merge: the latents are ready.")
    with stopped_in_time(stretch.ends):
        last = train.run(config, workdir)
    if last:
        loss = float(np.mean(list(last["score"].values())))
        stretch.report({"step": config.num_steps, "num_steps": config.num_steps, "loss": loss})
    shutil.rmtree(study.out / "exported", ignore_errors=True)
    (exported,) = export(workdir, study.out / "exported", ["dmm"])
    os.replace(exported, study.student)


@contextlib.contextmanager
def stopped_in_time(ends: float) -> Iterator[None]:
    """Stops the training run of the block at a time, as a signal would: its state is saved.

    Raises:
      StretchOver: the run was stopped.
    """

    def not_begun(*_):
        raise StretchOver("merge: the run has not begun.")

    previous = signal.signal(signal.SIGTERM, not_begun)  # The run replaces it while it trains.
    timer = threading.Timer(max(ends - time.monotonic(), 0.0), os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    try:
        timer.start()
        yield
    except Preempted as stopped:
        raise StretchOver(f"merge: {stopped}") from None
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, previous)


def merge_weights(study: Study, method: str, stretch: Stretch) -> None:
    """Merges the teachers in weight space, without training."""
    teachers = [study.teacher(name) for name in study.sets]
    average(study.out / f"{method}.safetensors", study.base, teachers, method, components="unet")


def make_classifier(study: Study, stretch: Stretch) -> None:
    """Trains the classifier on all pictures, also of held-out concepts: it measures, and no model learns from it."""
    concepts, sets = sorted({row["concept"] for row in study.rows}), list(study.sets)

    def train_classifier():
        bank = study.bank("")
        bank |= {name: jnp.asarray([names.index(row[name]) for row in study.rows])
                 for name, names in (("concept", concepts), ("set", sets))}  # fmt: skip
        plan, rate = study.size.plans["classifier"], study.size.rates["classifier"]
        return emoji_classifier.train(study.size.classifier, (len(concepts), len(sets)), bank, plan, rate, stretch)

    params = study.raw("classifier", train_classifier)
    emoji_classifier.save(study.out / "classifier.safetensors", params, concepts, sets)


def measure(study: Study, stretch: Stretch) -> None:
    """Measures base, weight merges, student and floor against the teachers."""
    judge = emoji_judge.Judge(study, stretch)
    emoji_judge.write(study.out / "measures.json", judge.measure())
