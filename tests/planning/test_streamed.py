"""The plan of teachers in the host's memory: one on the device, all in the host, and the time of their travel."""

import jax
import pytest

from dmm_jax.planning import devices, memory, plan, requirements, text
from dmm_jax.planning.program import Program
from dmm_jax.runtime import sharding


@pytest.fixture(scope="module")
def program(tiny):
    config = tiny[1].copy_and_resolve_references()
    config.validation_size, config.batch_size, config.teachers_in_host_memory = 0, 32, True
    return Program.on_mesh(config, "sd15", "gpu", sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def planned(program):
    return plan.plan(program.config, "gpu:1x80GB")


def test_the_device_holds_one_teacher_and_the_host_all(program, planned, plan_of_one):
    teachers = program.arguments.teachers
    assert planned.memory["teachers"] == pytest.approx(plan_of_one.memory["teachers"] / 2, rel=1e-3)
    assert planned.memory["text encoders"] == plan_of_one.memory["text encoders"]  # The base's, and a teacher's own.
    assert planned.memory["temporaries"] < plan_of_one.memory["temporaries"]  # Rows are micro-batches.
    assert planned.from_host == 2 * memory.per_device((teachers.unet, teachers.text)) == planned.host_memory
    assert planned.flops == pytest.approx(plan_of_one.flops, rel=0.02)
    assert "teachers, page-locked" in text.render(planned) and "page-locked" not in text.render(plan_of_one)


def test_a_teacher_travels_while_the_student_learns(planned):
    parts, share = planned.parts_s, planned.flops_of_teachers / planned.flops
    assert parts["from host"] == planned.from_host / devices.PCIE_5
    assert 0.2 < share < 0.3  # The student takes a forward and a backward pass, three times as much work.
    computing = max(parts["products"], parts["memory"])
    assert planned.step_s == pytest.approx(max(computing, share * computing + parts["from host"]))


def test_compiled_programs_have_the_planned_arrays(program, planned):
    compiled = program.lower().compile()
    target = devices.topology("gpu:1x80GB")
    cost = requirements.cost_of_streamed(compiled, program.arguments, program.mesh.shape, target)
    for kind in ("student", "moments", "gradients", "teachers", "text encoders", "batch"):
        assert cost.memory[kind] == planned.memory[kind]
    assert cost.memory["temporaries"] > 0 and cost.from_host == planned.from_host and not cost.collectives
    arguments = compiled.predict.memory_analysis().argument_size_in_bytes
    one = planned.memory["teachers"] + planned.memory["text encoders"] + planned.memory["batch"]
    assert arguments == pytest.approx(one, rel=0.01)


def test_several_devices_hold_copies_in_the_hosts_memory(program):
    on_two = plan.plan(program.config, "gpu:2x80GB")
    assert on_two.host_memory == 2 * on_two.from_host
    gathered = [it for it in on_two.collectives if it.kind == "all-gather"]
    assert gathered and {it.count for it in gathered} == {2}  # Once for each row of the batch.
