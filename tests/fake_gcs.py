"""A bucket in memory with the part of Google Cloud Storage's JSON API that a run uses, over HTTP.

https://cloud.google.com/storage/docs/json_api/v1. TensorStore needs atomic writes and generations that are checked.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "runs"
OBJECT = re.compile(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)(?:/(?:moveTo|rewriteTo/b/{BUCKET})/o/([^/]+))?")
TIMES = dict.fromkeys(("timeCreated", "updated"), "2025-01-01T00:00:00.000Z")


class Store:
    """The objects of the bucket, and faults that a test sets.

    `denied` HTTP methods get status 403. A POST whose path contains `stalled` sets `arrived` and waits for `released`.
    """

    def __init__(self):
        self.objects: dict[str, tuple[int, bytes]] = {}  # {name: (generation, content)}
        self.denied: set[str] = set()
        self.stalled = ""
        self.arrived, self.released = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self.url = ""
        self._generation = 0

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that direct gcsfs, google-cloud-storage and TensorStore to this server."""
        address = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), self.url)
        return address | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}

    def write(self, name: str, content: bytes) -> None:
        """Stores an object under a new generation."""
        with self.lock:
            self._generation += 1
            self.objects[name] = (self._generation, content)

    def names(self, prefix: str = "") -> list[str]:
        """Returns the sorted names of the objects."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def resource(self, name: str) -> dict:
        """Returns the description of an object."""
        generation, content = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        numbers = {"generation": str(generation), "metageneration": "1", "size": str(len(content)), "md5Hash": md5}
        return {"kind": "storage#object", "bucket": BUCKET, "name": name} | numbers | TIMES


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """Yields an empty store that answers requests until the block ends."""
    store = Store()
    server = ThreadingHTTPServer(("localhost", 0), type("Handler", (Handler,), {"store": store}))
    store.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers the requests of a connection; each method returns (status, content, headers)."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # A test may have killed the client.
            super().handle()

    def respond(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        if self.store.stalled and self.command == "POST" and self.store.stalled in unquote(self.path):
            self.store.arrived.set()
            self.store.released.wait()
            self.close_connection = True
            return
        query = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        with self.store.lock:
            status, body, headers = self.answer(address.path, query, content)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = respond

    def answer(self, path: str, query: Mapping[str, str], content: bytes) -> tuple:
        if self.command in self.store.denied:
            return error(403, "the caller does not have storage.objects access")
        if path.startswith(f"/storage/v1/b/{BUCKET}") and path.count("/") == 4:
            return as_json({"kind": "storage#bucket", "name": BUCKET, "locationType": "region"})
        if path == f"/storage/v1/b/{BUCKET}/o":
            return as_json(self.list_objects(query))
        if path == f"/upload/storage/v1/b/{BUCKET}/o":
            return self.upload(query, content)
        if match := OBJECT.fullmatch(path):
            return self.answer_object(*(name and unquote(name) for name in match.groups()), query)
        return error(404, f"not found: {self.command} {path}")

    def list_objects(self, query: Mapping[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], {}
        for name in self.store.names(prefix):
            head, separator, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if separator:
                prefixes[prefix + head + separator] = None
            elif query.get("startOffset", "") <= name < query.get("endOffset", "\U0010ffff"):
                items.append(self.store.resource(name))
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}

    def upload(self, query: Mapping[str, str], content: bytes) -> tuple:
        if query["uploadType"] == "resumable":  # The first request has the name; the second goes to the Location.
            name = quote(json.loads(content)["name"], safe="")
            return as_json({}, Location=f"{self.store.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}")
        is_multipart = query["uploadType"] == "multipart"
        name, content = self.split_multipart(content) if is_multipart else (query["name"], content)
        generation, _ = self.store.objects.get(name, (0, b""))
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return error(412, "the object has another generation")
        self.store.write(name, content)
        return as_json(self.store.resource(name))

    def split_multipart(self, content: bytes) -> tuple[str, bytes]:
        """Returns name and content of a multipart upload: a part of JSON, then the object."""
        boundary = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
        parts = content.split(b"--" + boundary)[1:3]
        metadata, body = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
        return json.loads(metadata)["name"], body.removesuffix(b"\n").removesuffix(b"\r")

    def answer_object(self, name: str, target: str | None, query: Mapping[str, str]) -> tuple:
        """Reads, describes, deletes, copies or moves an object; `target` is the name of the copy."""
        if name not in self.store.objects:
            return error(404, f"no such object: {name}")
        generation, content = self.store.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return error(412, "the object has another generation")
        if self.command == "DELETE":
            del self.store.objects[name]
            return 204, b"", {}
        if target:
            self.store.write(target, content)
            if "/moveTo/" in self.path:
                del self.store.objects[name]
            return as_json({"done": True, "resource": self.store.resource(target)} | self.store.resource(target))
        if query.get("alt") != "media":
            return as_json(self.store.resource(name))
        return ranged(content, self.headers.get("Range", ""), {"x-goog-generation": str(generation)})


@contextlib.contextmanager
def reachable() -> Iterator[Store]:
    """Serves a bucket for the block, and directs this process and its children to it."""
    with serving() as store, mock.patch.dict(os.environ, store.environment):
        yield store


def ranged(content: bytes, header: str, headers: dict[str, str]) -> tuple:
    """Answers with the bytes of a Range header: FIRST-LAST, FIRST-, or -NUMBER for the last bytes."""
    bounds = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not bounds:
        return 200, content, headers
    first, last = bounds.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
    return 206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}


def as_json(body: dict, **headers: str) -> tuple:
    return 200, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers


def error(status: int, message: str) -> tuple:
    body = json.dumps({"error": {"code": status, "message": message}}).encode()
    return status, body, {"Content-Type": "application/json"}
