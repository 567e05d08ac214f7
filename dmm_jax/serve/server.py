"""Runs the web application: binds its address, compiles while it answers probes, and drains when it is stopped."""

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dmm_jax.runtime.errors import UserError
from dmm_jax.runtime.processes import say
from dmm_jax.runtime.stopping import EXIT_CODES
from dmm_jax.serve.app import build_app
from dmm_jax.serve.guards import is_loopback
from dmm_jax.serve.service import Service

MAX_CONNECTIONS, BACKLOG = 1024, 256
HEADERS_S = 20  # For the headers of a request to arrive, and for a new connection to send any.
CLOSE_S = 5  # For answers to reach their clients after the last image is finished.


def check_access(host: str, keys: Sequence[str], no_auth: bool) -> None:
    """Raises UserError if other machines reach an address, and neither keys nor the user's word allow that."""
    if not is_loopback(host) and not keys and not no_auth:
        raise UserError(f"other machines reach {host}: give --api-key-file FILE, or --no-auth if everybody may draw.")


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket; port 0 takes a free one.

    Raises:
      UserError: the port is in use or reserved, or this machine does not have the address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: {error.strerror}.") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)  # Clients that come early wait for their answer.
    except OSError as error:
        bound.close()
        reasons = {errno.EADDRINUSE: f"port {port} is in use: choose another with --port, or stop its owner"}
        raise UserError(f"{reasons.get(error.errno, f'{host}:{port}: {error.strerror}')}.") from error
    return bound


class Protocol(H11Protocol):
    """uvicorn's protocol, which also closes a connection whose headers do not arrive in time.

    Otherwise clients that send half of their headers would occupy all MAX_CONNECTIONS. Between two requests uvicorn's
    own timeout runs, which the first byte of the next request ends.
    """

    _headers_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:  # uvloop's transports are no subclass of asyncio's.
        """Starts the time for the first request."""
        super().connection_made(transport)
        self._headers_timer = self.loop.call_later(HEADERS_S, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Stops the time once the headers are complete, and starts it with the first byte of a later request."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._headers_timer is None:
            self._headers_timer = self.loop.call_later(HEADERS_S, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the time."""
        self._stop_timer()
        super().connection_lost(exc)

    def _stop_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None


class Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, which would end the process by the signal itself."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to `run`."""
        yield


def server_for(service: Service) -> Server:
    """Returns a server of a service's application; it keeps connections alive as long as most proxies do."""
    config = uvicorn.Config(
        build_app(service),
        http=Protocol,
        log_config=None,  # Its own would close the handlers of other libraries.
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSE_S,
        limit_concurrency=MAX_CONNECTIONS,
    )
    return Server(config)


def run(service: Service, bound: socket.socket, drain_timeout_s: float) -> int:
    """Serves until a signal or a fault of the compilation; returns the exit code.

    The first SIGTERM or Ctrl-C refuses new requests, finishes the accepted ones and ends; the second ends at once.

    Raises:
      Exception: the engine could not start.
    """
    server, faults, code = server_for(service), [], 0

    def start() -> None:
        try:
            service.engine.start()
            say(f"ready: {address_of(bound)}")
        except BaseException as error:
            faults.append(error)
            server.should_exit = True

    def drain() -> None:
        if not service.engine.drain(drain_timeout_s):
            say(f"some images were not finished within {drain_timeout_s:g} s")
        server.should_exit = True

    def stop(number: int) -> None:
        nonlocal code
        code = EXIT_CODES[number]
        if service.draining or not service.engine.ready:
            server.should_exit = server.force_exit = True
            return
        service.draining = True
        say("stopping: accepted images are finished, new requests are refused; again to stop at once")
        threading.Thread(target=drain, daemon=True).start()

    starting = threading.Thread(target=start, daemon=True)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for number in EXIT_CODES:
            loop.add_signal_handler(number, stop, number)
        starting.start()
        await server.serve(sockets=[bound])

    asyncio.run(main())
    if starting.is_alive():  # Nothing stops a compilation, and Python's own end would not wait for it.
        os._exit(code)
    service.engine.stop()
    if faults:
        raise faults[0]
    return code


def address_of(bound: socket.socket) -> str:
    """Returns the address of a bound socket, for a browser."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
