"""What a failed request answers: a status, a sentence that says what to send, and each interface's own shape."""

import concurrent.futures
import dataclasses
import math
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from dmm_jax.runtime.errors import UserError, meant, visible
from dmm_jax.serve.requests import Draining, EngineFailed, NotFinite, QueueFull

RETRY_S = 5.0  # When a client may ask again a server that starts or stops.
MAX_MESSAGE_CHARS = 2000
OPENAI, A1111, OWN = "openai", "a1111", "own"


@dataclasses.dataclass(eq=False)
class Fault(Exception):
    """Why a request failed."""

    status: int
    code: str
    message: str
    field: str | None = None
    retry_after: float | None = None  # Seconds.
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    details: Sequence[Mapping] = ()  # One entry per wrong field.


def not_ready() -> Fault:
    """Returns the fault of a request that comes before the programs are compiled."""
    return Fault(503, "not_ready", "the server is compiling its programs; ask again soon.", retry_after=RETRY_S)


def fault_of(error: BaseException) -> Fault:
    """Returns the fault for an exception; one of ours (500) prints its traceback and tells the client nothing else."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, RequestValidationError):
        return _validation_fault(error)
    if isinstance(error, QueueFull):
        return Fault(429, "queue_full", str(error), retry_after=error.retry_after)
    if isinstance(error, concurrent.futures.CancelledError):
        return Fault(503, "cancelled", "the image was cancelled.", retry_after=RETRY_S)
    if isinstance(error, Draining):
        return Fault(503, "stopping", str(error), retry_after=RETRY_S)
    if isinstance(error, NotFinite):
        return Fault(422, "not_finite", str(error))
    if isinstance(error, UserError):
        return Fault(400, "invalid_request", str(error))
    if isinstance(error, EngineFailed):
        return Fault(503, "device_failed", str(error), retry_after=RETRY_S)
    if isinstance(error, HTTPException):
        return _http_fault(error)
    traceback.print_exception(error, file=sys.stderr)
    return Fault(500, "internal_error", "this is a fault of dmm-jax; the server's log has the details.")


def _http_fault(error) -> Fault:
    messages = {
        404: "there is no such address; /docs lists those that there are.",
        405: "this address takes another method; /docs lists them.",
        400: "the body is not JSON: send one JSON object with Content-Type: application/json.",
    }
    message = messages.get(error.status_code, str(error.detail))
    return Fault(error.status_code, f"http_{error.status_code}", message, headers=dict(error.headers or {}))


def _validation_fault(error: RequestValidationError) -> Fault:
    details = []
    for problem in error.errors()[:20]:
        place = [str(part) for part in problem["loc"] if part != "body"]
        message = str(problem["msg"]).removeprefix("Value error, ")
        if not place and problem["type"] != "value_error":  # It is missing, or another kind of JSON value.
            message = "send one JSON object with Content-Type: application/json"
        details.append({"loc": ["body", *place], "msg": message, "type": problem["type"]})
    if any(problem["type"] == "json_invalid" for problem in details):
        return _http_fault(HTTPException(400))
    lines = [f"{'.'.join(detail['loc'][1:]) or 'the body'}: {detail['msg']}" for detail in details]
    fields = [detail["loc"][1] for detail in details if len(detail["loc"]) > 1]
    return Fault(422, "invalid_request", "; ".join(lines), field=next(iter(fields), None), details=details)


def refuse_unknown_fields(names: Iterable, fields: Sequence[str], others: Mapping[str, str]) -> None:
    """Raises ValueError if a body has unknown fields; suggests what they are called here.

    Args:
      others: {name in other interfaces: name here, or a sentence}.
    """
    unknown = [str(name) for name in names if name not in fields]
    if unknown:
        hints = [f"{name!r}{meant(others.get(name, name), (*fields, *others.values()), repr)}" for name in unknown[:5]]
        raise ValueError(f"there is no field {' '.join(hints)} The fields are: {', '.join(fields)}.")


def interface_of(path: str) -> str:
    """Returns the interface that an address belongs to."""
    return OPENAI if path.startswith("/v1/") else A1111 if path.startswith("/sdapi/") else OWN


def response_of(fault: Fault, path: str) -> JSONResponse:
    """Returns a fault in the shape of the interface that was asked."""
    headers = dict(fault.headers)
    if fault.retry_after is not None:
        headers["Retry-After"] = str(max(math.ceil(fault.retry_after), 1))
    return JSONResponse(body_of(fault, path), fault.status, headers)


def body_of(fault: Fault, path: str) -> dict:
    """Returns a fault as JSON: OpenAI's `error` object, A1111's `error` and `detail`, or our `error` object."""
    message = visible(fault.message)[:MAX_MESSAGE_CHARS]
    field = fault.field and visible(fault.field)[:100]
    interface = interface_of(path)
    if interface == OPENAI:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(fault.status, "invalid_request_error" if fault.status < 500 else "server_error")
        return {"error": {"message": message, "type": kind, "param": field, "code": fault.code}}
    if interface == A1111:
        details = [
            {
                name: [visible(part)[:100] for part in value] if name == "loc" else visible(value)[:MAX_MESSAGE_CHARS]
                for name, value in detail.items()
            }
            for detail in fault.details
        ]
        return {"error": fault.code, "detail": details or message, "body": "", "errors": message}
    return {"error": {"code": fault.code, "message": message, "field": field}}


def add_handlers(app: FastAPI) -> None:
    """Makes an app answer every exception as a fault."""

    async def answer(request: Request, error: Exception):
        return response_of(fault_of(error), request.url.path)

    for kind in (RequestValidationError, HTTPException, UserError, EngineFailed, Fault, Exception):
        app.add_exception_handler(kind, answer)
