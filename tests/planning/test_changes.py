"""A config that does not divide gets flags that do, and one that does not fit gets the smallest change that does."""

import dataclasses
import pathlib

import pytest

from dmm_jax.config.files import read_config
from dmm_jax.planning import changes, compiler, devices, plan, requirements
from dmm_jax.planning.program import Program
from dmm_jax.verbs import main as cli
from dmm_jax.verbs import plan as plan_verb

MIB = 2.0**20
SD15 = str(pathlib.Path(plan.__file__).parents[2] / "configs" / "sd15.py")


@pytest.fixture
def set_device_memory(monkeypatch):
    """Returns `f(mib, kind)`, which gives a kind of device so much memory."""

    def set_memory(mib, kind="H100"):
        device = dataclasses.replace(devices.DEVICES[kind], memory=mib * MIB)
        monkeypatch.setitem(devices.DEVICES, kind, device)

    return set_memory


def arrays_mib(config, topology):
    """Returns the MiB per device of the step's arguments and gradients."""
    program = Program.on_topology(config, topology, "sd15", compiled=False)
    return sum(program.array_bytes().values()) / MIB


def test_fsdp_must_not_span_tpu_slices(config):
    config.mesh.fsdp = 8
    with pytest.raises(ValueError, match="fsdp=8 would span several TPU slices of 4 devices each"):
        plan.plan(config, "v5e:2x2*2", compiled=False)


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(config):
    config.batch_size = 36
    with pytest.raises(ValueError, match="Use 32") as refused:
        plan.plan(config, "gpu:8x80GB")
    assert "this divides: --config.mesh.teacher=1" not in str(refused.value)
    assert str(refused.value).endswith("--config.batch_size=32.")
    config.batch_size, config.validation_size = 32, 3
    with pytest.raises(ValueError, match="validation_size 3 cannot be divided") as refused:
        plan.plan(config, "gpu:8x80GB")
    assert "--config.validation_size=8" in str(refused.value)


def test_the_suggested_flags_divide():
    topology = devices.topology("v5e:4x4")
    suggestions = changes.dividing_flags(read_config(SD15), topology)
    assert suggestions == [
        "--config.mesh.teacher=8 --config.mesh.data=0 --config.mesh.fsdp=1",
        "--config.batch_size=128",
    ]
    for flags in suggestions:
        changes.check_layout(read_config(SD15, flags.split()), topology)


@pytest.fixture
def estimate_by_formula(monkeypatch):
    """Replaces the estimate: temporaries of 1 MiB per image at once; 1/2 or 1/4 of that with recomputation."""

    def estimate(program, target):
        share = {"none": 1, "finest": 2, "all": 4}[program.config.remat]
        images = program.config.batch_size / program.config.gradient_accumulation / target.count
        return requirements.StepCost(program.array_bytes() | {"temporaries": images * MIB / share}, 1.0, [])

    monkeypatch.setattr(plan, "estimate", estimate)
    monkeypatch.setattr(Program, "flops", lambda self: 1.0)


@pytest.mark.parametrize(
    "spare_mib, flags",
    [
        (16.1, "--config.remat=finest"),
        (8.1, "--config.remat=all"),
        (4.1, "--config.remat=all --config.gradient_accumulation=2"),
        (0.6, "--config.remat=all --config.gradient_accumulation=16"),  # One image per teacher at once.
    ],
)
def test_the_smallest_change_fits(config, estimate_by_formula, set_device_memory, spare_mib, flags):
    set_device_memory(arrays_mib(config, "gpu:1x80GB") + spare_mib)
    assert not plan.plan(config, "gpu:1x80GB").fits
    lines = []
    change, planned = plan.smallest_change(config, "gpu:1x80GB", say=lines.append)
    assert change == flags and planned.fits
    assert len(lines) <= 12  # Hopeless changes are not estimated.


def test_the_smallest_changes_come_first(config):
    config.batch_size = 16
    flags = [change.flags for change in changes.candidates(config, "gpu:4x80GB")]
    assert flags[:5] == [
        "--config.remat=finest",
        "--config.gradient_accumulation=2",
        "--config.mesh.teacher=2",
        "--config.mesh.fsdp=2",
        "--config.remat=all",
    ]
    assert len(set(flags)) == len(flags)
    on_larger = [each.startswith("--topology=gpu:") for each in flags]
    assert on_larger == sorted(on_larger) and any(on_larger)


def test_only_changes_that_can_run_are_candidates(config):
    config.batch_size = 2
    flags = [change.flags for change in changes.candidates(config, "gpu:1x80GB")]
    assert "--config.remat=all" in flags
    assert "--topology=gpu:2x80GB --config.mesh.fsdp=2" not in flags  # One image per teacher cannot be divided.
    assert not any("gradient_accumulation" in each or "batch_size" in each for each in flags)


@pytest.mark.parametrize(
    "topology, batch_size, flags",
    [("gpu:8x80GB", 64, "--config.mesh.teacher=4"), ("gpu:1x80GB", 16, "--config.teachers_in_host_memory=True")],
)
def test_teachers_move_if_they_are_the_largest_part(
    config, estimate_by_formula, set_device_memory, topology, batch_size, flags
):
    config.teachers = tuple((f"{name}{k}", path) for k in range(4) for name, path in config.teachers)
    config.batch_size, config.remat = batch_size, "all"
    memory_together = plan.plan(config, topology).memory
    set_device_memory((sum(memory_together.values()) - 0.6 * memory_together["teachers"]) / MIB)
    change, planned = plan.smallest_change(config, topology)
    assert change == flags and planned.fits


@pytest.mark.skipif(not compiler.is_installed(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_only_changes_whose_estimate_fits_are_compiled(config, estimate_by_formula, set_device_memory, monkeypatch):
    set_device_memory(arrays_mib(config, "v5e:2x2") + 4.1, "v5e")
    compiled = []

    def measure(program, target, full_effort):
        """Finds the first program too large, and agrees with the estimate about all later ones."""
        compiled.append(program.config.remat)
        cost = plan.estimate(program, target)
        return cost._replace(memory={"temporaries": 2 * target.device.memory}) if len(compiled) == 1 else cost

    monkeypatch.setattr(plan, "measure", measure)
    change, planned = plan.smallest_change(config, "v5e:2x2")
    assert planned.fits and len(compiled) == 2 and compiled[0] == "finest" and change != "--config.remat=finest"


def test_hopeless_changes_are_not_estimated(config, set_device_memory):
    set_device_memory(0.1)
    lines = []
    assert plan.smallest_change(config, "gpu:1x80GB", say=lines.append) is None and lines == []


def test_a_plan_that_does_not_fit_exits_1_and_prints_the_change(
    capsys, config, estimate_by_formula, set_device_memory, monkeypatch
):
    set_device_memory(arrays_mib(config, "gpu:1x80GB") + 16.1)
    monkeypatch.setattr(plan_verb, "read_config", lambda *_: config)
    assert cli.main(["plan", "--config=x.py"]) == 1
    output = capsys.readouterr()
    assert "DOES NOT FIT" in output.out and "It fits with --config.remat=finest" in output.err
