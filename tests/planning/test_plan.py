"""Plans: memory equals that of real arrays, work divides among devices, and the printed forms keep their contract."""

import collections
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from dmm_jax import train
from dmm_jax.bench import networks as bench_networks
from dmm_jax.checkpoints.abstract import abstract_params
from dmm_jax.checkpoints.open import open_checkpoint
from dmm_jax.config.files import read_config
from dmm_jax.config.serialization import to_json
from dmm_jax.distill import incremental, student, teachers
from dmm_jax.distill import step as distill_step
from dmm_jax.distill.definition import Definition
from dmm_jax.distill.optimizer import make_optimizers
from dmm_jax.distill.state import init_state
from dmm_jax.models.unet_config import merged_config
from dmm_jax.planning import compiler, flops, memory, plan, requirements, text
from dmm_jax.planning.program import Program
from dmm_jax.runtime import sharding
from dmm_jax.verbs import main as cli
from tests import worlds

MIB = 2.0**20
SD15 = str(pathlib.Path(plan.__file__).parents[2] / "configs" / "sd15.py")


def test_planned_memory_equals_that_of_the_arrays_of_train(tiny, config, plan_of_one):
    paths, _ = tiny
    base = open_checkpoint(paths["base"])
    checkpoints = {name: open_checkpoint(paths[name]) for name in worlds.NAMES}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    rows = incremental.batch_rows(checkpoints)
    stacked = teachers.put_teachers(base, rows, base.unet_config, mesh, jnp.float32)
    frozen = teachers.put_text_encoders(base, mesh, jnp.float32)
    student_config = merged_config(base.unet_config, 2)
    style = student.style_params(student_config, "zero", 0)
    params = student.put_student([base.params("unet")], style, student_config, mesh)
    state = init_state({"student": params}, make_optimizers(config), mesh, keeps_average=False)

    def num_bytes(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    expected = {
        "student": num_bytes(params),
        "moments": num_bytes(state.student.opt_state),
        "teachers": num_bytes(stacked._replace(text=None)),
        "text encoders": num_bytes((frozen, stacked.text)),
        "batch": 32 * (8 * 8 * 4 * 4 + 77 * 4 + 6 * 4),  # Latents, token ids, time ids.
    }
    assert {kind: plan_of_one.memory[kind] for kind in expected} == pytest.approx(expected, rel=1e-6)


def test_a_discriminator_adds_parameters_moments_and_gradients(config):
    config.adversarial.weight = 0.01
    gradients = {}
    for train_backbone in (True, False):
        config.adversarial.train_backbone = train_backbone
        program = Program.on_mesh(config, "sd15", "gpu", sharding.abstract_mesh(num_devices=1))
        trained, fixed = program.definition.abstract_discriminator()
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
    once_per_step = {("reduce_scatter", axis): {"float32"} for axis in distill_step.GATHERED_ONCE}
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
    assert plans["none"].memory["temporaries"] > plans["all"].memory["temporaries"]  # "finest" saves nothing so small.


def test_a_missing_base_is_planned_with_the_published_networks():
    planned = plan.plan(read_config(SD15), "gpu:1xH200")
    unet = 859_520_964 * 4
    style_layers = 2 * 8 * 1280 * 1280 * 4 + 2**20
    assert unet < planned.memory["student"] < unet + style_layers
    assert any("stable-diffusion-v1-5 is not there" in line for line in planned.assumptions)
    printed = text.render(planned)
    assert "stable-diffusion-v1-5 is not there" in printed and "  at the speed of NVIDIA H200\n" in printed
    # docs/log.md, step 6: `bench train` takes 60.6 GiB, with one text encoder; planned are one more for each teacher.
    own_encoders = planned.memory["text encoders"] * 8 / 9
    assert 60.6 < (sum(planned.memory.values()) - own_encoders) / 2**30 < 1.02 * 60.6


def test_the_error_for_an_unknown_architecture_lists_the_known(config):
    config.base = "nowhere"
    with pytest.raises(ValueError, match="sd15, sd21, sdxl"):
        plan.plan(config, "gpu:1x80GB", architecture="sd9")


@pytest.mark.skipif(not compiler.is_installed(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_the_tpu_compiler_agrees_with_the_planned_arrays(config):
    config.dtype, config.mesh.teacher, config.mesh.fsdp = "bfloat16", 2, 2
    with jax.default_matmul_precision("default"):
        planned = plan.plan(config, "v5e:2x2")
    assert planned.method == requirements.COMPILED and planned.fits
    assert planned.memory["padding"] >= 0  # The program's arguments are the planned arrays, laid out in tiles.
    across = {row["kind"] for row in planned.to_json()["collectives"] if "teacher" in row["axes"]}
    assert {"all-gather"} < across <= {"all-gather", "reduce-scatter", "all-reduce"}


def test_the_json_keeps_its_contract(capsys, config, tmp_path):
    experiment = tmp_path / "experiment.py"
    experiment.write_text(f"""
from dmm_jax.config.serialization import from_json
def get_config():
    return from_json({to_json(config)!r})
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
    assert "Roofline" not in table  # The rates of a CPU are not known.
    assert f"checkpoints {planned.disk['checkpoints'] / MIB:.1f} MiB" in table
    assert len(table[table.index("cpu: 1 x cpu") :].splitlines()) <= 25


def test_the_casts_of_looped_kernels_are_counted(config):
    base, mesh = bench_networks.abstract_checkpoint("tiny_xl"), sharding.abstract_mesh(num_devices=1)
    params = Definition(config, base, mesh).abstract_state().student.params
    whole = abstract_params("unet", base.unet_config)  # Its only group of four blocks, in the lowest level.
    unets = whole["down_blocks"][1], whole["mid_block"], whole["up_blocks"][0]
    groups = [unet["attentions"][number] for unet in unets for number in unet["attentions"]]
    kernels = [leaf.size for group in groups for leaf in jax.tree.leaves(group["transformer_blocks"]) if leaf.ndim > 1]
    assert memory.looped_kernels(params, "bfloat16") == 2 * sum(kernels) > 0
    assert memory.looped_kernels(params, "bfloat16", fsdp=2) == sum(kernels)
    assert memory.looped_kernels(params, "float32") == 0
    config.loop_blocks = 0
    unlooped = Definition(config, base, mesh).abstract_state().student.params
    assert memory.looped_kernels(unlooped, "bfloat16") == 0
