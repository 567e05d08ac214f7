"""What every HTTP request passes first: the host's name, the page it comes from, the key, and the size of the body.

Each guard is an ASGI application around another. The guards refuse in the shape of the interface that was asked.
"""

import asyncio
import base64
import binascii
import ipaddress
import urllib.parse

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dmm_jax.serve.faults import A1111, Fault, interface_of, response_of
from dmm_jax.serve.service import CLIENT, Settings, matching_key

OPEN_PATHS = ("/", "/healthz", "/readyz")  # They need no key: the page without pictures, and the probes.
# What `curl -d` states. A body of this type, or of none, is read as JSON: no form of another page can write JSON in it,
# and a script of another page is refused by its origin.
CURL_TYPE = "application/x-www-form-urlencoded"
OPEN_FOLDER = "/static/"
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Tells whether an address to listen on can be reached from this machine alone."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guards:
    """Refuses requests from other web pages, without a key, and with a body that is too large; adds headers."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_headers(send, cross_origin=bool(self.settings.cors))
        try:
            self._check_origin(scope)
            scope[CLIENT] = self._client(scope)
            receive = await self._limited(scope, receive)
            if Headers(scope=scope).get("content-type", CURL_TYPE) == CURL_TYPE:
                others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
                scope["headers"] = [*others, (b"content-type", b"application/json")]
        except Fault as fault:
            await response_of(fault, scope["path"])(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_origin(self, scope: Scope) -> None:
        """Refuses what a web page of somebody else could make a browser send.

        A page can point its own name to 127.0.0.1 (DNS rebinding); then its name is the Host. It can also post to
        another site without reading the answer; then its address is the Origin.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = urllib.parse.urlsplit(f"//{host}").hostname if _is_host(host) else None
        if is_loopback(self.settings.host) and name not in LOOPBACK_NAMES | {self.settings.host}:
            raise Fault(
                421, "wrong_host", f"this server listens on http://127.0.0.1:{self.settings.port}: use that address."
            )
        origin = headers.get("origin")
        allowed = {f"http://{host}", f"https://{host}", *self.settings.cors}
        if origin is not None and origin not in allowed and "*" not in self.settings.cors:
            raise Fault(403, "other_origin", "another web page may not use this server: start it with --cors ORIGIN.")

    def _client(self, scope: Scope) -> str:
        """Returns the client's name; refuses a wrong or missing key."""
        address = (scope.get("client") or ("unknown", 0))[0]
        path = scope["path"]
        if not self.settings.keys or path in OPEN_PATHS or path.startswith(OPEN_FOLDER):
            return address
        number = matching_key(_sent_key(Headers(scope=scope).get("authorization", "")), self.settings.keys)
        if number is None:
            kind = "Basic" if interface_of(path) == A1111 else "Bearer"
            raise Fault(
                401, "invalid_api_key",
                "send an API key of this server: Authorization: Bearer KEY, or HTTP Basic with the key as password.",
                headers={"WWW-Authenticate": kind},
            )  # fmt: skip
        return f"key {number}"

    async def _limited(self, scope: Scope, receive: Receive) -> Receive:
        """Reads the body up to its limits of size and time; returns a `receive` that gives it, and what comes after."""
        limit = self.settings.max_body_bytes
        too_large = Fault(413, "body_too_large", f"a body may have {limit} bytes.", headers={"Connection": "close"})
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > limit:
            raise too_large
        body, is_open = bytearray(), True
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                while is_open:
                    message = await receive()  # A client that leaves sends "http.disconnect", which has neither.
                    body += message.get("body", b"")
                    is_open = message.get("more_body", False)
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            seconds = f"{self.settings.body_timeout_s:g}"
            raise Fault(
                408, "body_too_slow", f"the body must arrive within {seconds} seconds.", headers={"Connection": "close"}
            ) from None
        first: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        return replay


def _is_host(host: str) -> bool:
    try:
        return bool(urllib.parse.urlsplit(f"//{host}").hostname)
    except ValueError:
        return False


def _sent_key(authorization: str) -> str:
    """Returns the key of an Authorization header: a bearer's, or the password of HTTP Basic; "" if there is none."""
    kind, _, value = authorization.strip().partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _with_headers(send: Send, cross_origin: bool) -> Send:
    headers = dict(SECURITY_HEADERS)
    if cross_origin:
        headers["Cross-Origin-Resource-Policy"] = "cross-origin"

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            present = {name.lower() for name, _ in message["headers"]}
            added = {"Cache-Control": "no-store", **headers}
            pairs = [(name.lower().encode(), value.encode()) for name, value in added.items()]
            message["headers"] = [*message["headers"], *(pair for pair in pairs if pair[0] not in present)]
        await send(message)

    return send_with_headers
