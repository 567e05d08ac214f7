"""Topologies: their device counts, the next larger ones, bandwidths, and the errors for unknown ones."""

import types

import pytest

from dmm_jax.planning import devices


@pytest.mark.parametrize(
    "name, count, platform", [("v5e:4x4", 16, "tpu"), ("v5p:2x2x2", 8, "tpu"), ("gpu:8x80GB", 8, "gpu")]
)
def test_topologies_count_their_devices(name, count, platform):
    topology = devices.topology(name)
    assert (topology.count, topology.platform) == (count, platform)


def test_a_gpu_is_named_by_memory_or_model():
    assert devices.topology("gpu:2x141GB").device == devices.topology("gpu:2xH200").device
    assert devices.topology("gpu:1x80GB").device.name == "NVIDIA H100"


@pytest.mark.parametrize("gigabytes", [8, 12, 16, 24, 32, 48])
def test_desktop_cards_are_known_by_size_and_by_name(gigabytes):
    device = devices.topology(f"gpu:1x{gigabytes}GB").device
    assert device.memory == pytest.approx(0.95 * gigabytes * 1e9)
    name = devices.GPU_BY_MEMORY[f"{gigabytes}GB"]
    assert devices.topology(f"gpu:2x{name}").device == devices.topology(f"gpu:2x{name.lower()}").device == device


@pytest.mark.parametrize(
    "name, source",
    [
        ("gpu:1x24gb", "NVIDIA RTX 4090; for others of 24gb: --topology gpu:1xA10, gpu:1xL4, gpu:1xRTX3090"),
        ("gpu:8x80GB", "NVIDIA H100; for others of 80GB: --topology gpu:8xA100"),
        ("gpu:1x32GB", "NVIDIA RTX 5090"),
        ("gpu:1xL4", "NVIDIA L4"),
        ("v5e:2x2", "TPU v5e"),
    ],
)
def test_a_plan_states_whose_speed_it_has(name, source):
    assert devices.topology(name).speed_source == f"at the speed of {source}"


def test_the_list_names_topologies_that_can_be_planned():
    head, *rows = devices.listed()
    assert head[0] == "topology" and len(rows) == len(devices.DEVICES)
    assert all(devices.topology(name).device.name == device for name, device, _ in rows)


@pytest.mark.parametrize(
    "name, message",
    [
        *((name, r"v5e:4x4.*80GB.*H200") for name in ("v9:4x4", "gpu:8", "gpu:0x80GB", "gpu:8x81GB", "gpu:8xv5e")),
        *((f"v5e{size}", "Slices of v5e are 2x2, 2x4.*16x16; .*v5e:16x16") for size in ("", ":4", ":0x4", ":3x7")),
        *((f"v5e:{size}", "Slices of v5e are") for size in ("100x100", "16x16x2", "4x4*0", "4x4*two", "4x4*")),
        ("v5p:2x2", "Slices of v5p are 2x2x1, 2x2x2"),
        ("gpu:2xrtx409", "did you mean gpu:2xRTX4090?"),
        ("RTX_4090", "did you mean gpu:1xRTX4090?"),
        ("gpu:24GB", "did you mean gpu:1x24GB?"),
    ],
)
def test_the_error_for_an_unknown_topology_lists_the_known(name, message):
    with pytest.raises(ValueError, match=message):
        devices.topology(name)


def test_several_slices_are_one_topology():
    two = devices.topology("v5e:4x4*2")
    assert (two.count, two.domain_size, two.larger.name) == (32, 16, "v5e:4x8*2")


def test_groups_beyond_a_host_use_the_network():
    """GPUs of one host that are in the same group use the host's network connections together."""
    topology = devices.topology("gpu:16xH100")
    device = topology.device
    one_host, pair, all_devices = range(8), (0, 8), range(16)
    carriers = [topology.carrier(group) for group in (one_host, pair, all_devices)]
    assert carriers == ["links", "network", "network"]
    assert topology.bandwidth(one_host) == device.link_bandwidth
    assert topology.bandwidth(pair) == device.network_bandwidth
    assert topology.bandwidth(all_devices) == min(8 * device.network_bandwidth, device.link_bandwidth)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"), ("cpu", None),
    ],
)  # fmt: skip
def test_devices_of_the_process_are_recognised_by_device_kind(kind, name):
    device = types.SimpleNamespace(platform="gpu" if "NVIDIA" in kind else "tpu", device_kind=kind, slice_index=0)
    topology = devices.of_process([device] * 4)
    assert topology.device == devices.DEVICES.get(name) and topology.count == 4


@pytest.mark.parametrize(
    "name, larger", [("v5e:4x4", "v5e:4x8"), ("v5p:2x2x2", "v5p:2x2x4"), ("gpu:8x80GB", "gpu:16x80GB")]
)
def test_the_larger_topology_is_the_next_of_the_same_device(name, larger):
    assert devices.topology(name).larger.name == larger
    assert devices.topology(name).larger.device == devices.topology(name).device


def test_the_largest_has_none_larger():
    assert devices.topology("v5e:16x16").larger is None


@pytest.mark.parametrize("kind", devices.SIZES)
def test_sizes_ascend(kind):
    names = [f"gpu:{size}x80GB" if kind == "gpu" else f"{kind}:{size}" for size in devices.SIZES[kind]]
    counts = [devices.topology(name).count for name in names]
    assert counts == sorted(set(counts))
