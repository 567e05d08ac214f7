"""The students of the emoji study: rows of training runs, each an ordinary distillation with changes to one config."""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping

import ml_collections
import numpy as np

from dmm_jax import train
from dmm_jax.checkpoints.export import export
from dmm_jax.config.options import PROMPTS
from dmm_jax.distill.teacher_samples import prepare_cache
from dmm_jax.runtime.errors import Preempted
from dmm_jax.runtime.storage import write_text
from dmm_jax.studies.emoji_pictures import PICTURES, TRAIN
from dmm_jax.studies.emoji_study import Study, slug
from dmm_jax.world.training import Stretch, StretchOver

SEEDS = (0, 1, 2)
MIN_RUN_S = 20  # A stretch with less time left does not start a training run, which compiles for a while.


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a row."""

    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)  # To the config.
    first: int = 0  # The first set that it learns, in the study's order.
    last: int | None = None  # It learns the sets before this one; None: all.
    grows: bool = False  # Whether it grows the student of the run before.
    steps: float = 1.0  # A share of the plan's.
    is_made: bool = False  # Whether the teachers draw its data, from the captions.


ROWS: Mapping[str, tuple[Run, ...]] = {
    "joint": (Run(),),
    "joint, a third of the steps": (Run(steps=1 / 3),),
    "joint, mixes trained": (Run({"mix_every": 4}),),
    "joint, style path x10": (Run({"style_learning_rate_scale": 10.0}),),
    "teacher-made data": (Run(is_made=True),),
    "4 + 3": (Run(last=4), Run(first=4, grows=True)),
}


def run_config(study: Study, run: Run, seed: int, before: pathlib.Path | None = None) -> ml_collections.ConfigDict:
    """Returns the config of a run; `before` is the folder of the run that it grows."""
    config, plan = study.config(), study.size.plans["merge"]
    names = list(study.sets)[run.first : run.last]
    config.teachers = tuple((name, str(study.teacher(name))) for name in names)
    config.seed = seed
    config.data.source, config.data.cache = str(study.folder / PICTURES), str(study.cache(run.is_made))
    if run.is_made:
        config.data.kind, config.data.source = PROMPTS, str(study.out / "captions.txt")
        config.data.num_examples = num_pictures(study)
        config.sampling.batch_size = min(512, num_pictures(study))
    else:
        config.data.where = f"split == '{TRAIN}'"
    config.num_steps, config.learning_rate = max(round(run.steps * plan.num_steps), 1), study.size.rates["merge"]
    config.learning_rate_schedule, config.weight_decay = "cosine", 0.0
    config.warmup_steps = config.num_steps // 50
    config.log_every, config.checkpoint_every = max(config.num_steps // 20, 1), max(config.num_steps // 4, 1)
    config.validation_every, config.validation_size = 0, 0
    if run.grows:
        config.grow.student = str(before)
    config.update_from_flattened_dict(run.changes)
    parts = (len(names) + run.grows) * max(config.mix_every, 1)
    config.batch_size = max(plan.batch_size - plan.batch_size % parts, parts)
    return config


def num_pictures(study: Study) -> int:
    """Returns how many pictures train the teachers; teacher-made data has as many."""
    return sum(row["split"] == TRAIN for row in study.rows)


def make_latents(study: Study, is_made: bool, stretch: Stretch) -> None:
    """Writes the latents that students are trained on; an interrupted call goes on with the files that are missing."""
    if is_made:
        captions = sorted({line["caption"] for line in study.rows if line["split"] == TRAIN})
        write_text(study.out / "captions.txt", "\n".join(captions) + "\n")
    prepare_cache(run_config(study, Run(is_made=is_made), seed=0))


def train_student(study: Study, row: str, seed: int, stretch: Stretch) -> None:
    """Trains a row's student, and writes it as a DMM folder with VAE and text encoder.

    Raises:
      StretchOver: the time is over; what was trained is saved.
    """
    workdir = None
    for number, run in enumerate(ROWS[row]):
        before, workdir = workdir, study.out / "runs" / f"{slug(row, seed)}_{number}"
        config = run_config(study, run, seed, before)
        if stretch.ends - time.monotonic() < MIN_RUN_S:
            raise StretchOver(f"{row}: not begun.")
        with stopped_in_time(stretch.ends):
            last = train.run(config, workdir)
        if last:
            loss = float(np.mean(list(last["score"].values())))
            stretch.report({"step": config.num_steps, "num_steps": config.num_steps, "loss": loss})
    staged = study.out / "exported" / slug(row, seed)
    shutil.rmtree(staged, ignore_errors=True)
    (exported,) = export(workdir, staged, ["dmm"])
    study.student(row, seed).parent.mkdir(parents=True, exist_ok=True)
    os.replace(exported, study.student(row, seed))


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
