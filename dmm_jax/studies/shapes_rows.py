"""The rows of the study: chains of training runs, each with changes to one config (docs/study.md).

Part of what the rows ask, and what they are held against, is of the paper (arXiv:2504.12364, Tab. 1 and 2, A.3).
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence

import jax
import ml_collections
import numpy as np

from dmm_jax import train
from dmm_jax.world import demo_config

STYLES = ("comic", "cartoon", "pastel", "ink", "sepia", "neon", "night", "blueprint")  # Neighbours are nearly alike.
SEEDS = (0, 1, 2)
NUM_PICTURES, NUM_MADE = 8192, 1500  # Of the renderer; and of each teacher, as in the paper (A.3).
RENDERED, MADE, SHORT = "rendered", "made", "short"  # Data: pictures of the renderer; of the teachers, by prompts.
SHARES = {"made_25": 0.25, "made_50": 0.5, "made_75": 0.75}  # Of the teachers' pictures, in data that hold both.
NO_FEATURES = {"feature_loss_weight": 0.0}
ADVERSARIAL = {"adversarial.weight": 0.01, "adversarial.learning_rate": 1e-4}  # The rate is ten times the paper's.
AVERAGE = {"student_init": "average"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run: what it changes in the config, its data and styles, and whether it grows the one before."""

    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    styles: tuple[str, ...] = STYLES
    replay: int | None = None  # Grows the last stage's student, with so many rows of replay.
    steps: float = 1.0  # Times the study's number of steps.
    data: str = RENDERED  # A later stage's are those that the run goes on with.


def _grown(*groups: int, replay: int, steps: float = 1.0) -> tuple[Stage, ...]:
    """Returns the stages that learn so many styles after each other."""
    ends = np.cumsum(groups).tolist()
    parts = [STYLES[end - size : end] for end, size in zip(ends, groups, strict=True)]
    later = [Stage(styles=part, replay=replay, steps=steps) for part in parts[1:]]
    return (Stage(styles=parts[0]), *later)


ROWS: dict[str, tuple[Stage, ...]] = {
    "score": (Stage(NO_FEATURES),),
    "+ feature": (Stage(),),
    "+ feature, twice the steps": (Stage(steps=2.0),),
    "+ feature, then as many steps again": (Stage(), Stage()),
    "+ feature, then teacher-made data": (Stage(), Stage(data=MADE)),
    "+ feature, weight 0.1": (Stage({"feature_loss_weight": 0.1}),),
    "+ adversarial": (Stage(ADVERSARIAL),),
    "+ adversarial, its rate 1e-5": (Stage(ADVERSARIAL | {"adversarial.learning_rate": 1e-5}),),
    "+ teacher-made data": (Stage(ADVERSARIAL), Stage(ADVERSARIAL, steps=0.5, data=MADE)),
    "+ as many steps without it": (Stage(ADVERSARIAL), Stage(ADVERSARIAL, steps=0.5)),
    "teacher-made data alone": (Stage(data=MADE),),
    "teacher-made data alone, short prompts": (Stage(data=SHORT),),
    **{f"teacher-made data, {share:.0%} beside rendered": (Stage(data=name),) for name, share in SHARES.items()},
    "4 + 4, not regularised": _grown(4, 4, replay=0),
    "4 + 4": _grown(4, 4, replay=1),
    "4 + 2 + 2": _grown(4, 2, 2, replay=1),
    "random style MLP": (Stage({"style_init": "paper"}),),
    "from the weight average": (Stage(AVERAGE),),
    "features over their variance": (Stage({"feature_loss": "normalized", "feature_loss_weight": 0.1}),),
    "features over their variance, weight 0.002": (Stage({"feature_loss": "normalized"}),),
    "average, teacher-made data, twice the steps": (Stage(AVERAGE, steps=2.0, data=MADE),),
    "average, teacher-made data, ten times the steps": (Stage(AVERAGE | {"ema_decay": 0.999}, steps=10.0, data=MADE),),
}


def study_config(out: pathlib.Path, styles: Sequence[str], num_steps: int, seed: int) -> ml_collections.ConfigDict:
    """Returns the config that all rows share: the demo's, with the study's teachers."""
    config = demo_config.get_config()
    config.teachers = tuple((name, str(teacher_path(out, name))) for name in styles)
    config.student_init = "base"
    config.seed, config.num_steps = seed, num_steps
    config.dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    config.batch_size = 240  # Of 8, 4 + 1 and 2 + 1 rows.
    config.data.num_examples = NUM_PICTURES
    config.data.cache = cache_path(out, RENDERED)
    config.data.sampling.update({"num_inference_steps": 10, "guidance_scale": 2.5, "batch_size": 512})
    config.warmup_steps, config.validation_size, config.validation_every = 20, 0, 0
    config.log_every, config.checkpoint_every, config.checkpoints_kept = 250, 500, 2
    config.evaluation.batch_size = 500
    return config


def stage_config(out: pathlib.Path, config: ml_collections.ConfigDict, stage: Stage, before: pathlib.Path | None):
    """Returns the config of a stage behind the one that trained in `before`.

    A stage that grows starts a student of its own; another one goes on with the same.
    """
    config = config.copy_and_resolve_references()
    config.num_steps = int(config.num_steps * stage.steps)
    config.data.cache = cache_path(out, stage.data)
    config.update_from_flattened_dict(stage.changes)
    if stage.replay is not None:
        config.grow.student, config.grow.replay = str(before), stage.replay
    return config


def teacher_path(out: pathlib.Path, name: str) -> pathlib.Path:
    """Returns where a teacher of the study lies."""
    return out / "teachers" / f"{name}.safetensors"


def cache_path(out: pathlib.Path, data: str) -> str:
    """Returns where the latents of some data lie."""
    return str(out / "caches" / data)


def data_of(rows: Iterable[str]) -> set[str]:
    """Returns the data that rows are trained on."""
    return {stage.data for row in rows for stage in ROWS[row]}


@dataclasses.dataclass(frozen=True)
class Node:
    """A chain of stages that one or more rows begin with, for one seed: trained once, whatever goes on from it."""

    stages: tuple[Stage, ...]
    seed: int

    @property
    def parent(self) -> "Node | None":
        """The chain without its last stage."""
        return Node(self.stages[:-1], self.seed) if len(self.stages) > 1 else None

    @property
    def row(self) -> str | None:
        """The row that ends here."""
        return next((row for row, stages in ROWS.items() if stages == self.stages), None)

    def folder(self, out: pathlib.Path, num_steps: int) -> pathlib.Path:
        """Returns where it is trained: what its stages say gives the name, so that no other chain finds it."""
        chain = hashlib.sha256(repr(self.stages).encode()).hexdigest()[:12]
        return out / "runs" / f"{chain}_{num_steps}_{self.seed}"

    def steps_left(self, rows: Iterable[str]) -> float:
        """Returns the stages that rows still train from here on, this one's included, in units of a stage."""
        size = len(self.stages)
        through = [ROWS[row][size - 1 :] for row in rows if ROWS[row][:size] == self.stages]
        return max((sum(stage.steps for stage in stages) for stages in through), default=0.0)


def train_node(out: pathlib.Path, node: Node, num_steps: int) -> pathlib.Path:
    """Trains a node's last stage behind its parent's run; returns its workdir. One that is trained is left alone."""
    workdir, stage, steps = node.folder(out, num_steps), node.stages[-1], 0
    before = node.parent and node.parent.folder(out, num_steps)
    if before and stage.replay is None:  # A stage that does not grow goes on with the run, in a copy of it.
        steps = json.loads((before / "config.json").read_text())["num_steps"]
        if not workdir.exists():
            shutil.copytree(before, workdir.with_suffix(".part"), dirs_exist_ok=True)
            os.replace(workdir.with_suffix(".part"), workdir)
    config = stage_config(out, study_config(out, stage.styles, num_steps, node.seed), stage, before)
    config.num_steps += steps
    train.run(config, workdir)
    return workdir
