"""The process: its address, signals that drain it, and an engine that cannot start."""

import contextlib
import os
import signal
import socket
import threading

import pytest

from dmm_jax.runtime.errors import UserError
from dmm_jax.serve import server
from dmm_jax.serve.service import Service, Settings
from tests.serve.fake import FakeEngine
from tests.serve.running import Running, running, until


def run_with(engine, actions, timeout_s=20.0):
    """Runs a server in this thread, and `actions` in another; returns the exit code."""
    bound = server.listen("127.0.0.1", 0)
    service = Service(engine, Settings(port=bound.getsockname()[1]))
    web = Running(engine, service, server.address_of(bound))
    failures = []

    def act():
        try:
            actions(web)
        except BaseException as error:  # The server must end, or the test would not.
            failures.append(error)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    code = server.run(service, bound, timeout_s)
    thread.join(20)
    assert not failures, failures
    return code


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_finishes_accepted_images_and_refuses_new_ones(number, code):
    answers = {}

    def actions(web):
        until(lambda: web.engine.ready)
        body = {"prompt": "a", "styles": ["ink"], "steps": 40}
        first = threading.Thread(target=lambda: answers.update(first=web.post("/api/draw", body)))
        first.start()
        until(lambda: web.engine.running)
        os.kill(os.getpid(), number)
        until(lambda: web.service.draining)
        other = Running(web.engine, web.service, web.address)
        answers["probe"], answers["second"] = other.get("/readyz"), other.post("/api/draw", body)
        first.join(20)

    assert run_with(FakeEngine(num_slots=1, period_s=0.02), actions) == code
    assert answers["first"].status_code == 200 and answers["first"].json()["images"]
    assert answers["probe"].json() == {"status": "stopping"}
    assert answers["second"].status_code == 503 and answers["second"].json()["error"]["code"] == "stopping"


def test_a_second_signal_stops_at_once():
    def actions(web):
        until(lambda: web.engine.ready)
        threading.Thread(target=lambda: _ignore(web), daemon=True).start()
        until(lambda: web.engine.running)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: web.service.draining)
        os.kill(os.getpid(), signal.SIGTERM)

    engine = FakeEngine(num_slots=1, period_s=0.2)
    assert run_with(engine, actions) == 0 and engine.numbers["finished"] == 0


def _ignore(web):
    try:
        web.post("/api/draw", {"prompt": "a", "styles": ["ink"], "steps": 100})
    except OSError:
        pass


def test_a_request_that_does_not_end_stops_no_shutdown(monkeypatch):
    monkeypatch.setattr(server, "CLOSE_S", 0.1)
    with running(FakeEngine(num_slots=1, period_s=10.0)) as web:  # It waits for the end of the server's thread.
        body = {"prompt": "a", "styles": ["ink"], "steps": 100, "stream": True}
        answer = web.session.post(f"{web.address}/api/draw", json=body, stream=True, timeout=30)
        lines = answer.iter_lines()  # Its end would close the connection.
        assert next(lines) == b"event: start"


def test_more_connections_than_the_limit_are_503(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    with running() as web:
        port = web.service.settings.port
        open_ones = [socket.create_connection(("127.0.0.1", port), 10) for _ in range(3)]
        until(lambda: web.get("/healthz").status_code == 503)
        for connection in open_ones:
            connection.close()
        until(lambda: web.get("/healthz").status_code == 200)


def test_half_of_the_headers_hold_no_connection(monkeypatch):
    monkeypatch.setattr(server, "HEADERS_S", 0.2)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 4)
    half = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-"
    with running() as web, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", web.service.settings.port)
        silent, slow, later = (stack.enter_context(socket.create_connection(address, 10)) for _ in range(3))
        slow.sendall(half)
        later.sendall(half + b"A: 1\r\n\r\n")  # A whole request.
        assert b" 200 " in later.recv(1000)
        assert silent.recv(10) == b"" and slow.recv(10) == b""  # Closed.
        later.sendall(half)  # The second request of a connection that waited, whole, for longer than HEADERS_S.
        assert later.recv(10) == b""
        until(lambda: web.get("/healthz").status_code == 200)


def test_a_byte_now_and_then_is_no_progress(monkeypatch):
    monkeypatch.setattr(server, "HEADERS_S", 0.2)
    with running() as web, socket.create_connection(("127.0.0.1", web.service.settings.port), 10) as slow:
        slow.settimeout(0.02)

        def is_closed():
            try:
                slow.sendall(b"G")
                return slow.recv(10) == b""
            except TimeoutError:
                return False
            except OSError:  # The end was sent before this byte arrived.
                return True

        until(is_closed)


def test_a_request_that_takes_long_keeps_its_connection(monkeypatch):
    monkeypatch.setattr(server, "HEADERS_S", 0.1)
    with running(FakeEngine(period_s=0.01)) as web:
        assert web.post("/api/draw", {"prompt": "a", "styles": ["ink"], "steps": 30}).status_code == 200


def test_an_engine_that_cannot_start_ends_the_server_with_its_error():
    class Failing(FakeEngine):
        def start(self):
            raise UserError("the device is out of memory")

    with pytest.raises(UserError, match="out of memory"):
        run_with(Failing(), lambda web: None)


def test_a_port_in_use_is_one_sentence():
    with server.listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"^port {port} is in use: choose another with --port"):
            server.listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused():
    with pytest.raises(UserError, match="192.0.2.1"):
        server.listen("192.0.2.1", 0)
