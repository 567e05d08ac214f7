"""A server of the real application on a free port, in a thread of its own."""

import contextlib
import threading
import time

import requests

from dmm_jax.serve import server
from dmm_jax.serve.service import Service, Settings
from tests.serve.fake import FakeEngine


class Running:
    """A running server: its address, its engine, and requests to it."""

    def __init__(self, engine, service, address):
        self.engine, self.service, self.address = engine, service, address
        self.session = requests.Session()

    def get(self, path, **options):
        return self.session.get(self.address + path, timeout=30, **options)

    def post(self, path, json=None, **options):
        return self.session.post(self.address + path, json=json, timeout=30, **options)


@contextlib.contextmanager
def running(engine=None, start=True, **settings):
    """Serves an engine, by default a fake one, until the block ends."""
    engine = FakeEngine() if engine is None else engine
    if start:
        engine.start()
    bound = server.listen("127.0.0.1", 0)
    service = Service(engine, Settings(port=bound.getsockname()[1], **settings))
    web = server.server_for(service)
    thread = threading.Thread(target=lambda: web.run(sockets=[bound]), daemon=True)
    thread.start()
    until(lambda: web.started)
    try:
        yield Running(engine, service, server.address_of(bound))
    finally:
        web.should_exit = True
        thread.join(10)
        engine.stop()
    assert not thread.is_alive()


def until(condition, seconds=20.0):
    """Waits until a condition holds; fails if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not hold in time"
        time.sleep(0.005)
