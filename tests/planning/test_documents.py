"""Every `plan` and `train` command in README and docs can run on the machine that its page names."""

import functools
import pathlib
import re
import shlex

import pytest

from dmm_jax.config.files import read_config
from dmm_jax.config.serialization import from_json, to_json
from dmm_jax.planning import devices, program

ROOT = pathlib.Path(program.__file__).parents[2]
SLICES = {"v5litepod-16": "v5e:4x4"}  # The names of Cloud TPU and xpk.
PROGRAMS = r"dmm-jax (?:plan|train)|launch/(?:tpu_pod|gke_xpk)\.sh train|launch/(?:slurm|local_processes)\.sh"
COMMAND = re.compile(rf"(?:{PROGRAMS}) [^`|#\n]*--config=[^`|#\n]*")


def commands():
    """Returns (page, command, topology): the machine is named by the command, its page, or the config's docstring."""
    params = []
    for page in ("README.md", "docs/train.md", "docs/plan.md", "docs/pods.md"):
        text = (ROOT / page).read_text().replace("\\\n", " ")
        for match in COMMAND.finditer(text):
            words = shlex.split(match[0])
            config = (ROOT / option(words, "--config=")).read_text()
            if "--topology" in words:
                topology = words[words.index("--topology") + 1]
            elif "slurm" in words[0]:
                topology = f"gpu:{int(words[1]) * int(words[2])}x80GB"
            elif "local_processes" in words[0]:
                per_process = re.search(r"device_count=(\d+)", text)[1]
                topology = f"gpu:{int(per_process) * int(words[1])}x80GB"
            elif "launch" in words[0]:
                name = "ACCELERATOR_TYPE" if "tpu_pod" in words[0] else "TPU_TYPE"
                topology = SLICES[re.search(rf"{name}=([\w-]+)", text)[1]]
            else:
                in_docstring = re.search(r"--topology (\S+?)`", config)
                topology = in_docstring[1] if in_docstring else "gpu:1x80GB"
            params.append(pytest.param(page, match[0], topology))
    return params


def option(words, name):
    return next(word for word in words if word.startswith(name)).removeprefix(name)


@pytest.mark.parametrize("page, command, topology", commands())
def test_a_documented_command_divides_and_its_arrays_fit(page, command, topology):
    words = shlex.split(command)
    overrides = [word for word in words if word.startswith("--config.")]
    config = read_config(str(ROOT / option(words, "--config=")), overrides)
    if config.grow.student:
        pytest.skip("its styles are read from a finished student")
    architecture = words[words.index("--architecture") + 1] if "--architecture" in words else "sd15"
    assert array_bytes(to_json(config), topology, architecture) < devices.topology(topology).device.memory


@functools.cache
def array_bytes(config, topology, architecture):
    """Returns the bytes of a run's arrays on each device; pages repeat commands."""
    planned = program.Program.on_topology(from_json(config), topology, architecture, compiled=False)
    return sum(planned.array_bytes().values())


def test_every_page_is_read():
    pages = [param.values[0] for param in commands()]
    assert (pages.count("docs/pods.md"), pages.count("docs/plan.md")) == (4, 12)
    assert pages.count("README.md") >= 2 and pages.count("docs/train.md") >= 5


def test_estimates_in_the_table_are_not_below_compiled_figures():
    rows = re.findall(r"\| ([\d.]+) of [\d.]+ \| ([\d.]+) \|", (ROOT / "docs" / "plan.md").read_text())
    assert len(rows) == 7
    for compiled, estimated in rows:
        assert float(compiled) <= float(estimated) < 1.12 * float(compiled)
