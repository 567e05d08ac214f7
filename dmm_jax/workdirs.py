"""The folder of a run: whose it is, looked at before any work is done; config.json, once nothing can be refused."""

import jax

from dmm_jax import config as config_lib
from dmm_jax import folders, processes


def check(workdir: folders.Location, config) -> list[str]:
    """Returns what changed in the config since the run that is there was last started; makes nothing.

    Raises:
      ValueError: the folder is of a run on other styles, or of no run, or cannot be written.
    """
    if (workdir / "config.json").is_file():
        old = config_lib.load(workdir)
        before, now = config_lib.style_names(old), config_lib.style_names(config)
        if before and before != now:
            raise ValueError(
                f"{workdir} was trained on the styles {', '.join(before)}; the config lists {', '.join(now)}. "
                "Use another --workdir."
            )
        changed = config_lib.differences(old, config)
    else:
        with folders.reaching(workdir):
            strangers = _strangers(workdir, config)
        if strangers:
            raise ValueError(
                f"{workdir} is not empty and holds no run (config.json is missing, there is {', '.join(strangers[:5])})"
                ". Give --workdir a new folder, an empty one, or that of a run."
            )
        changed = []
    if not folders.in_bucket(workdir):
        folders.check_writable(workdir)
    processes.wait_for_all("workdir looked at")
    return changed


def _strangers(workdir, config) -> list[str]:
    """Names what is there, but for empty folders and a latent cache that the config keeps there."""
    if not workdir.exists():
        return []
    if not workdir.is_dir():
        raise ValueError(f"{workdir} is a file; a run is kept in a folder. Give another --workdir.")
    own = {f"{config.data.cache}{end}" for end in ("", ".images")}
    there = [path for path in workdir.iterdir() if not path.is_dir() or any(path.iterdir())]
    return sorted(path.name for path in there if str(path) not in own)


def write_config(workdir: folders.Location, config) -> None:
    """Makes the folder and writes config.json: from here on it is a run's.

    Raises:
      ValueError: it cannot be written, or another process does not see it.
    """
    path = workdir / "config.json"
    if processes.is_first():
        with folders.reaching(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            path.write_text(config_lib.to_json(config))
    processes.wait_for_all("config.json written")
    if not path.is_file():
        raise ValueError(
            f"process {jax.process_index()} does not see {path}, which process 0 wrote. "
            "Give a --workdir on a file system that all hosts share."
        )
