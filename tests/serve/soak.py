"""Many clients, clients that leave, and restarts under load, against a real server of the shipped student.

    python -m tests.serve.soak            # 1,000 requests, 200 of them abandoned, 3 restarts; then 2,000 for the memory

A server has accepted a request when its stream says `start`; it must then end with `done`, unless its client has left.
"""

import argparse
import collections
import concurrent.futures
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import requests

CLIENTS, STEPS = 64, (1, 4)
SIZE_ARGUMENTS = ("--slots", "8", "--queue", "128", "--max-steps", "10", "--drain-timeout", "120")


class Server:
    """A server that can be restarted on the same port."""

    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address, self.exit_codes = f"http://127.0.0.1:{self.port}", []
        self.start()

    def start(self):
        """Starts the process and waits until it is ready."""
        command = [sys.executable, "-m", "dmm_jax", "serve", "demo", "--port", str(self.port)]
        self.process = subprocess.Popen([*command, *SIZE_ARGUMENTS], stderr=subprocess.DEVNULL)
        while not self.is_ready():
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.1)

    def is_ready(self):
        """Tells whether it accepts requests."""
        try:
            return requests.get(f"{self.address}/readyz", timeout=5).ok
        except requests.RequestException:
            return False

    def stop(self):
        """Sends SIGTERM and waits for the end."""
        self.process.send_signal(signal.SIGTERM)
        self.exit_codes.append(self.process.wait(150))

    @property
    def memory_mb(self):
        """Resident memory in megabytes."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


def ask(server, number, leaves):
    """Sends one request until it is accepted; returns "answered", "left" or "lost"."""
    rng = random.Random(number)
    styles = ["comic", "cartoon", "ink", "neon", "blueprint", {"comic": 0.5, "neon": 0.5}]
    body = {"prompt": "a large red circle", "styles": [rng.choice(styles)], "seeds": [number], "stream": True}
    body |= {"steps": rng.randint(*STEPS), "guidance_scale": rng.choice([1.0, 2.5])}
    body["solver"] = rng.choice(["ddim", "euler"])
    while True:
        try:
            with requests.post(f"{server.address}/api/draw", json=body, stream=True, timeout=120) as answer:
                if answer.status_code in (429, 503):
                    time.sleep(0.2 + 0.5 * rng.random())
                    continue
                assert answer.status_code == 200, answer.text
                lines = answer.iter_lines()
                if next(lines) != b"event: start":
                    return "lost"
                if leaves:
                    time.sleep(0.3 * rng.random())
                    return "left"
                names = [line for line in lines if line.startswith(b"event: ")]
                return "answered" if names[-2:] == [b"event: image", b"event: done"] else f"lost {names[-2:]}"
        except (requests.ConnectionError, StopIteration):  # Refused while it restarts: not accepted.
            time.sleep(0.2)


def load(server, numbers, leaving, on_answer=lambda count: None):
    """Sends requests from all clients at once; returns how many ended in which way."""
    outcomes, lock = collections.Counter(), threading.Lock()

    def one_client(number):
        outcome = ask(server, number, number in leaving)
        with lock:
            outcomes[outcome] += 1
            on_answer(sum(outcomes.values()))

    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(one_client, numbers))
    return outcomes


def main():
    """Prints one line per phase; returns 1 if a request was lost, or the memory grew by more than 2 percent."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--memory-requests", type=int, default=2000)
    args = parser.parse_args()
    server, failures = Server(), []
    leaving = set(random.Random(0).sample(range(args.requests), args.requests // 5))
    restarts = {args.requests * part // 4 for part in (1, 2, 3)}

    def restart_now_and_then(count):
        if count in restarts:
            server.stop()
            server.start()

    start = time.monotonic()
    outcomes = load(server, range(args.requests), leaving, restart_now_and_then)
    seconds = time.monotonic() - start
    print(
        f"{args.requests} requests of {CLIENTS} clients in {seconds:.0f} s: {dict(outcomes)}; exits {server.exit_codes}"
    )
    if set(outcomes) - {"answered", "left"} or set(server.exit_codes) != {0}:
        failures.append("requests were lost")
    server.stop()
    server.start()
    memory, every = [], args.memory_requests // 10

    def measure(count):
        if count % every == 0:
            memory.append(server.memory_mb)

    load(server, range(args.memory_requests), set(), measure)
    server.stop()
    print(f"memory in MB after every {every} requests: {' '.join(f'{number:.1f}' for number in memory)}")
    if memory[-1] > 1.02 * memory[0]:
        failures.append("the memory grew")
    print("; ".join(failures) or "all is well")
    return bool(failures)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
