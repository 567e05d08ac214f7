"""Slots divided among devices, in a process with fake ones."""

import os
import subprocess
import sys


def test_four_devices_draw_the_pipelines_images():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-m", "tests.serve.devices_program"]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    places, difference = finished.stdout.rsplit(maxsplit=1)
    assert places == "[4, 4]" and int(difference) <= 1
