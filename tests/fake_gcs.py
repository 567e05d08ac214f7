"""A bucket that speaks Google Cloud Storage's JSON API over HTTP, in memory: as much of it as a run asks for.

https://cloud.google.com/storage/docs/json_api/v1. Writes are atomic and generations checked: TensorStore rests on it.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "runs"
OBJECT = re.compile(rf"(?:/download)?/storage/v1/b/{BUCKET}/o/([^/]+)(?:/(?:moveTo|rewriteTo/b/{BUCKET})/o/([^/]+))?")
TIMES = dict.fromkeys(("timeCreated", "updated"), "2025-01-01T00:00:00.000Z")


class Store:
    """The objects of the one bucket; `denied` HTTP methods are answered by 403, POSTs to what holds `stalled` never."""

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
        """What sends gcsfs, google-cloud-storage and TensorStore here instead of to the cloud."""
        here = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), self.url)
        return here | {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "NO_GCE_CHECK": "true"}

    def write(self, name: str, content: bytes) -> None:
        """Stores an object under a new generation."""
        with self.lock:
            self._generation += 1
            self.objects[name] = (self._generation, content)

    def names(self, prefix: str = "") -> list[str]:
        """Returns the names of the objects in order."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def described(self, name: str) -> dict:
        """Returns an object's resource."""
        generation, content = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
        numbers = {"generation": str(generation), "metageneration": "1", "size": str(len(content)), "md5Hash": md5}
        return {"kind": "storage#object", "bucket": BUCKET, "name": name} | numbers | TIMES


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """Yields an empty store that answers until the block ends."""
    store = Store()
    server = ThreadingHTTPServer(("localhost", 0), type("Handler", (Requests,), {"store": store}))
    store.url = f"http://localhost:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()


class Requests(BaseHTTPRequestHandler):
    """Answers a connection's requests; each method returns (status, content, headers)."""

    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # The caller may have been killed.
            super().handle()

    def answer(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        if self.store.stalled and self.command == "POST" and self.store.stalled in unquote(self.path):
            self.store.arrived.set()
            self.store.released.wait()
            self.close_connection = True
            return
        told = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        with self.store.lock:
            status, body, headers = self.found(address.path, told, content)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def found(self, path: str, told: Mapping[str, str], content: bytes) -> tuple:
        if self.command in self.store.denied:
            return failed(403, "the caller does not have storage.objects access")
        if path.startswith(f"/storage/v1/b/{BUCKET}") and path.count("/") == 4:
            return as_json({"kind": "storage#bucket", "name": BUCKET, "locationType": "region"})
        if path == f"/storage/v1/b/{BUCKET}/o":
            return as_json(self.listing(told))
        if path == f"/upload/storage/v1/b/{BUCKET}/o":
            return self.upload(told, content)
        if named := OBJECT.fullmatch(path):
            return self.one(*(name and unquote(name) for name in named.groups()), told)
        return failed(404, f"not found: {self.command} {path}")

    def listing(self, told: Mapping[str, str]) -> dict:
        prefix, delimiter = told.get("prefix", ""), told.get("delimiter")
        items, prefixes = [], {}
        for name in self.store.names(prefix):
            head, between, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if between:
                prefixes[prefix + head + between] = None
            elif told.get("startOffset", "") <= name < told.get("endOffset", "\U0010ffff"):
                items.append(self.store.described(name))
        return {"kind": "storage#objects", "items": items, "prefixes": list(prefixes)}

    def upload(self, told: Mapping[str, str], content: bytes) -> tuple:
        if told["uploadType"] == "resumable":  # In one piece: the name first, the content to the place that is told.
            name = quote(json.loads(content)["name"], safe="")
            return as_json({}, Location=f"{self.store.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}")
        name, content = self.part(content) if told["uploadType"] == "multipart" else (told["name"], content)
        return self.written(name, content, told)

    def part(self, content: bytes) -> tuple[str, bytes]:
        """Returns name and content of a multipart upload: JSON, then the object."""
        boundary = re.search(r'boundary="?([^"]+)"?', self.headers["Content-Type"])[1].encode()
        parts = content.split(b"--" + boundary)[1:3]
        about, body = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in parts)
        return json.loads(about)["name"], body.removesuffix(b"\n").removesuffix(b"\r")

    def written(self, name: str, content: bytes, told: Mapping[str, str]) -> tuple:
        there, _ = self.store.objects.get(name, (0, b""))
        if told.get("ifGenerationMatch", str(there)) != str(there):
            return failed(412, "the generation is another")
        self.store.write(name, content)
        return as_json(self.store.described(name))

    def one(self, name: str, target: str | None, told: Mapping[str, str]) -> tuple:
        if name not in self.store.objects:
            return failed(404, f"no such object: {name}")
        generation, content = self.store.objects[name]
        if told.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        if told.get("ifGenerationMatch", str(generation)) != str(generation):
            return failed(412, "the generation is another")
        if self.command == "DELETE":
            del self.store.objects[name]
            return 204, b"", {}
        if target:
            self.store.write(target, content)
            if "/moveTo/" in self.path:
                del self.store.objects[name]
            return as_json({"done": True, "resource": self.store.described(target)} | self.store.described(target))
        if told.get("alt") != "media":
            return as_json(self.store.described(name))
        return ranged(content, self.headers.get("Range", ""), {"x-goog-generation": str(generation)})


def ranged(content: bytes, asked: str, headers: dict[str, str]) -> tuple:
    """Answers with the bytes of a Range header: first-last, first-, or -last_so_many."""
    bounds = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    if not bounds:
        return 200, content, headers
    first, last = bounds.groups()
    start = int(first) if first else max(len(content) - int(last), 0)
    stop = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= len(content):
        return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
    return 206, content[start:stop], headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}


def as_json(found: dict, **headers: str) -> tuple:
    return 200, json.dumps(found).encode(), {"Content-Type": "application/json"} | headers


def failed(status: int, message: str) -> tuple:
    body = json.dumps({"error": {"code": status, "message": message}}).encode()
    return status, body, {"Content-Type": "application/json"}
