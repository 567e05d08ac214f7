"""The emoji study's stages: VAE, base, a teacher per set, the merge, weight merges, classifier, measurements.

Each stage writes one output in FOLDER/SIZE, and is done when that exists. `run` continues with the first one that is
missing, and ends in time; what a stage has done so far is saved in FOLDER/SIZE/fits or in its run's workdir.
"""

import dataclasses
import functools
import json
import multiprocessing
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
from flax import nnx

from dmm_jax.checkpoints.average import average
from dmm_jax.checkpoints.modelspec import Recipe
from dmm_jax.checkpoints.write import write_folder, write_single_file
from dmm_jax.models.clip_text import CLIPTextModel
from dmm_jax.models.unet_2d_condition import UNet2DConditionModel
from dmm_jax.runtime import compilation, locks
from dmm_jax.runtime.errors import UserError, meant
from dmm_jax.runtime.processes import say
from dmm_jax.studies import emoji_classifier, emoji_judge
from dmm_jax.studies.emoji_merges import ROWS, SEEDS, make_latents, train_student
from dmm_jax.studies.emoji_pictures import HELD_OUT, PICTURES, TRAIN
from dmm_jax.studies.emoji_study import MERGES, Study, missing_stage
from dmm_jax.world import training
from dmm_jax.world.recipe import train_vae
from dmm_jax.world.shipped_checkpoints import stock_checkpoint
from dmm_jax.world.training import Fit, Stretch, StretchOver

RESULTS = "results.jsonl"


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


def stages(study: Study, rows: Sequence[str] = tuple(ROWS), seeds: Sequence[int] = SEEDS) -> list[Stage]:
    """Returns the stages in their order; students of these rows and seeds, the first seed of all rows first."""
    students = [stage for seed in seeds for row in rows for stage in student_stages(study, row, seed)]
    return common_stages(study, rows) + students


def common_stages(study: Study, rows: Sequence[str]) -> list[Stage]:
    """Returns the stages that come before all students."""
    out, raw = study.out, study.out / "raw"
    bind = functools.partial
    merges = [Stage(name, out / f"{name}.safetensors", bind(merge_weights, study, name)) for name in MERGES]
    kinds = sorted({run.is_made for row in rows for run in ROWS[row]})
    return [
        Stage("vae", raw / "vae.safetensors", bind(make_vae, study), contained_in=study.base),
        Stage("base", study.base, bind(make_base, study)),
        *(Stage(f"teacher {name}", study.teacher(name), bind(make_teacher, study, name)) for name in study.sets),
        *merges,
        Stage("classifier", out / "classifier.safetensors", bind(make_classifier, study)),
        Stage("measure references", study.references, bind(measure_references, study)),
        *(Stage(f"latents{' made' * made}", study.cache(made), bind(make_latents, study, made)) for made in kinds),
    ]


def student_stages(study: Study, row: str, seed: int) -> list[Stage]:
    """Returns the stages of one student: to train it, and to measure it."""
    train, measure = (functools.partial(make, study, row, seed) for make in (train_student, measure_student))
    return [
        Stage(f"merge {row}, seed {seed}", study.student(row, seed), train),
        Stage(f"measure {row}, seed {seed}", study.measures(row, seed), measure),
    ]


def run(
    study: Study,
    minutes: float,
    only: Sequence[str] = (),
    jobs: int = 1,
    rows: Sequence[str] = tuple(ROWS),
    seeds: Sequence[int] = SEEDS,
) -> bool:
    """Runs stages that are not done, one after another, for so many minutes; returns whether all are done.

    Args:
      only: names of stages; () for all.
      jobs: students that are trained and measured at the same time, each in a process of its own.
      rows, seeds: of the students.

    Raises:
      UserError: the minutes are negative or no number, a stage is unknown, or there are no pictures. Nothing is
        written then.
    """
    if not minutes >= 0:
        raise UserError(f"--minutes must be a number of at least 0; got {minutes:g}.")
    names = [stage.name for stage in stages(study, rows, seeds)]
    if unknown := sorted(set(only) - set(names)):
        raise UserError(
            f"there is no stage {', '.join(unknown)}{meant(unknown[0], names)} The stages are {', '.join(names)}."
        )
    if not study.rows:
        raise UserError(
            f"{study.folder / PICTURES} lists no pictures: python -m dmm_jax.studies.emoji fetch {study.folder}"
        )
    ends = time.monotonic() + 60 * minutes
    students = [(row, seed) for seed in seeds for row in rows]
    with locks.lock(study.out):
        if not run_stages(study, common_stages(study, rows), ends, only):
            return False
        if jobs == 1:
            return all([run_student(study, *student, ends, only) for student in students])
        fresh = dataclasses.replace(study)  # Without what it has read, which would travel.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, spawn, initializer=compilation.use_cache) as pool:
            running = [pool.submit(run_student, fresh, *student, ends, only) for student in students]
            return all([student.result() for student in running])


def run_student(study: Study, row: str, seed: int, ends: float, only: Sequence[str]) -> bool:
    """Trains and measures one student; returns whether that is done. `ends` is of the machine's monotonic clock."""
    return run_stages(study, student_stages(study, row, seed), ends, only)


def run_stages(study: Study, chosen: Sequence[Stage], ends: float, only: Sequence[str]) -> bool:
    """Runs stages in their order until the time is over; returns whether they are done."""
    chosen = [stage for stage in chosen if not only or stage.name in only]
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
    return True


def write_line(study: Study, **line) -> None:
    """Adds a line to results.jsonl."""
    study.out.mkdir(parents=True, exist_ok=True)
    with (study.out / RESULTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"device": jax.devices()[0].device_kind}) + "\n")


def status(study: Study, **students) -> str:
    """Returns a Markdown table: each stage, whether it is done, and the step and loss of its last line."""
    path = study.out / RESULTS
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    text = ["| stage | done | step | of | loss |", "|---|---|---|---|---|"]
    for stage in stages(study, **students):
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
    vae, dtype = study.raw("vae", missing_stage), jnp.dtype(study.dtype)

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


def padded(bank: Mapping[str, jax.Array], size: int) -> dict[str, jax.Array]:
    """Returns a bank with zeros up to `size` rows; "num_examples" is the number of its own."""
    count = len(bank["input_ids"])
    rows = {name: jnp.pad(leaf, ((0, size - count), *[(0, 0)] * (leaf.ndim - 1))) for name, leaf in bank.items()}
    return rows | {"num_examples": jnp.asarray(count)}


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


def measure_references(study: Study, stretch: Stretch) -> None:
    """Measures floor, base and weight merges against the teachers."""
    emoji_judge.write(study.references, emoji_judge.Judge(study, stretch).references())


def measure_student(study: Study, row: str, seed: int, stretch: Stretch) -> None:
    """Measures a row's student against the teachers, and its mixes."""
    emoji_judge.write(study.measures(row, seed), emoji_judge.Judge(study, stretch).student(row, seed))
