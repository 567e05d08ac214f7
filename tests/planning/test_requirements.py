"""The roofline of a plan: seconds of work, memory traffic and collectives, over links and over the network."""

import dataclasses

import pytest

from dmm_jax.planning import devices, requirements, text
from dmm_jax.planning.collectives import Collective


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
