"""Under load and faults: full queues, clients that leave, images that fail, probes, and metrics."""

import concurrent.futures
import io
import json
import socket

import openai
import pytest

from dmm_jax.serve import drawing, faults, own_api
from tests.serve.fake import FakeEngine
from tests.serve.running import running, until

BODY = {"prompt": "a", "styles": ["anime"], "steps": 50}


@pytest.fixture
def slow():
    with running(FakeEngine(num_slots=1, queue_size=2, period_s=0.02)) as web:
        yield web


def leaving(web, path, body):
    """Sends a request, and returns the connection."""
    connection = socket.create_connection(("127.0.0.1", web.service.settings.port), 10)
    text = json.dumps(body)
    head = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(text)}",
    ]
    connection.sendall("\r\n".join([*head, "", text]).encode())
    return connection


@pytest.mark.parametrize(
    "path, body",
    [
        ("/api/draw", BODY),
        ("/api/draw", BODY | {"stream": True}),
        ("/v1/images/generations", {"prompt": "a", "model": "ink", "steps": 50}),
        ("/v1/images/generations", {"prompt": "a", "model": "ink", "steps": 50, "stream": True}),
        ("/sdapi/v1/txt2img", {"prompt": "a", "batch_size": 2}),
    ],
)
def test_a_client_that_leaves_frees_its_slots(slow, path, body):
    connection = leaving(slow, path, body)
    until(lambda: slow.engine.running and slow.engine.running[0].step > 2)
    jobs = [*slow.engine.running, *slow.engine.waiting]
    connection.close()
    until(lambda: all(job.future.cancelled() for job in jobs))
    assert jobs[0].step < jobs[0].num_steps


def test_a_full_queue_is_429_and_says_when_to_come_back():
    with running(FakeEngine(num_slots=1, queue_size=2, period_s=1.0)) as web:  # A job takes 50 s: none ends here.
        connections = [leaving(web, "/api/draw", BODY)]
        until(lambda: web.engine.running)
        connections += [leaving(web, "/api/draw", BODY) for _ in range(2)]
        until(lambda: len(web.engine.waiting) == 2)
        answer = web.post("/api/draw", BODY)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "3"
        assert answer.json()["error"]["code"] == "queue_full"
        client = openai.OpenAI(base_url=f"{web.address}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError, match="ask again"):
            client.images.generate(model="ink", prompt="a")
        for connection in connections:
            connection.close()


def test_a_request_that_does_not_fit_the_queue_leaves_nothing_in_it(slow):
    answer = slow.post("/api/draw", BODY | {"num_images": 8})
    assert answer.status_code == 429
    assert slow.engine.jobs and all(job.future.cancelled() for job in slow.engine.jobs)


def test_a_failed_image_cancels_the_others_of_its_request():
    with running(FakeEngine(num_slots=1, period_s=0.01)) as web:
        assert (
            web.post("/api/draw", {"prompt": "NaN", "styles": ["ink"], "seeds": [1, 2, 3], "steps": 5}).status_code
            == 422
        )
        until(lambda: all(job.future.done() for job in web.engine.jobs))
        assert [job.future.cancelled() for job in web.engine.jobs] == [False, True, True]


def test_a_silent_stream_is_kept_open_by_comments(monkeypatch):
    monkeypatch.setattr(drawing, "HEARTBEAT_S", 0.01)
    with (
        running(FakeEngine(num_slots=1, period_s=1.0)) as web,
        leaving(web, "/api/draw", BODY | {"stream": True}) as it,
    ):
        received = b""
        until(lambda: web.engine.jobs)
        it.settimeout(10)
        while b": waiting" not in received:
            received += (part := it.recv(4096))
            assert part


def test_a_client_that_does_not_read_delays_nobody(monkeypatch):
    monkeypatch.setattr(own_api, "PREVIEW_S", 0.0)
    with running(FakeEngine(num_slots=2)) as web, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(("127.0.0.1", web.service.settings.port))
        text = json.dumps(BODY | {"styles": ["ink"] * 16, "stream": True, "width": 128})
        head = ["POST /api/draw HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        connection.sendall("\r\n".join([*head, f"Content-Length: {len(text)}", "", text]).encode())
        until(lambda: len(web.engine.jobs) == 16 and all(job.future.done() for job in web.engine.jobs))
        assert web.post("/api/draw", BODY | {"steps": 1}).status_code == 200


def test_an_unexpected_error_tells_the_client_nothing(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(faults.sys, "stderr", log)

    class Broken(FakeEngine):
        def submit(self, request, client=""):
            raise RuntimeError("the secret of /etc/passwd")

    with running(Broken()) as web:
        answer = web.post("/api/draw", BODY)
    message = "this is a fault of dmm-jax; the server's log has the details."
    assert answer.status_code == 500
    assert answer.json() == {"error": {"code": "internal_error", "message": message, "field": None}}
    assert "RuntimeError: the secret of /etc/passwd" in log.getvalue()


def test_messages_are_short_and_printable():
    fault = faults.Fault(400, "x", "\x1b[31m" + "a" * 10_000, field="\x07" * 200, retry_after=0.2)
    answer = faults.response_of(fault, "/api/draw")
    error = json.loads(answer.body)["error"]
    assert len(error["message"]) == 2000 and len(error["field"]) == 100
    assert error["message"].isprintable() and error["field"].isprintable() and answer.headers["Retry-After"] == "1"


def test_what_automatic1111s_clients_get_is_short_and_printable():
    detail = {"loc": ["body", "\x07" * 200], "msg": "\x1b" + "a" * 10_000, "type": "value_error"}
    fault = faults.Fault(422, "x", "a" * 10_000, details=[detail])
    answer = json.loads(faults.response_of(fault, "/sdapi/v1/txt2img").body)
    assert len(answer["errors"]) == len(answer["detail"][0]["msg"]) == 2000
    assert len(answer["detail"][0]["loc"][1]) == 100 and answer["detail"][0]["msg"].isprintable()


def test_many_wrong_fields_give_a_short_answer(web):
    answer = web.post("/api/draw", BODY | {"seeds": ["x"] * 60})
    assert answer.status_code == 422 and answer.json()["error"]["message"].count("seeds.") == 20


def test_a_bad_image_fails_alone(web):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        prompts = ["a", "NaN", "b", "broken", "c", "NaN"]
        answers = pool.map(lambda prompt: web.post("/api/draw", BODY | {"prompt": prompt}).status_code, prompts)
        assert list(answers) == [200, 422, 200, 503, 200, 422]


def test_requests_before_the_compilation_are_503():
    with running(start=False) as web:
        assert web.get("/healthz").status_code == 200 and web.get("/readyz").status_code == 503
        answer = web.post("/v1/images/generations", {"prompt": "a", "model": "ink"})
        assert (
            answer.status_code == 503
            and answer.headers["Retry-After"]
            and answer.json()["error"]["code"] == "not_ready"
        )
        web.engine.start()
        assert web.get("/readyz").json() == {"status": "ready"}


def test_metrics_count_requests_and_images(web):
    web.post("/api/draw", BODY | {"steps": 1})
    web.get("/no/such/address")
    lines = dict(line.rsplit(" ", 1) for line in web.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert (
        float(lines["dmm_jax_finished_total"]) >= 1
        and lines["dmm_jax_slots"] == "4.0"
        and lines["dmm_jax_ready"] == "1.0"
    )
    assert float(lines['dmm_jax_images_seconds_bucket{le="+Inf"}']) == float(lines["dmm_jax_finished_total"])
    assert lines['dmm_jax_step_s{size="64x64"}'] == "0.002"
    assert float(lines['dmm_jax_http_requests_total{path="/api/draw",status="200"}']) >= 1
    assert float(lines['dmm_jax_http_requests_total{path="other",status="404"}']) >= 1


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_printed_only_if_the_user_asks(capfd, log_prompts):
    with running(log_prompts=log_prompts) as web:
        for path, style in [("/api/draw", {"styles": ["ink"]}), ("/v1/images/generations", {"model": "ink"})]:
            assert web.post(path, {"prompt": "a secret", "steps": 1} | style).status_code == 200
            assert web.post(path, {"prompt": "a secret", "steps": 999} | style).status_code == 400
            assert web.post(path, {"prompt": "a secret NaN", "steps": 1} | style).status_code == 422
    printed = "".join(capfd.readouterr())
    assert "/api/draw: 1 x 64x64" in printed and ("secret" in printed) == log_prompts
