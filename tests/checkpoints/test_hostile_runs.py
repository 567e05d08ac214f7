"""Damaged and hostile files of a run's folder: every reader ends well or in a UserError; see tests/hostile.py."""

import json
import shutil

import jax
import numpy as np
import pytest

from dmm_jax.checkpoints import export, model_card, provenance
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.checkpoints.recorded_sampling import recorded_sampling
from dmm_jax.checkpoints.states import StateStore
from dmm_jax.config import workdirs
from dmm_jax.config.options import style_names
from dmm_jax.config.serialization import load_config
from dmm_jax.distill import incremental
from dmm_jax.models.unet_config import merged_config
from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.metrics import MetricsLog
from tests import hostile, worlds

VALUES = [
    None, True, 0, -1, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "x", "\0", "\ud800", "../..", "~",
    "x" * 5000,
    "[1]", [], [None], ["x"], [["x", "y"]], [["x"]], {}, {"x": 1}, {"x": {}}, [[[]]],
]  # fmt: skip
TEXTS = (
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 50, b"{}\n{}",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with two checkpoints of zeros, a log, parents and metrics, and its config."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = worlds.write_world(folder)
    config, workdir = worlds.tiny_config(paths, folder / "cache"), folder / "run"
    workdirs.write_config(workdir, config)
    with provenance.record_parents(workdir, config):
        pass
    lines = [{"step": step, "validation": {"left": [0.1]}, "loss": 0.5} for step in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (workdir / "report").mkdir()
    settings = {"num_inference_steps": 5, "guidance_scale": 2.0, "solver": "ddim"}
    results = {name: [1.0, 2.0] for name in ("floor", "base", "average")}
    results |= {
        "styles": list(worlds.NAMES),
        "matrix": [[1.0, 2.0]] * 2,
        "n": 5,
        "distance": "FD",
        "settings": settings,
    }
    (workdir / "report" / "metrics.json").write_text(json.dumps(results | {"weight_merges": ["average"]}))
    with StateStore(workdir) as store:
        for step in (2, 4):
            store.save(step, state(config), {"samples_seen": 8 * step})
    return workdir, config


def state(config):
    """Returns a state of zeros; the student alone, without moments."""
    unet = merged_config(open_checkpoint(config.base).unet_config, len(worlds.NAMES))
    zeros = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, np.float32), abstract_params("unet", unet))
    return {"step": jax.numpy.int32(2), "params": zeros}


def place(tree, rng):
    """Returns a random container of a tree, and a key in it."""
    while True:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        if not (isinstance(tree[key], (dict, list)) and tree[key]) or rng.random() < 0.3:
            return tree, key
        tree = tree[key]


def damage(path, rng) -> None:
    """Damages a file."""
    kind = rng.choice(["value"] * 6 + ["key", "drop", "text", "cut", "bytes", "delete", "special", "special"])
    raw = path.read_bytes()
    at = rng.randrange(len(raw))
    if kind in ("value", "key", "drop"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        number = rng.randrange(len(lines))
        tree = json.loads(lines[number])
        container, key = place(tree, rng)
        value = rng.choice(VALUES)
        if kind == "value" or isinstance(container, list):
            container[key] = value
        elif kind == "key":
            container[rng.choice([key, "x", "", "step"])] = container.pop(key)
        else:
            del container[key]
        lines[number] = json.dumps(tree)
        path.write_text("\n".join(lines), "utf-8", "surrogatepass")
    elif kind == "delete":
        path.unlink()
    elif kind == "special":
        hostile.replace_by_special(rng, path)
    else:
        byte = bytes([rng.randrange(256)])
        path.write_bytes({"text": rng.choice(TEXTS), "cut": raw[:at], "bytes": raw[:at] + byte + raw[at + 1 :]}[kind])


READERS = {
    "check": lambda workdir, config: workdirs.check(workdir, config),
    "open": lambda workdir, _: open_checkpoint(workdir),
    "origins": lambda workdir, _: incremental.origins(load_config(workdir)),
    "log": lambda workdir, _: MetricsLog(workdir, 1, worlds.NAMES).__exit__(),
    "parents": lambda workdir, _: write_card(workdir),
    "card": lambda workdir, _: model_card.metrics_of(workdir, worlds.NAMES),
    "load": lambda workdir, _: open_checkpoint(workdir).params("unet"),
    "resume": lambda workdir, config: resume(workdir, config),
}


def write_card(workdir):
    styles, parents = style_names(load_config(workdir)), provenance.parents_of_workdir(workdir, hashed=False)
    student = open_checkpoint(workdir)
    json.dumps(export.describe(workdir, student, parents, "left")), export.merged_from_names(parents, student)
    drawing = student.scheduler_config, recorded_sampling(student)
    model_card.card(["dmm"], "t", styles, student.architecture, parents, "", None, False, *drawing)


def resume(workdir, config):
    with StateStore(workdir) as store:
        step, _ = store.resume(state(config))
        store.notes(step)


FILES = {  # The files of a run, and what reads them.
    "config.json": ("check", "open", "origins", "parents"),
    "parents.json": ("parents",),
    "metrics.jsonl": ("log",),
    "report/metrics.json": ("card",),
    "checkpoints/4/_CHECKPOINT_METADATA": ("load", "resume"),
    "checkpoints/4/record/metadata": ("load", "resume"),
}


def test_hostile_files_of_a_run_are_read_or_refused_in_one_line(run, tmp_path, capsys):
    original, config = run

    def case(rng, workdir):
        shutil.copytree(original, workdir)
        name, errors = rng.choice(list(FILES)), []
        damage(workdir / name, rng)
        for reader in FILES[name]:
            try:
                READERS[reader](workdir, config)
            except UserError as error:
                errors.append(error)
                assert not hostile.message_faults(error), (name, reader, error)
        return not errors

    hostile.run(case, tmp_path, default=24)
