"""Plans: memory as real arrays weigh, works without checkpoints, and what does not fit is told what would."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from dmm_jax import cli, plan, plan_text, sharding, train
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.distill import incremental, student, teachers
from dmm_jax.models.unet_2d_condition import merged_config
from dmm_jax.planning import compiler, devices, memory
from tests import worlds

MIB = 2.0**20


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
    lessons = incremental.lessons(others, None, 0)
    frozen, encoders = teachers.put_teachers(base, lessons, base.unet_config, mesh, jnp.float32)
    student_config = merged_config(base.unet_config, 2)
    style = student.style_params(student_config, "zero", 0)
    params = student.put_student([base.params("unet")], style, student_config, mesh)
    state = student.make_state({"student": params}, student.make_optimizers(config), mesh, 0.0)

    def weigh(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / MIB

    expected = {"student": weigh(params), "moments": weigh(state["opt_state"]), "teachers": weigh(frozen)}
    expected |= {"text encoders": weigh(encoders), "batch": 32 * (8 * 8 * 4 * 4 + 77 * 4 + 6 * 4) / MIB}
    assert held_mib(on_one) == pytest.approx(expected, rel=1e-6)


def test_a_discriminator_weighs_its_parameters_and_moments_and_its_head_alone_less(config):
    config.adversarial.weight = 0.01
    sizes = []
    for config.adversarial.train_backbone in (True, False):
        learns, fixed = train.abstract_discriminator(config, open_checkpoint(config.base))
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
    whole = sum(leaf.size for leaf in jax.tree.leaves(unet) if leaf.size < 1024) * 4  # Small leaves are copied.
    assert four["student"] == pytest.approx((one["student"] - whole) / 2 + whole)
    assert four["teachers"] == one["teachers"] / 2
    assert four["text encoders"] == one["text encoders"]
    assert four["batch"] == one["batch"] / 4


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
from dmm_jax.config import from_json
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
    assert report["collectives"][0] == {"kind": "all-reduce", "axes": "teacher"} | {
        key: report["collectives"][0][key] for key in ("count", "gb")
    }
    assert cli.main(argv[:-2] + argv[-1:]) == 0
    said = capsys.readouterr().out
    assert "temporaries estimated" in said and "images/s" in said and "chip-hours" in said


def test_the_roofline_is_the_slower_of_work_and_traffic_and_then_the_collectives(on_one):
    planned = dataclasses.replace(on_one, flops=989e12, bytes_accessed=3350e9)
    assert planned.step_s == pytest.approx(max(1 / devices.COMPUTE_SHARE, 1 / devices.BANDWIDTH_SHARE))
    link = devices.DEVICES["H100"].link_bandwidth
    row = plan.collectives_lib.Collective("a", "all-gather", ("fsdp",), 2, int(2 * link), 1)
    assert dataclasses.replace(planned, collectives=[row]).step_s == pytest.approx(planned.step_s + 1)


def test_no_checkpoint_needs_to_be_there(config):
    config.base, config.teachers = "nowhere", tuple((f"s{k}", "nowhere") for k in range(4))
    config.data.resolution = 64
    planned = plan.plan(config, "gpu:1x80GB")
    unet = 859_520_964 * 4
    assert unet < planned.memory["student"] < unet + 2 * 8 * 1280 * 1280 * 4 + 2**20  # And the style's two layers.
    assert any("nowhere is not there" in line for line in planned.assumptions)
    assert "nowhere is not there" in plan_text.render(planned)


def test_an_unknown_architecture_is_told_which_there_are(config):
    config.base = "nowhere"
    with pytest.raises(ValueError, match="sd15, sd21, sdxl"):
        plan.plan(config, "gpu:1x80GB", architecture="sd9")


def test_batches_that_do_not_divide_are_told_the_nearest(config):
    config.batch_size = 36
    with pytest.raises(ValueError, match="Use 32"):
        plan.plan(config, "gpu:8x80GB")


def test_what_does_not_fit_is_told_the_smallest_change_that_does(config, on_one, small_device):
    total = sum(on_one.memory.values()) / MIB
    small_device(total - 0.1)
    assert not plan.plan(config, "gpu:1x80GB").fits
    tried = []
    what, changed = plan.smallest_change(config, "gpu:1x80GB", say=tried.append)
    assert what == "--config.remat=finest" and changed.fits and len(tried) == 1
    config.remat = "all"
    small_device(sum(plan.plan(config, "gpu:1x80GB").memory.values()) / MIB - 0.1)
    config.remat = "none"
    what, again = plan.smallest_change(config, "gpu:1x80GB", say=tried.append)
    assert what == "--config.remat=all --config.gradient_accumulation=2" and again.fits


def test_a_plan_that_does_not_fit_exits_1_and_says_the_change(capsys, config, on_one, small_device, monkeypatch):
    small_device(sum(on_one.memory.values()) / MIB - 0.1)
    monkeypatch.setattr(cli, "read_config", lambda *_: config)
    assert cli.main(["plan", "--config=x.py"]) == 1
    said = capsys.readouterr()
    assert "DOES NOT FIT" in said.out and "It fits with --config.remat=finest" in said.err


def test_nothing_that_fits_is_none(config, small_device, monkeypatch):
    monkeypatch.setattr(plan, "changes", lambda *_: [("--config.remat=all", config, "gpu:1x80GB")])
    small_device(0.1)
    assert plan.smallest_change(config, "gpu:1x80GB") is None


def test_changes_keep_to_what_can_run(config):
    config.batch_size = 2
    whats = [what for what, *_ in plan.changes(config, "gpu:1x80GB")]
    assert "--config.remat=all" in whats
    assert "--topology=gpu:2x80GB --config.mesh.fsdp=2" not in whats  # One image a teacher cannot be divided.
    assert not any("gradient_accumulation" in what or "batch_size" in what for what in whats)


def test_teachers_are_spread_where_they_weigh_most(config, small_device):
    config.teachers = tuple((f"{name}{k}", path) for k in range(4) for name, path in config.teachers)
    config.batch_size, config.remat = 64, "all"
    together = plan.plan(config, "gpu:8x80GB")
    small_device((sum(together.memory.values()) - 0.6 * together.memory["teachers"]) / MIB)
    what, changed = plan.smallest_change(config, "gpu:8x80GB")
    assert what == "--config.mesh.teacher=8 --config.mesh.data=0" and changed.mesh_shape["teacher"] == 8


def test_train_says_what_each_device_holds(tiny, config):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    said = memory.short_table({"student": 3 * 2**30, "batch": 2**28}, mesh)
    assert "teacher 1 x data 1 x fsdp 1" in said and "3.25 GiB (student 3.00, batch 0.25)" in said
    assert len(said.splitlines()) <= 3


@pytest.mark.skipif(not compiler.is_here(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_the_tpus_compiler_agrees_with_what_is_held(config):
    config.dtype, config.mesh.teacher, config.mesh.fsdp = "bfloat16", 2, 2
    with jax.default_matmul_precision("default"):
        planned = plan.plan(config, "v5e:2x2")
    assert planned.compiled and planned.fits
    assert planned.memory["padding"] >= 0  # What it is given is what we count, laid out in tiles.
    across = {row["kind"] for row in planned.to_json()["collectives"] if "teacher" in row["axes"]}
    assert across == {"all-reduce"}
