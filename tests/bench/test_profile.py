"""Kernels are summed by name per device, and the shares of collectives are those of a small trace."""

import pytest

from dmm_jax.bench import profile


def name(kind, pid, tid, text):
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}}


def ran(pid, tid, text, microseconds, start=0):
    return {"ph": "X", "pid": pid, "tid": tid, "name": text, "ts": start, "dur": microseconds}


def test_times_are_sums_by_name_per_call_and_device():
    events = [
        name("process_name", 1, 0, "/device:GPU:0"), name("process_name", 2, 0, "/host:CPU"),
        name("process_name", 3, 0, "/device:GPU:1"), name("thread_name", 3, 7, "Stream #7(Compute)"),
        name("thread_name", 1, 7, "Stream #7(Compute)"), name("thread_name", 1, 8, "XLA Ops"),
        name("thread_name", 2, 7, "Stream #7"),
        ran(1, 7, "loop_fusion_1", 2000), ran(1, 7, "loop_fusion_12_3", 4000), ran(1, 7, "gemm", 10000),
        ran(1, 7, "gemm", 10000), ran(1, 8, "gemm", 9e9), ran(2, 7, "gemm", 9e9),
        ran(3, 7, "loop_fusion_1", 2000), ran(3, 7, "loop_fusion_12_3", 4000), ran(3, 7, "gemm", 14000),
        ran(3, 7, "gemm", 14000),
    ]  # fmt: skip
    kernels = profile.time_by_name(profile.device_kernels(events))
    assert kernels == {"gemm": (12.0, 1), "loop_fusion": (3.0, 1)}
    assert list(kernels) == ["gemm", "loop_fusion"]
    assert "gemm" in profile.table(kernels).splitlines()[1]


def test_collective_shares_are_all_time_and_exposed_time():
    """One GPU overlaps two collectives from 10 to 40 of 100, and 25 with a kernel; the other runs one of 20 alone."""
    all_reduce = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
    events = [
        name("process_name", 1, 0, "/device:GPU:0"), name("process_name", 2, 0, "/device:GPU:1"),
        *(name("thread_name", pid, tid, f"Stream #{tid}") for pid in (1, 2) for tid in (7, 8, 9)),
        ran(1, 7, "gemm", 35, start=0), ran(1, 7, "input_reduce_fusion", 50, start=50),
        ran(1, 8, all_reduce, 20, start=10), ran(1, 9, "ncclDevKernel_AllGather_RING_LL", 20, start=20),
        ran(2, 7, "gemm", 80, start=0), ran(2, 8, "stream_executor::gpu::AllReduceKernelImpl<float>", 20, start=80),
    ]  # fmt: skip
    shares = profile.collective_shares(profile.device_kernels(events))
    assert shares == {
        "collective_share": pytest.approx((0.3 + 0.2) / 2),
        "exposed_collective_share": pytest.approx((0.05 + 0.2) / 2),
    }
    assert profile.collective_shares([]) == {}  # A CPU records no kernels.


def test_tpu_loops_and_copies_are_not_operations():
    events = [
        name("process_name", 1, 0, "/device:TPU:0"), name("thread_name", 1, 1, "XLA Ops"),
        name("thread_name", 1, 2, "Async XLA Ops"), name("thread_name", 1, 3, "XLA Modules"),
        ran(1, 3, "jit_step", 100), ran(1, 1, "while.5", 100), ran(1, 1, "fusion.1", 60),
        ran(1, 2, "all-gather-start.3", 30, start=50), ran(1, 1, "all-gather-done.3", 20, start=60),
        ran(1, 2, "copy-start.7", 100), ran(1, 1, "fusion.2", 20, start=80),
    ]  # fmt: skip
    kernels = list(profile.device_kernels(events))
    assert profile.collective_shares(kernels) == {
        "collective_share": pytest.approx(0.3), "exposed_collective_share": pytest.approx(0.2),
    }  # fmt: skip
    assert "while" not in profile.time_by_name(kernels) and "fusion" in profile.time_by_name(kernels)
