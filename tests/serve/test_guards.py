"""Who may ask: hosts, origins, keys; how much: sizes of bodies; and the headers of every answer."""

import asyncio
import base64
import socket

import pytest

from dmm_jax.runtime.errors import UserError
from dmm_jax.serve import service as service_lib
from dmm_jax.serve.guards import Guards, is_loopback
from dmm_jax.serve.server import check_access
from dmm_jax.serve.service import Settings, matching_key, read_keys
from tests.serve.running import running

KEYS = ("first-key-0123456789", "second-key-0123456789")
BODY = {"prompt": "a", "styles": ["anime"], "steps": 1}


@pytest.fixture(scope="module")
def locked():
    with running(keys=KEYS) as web:
        yield web


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", "[", "user@"])
def test_a_foreign_host_name_is_refused_on_loopback(web, host):
    answer = web.get("/api/model", headers={"Host": host})
    assert answer.status_code in (400, 421) and "styles" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:9", "[::1]:8000"])
def test_names_of_this_machine_are_accepted(web, host):
    assert web.get("/healthz", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "settings, host, status",
    [
        ({"host": "127.0.0.2"}, "127.0.0.2:80", 200),  # A loopback address of its own.
        ({"host": "127.0.0.2"}, "127.0.0.3", 421),
        ({"host": "0.0.0.0"}, "gpu-machine.example", 200),  # Reached by any name, with keys or --no-auth.
    ],
)
def test_the_names_depend_on_the_address(settings, host, status):
    assert asked(Settings(**settings), {"host": host})[0] == status


def asked(settings, headers, messages=({"type": "http.request", "body": b"", "more_body": False},), method="POST"):
    """Sends messages to the guards of an application that answers 200; returns status, headers and what it received."""
    sent, received, messages = [], [], list(messages)

    async def app(scope, receive, send):
        received.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": [(b"cache-control", b"own")]})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return messages.pop(0) if messages else await asyncio.sleep(3600)

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": "/api/draw", "headers": pairs, "client": ("127.0.0.1", 5)}
    asyncio.run(asyncio.wait_for(Guards(app, settings)(scope, receive, send), 20))
    answer = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    assert len(answer) == len(sent[0]["headers"])  # The application's own headers stay, and none comes twice.
    return sent[0]["status"], answer, received


LOCAL = {"host": "localhost"}


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "1e3", "\u0663", "", "21"])
def test_a_length_that_is_no_small_number_is_refused_unread(length):
    status, headers, received = asked(Settings(max_body_bytes=20), LOCAL | {"content-length": length}, messages=())
    assert status == 413 and headers["connection"] == "close" and received == []


def test_a_body_without_a_length_is_counted_as_it_comes():
    parts = [{"type": "http.request", "body": b"x" * 8, "more_body": True}] * 100
    status, headers, received = asked(Settings(max_body_bytes=20), LOCAL, parts)
    assert status == 413 and headers["connection"] == "close" and received == []


def test_a_slow_body_closes_its_connection():
    first = [{"type": "http.request", "body": b"{", "more_body": True}]
    status, headers, received = asked(Settings(body_timeout_s=0.01), LOCAL, first)
    assert status == 408 and headers["connection"] == "close" and received == []


def test_a_client_that_leaves_within_its_body_is_not_waited_for():
    parts = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    assert asked(Settings(), LOCAL, parts)[2][0]["body"] == b"{"


def test_a_body_in_parts_arrives_as_one():
    parts = [{"type": "http.request", "body": part, "more_body": part != b"c"} for part in (b"a", b"b", b"c")]
    assert asked(Settings(max_body_bytes=3), LOCAL, parts)[2] == [
        {"type": "http.request", "body": b"abc", "more_body": False}
    ]


@pytest.mark.parametrize(
    "settings, origin, status",
    [
        ({}, "http://localhost", 200), ({}, "https://localhost", 200), ({}, "http://localhost:81", 403),
        ({}, "null", 403), ({"cors": ("*",)}, "https://evil.example", 200),
        ({"cors": ("https://a.example",)}, "https://a.example.evil", 403),
    ],
)  # fmt: skip
def test_origins_are_compared_as_a_whole(settings, origin, status):
    assert asked(Settings(**settings), LOCAL | {"origin": origin})[0] == status


@pytest.mark.parametrize("path", ["/api/draw", "/v1/images/generations", "/sdapi/v1/txt2img"])
def test_a_body_that_curl_sends_is_read_as_json(web, path):
    for headers in ({"Content-Type": "application/x-www-form-urlencoded"}, {"Content-Type": None}):
        assert web.post(path, data=b'{"prompt": "a"}', headers=headers).status_code == 200
        foreign = headers | {"Origin": "https://a.example"}
        assert web.post(path, data=b'{"prompt": "a"}', headers=foreign).status_code == 403
        assert "send one JSON object" in web.post(path, data=b"prompt=a", headers=headers).text
    assert "send one JSON object" in web.post(path, data=b"[1]", headers=headers).text


def test_every_key_is_compared_whatever_is_sent(monkeypatch):
    compared, compare = [], service_lib.hmac.compare_digest
    monkeypatch.setattr(service_lib.hmac, "compare_digest", lambda *pair: compared.append(pair) or compare(*pair))
    for text in (KEYS[0], KEYS[1], "", "x" * 10_000):
        matching_key(text, KEYS)
    # A digest tells nothing about the length of what was sent, and no key is skipped after a match.
    assert len(compared) == 4 * len(KEYS) and {len(part) for pair in compared for part in pair} == {32}


@pytest.mark.parametrize("path, kind", [("/api/model", "Bearer"), ("/sdapi/v1/options", "Basic")])
def test_a_missing_key_says_how_to_send_one(locked, path, kind):
    assert locked.get(path).headers["WWW-Authenticate"] == kind


def test_another_page_may_not_post(web):
    accepted = web.engine.numbers["accepted"]
    answer = web.post("/api/draw", BODY, headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403 and web.engine.numbers["accepted"] == accepted
    assert web.post("/api/draw", BODY, headers={"Origin": web.address}).status_code == 200


def test_no_page_elsewhere_reads_answers_without_cors(web):
    answer = web.session.options(f"{web.address}/api/draw", headers={"Origin": "https://a.example"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_cors_names_the_pages_that_may():
    with running(cors=("https://a.example",), keys=KEYS) as web:
        asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        preflight = web.session.options(f"{web.address}/api/draw", headers={"Origin": "https://a.example"} | asking)
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        bearer = {"Authorization": f"Bearer {KEYS[0]}"}
        assert web.post("/api/draw", BODY, headers={"Origin": "https://a.example"} | bearer).status_code == 200
        assert web.post("/api/draw", BODY, headers={"Origin": "https://b.example"} | bearer).status_code == 403


@pytest.mark.parametrize(
    "path", ["/api/model", "/v1/models", "/sdapi/v1/sd-models", "/metrics", "/docs", "/openapi.json"]
)
def test_a_key_is_needed_and_any_of_the_file_is_enough(locked, path):
    assert locked.get(path).status_code == 401
    assert locked.get(path, headers={"Authorization": "Bearer first-key-012345678"}).status_code == 401
    assert locked.get(path, headers={"Authorization": f"Basic {KEYS[0]}"}).status_code == 401
    for key in KEYS:
        assert locked.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert locked.get(path, auth=("anybody", KEYS[1])).status_code == 200


def test_the_page_and_the_probes_need_no_key(locked):
    assert {locked.get(path).status_code for path in ("/", "/healthz", "/readyz", "/static/style.css")} == {200}
    assert locked.get("/static/../../../setup.py").status_code in (401, 404)


def test_each_key_is_a_client_of_its_own(locked):
    for key in KEYS:
        locked.post("/api/draw", BODY, headers={"Authorization": f"Bearer {key}"})
    assert [job.client for job in locked.engine.jobs[-2:]] == ["key 0", "key 1"]


@pytest.mark.parametrize("text, expected", [("b" * 20, 1), ("", None), ("b" * 19, None), ("ä" * 20, None)])
def test_a_key_matches_as_a_whole(text, expected):
    assert matching_key(text, ("a" * 20, "b" * 20)) == expected


@pytest.mark.parametrize(
    "text, expected", [("", "no key"), ("# only\n", "no key"), ("short\n", "fewer than 16"), ("ä" * 20, "ASCII")]
)
def test_unusable_key_files_are_refused(tmp_path, text, expected):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(UserError, match=expected):
        read_keys(tmp_path / "keys")


def test_key_files_have_comments_and_blank_lines(tmp_path):
    (tmp_path / "keys").write_text(f"# mine\n{KEYS[0]}\n\n {KEYS[1]} \n")
    assert read_keys(tmp_path / "keys") == KEYS


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "gpu-machine"])
def test_other_addresses_need_a_key_or_a_word(host):
    with pytest.raises(UserError, match="--api-key-file FILE, or --no-auth"):
        check_access(host, (), no_auth=False)
    check_access(host, KEYS, no_auth=False)
    check_access(host, (), no_auth=True)
    assert not is_loopback(host) and is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")


def test_large_bodies_are_refused(web):
    limit = web.service.settings.max_body_bytes
    json_type = {"Content-Type": "application/json"}
    assert web.post("/api/draw", data=b" " * (limit + 1), headers=json_type).status_code == 413
    parts = (b" " * 65536 for _ in range(limit // 65536 + 1))  # Chunked: no length is stated.
    assert web.post("/v1/images/generations", data=parts, headers=json_type).status_code == 413


def test_a_slow_body_is_given_up():
    with running(body_timeout_s=0.2) as web:
        host, port = "127.0.0.1", web.service.settings.port
        with socket.create_connection((host, port), 10) as connection:
            head = f"POST /api/draw HTTP/1.1\r\nHost: {host}\r\nContent-Length: 9\r\n\r\n"
            connection.sendall(head.encode() + b"{")
            assert b" 408 " in connection.recv(200)


def test_answers_forbid_foreign_scripts(web):
    for path in ("/", "/docs", "/api/model", "/nowhere"):
        headers = web.get(path).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["script-src"] == policy["style-src"] == "'self'"
        assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
        assert headers["X-Content-Type-Options"] == "nosniff" and "server" not in headers
        assert headers["Referrer-Policy"] == "no-referrer" and headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Cache-Control"] == "no-store"


def test_pages_elsewhere_may_show_answers_only_with_cors():
    headers = asked(Settings(cors=("https://a.example",)), LOCAL | {"origin": "https://a.example"})[1]
    assert headers["cross-origin-resource-policy"] == "cross-origin"


def test_basic_authentication_without_a_colon_is_wrong(locked):
    value = base64.b64encode(KEYS[0].encode()).decode()
    assert locked.get("/api/model", headers={"Authorization": f"Basic {value}"}).status_code == 401
    sound = base64.b64encode(f"user:{KEYS[0]}".encode()).decode()
    assert locked.get("/api/model", headers={"Authorization": f"Basic {sound}"}).status_code == 200
    assert locked.get("/api/model", headers={"Authorization": f"Basic !{sound}"}).status_code == 401
