"""The folder of a run: checked before any work is done; config.json holds the options of its newest checkpoint."""

import os

import jax

from dmm_jax.config.options import keeps_average, style_names
from dmm_jax.config.serialization import differences, load_config, removed_options, to_json
from dmm_jax.runtime import locks, processes, storage
from dmm_jax.runtime.errors import UserError


def check(workdir: storage.Location, config) -> list[str]:
    """Returns the changes of the config since the folder's run was last started; writes nothing.

    Raises:
      UserError: the folder belongs to a run on other styles or with another kind of state, or to no run, or cannot
        be written.
    """
    if (workdir / "config.json").is_file():
        old = load_config(workdir)
        before, after = style_names(old), style_names(config)
        if before and before != after:
            raise UserError(
                f"{workdir} was trained on the styles {', '.join(before)}; the config lists {', '.join(after)}. "
                "Use another --workdir."
            )
        changed = differences(old, config)
        changed += removed_options(storage.read_json(workdir / "config.json"))
        if (workdir / "checkpoints").is_dir() and any((workdir / "checkpoints").iterdir()):
            _check_state(workdir, old, config)
    else:
        with storage.bucket_errors(workdir):
            others = _other_files(workdir, config)
        if others:
            raise UserError(
                f"{workdir} is not empty and holds no run (config.json is missing, it holds {', '.join(others[:5])})"
                ". Give --workdir a new folder, an empty one, or that of a run."
            )
        changed = []
    if not storage.in_bucket(workdir):
        storage.check_writable(workdir)
        if workdir.exists():
            with locks.lock(workdir):  # Tells now, and not after the teachers are loaded.
                pass
    processes.wait_for_all("workdir checked")
    return changed


def _check_state(workdir, old, new):
    """Refuses changes that a resume cannot follow: of the arrays that a checkpoint holds, and of its start."""
    fixed = {
        "student_init": lambda config: config.student_init,
        "student_prediction": lambda config: config.student_prediction,
        "style_init": lambda config: config.style_init,
        "grow.student": lambda config: config.grow.student,
        "optimizer": lambda config: config.optimizer,
        "ema_decay": keeps_average,
        "ema_width": keeps_average,
        "max_grad_norm": lambda config: bool(config.max_grad_norm),
        "style_learning_rate_scale": lambda config: config.style_learning_rate_scale != 1.0,
        "adversarial.weight": lambda config: bool(config.adversarial.weight),
        "adversarial.train_backbone": lambda config: (
            bool(config.adversarial.weight) and config.adversarial.train_backbone
        ),
    }
    before, after = ({name: read(config) for name, read in fixed.items()} for config in (old, new))
    changes = {line.partition(":")[0]: line for line in differences(old, new)}
    lines = [changes[name] for name in fixed if before[name] != after[name] and name in changes]
    if lines:
        raise UserError(
            f"{workdir} cannot resume with {'; '.join(lines)}: its checkpoints started from, or hold, other arrays. "
            "Set it as it was, or start again in another --workdir."
        )


def _other_files(workdir, config) -> list[str]:
    """Returns the names of a folder's files and folders, except empty folders and the config's own latent cache."""
    if not workdir.exists():
        return []
    if not workdir.is_dir():
        raise UserError(f"{workdir} is a file; a run needs a folder. Give another --workdir.")
    cache = os.path.abspath(config.data.cache)
    entries = [path for path in workdir.iterdir() if not path.is_dir() or any(path.iterdir())]
    own = (cache, os.path.abspath(workdir / locks.NAME))
    return sorted(path.name for path in entries if os.path.abspath(path) not in own)


def write_config(workdir: storage.Location, config) -> None:
    """Makes the folder and writes config.json; from then on the folder belongs to the run.

    Raises:
      UserError: it cannot be written, or another process does not see it.
    """
    path = workdir / "config.json"
    if processes.is_first():
        with storage.bucket_errors(workdir), storage.errors_name(path):
            workdir.mkdir(parents=True, exist_ok=True)
            storage.write_text(path, to_json(config))
    processes.wait_for_all("config.json written")
    if not path.is_file():
        raise UserError(
            f"process {jax.process_index()} does not see {path}, which process 0 wrote. "
            "Give a --workdir on a file system that all hosts share."
        )
