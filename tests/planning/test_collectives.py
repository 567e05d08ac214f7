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
LINE = "ENTRY %main (p: f32[4]) -> f32[4] {{\n  {}\n}}"


def read(operation):
    (found,) = collectives.parse(LINE.format(operation), MESH)
    return found


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
def test_the_axes_are_those_along_which_a_group_differs(groups, axes):
    found = read(f"%all-reduce.7 = f32[10,3]{{1,0:T(8,128)}} all-reduce(%x), replica_groups={groups}, to_apply=%add")
    assert (found.name, found.kind, found.axes, found.bytes) == ("all-reduce.7", "all-reduce", axes, 120)
    assert found.group == 2 ** len(axes)


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
    assert collectives.parse(LINE.format("%a = f32[4] all-reduce(%x), replica_groups={{0},{1}}"), MESH) == []


def test_a_loops_body_counts_as_often_as_it_runs():
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
    (found,) = collectives.parse(program, MESH)
    assert found.count == 5


def test_the_tpus_fused_reduce_scatter_is_one():
    program = """
%all-reduce-scatter.3 (input.3: bf16[8]) -> bf16[4] {
  %all-reduce.9 = bf16[8]{0} all-reduce(%input.3), replica_groups={{0,1},{2,3},{4,5},{6,7}}
}
"""
    (found,) = collectives.parse(program, MESH)
    assert (found.kind, found.bytes) == ("reduce-scatter", 16)


def test_a_ring_sends_all_but_a_devices_own_share():
    def sent(kind):
        return collectives.Collective("a", kind, ("fsdp",), 4, 100, 3).sent

    assert (sent("all-gather"), sent("reduce-scatter"), sent("all-reduce")) == (225, 225, 450)


def test_what_goes_between_slices_is_a_collective_too():
    line = (
        "%send.1 = (f32[4,6]{1,0:T(8,128)}, u32[], token[]) send(%x, %after), channel_id=4, is_host_transfer=true, "
        'frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    (found,) = collectives.parse(LINE.format(line), MESH, linked=4)
    assert (found.kind, found.axes, found.group, found.bytes) == ("all-reduce", ("teacher",), 2, 96)


@pytest.mark.skipif(not compiler.is_here(), reason="needs libtpu: pip install 'dmm-jax[plan]'")
def test_the_tpus_compiler_sums_between_slices_what_is_summed_over_teachers():
    mesh = compiler.tpu_mesh("v5e:2x2*2", **MESH)
    summed = jax.shard_map(lambda x: jax.lax.psum(x, "teacher"), mesh=mesh, in_specs=P("teacher"), out_specs=P())
    given = jax.ShapeDtypeStruct((64, 128), np.float32, sharding=NamedSharding(mesh, P("teacher")))
    program = jax.jit(summed).lower(given).compile(compiler_options=compiler.EFFORT).as_text()
    (found,) = collectives.parse(program, MESH, linked=4)
    assert (found.kind, found.axes, found.group, found.bytes) == ("all-reduce", ("teacher",), 2, 32 * 128 * 4)


PROGRAM = """
import json, sys, dataclasses
import jax
from dmm_jax.config.options import from_json
from dmm_jax.planning import collectives, memory, plan
from dmm_jax.runtime import sharding
config = from_json(open(sys.argv[1]).read())
pairs = config.teachers
for num_teachers in (4, 8):
    config.teachers = tuple((f"{name}{k}", path) for k in range(num_teachers // 2) for name, path in pairs)
    config.batch_size, config.mesh.teacher, config.mesh.data, config.mesh.fsdp = num_teachers * 2, 4, 1, 2
    mesh = sharding.make_mesh(**config.mesh)
    program = plan.Program.describe(config, "sd15", "cpu", mesh)
    compiled = program.lower().compile()
    state = program.arguments[0]
    exchanged = collectives.parse(compiled.as_text(), mesh.shape)
    held = memory.held(*program.arguments)
    print(json.dumps({
        "found": [dataclasses.asdict(one) for one in exchanged],
        "foretold": [dataclasses.asdict(one) for one in plan.foretold(program)],
        "teachers": num_teachers,
        "table": num_teachers * state["params"]["model_embedding"]["embedding"].shape[1] * 4,
        "arguments": compiled.memory_analysis().argument_size_in_bytes,
        "held": sum(held.values()) - held["gradients"],
    }), flush=True)
"""


@pytest.fixture(scope="module")
def programs(tiny, tmp_path_factory):
    """The step of four and of eight teachers on a mesh of teacher 4 x fsdp 2, compiled for eight fake devices."""
    from dmm_jax.config.options import to_json

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


AXES_OF_PARTS = ("teacher and fsdp", "fsdp", "teacher")  # The norm: a sum for arrays that are divided alike.
ERRORS = 2  # Of the score and of the features: a number a teacher each, 4 bytes, known to every device.


def total(rows, kind, axis=""):
    found = (row for row in rows if row["kind"] == kind and (not axis or axis in row["axes"]))
    return sum(row["bytes"] * row["count"] for row in found)


def grown(few, many):
    """Returns {(kind, axes, where in the source): (bytes a step more than with few, names of those that differ)}."""
    where = [
        [((row["kind"], "+".join(row["axes"]), row["scope"]), row["bytes"], row["count"], row["name"]) for row in rows]
        for rows in (few, many)
    ]
    before, after = ({key: 0 for key, *_ in where[0] + where[1]} for _ in where)
    for sums, rows in zip((before, after), where, strict=True):
        for key, size, count, _ in rows:
            sums[key] += size * count
    known = [entry[:3] for entry in where[0]]
    return {
        key: (more, [name for *entry, name in where[1] if entry[0] == key and tuple(entry) not in known])
        for key in after
        if (more := after[key] - before[key]) > 0
    }


def test_nothing_but_the_student_its_gradients_and_what_is_logged_crosses_the_teacher_axis(programs):
    for program in programs:
        across = [row for row in program["found"] if "teacher" in row["axes"]]
        assert {row["kind"] for row in across} == {"all-gather", "reduce-scatter", "all-reduce"}
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            logged = ERRORS * 4 * program["teachers"] + 4 * len(AXES_OF_PARTS) if kind == "all-reduce" else 0
            assert total(across, kind) <= total(program["foretold"], kind, "teacher") + logged, kind


def test_no_collective_grows_with_the_number_of_teachers(programs):
    """But for the style table, which has a row a teacher, and the errors."""
    four, eight = programs
    table, errors = eight["table"] - four["table"], ERRORS * 4 * (eight["teachers"] - four["teachers"])
    allowed = {
        ("all-gather", "teacher"): table // 2, ("all-gather", "fsdp"): table, ("reduce-scatter", "fsdp"): table,
        ("reduce-scatter", "teacher"): table // 2, ("all-reduce", "teacher+fsdp"): errors,
    }  # fmt: skip
    more = grown(four["found"], eight["found"])
    offenders = {key: names for key, (size, names) in more.items() if size > allowed.get(key[:2], 0)}
    assert offenders == {}
    assert sum(size for size, _ in more.values()) == sum(allowed.values())


def test_what_grows_is_named_be_it_larger_or_more_often_there():
    row = {"name": "all-gather.1", "kind": "all-gather", "axes": ["teacher"], "bytes": 8, "count": 1, "scope": "a"}
    key, larger, often = ("all-gather", "teacher", "a"), row | {"bytes": 16}, row | {"count": 2}
    assert grown([row], [larger]) == grown([row], [often]) == {key: (8, ["all-gather.1"])}
    again = row | {"name": "all-gather.2"}
    assert grown([row], [row, again])[key][0] == 8 and grown([row, again], [row]) == {}
    assert grown([], [row]) == {key: (8, ["all-gather.1"])}


def test_gathers_and_sums_are_those_foretold(programs):
    for program in programs:
        for kind, axis in itertools.product(("all-gather", "reduce-scatter", "all-reduce"), ("teacher", "fsdp")):
            found, foretold = (total(program[which], kind, axis) for which in ("found", "foretold"))
            equal_ones = 0.05 if kind == "all-reduce" else 0.0  # Gradients of biases; they are summed once.
            assert found == pytest.approx(foretold, rel=0.01 + equal_ones, abs=1024), (kind, axis)
        assert [row["name"] for row in program["found"] if row["kind"] == "all-to-all"] == []


def test_what_a_device_holds_is_what_its_program_is_given(programs):
    for program in programs:
        assert program["held"] == pytest.approx(program["arguments"], rel=1e-3)


def test_the_summary_joins_kinds_and_axes():
    ones = [collectives.Collective(name, "all-gather", ("fsdp",), 2, 2**29, 2) for name in "ab"]
    assert collectives.summary(ones) == [{"kind": "all-gather", "axes": "fsdp", "count": 4, "gb": np.float64(2.0)}]
