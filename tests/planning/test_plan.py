"""Plans: memory as real arrays weigh, works without checkpoints, and what does not fit is told what would."""

import collections
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from dmm_jax import train
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config.files import read_config
from dmm_jax.distill import incremental, student, teachers
from dmm_jax.distill import step as distill_step
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.state import init_state
from dmm_jax.models.unet_config import merged_config
from dmm_jax.planning import changes, collectives, compiler, devices, flops, memory, plan, requirements, text
from dmm_jax.runtime import sharding
from dmm_jax.verbs import main as cli
from dmm_jax.verbs import plan as plan_verb
from tests import worlds

MIB = 2.0**20
LIBTPU = pytest.mark.skipif(not compiler.is_here(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
ROOT = pathlib.Path(plan.__file__).parents[2]


def tiny_config(tiny):
    changed = tiny[1].copy_and_resolve_references()
    changed.validation_size = 0
    changed.batch_size = 32
    return changed


@pytest.fixture
def config(tiny):
    return tiny_config(tiny)


@pytest.fixture(scope="module")
def on_one(tiny):
    """The plan of the config, unchanged, on one large GPU."""
    return plan.plan(tiny_config(tiny), "gpu:1x80GB")


@pytest.fixture
def small_device(monkeypatch):
    """Makes a chip of so many MiB."""

    def shrink(mib, kind="H100"):
        device = dataclasses.replace(devices.DEVICES[kind], memory=mib * MIB)
        monkeypatch.setitem(devices.DEVICES, kind, device)

    return shrink


def held_mib(planned):
    kinds = ("student", "moments", "teachers", "text encoders", "batch")
    return {kind: planned.memory[kind] / MIB for kind in kinds}


def test_what_is_held_is_what_real_arrays_weigh(tiny, config, on_one):
    """One device: the arrays that `train` makes, weighed."""
    paths, _ = tiny
    base, others = open_checkpoint(paths["base"]), {name: open_checkpoint(paths[name]) for name in worlds.NAMES}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rows = incremental.batch_rows(others)
    stacked, frozen = teachers.put_teachers(base, rows, base.unet_config, mesh, jnp.float32)
    student_config = merged_config(base.unet_config, 2)
    style = student.style_params(student_config, "zero", 0)
    params = student.put_student([base.params("unet")], style, student_config, mesh)
    state = init_state({"student": params}, make_optimizers(config), mesh, 0.0)

    def weigh(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / MIB

    expected = {"student": weigh(params), "moments": weigh(state.student.opt_state)}
    expected |= {
        "teachers": weigh(stacked._replace(text=None)),
        "text encoders": weigh((frozen, stacked.text)),
        "batch": 32 * (8 * 8 * 4 * 4 + 77 * 4 + 6 * 4) / MIB,
    }
    assert held_mib(on_one) == pytest.approx(expected, rel=1e-6)


def test_a_discriminator_weighs_its_parameters_and_moments_and_its_head_alone_less(config):
    config.adversarial.weight = 0.01
    sizes = []
    for config.adversarial.train_backbone in (True, False):
        program = plan.Program.describe(config, "sd15", "gpu", sharding.abstract_mesh(num_devices=1))
        learns, fixed = program.definition.abstract_discriminator()
        held, counts = memory.whole(learns), 2 * 4  # AdamW counts its updates, and its schedule's.
        found = plan.plan(config, "gpu:1x80GB").memory
        assert found["discriminator"] == pytest.approx(3 * held, abs=counts)
        sizes.append(found["gradients"])
        assert sizes[-1] == pytest.approx(found["student"] + held)
    assert sizes[0] > sizes[1] and fixed


def test_meshes_divide_what_they_shard(config, on_one):
    config.mesh.teacher, config.mesh.fsdp = 2, 2
    one, four = on_one.memory, plan.plan(config, "gpu:4x80GB").memory
    unet = abstract_params("unet", merged_config(open_checkpoint(config.base).unet_config, 2))
    small = [leaf.size for leaf in jax.tree.leaves(unet) if leaf.ndim < 2 or leaf.size < sharding.SMALLEST_SHARDED]
    whole = sum(small) * 4  # They are copied.
    assert four["student"] == pytest.approx((one["student"] - whole) / 4 + whole)
    assert four["teachers"] == one["teachers"] / 2
    assert four["text encoders"] == one["text encoders"]
    assert four["batch"] == one["batch"] / 4


def test_kernels_travel_in_the_compute_dtype_and_gradients_are_summed_in_float32_but_along_fsdp(config):
    config.dtype, config.mesh.teacher, config.mesh.data, config.mesh.fsdp = "bfloat16", 2, 2, 2
    program = plan.Program.describe(config, "sd15", "gpu", sharding.abstract_mesh(**config.mesh, num_devices=8))
    function, arguments = program.gradients("xla")
    found = collections.defaultdict(set)

    def look(jaxpr):
        for equation in jaxpr.eqns:
            axes = equation.params.get("axis_name")
            if equation.primitive.name in ("all_gather", "reduce_scatter") and equation.invars[0].aval.ndim == 4:
                axes = axes if isinstance(axes, tuple) else (axes,)
                found[equation.primitive.name, *axes].add(str(equation.invars[0].aval.dtype))
            for inner in flops.inner_jaxprs(equation):
                look(inner)

    look(jax.make_jaxpr(function)(*arguments).jaxpr)
    gathered = {("all_gather", axis): {"bfloat16"} for axis in sharding.AXES}
    once = {("reduce_scatter", axis): {"float32"} for axis in distill_step.ONCE}
    assert found == gathered | once | {("reduce_scatter", "fsdp"): {"bfloat16"}}


def test_work_divides_among_devices_and_recomputation_adds_to_it(config, on_one):
    config.mesh.teacher = 2
    four = plan.plan(config, "gpu:4x80GB")
    assert four.flops == pytest.approx(on_one.flops / 4, rel=0.05)
    plans = [four]
    for config.remat in ("finest", "all"):
        plans.append(plan.plan(config, "gpu:4x80GB"))
    none, finest, everything = (planned.flops / four.flops for planned in plans)
    assert none < finest < everything < 4 / 3 and everything > 1.05
    none, finest, everything = (planned.memory["temporaries"] for planned in plans)
    assert none > finest > everything


def test_the_json_keeps_its_contract(capsys, config, tmp_path):
    experiment = tmp_path / "experiment.py"
    experiment.write_text(f"""
from dmm_jax.config.options import from_json
def get_config():
    return from_json({plan.config_lib.to_json(config)!r})
""")
    argv = ["plan", f"--config={experiment}", "--topology", "gpu:2x80GB", "--json", "--config.mesh.teacher=2"]
    assert cli.main(argv) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is True and report["mesh"] == {"teacher": 2, "data": 1, "fsdp": 1}
    assert {"student", "moments", "gradients", "teachers", "text encoders", "batch"} < report["memory_gb"].keys()
    assert report["images_per_s"] == pytest.approx(32 / report["step_s"])
    assert report["hours"] == pytest.approx(6 * report["step_s"] / 3600)
    assert report["chip_hours"] == pytest.approx(2 * report["hours"])
    row = report["collectives"][0]
    assert row == {"kind": "all-gather", "axes": "teacher", "over": "links"} | {
        key: row[key] for key in ("count", "gb")
    }
    assert cli.main(argv[:-2] + argv[-1:]) == 0
    said = capsys.readouterr().out
    assert "temporaries and their margin estimated" in said and "images/s" in said and "chip-hours" in said


def test_the_roofline_is_the_slower_of_work_and_traffic_and_then_the_collectives(on_one):
    planned = dataclasses.replace(
        on_one, flops=989e12, bytes_accessed=3350e9, mesh_shape={"teacher": 1, "data": 1, "fsdp": 2}
    )
    assert planned.step_s == pytest.approx(max(1 / devices.COMPUTE_SHARE, 1 / devices.BANDWIDTH_SHARE))
    link = devices.DEVICES["H100"].link_bandwidth
    row = collectives.Collective("a", "all-gather", ("fsdp",), 2, int(2 * link), 1)
    assert dataclasses.replace(planned, collectives=[row]).step_s == pytest.approx(planned.step_s + 1)


def test_no_checkpoint_needs_to_be_there_and_an_h200_holds_what_it_was_measured_to(config):
    """docs/log.md, step 6: `bench train` takes 60.6 GiB, its teachers without text encoders of their own."""
    planned = plan.plan(read_config(str(ROOT / "configs" / "sd15.py")), "gpu:1xH200")
    unet = 859_520_964 * 4
    assert unet < planned.memory["student"] < unet + 2 * 8 * 1280 * 1280 * 4 + 2**20  # And the style's two layers.
    assert any("stable-diffusion-v1-5 is not there" in line for line in planned.assumptions)
    assert "stable-diffusion-v1-5 is not there" in text.render(planned)
    lent = planned.memory["text encoders"] * 8 / 9  # Planned are the base's and one for each of eight teachers.
    assert 60.6 < (sum(planned.memory.values()) - lent) / 2**30 < 1.02 * 60.6


def test_an_unknown_architecture_is_told_which_there_are(config):
    config.base = "nowhere"
    with pytest.raises(ValueError, match="sd15, sd21, sdxl"):
        plan.plan(config, "gpu:1x80GB", architecture="sd9")


def test_fsdp_does_not_lie_across_slices(config):
    config.mesh.fsdp = 8
    with pytest.raises(ValueError, match="fsdp=8 would lie across TPU slices, of 4 devices each"):
        plan.plan(config, "v5e:2x2*2", compiled=False)


def test_the_network_counts_beyond_a_host(on_one):
    """Eight teachers' groups of two on two hosts: pairs are joined by links, teachers by the network."""
    row = collectives.Collective("a", "all-reduce", ("teacher",), 8, 2**30)
    pairs = dataclasses.replace(row, axes=("fsdp",), group=2)
    topology = devices.topology("gpu:16xH100")
    planned = dataclasses.replace(
        on_one, topology=topology, mesh_shape={"teacher": 8, "data": 1, "fsdp": 2}, collectives=[row, pairs]
    )
    assert planned.parts_s["network"] == pytest.approx(row.sent / (4 * topology.device.network_bandwidth))
    assert planned.parts_s["collectives"] == pytest.approx(pairs.sent / topology.device.link_bandwidth)
    assert {one["axes"]: one["over"] for one in planned.exchanged} == {"teacher": "network", "fsdp": "links"}
    assert "GiB between hosts" in text.render(planned)
    assert any("50 GB/s a device between hosts" in line for line in requirements.roofline_assumptions(topology))


def test_what_train_refuses_plan_refuses_and_names_flags_that_run(config):
    config.batch_size = 36
    with pytest.raises(ValueError, match="Use 32") as refused:
        plan.plan(config, "gpu:8x80GB")
    assert "this divides: --config.mesh.teacher=1" not in str(refused.value)
    assert str(refused.value).endswith("--config.batch_size=32.")
    config.batch_size, config.validation_size = 32, 3
    with pytest.raises(ValueError, match="validation_size 3 cannot be divided") as refused:
        plan.plan(config, "gpu:8x80GB")
    assert "--config.validation_size=8" in str(refused.value)


def test_the_flags_that_are_named_divide():
    config = read_config(str(ROOT / "configs" / "sd15.py"))
    named = changes.divisible(config, devices.topology("v5e:4x4"))
    assert named == [
        "--config.mesh.teacher=8 --config.mesh.data=0 --config.mesh.fsdp=1",
        "--config.batch_size=128",
    ]
    for flags in named:
        options = read_config(str(ROOT / "configs" / "sd15.py"), flags.split())
        changes.check_layout(options, devices.topology("v5e:4x4"))


@pytest.fixture
def by_formula(monkeypatch):
    """Has a step need a MiB for each image at once, a half or a quarter of it with recomputation; nothing is traced."""

    def estimate(program, held, where):
        share = {"none": 1, "finest": 2, "all": 4}[program.config.remat]
        images = program.config.batch_size / program.config.gradient_accumulation / where.count
        return {"memory": held | {"temporaries": images * MIB / share}, "bytes_accessed": 1.0, "collectives": []}

    monkeypatch.setattr(plan, "estimate", estimate)
    monkeypatch.setattr(plan.Program, "flops", lambda self: 1.0)


def held_by(config, topology):
    program = plan.Program.planned(config, topology, "sd15", compiled=False)
    return sum(program.held().values()) / MIB


@pytest.mark.parametrize(
    "spare, wanted",
    [
        (16.1, "--config.remat=finest"),
        (8.1, "--config.remat=all"),
        (4.1, "--config.remat=all --config.gradient_accumulation=2"),
        (0.6, "--config.remat=all --config.gradient_accumulation=16"),  # One image of each teacher at once.
    ],
)
def test_what_does_not_fit_is_told_the_smallest_change_that_does(config, by_formula, small_device, spare, wanted):
    small_device(held_by(config, "gpu:1x80GB") + spare)
    assert not plan.plan(config, "gpu:1x80GB").fits
    tried = []
    what, changed = plan.smallest_change(config, "gpu:1x80GB", say=tried.append)
    assert what == wanted and changed.fits
    assert len(tried) <= 12  # What is hopeless is passed over.


def test_the_smallest_changes_come_first(config):
    config.batch_size = 16
    first = [change.what for change, _ in zip(changes.candidates(config, "gpu:4x80GB"), range(5), strict=False)]
    assert first == [
        "--config.remat=finest",
        "--config.gradient_accumulation=2",
        "--config.mesh.teacher=2",
        "--config.mesh.fsdp=2",
        "--config.remat=all",
    ]
    whats = [change.what for change in changes.candidates(config, "gpu:4x80GB")]
    assert len(set(whats)) == len(whats)
    machines = [what.startswith("--topology=gpu:") for what in whats]
    assert machines == sorted(machines) and any(machines)


@LIBTPU
def test_only_what_the_estimate_finds_to_fit_is_compiled(config, by_formula, small_device, monkeypatch):
    small_device(held_by(config, "v5e:2x2") + 4.1, "v5e")
    compiled = []

    def measured(program, held, where, full_effort):
        compiled.append(program.config.remat)
        refused = {"fits": False} if len(compiled) == 1 else {}  # The compiler thinks otherwise, the first time.
        return plan.estimate(program, held, where) | refused

    monkeypatch.setattr(plan, "measure", measured)
    tried = []
    what, planned = plan.smallest_change(config, "v5e:2x2", say=tried.append)
    assert planned.fits and len(compiled) == 2 and compiled[0] == "finest" and what != "--config.remat=finest"


def test_a_plan_that_does_not_fit_exits_1_and_says_the_change(capsys, config, by_formula, small_device, monkeypatch):
    small_device(held_by(config, "gpu:1x80GB") + 16.1)
    monkeypatch.setattr(plan_verb, "read_config", lambda *_: config)
    assert cli.main(["plan", "--config=x.py"]) == 1
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out and "It fits with --config.remat=finest" in said.err


def test_nothing_that_fits_is_none_and_what_is_hopeless_is_not_traced(config, small_device):
    small_device(0.1)
    tried = []
    assert plan.smallest_change(config, "gpu:1x80GB", say=tried.append) is None and tried == []


def test_changes_keep_to_what_can_run(config):
    config.batch_size = 2
    whats = [change.what for change in changes.candidates(config, "gpu:1x80GB")]
    assert "--config.remat=all" in whats
    assert "--topology=gpu:2x80GB --config.mesh.fsdp=2" not in whats  # One image a teacher cannot be divided.
    assert not any("gradient_accumulation" in what or "batch_size" in what for what in whats)


def test_teachers_are_spread_where_they_weigh_most(config, by_formula, small_device):
    config.teachers = tuple((f"{name}{k}", path) for k in range(4) for name, path in config.teachers)
    config.batch_size, config.remat = 64, "all"
    together = plan.plan(config, "gpu:8x80GB")
    small_device((sum(together.memory.values()) - 0.6 * together.memory["teachers"]) / MIB)
    what, changed = plan.smallest_change(config, "gpu:8x80GB")
    assert what == "--config.mesh.teacher=4" and changed.mesh_shape["teacher"] == 4


def test_train_prints_plans_table_of_its_compiled_step(tiny, capsys, tmp_path):
    config = tiny[1].copy_and_resolve_references()
    config.num_steps, config.validation_size, config.checkpoint_every = 1, 0, 0
    train.run(config, tmp_path / "run")
    said = capsys.readouterr().err
    said = said[: said.index("step 1/1")]  # Before the first step.
    planned = plan.plan(config, "gpu:1x80GB", compiled=False)
    for kind in ("student", "moments", "gradients", "teachers", "text encoders"):
        assert f"  {kind:<16}{planned.memory[kind] / MIB:8.2f}\n" in said
    assert re.search(r"temporaries +[1-9]\d*\.\d+", said)
    assert f"{'products':<16}{planned.flops / 1e12:8.2f}  TFLOP" in said
    assert re.search(r"memory traffic +\d+\.\d+ +GiB\n", said)
    assert "collectives, of the compiled program: none" in said
    assert "Roofline: none, the rates of cpu are not known" in said
    assert f"checkpoints {planned.disk['checkpoints'] / MIB:.1f} MiB" in said
    assert len(said[said.index("cpu: 1 x cpu") :].splitlines()) <= 25


@LIBTPU
def test_the_tpus_compiler_agrees_with_what_is_held(config):
    config.dtype, config.mesh.teacher, config.mesh.fsdp = "bfloat16", 2, 2
    with jax.default_matmul_precision("default"):
        planned = plan.plan(config, "v5e:2x2")
    assert planned.method == requirements.COMPILED and planned.fits
    assert planned.memory["padding"] >= 0  # What it is given is what we count, laid out in tiles.
    across = {row["kind"] for row in planned.to_json()["collectives"] if "teacher" in row["axes"]}
    assert {"all-gather"} < across <= {"all-gather", "reduce-scatter", "all-reduce"}
