"""The rows of the study: chains of training runs, each with changes to one config (docs/study.md).

Several rows repeat rows of the paper's tables (arXiv:2504.12364, Tab. 1 and 2, A.3).
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
from dmm_jax.runtime.storage import part_of
from dmm_jax.world import demo_config

STYLES = (
    "comic",
    "cartoon",
    "pastel",
    "ink",
    "sepia",
    "neon",
    "night",
    "blueprint",
)  # Neighbours are nearly alike.
SEEDS = (0, 1, 2)
NUM_PICTURES = 8192  # Rendered pictures.
NUM_MADE = 1500  # Pictures drawn by each teacher, as in the paper (A.3).
# Training data: rendered pictures; pictures drawn by the teachers from captions; the same from short prompts.
RENDERED, MADE, SHORT = "rendered", "made", "short"
SHARES = {"made_25": 0.25, "made_50": 0.5, "made_75": 0.75}  # Share of teacher-made pictures in mixed data.
NO_FEATURES = {"feature_loss_weight": 0.0}
ADVERSARIAL = {"adversarial.weight": 0.01, "adversarial.learning_rate": 1e-4}  # The rate is ten times the paper's.
AVERAGE = {"student_init": "average"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of a chain: changes to the config, styles, and data.

    The folders of runs are named after the representation of this class: see `Node.folder`.
    """

    changes: Mapping[str, object] = dataclasses.field(default_factory=dict)
    styles: tuple[str, ...] = STYLES
    replay: int | None = None  # Grows the last stage's student with this many rows of replay; None: no growing.
    steps: float = 1.0  # Multiplies the study's number of steps.
    data: str = RENDERED


def _grown(*sizes: int, replay: int) -> tuple[Stage, ...]:
    """Returns stages that learn the styles in groups of these sizes, one group after another."""
    ends = np.cumsum(sizes).tolist()
    groups = [STYLES[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    return (Stage(styles=groups[0]), *(Stage(styles=group, replay=replay) for group in groups[1:]))


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
    """Returns the config that all rows change: the demo's config with the study's teachers."""
    config = demo_config.get_config()
    config.teachers = tuple((name, str(teacher_path(out, name))) for name in styles)
    config.student_init = "base"
    config.seed, config.num_steps = seed, num_steps
    config.dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    config.batch_size = 240  # Divides by 8, 4 + 1 and 2 + 1, the numbers of teachers with replay.
    config.data.num_examples = NUM_PICTURES
    config.data.cache = cache_path(out, RENDERED)
    config.sampling.batch_size = 512
    config.warmup_steps, config.validation_size, config.validation_every = 20, 0, 0
    config.log_every, config.checkpoint_every, config.checkpoints_kept = 250, 500, 2
    return config


def stage_config(out: pathlib.Path, config: ml_collections.ConfigDict, stage: Stage, before: pathlib.Path | None):
    """Returns the config of a stage whose preceding stage trained in `before`.

    A stage that grows starts a new student; any other stage continues the run.
    """
    config = config.copy_and_resolve_references()
    config.num_steps = int(config.num_steps * stage.steps)
    config.data.cache = cache_path(out, stage.data)
    config.update_from_flattened_dict(stage.changes)
    if stage.replay is not None:
        config.grow.student, config.grow.replay = str(before), stage.replay
    return config


def teacher_path(out: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the path of one of the study's teachers."""
    return out / "teachers" / f"{name}.safetensors"


def cache_path(out: pathlib.Path, data: str) -> str:
    """Returns the folder of the latents of some data."""
    return str(out / "caches" / data)


def data_of(rows: Iterable[str]) -> set[str]:
    """Returns the names of the data that rows train on."""
    return {stage.data for row in rows for stage in ROWS[row]}


@dataclasses.dataclass(frozen=True)
class Node:
    """A chain of stages that one or more rows begin with, and a seed; it is trained once for all of them."""

    stages: tuple[Stage, ...]
    seed: int

    @property
    def parent(self) -> "Node | None":
        """The chain without its last stage."""
        return Node(self.stages[:-1], self.seed) if len(self.stages) > 1 else None

    @property
    def row(self) -> str | None:
        """The row that consists of this chain; None if rows only begin with it."""
        return next((row for row, stages in ROWS.items() if stages == self.stages), None)

    def folder(self, out: pathlib.Path, num_steps: int) -> pathlib.Path:
        """Returns the workdir, named by a hash of the stages, so that no two chains share one."""
        chain = hashlib.sha256(repr(self.stages).encode()).hexdigest()[:12]
        return out / "runs" / f"{chain}_{num_steps}_{self.seed}"

    def steps_left(self, rows: Iterable[str]) -> float:
        """Returns the most work from this stage to the end of one of the rows, in units of one stage."""
        size = len(self.stages)
        remaining = [ROWS[row][size - 1 :] for row in rows if ROWS[row][:size] == self.stages]
        return max((sum(stage.steps for stage in stages) for stages in remaining), default=0.0)


def train_node(out: pathlib.Path, node: Node, num_steps: int) -> pathlib.Path:
    """Trains a node's last stage, after its parent's run, unless that is done; returns its workdir."""
    workdir, stage, steps = node.folder(out, num_steps), node.stages[-1], 0
    before = node.parent and node.parent.folder(out, num_steps)
    if before and stage.replay is None:  # Continues a copy of the parent's run.
        steps = json.loads((before / "config.json").read_text())["num_steps"]
        if not workdir.exists():
            part = part_of(workdir)
            shutil.copytree(before, part)
            os.replace(part, workdir)
    config = stage_config(out, study_config(out, stage.styles, num_steps, node.seed), stage, before)
    config.num_steps += steps
    train.run(config, workdir)
    return workdir
