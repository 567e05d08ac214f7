"""Fixtures of the server's tests."""

import pytest

from tests.serve.running import running


@pytest.fixture(scope="module")
def web():
    """A server with a fake engine and no keys."""
    pytest.importorskip("fastapi", reason="launch/requirements-test.txt installs it")
    with running() as server:
        yield server
