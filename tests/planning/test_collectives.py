"""Collectives: how program text is read, and what the real step sends on eight fake devices."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dmm_jax.planning import collectives, compiler

ROOT = pathlib.Path(__file__).parent.parent.parent
MESH = {"teacher": 2, "data": 2, "fsdp": 2}
ENTRY = "ENTRY %main (p: f32[4]) -> f32[4] {{\n  {}\n}}"


def read(instruction, slice_size=0):
    """Returns the only collective of a program of one instruction."""
    (collective,) = collectives.read(ENTRY.format(instruction), MESH, slice_size)
    return collective


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", ("fsdp",)),
        ("{{0,2},{1,3},{4,6},{5,7}}", ("data",)),
        ("{{0,4},{1,5},{2,6},{3,7}}", ("teacher",)),
        ("{{0,1,2,3},{4,5,6,7}}", ("data", "fsdp")),
        ("{{0,1,2,3,4,5,6,7}}", ("teacher", "data", "fsdp")),
        ("{}", ("teacher", "data", "fsdp")),
        ("[4,2]<=[8]", ("fsdp",)),
        ("[4,2]<=[2,4]T(1,0)", ("teacher",)),
        ("[2,4]<=[2,2,2]T(1,0,2)", ("teacher", "fsdp")),
    ],
)
def test_axes_are_those_along_which_a_group_differs(groups, axes):
    row = read(f"%all-reduce.7 = f32[10,3]{{1,0:T(8,128)}} all-reduce(%x), replica_groups={groups}, to_apply=%add")
    assert (row.name, row.kind, row.axes, row.bytes) == ("all-reduce.7", "all-reduce", axes, 120)
    assert row.group == 2 ** len(axes)


def test_bytes_are_those_of_the_whole_array():
    groups = "replica_groups={{0,1},{2,3},{4,5},{6,7}}"
    assert read(f"%a = bf16[4,6]{{1,0}} all-gather(%x), {groups}, dimensions={{0}}").bytes == 48
    assert read(f"%a = (bf16[2,6], bf16[4,6]) all-gather-start(%x), {groups}").bytes == 48
    assert read(f"%a = f32[4,6]{{1,0}} reduce-scatter(%x), {groups}").bytes == 192
    assert read(f"%a = (f32[4]{{0}}, /*index=1*/s8[3]) all-reduce(%x, %y), {groups}").bytes == 19
    permuted = read(
        "%a = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}"
    )
    assert (permuted.bytes, permuted.axes) == (16, ("fsdp",))


def test_a_group_of_one_sends_nothing():
    assert collectives.read(ENTRY.format("%a = f32[4] all-reduce(%x), replica_groups={{0},{1}}"), MESH) == []


def test_a_loop_body_counts_as_often_as_it_runs():
    program = """
%inner (p: f32[4]) -> f32[4] {
  %gather = f32[4]{0} all-gather(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

%body (p: f32[4]) -> f32[4] {
  %f = f32[4]{0} fusion(%p), kind=kLoop, calls=%inner
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = f32[4]{0} while(%p), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""
    (collective,) = collectives.read(program, MESH)
    assert collective.count == 5


def test_the_fused_reduce_scatter_of_tpus_is_a_reduce_scatter():
    program = """
%all-reduce-scatter.3 (input.3: bf16[8]) -> bf16[4] {
  %all-reduce.9 = bf16[8]{0} all-reduce(%input.3), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""
    (collective,) = collectives.read(program, MESH)
    assert (collective.kind, collective.bytes) == ("reduce-scatter", 16)


def test_a_ring_sends_all_but_a_device_own_share():
    def sent(kind):
        return collectives.Collective("a", kind, ("fsdp",), 4, 100, 3).sent

    assert (sent("all-gather"), sent("reduce-scatter"), sent("all-reduce")) == (225, 225, 450)


def test_a_transfer_between_slices_is_a_collective():
    transfer = read(
        "%send.1 = (f32[4,6]{1,0:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
        slice_size=4,
    )
    assert (transfer.kind, transfer.axes, transfer.group, transfer.bytes) == ("all-reduce", ("teacher",), 2, 96)


@pytest.mark.skipif(not compiler.is_installed(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_the_tpu_compiler_sums_over_teachers_between_slices():
    mesh = compiler.tpu_mesh("v5e:2x2*2", **MESH)
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "teacher"), mesh=mesh, in_specs=P("teacher"), out_specs=P())
    argument = jax.ShapeDtypeStruct((64, 128), np.float32, sharding=NamedSharding(mesh, P("teacher")))
    program = jax.jit(summed).lower(argument).compile(compiler_options=compiler.LEAST_EFFORT).as_text()
    (row,) = collectives.read(program, MESH, slice_size=4)
    assert (row.kind, row.axes, row.group, row.bytes) == ("all-reduce", ("teacher",), 2, 32 * 128 * 4)


PROGRAM = """
import json, sys, dataclasses
import jax
from dmm_jax.config.serialization import from_json
from dmm_jax.planning import collectives, memory, plan
from dmm_jax.planning.program import Program
from dmm_jax.runtime import sharding
config = from_json(open(sys.argv[1]).read())
pairs = config.teachers
for num_teachers in (4, 8):
    config.teachers = tuple((f"{name}{k}", path) for k in range(num_teachers // 2) for name, path in pairs)
    config.batch_size, config.mesh.teacher, config.mesh.data, config.mesh.fsdp = num_teachers * 2, 4, 1, 2
    mesh = sharding.make_mesh(**config.mesh)
    program = Program.on_mesh(config, "sd15", "cpu", mesh)
    compiled = program.lower().compile()
    array_bytes = program.array_bytes()
    print(json.dumps({
        "compiled": [dataclasses.asdict(row) for row in collectives.read(compiled.as_text(), mesh.shape)],
        "predicted": [dataclasses.asdict(row) for row in plan.predicted_collectives(program)],
        "teachers": num_teachers,
        "table": num_teachers * program.arguments.state.student.params["model_embedding"]["embedding"].shape[1] * 4,
        "argument_bytes": compiled.memory_analysis().argument_size_in_bytes,
        "planned_bytes": sum(array_bytes.values()) - array_bytes["gradients"],
    }), flush=True)
"""


@pytest.fixture(scope="module")
def programs(tiny, tmp_path_factory):
    """The step of four and of eight teachers on a mesh of teacher 4 x fsdp 2, compiled for eight fake devices."""
    from dmm_jax.config.serialization import to_json

    path = tmp_path_factory.mktemp("collectives") / "config.json"
    path.write_text(to_json(tiny[1]))
    flags = "--xla_force_host_platform_device_count=8 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(
        command, env=environment | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    four, eight = (json.loads(line) for line in done.stdout.splitlines())
    return four, eight


NORM_PARTS = ("teacher and fsdp", "fsdp", "teacher")  # The norm has one sum per way of dividing arrays.
NUM_ERRORS = 2  # The score's and the features': 4 bytes per teacher, known to every device.


def total(rows, kind, axis=""):
    """Returns the bytes per step of the rows of a kind along an axis."""
    return sum(row["bytes"] * row["count"] for row in rows if row["kind"] == kind and (not axis or axis in row["axes"]))


def growth(few, many):
    """Returns {(kind, axes, scope): (additional bytes per step, names of the rows without an equal among the few)}."""

    def keyed(rows):
        return [((row["kind"], "+".join(row["axes"]), row["scope"]), row) for row in rows]

    def step_bytes(rows, key):
        return sum(row["bytes"] * row["count"] for other, row in keyed(rows) if other == key)

    equal = {(key, row["bytes"], row["count"]) for key, row in keyed(few)}
    new_names = {key: [] for key, _ in keyed(few) + keyed(many)}
    for key, row in keyed(many):
        if (key, row["bytes"], row["count"]) not in equal:
            new_names[key].append(row["name"])
    additional = {key: step_bytes(many, key) - step_bytes(few, key) for key in new_names}
    return {key: (size, new_names[key]) for key, size in additional.items() if size > 0}


def test_only_student_gradients_and_metrics_cross_the_teacher_axis(programs):
    for program in programs:
        across = [row for row in program["compiled"] if "teacher" in row["axes"]]
        assert {row["kind"] for row in across} == {"all-gather", "reduce-scatter", "all-reduce"}
        metrics = NUM_ERRORS * 4 * program["teachers"] + 4 * len(NORM_PARTS)
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            allowed = total(program["predicted"], kind, "teacher") + (metrics if kind == "all-reduce" else 0)
            assert total(across, kind) <= allowed, kind


def test_no_collective_grows_with_the_number_of_teachers(programs):
    """Exceptions: the style table, which has one row per teacher, and the errors."""
    four, eight = programs
    table, errors = eight["table"] - four["table"], NUM_ERRORS * 4 * (eight["teachers"] - four["teachers"])
    allowed = {
        ("all-gather", "teacher"): table // 2, ("all-gather", "fsdp"): table, ("reduce-scatter", "fsdp"): table,
        ("reduce-scatter", "teacher"): table // 2, ("all-reduce", "teacher+fsdp"): errors,
    }  # fmt: skip
    additional = growth(four["compiled"], eight["compiled"])
    offenders = {key: names for key, (size, names) in additional.items() if size > allowed.get(key[:2], 0)}
    assert offenders == {}
    assert sum(size for size, _ in additional.values()) == sum(allowed.values())


def test_growth_names_larger_more_frequent_and_new_rows():
    row = {"name": "all-gather.1", "kind": "all-gather", "axes": ["teacher"], "bytes": 8, "count": 1, "scope": "a"}
    key, larger, often = ("all-gather", "teacher", "a"), row | {"bytes": 16}, row | {"count": 2}
    assert growth([row], [larger]) == growth([row], [often]) == {key: (8, ["all-gather.1"])}
    twin = row | {"name": "all-gather.2"}
    assert growth([row], [row, twin])[key][0] == 8 and growth([row, twin], [row]) == {}
    assert growth([], [row]) == {key: (8, ["all-gather.1"])}


def test_compiled_gathers_and_sums_are_the_predicted_ones(programs):
    for program in programs:
        for kind, axis in itertools.product(("all-gather", "reduce-scatter", "all-reduce"), ("teacher", "fsdp")):
            compiled, predicted = (total(program[source], kind, axis) for source in ("compiled", "predicted"))
            shared_sums = 0.08 if kind == "all-reduce" else 0.0  # Equal gradients of biases are summed once.
            assert compiled == pytest.approx(predicted, rel=0.01 + shared_sums, abs=1024), (kind, axis)
        assert [row["name"] for row in program["compiled"] if row["kind"] == "all-to-all"] == []


def test_planned_array_bytes_are_the_program_arguments(programs):
    for program in programs:
        assert program["planned_bytes"] == pytest.approx(program["argument_bytes"], rel=1e-3)


def test_the_summary_joins_equal_kinds_and_axes():
    rows = [collectives.Collective(name, "all-gather", ("fsdp",), 2, 2**29, 2) for name in "ab"]
    assert collectives.summary(rows) == [{"kind": "all-gather", "axes": "fsdp", "count": 4, "gb": np.float64(2.0)}]
