"""Plans: memory equals that of real arrays, no checkpoint is needed, and a plan that does not fit suggests a change."""

import collections
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from dmm_jax import distillation as definitions
from dmm_jax import train
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config import options as config_lib
from dmm_jax.config.files import read_config
from dmm_jax.distill import incremental, student, teachers
from dmm_jax.distill import step as distill_step
from dmm_jax.models.unet_2d_condition import merged_config
from dmm_jax.planning import changes, compiler, devices, flops, memory, plan, requirements, text
from dmm_jax.planning.collectives import Collective
from dmm_jax.planning.program import Program
from dmm_jax.runtime import sharding
from dmm_jax.verbs import main as cli
from dmm_jax.verbs import plan as plan_verb
from tests import worlds

MIB = 2.0**20
LIBTPU = pytest.mark.skipif(not compiler.is_installed(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
ROOT = pathlib.Path(plan.__file__).parents[2]
SD15 = str(ROOT / "configs" / "sd15.py")


def tiny_config(tiny):
    """Returns a config of two teachers of the tiny world, 32 images per step."""
    _, shared = tiny
    config = shared.copy_and_resolve_references()
    config.validation_size = 0
    config.batch_size = 32
    return config


@pytest.fixture
def config(tiny):
    return tiny_config(tiny)


@pytest.fixture(scope="module")
def plan_of_one(tiny):
    """The plan of the unchanged config on one large GPU."""
    return plan.plan(tiny_config(tiny), "gpu:1x80GB")


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


# Memory and work.


def test_planned_memory_equals_that_of_the_arrays_of_train(tiny, config, plan_of_one):
    paths, _ = tiny
    base = open_checkpoint(paths["base"])
    checkpoints = {name: open_checkpoint(paths[name]) for name in worlds.NAMES}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    targets = incremental.lessons(checkpoints, None, 0)
    frozen, encoders = teachers.put_teachers(base, targets, base.unet_config, mesh, jnp.float32)
    own_encoders = frozen.pop("text")
    student_config = merged_config(base.unet_config, 2)
    style = student.style_params(student_config, "zero", 0)
    params = student.put_student([base.params("unet")], style, student_config, mesh)
    state = student.make_state({"student": params}, student.make_optimizers(config), mesh, 0.0)

    def num_bytes(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    expected = {
        "student": num_bytes(params),
        "moments": num_bytes(state["opt_state"]),
        "teachers": num_bytes(frozen),
        "text encoders": num_bytes((encoders, own_encoders)),
        "batch": 32 * (8 * 8 * 4 * 4 + 77 * 4 + 6 * 4),  # Latents, token ids, time ids.
    }
    assert {kind: plan_of_one.memory[kind] for kind in expected} == pytest.approx(expected, rel=1e-6)


def test_a_discriminator_adds_parameters_moments_and_gradients(config):
    config.adversarial.weight = 0.01
    gradients = {}
    for train_backbone in (True, False):
        config.adversarial.train_backbone = train_backbone
        trained, fixed = definitions.abstract_discriminator(config, open_checkpoint(config.base))
        trained_bytes, counters = memory.total(trained), 2 * 4  # AdamW and its schedule count their updates.
        planned = plan.plan(config, "gpu:1x80GB").memory
        assert planned["discriminator"] == pytest.approx(3 * trained_bytes, abs=counters)
        assert planned["gradients"] == pytest.approx(planned["student"] + trained_bytes)
        gradients[train_backbone] = planned["gradients"]
    assert gradients[True] > gradients[False] and fixed


def test_meshes_divide_what_they_shard(config, plan_of_one):
    config.mesh.teacher, config.mesh.fsdp = 2, 2
    alone, four = plan_of_one.memory, plan.plan(config, "gpu:4x80GB").memory
    unet = abstract_params("unet", merged_config(open_checkpoint(config.base).unet_config, 2))
    small = [leaf.size for leaf in jax.tree.leaves(unet) if leaf.ndim < 2 or leaf.size < sharding.SMALLEST_SHARDED]
    copied = sum(small) * 4
    assert four["student"] == pytest.approx((alone["student"] - copied) / 4 + copied)
    assert four["teachers"] == alone["teachers"] / 2
    assert four["text encoders"] == alone["text encoders"]
    assert four["batch"] == alone["batch"] / 4


def collective_dtypes(jaxpr):
    """Returns {(collective, *axes): dtypes of the convolution kernels that it moves}."""
    dtypes = collections.defaultdict(set)
    for equation in jaxpr.eqns:
        axes = equation.params.get("axis_name")
        if equation.primitive.name in ("all_gather", "reduce_scatter") and equation.invars[0].aval.ndim == 4:
            axes = axes if isinstance(axes, tuple) else (axes,)
            dtypes[equation.primitive.name, *axes].add(str(equation.invars[0].aval.dtype))
        for inner in flops.inner_jaxprs(equation):
            for key, inner_dtypes in collective_dtypes(inner).items():
                dtypes[key] |= inner_dtypes
    return dtypes


def test_kernels_travel_in_bfloat16_and_gradients_in_float32(config):
    """Exception: along `fsdp` gradients are summed in every micro-batch, in bfloat16."""
    config.dtype, config.mesh.teacher, config.mesh.data, config.mesh.fsdp = "bfloat16", 2, 2, 2
    program = Program.on_mesh(config, "sd15", "gpu", sharding.abstract_mesh(**config.mesh, num_devices=8))
    function, arguments = program.gradients("xla")
    gathered = {("all_gather", axis): {"bfloat16"} for axis in sharding.AXES}
    once_per_step = {("reduce_scatter", axis): {"float32"} for axis in distill_step.ONCE}
    per_micro_batch = {("reduce_scatter", "fsdp"): {"bfloat16"}}
    dtypes = collective_dtypes(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert dtypes == gathered | once_per_step | per_micro_batch


def test_work_divides_among_devices_and_recomputation_adds_to_it(config, plan_of_one):
    config.mesh.teacher = 2
    plans = {}
    for remat in ("none", "finest", "all"):
        config.remat = remat
        plans[remat] = plan.plan(config, "gpu:4x80GB")
    assert plans["none"].flops == pytest.approx(plan_of_one.flops / 4, rel=0.05)
    none, finest, everything = (planned.flops / plans["none"].flops for planned in plans.values())
    assert none < finest < everything < 4 / 3 and everything > 1.05
    none, finest, everything = (planned.memory["temporaries"] for planned in plans.values())
    assert none > finest > everything


def test_a_missing_base_is_planned_with_the_published_networks():
    planned = plan.plan(read_config(SD15), "gpu:1xH200")
    unet = 859_520_964 * 4
    style_layers = 2 * 8 * 1280 * 1280 * 4 + 2**20
    assert unet < planned.memory["student"] < unet + style_layers
    assert any("stable-diffusion-v1-5 is not there" in line for line in planned.assumptions)
    assert "stable-diffusion-v1-5 is not there" in text.render(planned)
    # docs/log.md, step 6: `bench train` takes 60.6 GiB, with one text encoder; planned are one more for each teacher.
    own_encoders = planned.memory["text encoders"] * 8 / 9
    assert 60.6 < (sum(planned.memory.values()) - own_encoders) / 2**30 < 1.02 * 60.6


def test_the_error_for_an_unknown_architecture_lists_the_known(config):
    config.base = "nowhere"
    with pytest.raises(ValueError, match="sd15, sd21, sdxl"):
        plan.plan(config, "gpu:1x80GB", architecture="sd9")


@LIBTPU
def test_the_tpu_compiler_agrees_with_the_planned_arrays(config):
    config.dtype, config.mesh.teacher, config.mesh.fsdp = "bfloat16", 2, 2
    with jax.default_matmul_precision("default"):
        planned = plan.plan(config, "v5e:2x2")
    assert planned.method == requirements.COMPILED and planned.fits
    assert planned.memory["padding"] >= 0  # The program's arguments are the planned arrays, laid out in tiles.
    across = {row["kind"] for row in planned.to_json()["collectives"] if "teacher" in row["axes"]}
    assert {"all-gather"} < across <= {"all-gather", "reduce-scatter", "all-reduce"}


# Time.


def test_step_time_is_the_slower_of_work_and_traffic_plus_collectives(plan_of_one):
    """One second of work and of traffic at the maker's rates, then one more second on the links."""
    h100 = devices.DEVICES["H100"]
    planned = dataclasses.replace(
        plan_of_one,
        flops=h100.bf16_flops,
        bytes_accessed=h100.memory_bandwidth,
        mesh_shape={"teacher": 1, "data": 1, "fsdp": 2},
    )
    assert planned.step_s == pytest.approx(max(1 / devices.COMPUTE_SHARE, 1 / devices.BANDWIDTH_SHARE))
    gather = Collective("a", "all-gather", ("fsdp",), 2, int(2 * h100.link_bandwidth))
    assert dataclasses.replace(planned, collectives=[gather]).step_s == pytest.approx(planned.step_s + 1)


def test_collectives_beyond_a_host_take_the_network(plan_of_one):
    """Eight groups of two devices on two hosts: links join the devices of a group, the network joins teachers."""
    over_teachers = Collective("a", "all-reduce", ("teacher",), 8, 2**30)
    over_pairs = dataclasses.replace(over_teachers, axes=("fsdp",), group=2)
    topology = devices.topology("gpu:16xH100")
    planned = dataclasses.replace(
        plan_of_one,
        topology=topology,
        mesh_shape={"teacher": 8, "data": 1, "fsdp": 2},
        collectives=[over_teachers, over_pairs],
    )
    network_s, links_s = planned.parts_s["network"], planned.parts_s["collectives"]
    assert network_s == pytest.approx(over_teachers.sent / (4 * topology.device.network_bandwidth))
    assert links_s == pytest.approx(over_pairs.sent / topology.device.link_bandwidth)
    assert {row["axes"]: row["over"] for row in planned.exchanged} == {"teacher": "network", "fsdp": "links"}
    assert "GiB between hosts" in text.render(planned)
    assert any("50 GB/s a device between hosts" in line for line in requirements.roofline_assumptions(topology))


# Output.


def test_the_json_keeps_its_contract(capsys, config, tmp_path):
    experiment = tmp_path / "experiment.py"
    experiment.write_text(f"""
from dmm_jax.config.options import from_json
def get_config():
    return from_json({config_lib.to_json(config)!r})
""")
    command = ["plan", f"--config={experiment}", "--topology", "gpu:2x80GB", "--config.mesh.teacher=2"]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True and report["mesh"] == {"teacher": 2, "data": 1, "fsdp": 1}
    assert {"student", "moments", "gradients", "teachers", "text encoders", "batch"} < report["memory_gb"].keys()
    assert report["images_per_s"] == pytest.approx(32 / report["step_s"])
    assert report["hours"] == pytest.approx(6 * report["step_s"] / 3600)
    assert report["chip_hours"] == pytest.approx(2 * report["hours"])
    row = report["collectives"][0]
    assert row.keys() == {"kind", "axes", "count", "gb", "over"}
    assert (row["kind"], row["axes"], row["over"]) == ("all-gather", "teacher", "links")
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert "temporaries and their margin estimated" in output and "images/s" in output and "chip-hours" in output


def test_train_prints_the_plan_of_its_compiled_step(tiny, capsys, tmp_path):
    config = tiny[1].copy_and_resolve_references()
    config.num_steps, config.validation_size, config.checkpoint_every = 1, 0, 0
    train.run(config, tmp_path / "run")
    output = capsys.readouterr().err
    table = output[: output.index("step 1/1")]
    planned = plan.plan(config, "gpu:1x80GB", compiled=False)
    for kind in ("student", "moments", "gradients", "teachers", "text encoders"):
        assert f"  {kind:<16}{planned.memory[kind] / MIB:8.2f}\n" in table
    assert re.search(r"temporaries +[1-9]\d*\.\d+", table)
    assert f"{'products':<16}{planned.flops / 1e12:8.2f}  TFLOP" in table
    assert re.search(r"memory traffic +\d+\.\d+ +GiB\n", table)
    assert "collectives, of the compiled program: none" in table
    assert "Roofline: none, the rates of cpu are not known" in table
    assert f"checkpoints {planned.disk['checkpoints'] / MIB:.1f} MiB" in table
    assert len(table[table.index("cpu: 1 x cpu") :].splitlines()) <= 25


# Configs that do not divide.


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


# Changes that make a run fit.


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


def test_teachers_are_spread_if_they_are_the_largest_part(config, estimate_by_formula, set_device_memory):
    config.teachers = tuple((f"{name}{k}", path) for k in range(4) for name, path in config.teachers)
    config.batch_size, config.remat = 64, "all"
    memory_together = plan.plan(config, "gpu:8x80GB").memory
    set_device_memory((sum(memory_together.values()) - 0.6 * memory_together["teachers"]) / MIB)
    change, planned = plan.smallest_change(config, "gpu:8x80GB")
    assert change == "--config.mesh.teacher=4" and planned.mesh_shape["teacher"] == 4


@LIBTPU
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
