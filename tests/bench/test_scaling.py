"""The sweep over numbers of devices: its rows, its survival of failures, and one real row."""

import json
import os
import pathlib
import subprocess
import types

import jax
import pytest
from PIL import Image

from dmm_jax.bench import jobs, networks, scaling, table, work
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.config.files import read_config
from dmm_jax.models.unet_config import merged_config
from dmm_jax.planning.devices import GIB
from dmm_jax.runtime.errors import UserError
from dmm_jax.verbs import main as cli
from tests.bench.test_jobs import CONTRACT

OUT_OF_MEMORY = "Traceback ...\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory\nMore of it."


def config(num_teachers=8, batch_size=16):
    values = jobs.get_config()
    values.teachers = values.teachers[:num_teachers]
    values.batch_size, values.dtype = batch_size, "float32"
    return values


@pytest.fixture
def children(monkeypatch):
    """Fakes eight devices and the children, which reach nine tenths of linear speed, or lack memory with `fsdp`.

    Returns a list that receives (mesh, batch size, devices) of each child.
    """
    started = []

    def run(command, **_):
        if command[1] == "-c":
            return types.SimpleNamespace(returncode=0, stdout="8\n", stderr="")
        options = dict(argument.split("=", 1) for argument in command if argument.startswith("--") and "=" in argument)
        child = read_config(options["--config"])
        mesh = {axis: child.mesh[axis] for axis in ("teacher", "data", "fsdp")}
        started.append((mesh, child.batch_size, int(options["--devices"])))
        if child.mesh.fsdp > 1:
            return types.SimpleNamespace(returncode=1, stdout="", stderr=OUT_OF_MEMORY)
        if child.mesh.data == 8:
            raise subprocess.TimeoutExpired(command, 1)
        speed = 10.0 * (1.0 if child.batch_size == 16 else 0.9 * child.batch_size / 16)
        row = {"job": "train", "images_per_s": speed, "mesh": mesh}
        return types.SimpleNamespace(returncode=0, stdout=f"words\n{json.dumps(row)}\n", stderr="")

    monkeypatch.setattr(scaling.subprocess, "run", run)
    return started


def test_layouts_are_the_different_ways_to_divide_the_work():
    eight = scaling.layouts(8, 8)
    assert {name: tuple(mesh.values()) for name, mesh in eight.items()} == {
        "teacher": (8, 1, 1), "data": (1, 8, 1), "teacher x data 2": (4, 2, 1), "fsdp": (1, 1, 8),
    }  # fmt: skip
    assert list(scaling.layouts(8, 4)) == ["data", "teacher x data 2", "fsdp"]
    assert list(scaling.layouts(2, 8)) == [
        "teacher",
        "data",
        "fsdp",
    ]  # "teacher x data 2" is 1 x 2 x 1, which is "data".
    assert list(scaling.layouts(3, 6)) == ["teacher", "data", "fsdp"]
    assert len(scaling.layouts(1, 8)) == 1
    assert scaling.device_counts(8) == [1, 8, 4, 2] and scaling.device_counts(6) == [1, 6, 4, 2]


def test_failed_rows_have_errors_and_are_measured_by_the_next_sweep(children, tmp_path):
    results, lines = str(tmp_path / "rows.jsonl"), []
    rows = scaling.scaling(config(), results=results, say=lines.append)
    assert rows == lines and len(rows) == len(children) == 1 + 4 + 4 + 3
    for mesh, batch_size, devices in children:
        assert mesh["teacher"] * mesh["data"] * mesh["fsdp"] == devices and batch_size == 16 * devices
    by_name = {(row["layout"], row["devices"]): row for row in rows}
    assert by_name["teacher", 8]["times_one_device"] == pytest.approx(7.2)
    assert "Out of memory" in by_name["fsdp", 8]["failed"] and "times_one_device" not in by_name["fsdp", 8]
    assert by_name["data", 8]["failed"] == f"took longer than {scaling.LIMIT_S} s"
    text = table.render(rows, scaling.COLUMNS)
    assert "teacher 4 x data 2" in text and "RESOURCE_EXHAUSTED" in text

    measured = len(children)
    second = scaling.scaling(config(), results=results, devices=[1, 8])
    assert [mesh["fsdp"] * mesh["data"] for mesh, *_ in children[measured:]] == [8, 8]  # The failed rows.
    assert [row for row in second if "failed" not in row] == [
        row for row in rows if "failed" not in row and row["devices"] in (1, 8)
    ]
    scaling.scaling(config(batch_size=32), results=results, devices=[1])
    assert len(children) == measured + 3  # Another config is another row.


def test_damaged_results_of_an_earlier_sweep_are_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"devices": 1}\n{"devi')
    with pytest.raises(UserError, match="rows.jsonl, line 2 is not JSON"):
        scaling._read(str(tmp_path / "rows.jsonl"))


def test_the_verb_prints_rows_and_draws_a_light_and_a_dark_figure(children, tmp_path, capsys):
    command = ["bench", "scaling", "--config.batch_size=16", "--config.dtype=float32"]
    assert cli.main([*command, "--json", "--figure", str(tmp_path / "scaling.png")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["devices"] for row in rows] == [1] + 4 * [8] + 4 * [4] + 3 * [2]
    light, dark = (Image.open(tmp_path / name).convert("RGBA") for name in ("scaling.png", "scaling_dark.png"))
    assert light.size == dark.size and light.tobytes() != dark.tobytes()
    assert cli.main([*command, "--devices", "1,16"]) == 1
    assert "between 1 and the 8 of this machine" in capsys.readouterr().err
    assert cli.main(["bench", "train", "--devices", "1,2"]) == 1


def test_a_row_of_two_devices_keeps_the_contract_and_adds_up(monkeypatch):
    """Two fake devices have one teacher each, and send only gradients and errors."""
    two_devices = "--xla_force_host_platform_device_count=2 --xla_llvm_disable_expensive_passes=true"
    flags = f"{os.environ['XLA_FLAGS']} {two_devices}"
    settings = {
        "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert scaling._device_count() == 2
    mesh = {"teacher": 2, "data": 1, "fsdp": 1}
    child_config = scaling._with_layout(config(2, batch_size=2), 2, mesh)
    row = scaling._measure_in_child(child_config, "tiny", 1, 2, "")
    assert row.get("failed") is None and row.keys() >= CONTRACT
    assert (row["mesh"], row["batch"], row["num_devices"]) == (mesh, 4, 2)
    base = networks.abstract_checkpoint("tiny")
    merged = merged_config(base.unet_config, 2)
    assert row["images_per_s"] == pytest.approx(4 / row["step_s"])
    assert row["tflop_per_s"] == pytest.approx(row["images_per_s"] * work.train_tflop(base, merged))
    assert row["share_of_peak"] == pytest.approx(row["tflop_per_s"] / row["matmul_peak_tflop_per_s"] / 2)
    teacher_gb, student_gb = (
        sum(leaf.size for leaf in jax.tree.leaves(abstract_params("unet", values))) * 4 / GIB
        for values in (base.unet_config, merged)
    )
    assert row["teacher_gb"] == pytest.approx(teacher_gb)
    assert row["sent_gb"] == pytest.approx(student_gb, rel=1e-3)  # An all-reduce sends a half, twice.
    assert row["planned_memory_gb"] > row["teacher_gb"] and "collective_share" not in row  # CPUs record no kernels.
