"""The launchers: shellcheck finds nothing, and a dry run prints exactly the commands that would run."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch"
CLOUD = {"TPU_NAME": "pod", "ZONE": "us-west4-a", "ACCELERATOR_TYPE": "v5litepod-16"}
CLOUD |= {"RUNTIME_VERSION": "v2-alpha-tpuv5-lite", "SHARED": "10.0.0.2:/runs"}
CLOUD |= {"CLUSTER": "one", "PROJECT": "mine", "TPU_TYPE": "v5litepod-16", "NAME": "first"}
TRAIN = ["--config=configs/sd15.py", "--workdir=/mnt/runs/my run"]
QUOTED = r"--config=configs/sd15.py --workdir=/mnt/runs/my\ run"


def dry_run(script, *arguments, environment=CLOUD):
    """Returns the commands that a launcher prints in a dry run, each as a list of words."""
    path = {"PATH": "/usr/bin:/bin"}  # No gcloud, xpk or sbatch: a dry run needs none.
    command = ["bash", str(LAUNCH / script), "--dry-run", *arguments]
    done = subprocess.run(command, env=path | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unquote = f"python3() {{ {sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"; }}\n"
    lines = "\n".join(f"python3 {line.removesuffix('&')}" for line in done.stdout.splitlines())
    words = subprocess.run(["bash", "-c", unquote + lines], capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in words.splitlines()]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
    assert shellcheck, "install launch/requirements-test.txt"
    done = subprocess.run([shellcheck, *map(str, sorted(LAUNCH.glob("*.sh")))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_lock_holds_every_requirement_with_hashes_and_no_host():
    def names(text):
        pins = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
        return {(re.sub(r"[_.]", "-", name).lower(), version) for name, version in pins}

    lock = (LAUNCH / "requirements.lock").read_text()
    assert names((LAUNCH / "requirements.txt").read_text()) <= names(lock)
    entries = re.split(r"\n(?=[\w-]+==)", lock)[1:]
    assert all("--hash=sha256:" in entry for entry in entries) and "://" not in lock


def test_serve_serves_the_shipped_student_or_a_model():
    server = [".venv/bin/python", "-m", "dmm_jax", "serve"]
    assert dry_run("serve.sh", environment={}) == [[*server, "emoji", "--port", "8000"]]
    (command,) = dry_run("serve.sh", "my run", "--port", "9", environment={"PORT": "1"})
    assert command == [*server, "my run", "--port", "9"]


def test_local_processes_starts_each_with_its_number():
    commands = dry_run("local_processes.sh", "2", *TRAIN, environment={"PORT": "1234"})
    several = ["--coordinator", "localhost:1234", "--num-processes", "2", "--process-id"]
    assert commands == [[".venv/bin/python", "-m", "dmm_jax", "train", *TRAIN, *several, str(k)] for k in range(2)]


def test_local_processes_gives_each_its_gpu():
    commands = dry_run("local_processes.sh", "--one-gpu-each", "2", *TRAIN)
    assert [command[:3] for command in commands] == [
        ["env", f"JAX_LOCAL_DEVICE_IDS={k}", ".venv/bin/python"] for k in range(2)
    ]


def test_slurm_stops_one_task_per_gpu_before_the_time_limit():
    (command,) = dry_run("slurm.sh", "2", "8", *TRAIN, environment={"SBATCH_ARGUMENTS": "--time=1:00:00 --account=a"})
    assert command == [
        "sbatch", "--job-name=dmm-jax", "--dependency=singleton", "--nodes=2", "--ntasks-per-node=8",
        "--gpus-per-node=8", "--signal=TERM@120", "--output=slurm-%j.log", "--time=1:00:00", "--account=a",
        f"--wrap=srun --kill-on-bad-exit=1 .venv/bin/python -m dmm_jax train --distributed {QUOTED} ",
    ]  # fmt: skip


def ssh(command):
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", "--zone", "us-west4-a", "--worker=all",
            f"--command={command}"]  # fmt: skip


def test_tpu_pod_creates_a_queued_resource():
    (command,) = dry_run("tpu_pod.sh", "create", "--spot")
    assert command == [
        "gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", "--zone", "us-west4-a",
        "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
    ]  # fmt: skip


def test_tpu_pod_runs_its_verbs_on_every_host():
    archive, copy, install, mount = dry_run("tpu_pod.sh", "install")
    assert archive[:2] == ["git", "archive"] and copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert (
        "--constraint launch/requirements.txt --python .venv '.[tpu,gcs]'" in install[-1]
        and "mount -t nfs 10.0.0.2:/runs /mnt/runs" in mount[-1]
    )
    run = f"nohup .venv/bin/python -m dmm_jax train --distributed {QUOTED}  > run.log 2>&1 < /dev/null"
    assert dry_run("tpu_pod.sh", "train", *TRAIN) == [ssh(f"cd dmm_jax; {run} & echo $! > run.pid")]
    assert dry_run("tpu_pod.sh", "log") == [ssh("tail -n 20 dmm_jax/run.log")]
    assert dry_run("tpu_pod.sh", "stop") == [ssh("kill -TERM $(cat dmm_jax/run.pid)")]
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    assert dry_run("tpu_pod.sh", "state") == [
        [*queued, "describe", "pod", "--zone", "us-west4-a", "--format=value(state.state)"]
    ]
    assert dry_run("tpu_pod.sh", "delete") == [[*queued, "delete", "pod", "--zone", "us-west4-a", "--force"]]


def test_tpu_pod_mounts_no_folder_without_shared():
    bucket = {name: value for name, value in CLOUD.items() if name != "SHARED"}
    assert len(dry_run("tpu_pod.sh", "install", environment=bucket)) == 3


def test_tpu_pod_runs_a_verb_on_one_host_alone():
    (command,) = dry_run("tpu_pod.sh", "one", "export", "/mnt/runs/my run", "out", "--format=dmm")
    assert command[-2] == "--worker=0" and "cd dmm_jax; TPU_PROCESS_BOUNDS=1,1,1 TPU_CHIPS" in command[-1]
    assert command[-1].endswith(r".venv/bin/python -m dmm_jax export /mnt/runs/my\ run out --format=dmm ")


def test_gke_xpk_makes_a_cluster_and_runs_on_it():
    place = ["--cluster=one", "--zone=us-west4-a", "--project=mine"]
    assert dry_run("gke_xpk.sh", "create", "--spot") == [
        ["xpk", "cluster", "create", *place, "--tpu-type=v5litepod-16", "--num-slices=1", "--spot"]
    ]
    ((*command, program),) = dry_run("gke_xpk.sh", "train", *TRAIN, environment=CLOUD | {"NUM_SLICES": "2"})
    assert command == [
        "xpk", "workload", "create", *place, "--workload=first", "--tpu-type=v5litepod-16", "--num-slices=2",
        "--max-restarts=50", "--base-docker-image=python:3.12", "--script-dir=.",
    ]  # fmt: skip
    assert "install --quiet --constraint launch/requirements.txt '.[tpu,gcs]' && " in program
    assert f" dmm-jax train --distributed {QUOTED} " in program
    assert dry_run("gke_xpk.sh", "state") == [["xpk", "workload", "list", *place]]
    assert dry_run("gke_xpk.sh", "stop") == [["xpk", "workload", "delete", *place, "--workload=first"]]
    assert dry_run("gke_xpk.sh", "delete") == [["xpk", "cluster", "delete", *place]]


@pytest.fixture
def pod(tmp_path):
    """Starts what xpk runs in a container, in a folder with fake commands: a pip, and a dmm-jax that waits or fails."""
    train = '[ "$3" = wait ] || exit 3\ntrap "sleep 0.3; touch saved; exit 0" TERM\n'
    train += "touch up\nwhile true; do sleep 0.05; done"
    for name, script in (("pip", "exit 0"), ("dmm-jax", train)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def start(argument, **variables):
        ((*_, program),) = dry_run("gke_xpk.sh", "train", argument)
        command = ["bash", "-c", program.removeprefix("--command=")]  # xpk sends SIGTERM to such a shell.
        return subprocess.Popen(command, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"} | variables)

    return start, tmp_path


def test_gke_xpk_restarts_a_run_that_sigterm_stopped(pod):
    start, folder = pod
    child = start("wait")
    deadline = time.monotonic() + 20
    while not (folder / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.terminate()
    assert child.wait(20) == 143 and (folder / "saved").exists()  # xpk restarts runs with codes of 127 or more.


@pytest.mark.parametrize("delay", ["", "sleep 0.2; "])
def test_gke_xpk_does_not_restart_a_run_that_failed(pod, delay):
    start, folder = pod
    shell = folder / "bash_env"  # Read by the pod's shell: with the delay, the run has failed before anybody waits.
    shell.write_text(f'trap() {{ {delay}builtin trap "$@"; }}\n')
    assert start("fail", BASH_ENV=str(shell)).wait(20) == 3


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke_xpk.sh"])
def test_a_missing_variable_or_an_unknown_verb_is_named(script):
    command = ["bash", str(LAUNCH / script), "--dry-run", "fly"]
    bare = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert bare.returncode == 1 and "set " in bare.stderr
    done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"} | CLOUD, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown verb fly; the verbs are create" in done.stderr


@pytest.fixture
def stub(tmp_path):
    """A folder with the launcher and a fake Python that waits for SIGTERM, or exits with the code in its arguments."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCH / "local_processes.sh", tmp_path / "launch")
    program = tmp_path / ".venv" / "bin" / "python"
    program.write_text(
        '#!/usr/bin/env bash\n[ "$4" = wait ] || exit "$4"\ntrap \'sleep 0.3; touch "saved_${!#}"; exit 0\' TERM\n'
        'touch "up_${!#}"\nwhile true; do sleep 0.05; done\n'
    )
    program.chmod(0o755)
    return tmp_path


def test_local_processes_passes_sigterm_on_and_waits_for_all_to_save(stub):
    child = subprocess.Popen(["bash", str(stub / "launch" / "local_processes.sh"), "2", "wait"])
    deadline = time.monotonic() + 20
    while not all((stub / f"up_{k}").exists() for k in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait(20) == 0
    assert all((stub / f"saved_{k}").exists() for k in range(2))


def test_local_processes_fails_when_a_process_fails(stub):
    assert subprocess.run(["bash", str(stub / "launch" / "local_processes.sh"), "2", "3"]).returncode == 3


@pytest.mark.parametrize("number", ["0", "-1", "1e3", "2.5", "two", "", "a[$(touch executed)]"])
def test_local_processes_refuses_a_number_that_is_not_positive(stub, number):
    command = ["bash", str(stub / "launch" / "local_processes.sh"), number, "0"]
    done = subprocess.run(command, cwd=stub, capture_output=True, text=True)
    assert done.returncode == (2 if number else 1), done.stderr
    assert "positive whole number" in done.stderr if number else "usage: " in done.stderr
    assert not list(stub.rglob("executed"))


def test_local_processes_names_a_port_in_use(stub):
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        command = ["bash", str(stub / "launch" / "local_processes.sh"), "2", "0"]
        done = subprocess.run(command, env=os.environ | {"PORT": port}, capture_output=True, text=True)
    assert done.returncode == 1 and f"port {port} is in use" in done.stderr and "Set PORT" in done.stderr
