"""Errors as clients of the OpenAI API know them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dare.core.errors import DareError, closest_name

RETRY_AFTER_S = 1
CLIENT_LEFT = "client_left"
_MAX_MESSAGE = 500


class ErrorObject(BaseModel):
    """What went wrong. `param` names the field of the request, `code` the kind of mistake."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorObject


class ApiError(HTTPException):
    """An answer other than 2xx."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.message, self.code = _printable(message), code
        self.param = None if param is None else _printable(param)
        super().__init__(status, self.message)
        if status in (429, 503):
            self.headers = {"Retry-After": str(RETRY_AFTER_S)}

    @property
    def body(self) -> dict[str, Any]:
        """The error object, as plain data."""
        kind = {429: "rate_limit_error", 401: "authentication_error"}.get(
            self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The error as an HTTP answer."""
        return JSONResponse(self.body, self.status_code, headers=self.headers)


def _printable(text: str) -> str:
    """Text that can be sent: of bounded length, without halves of surrogate pairs."""
    text = text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."
    return text.encode("utf-8", "replace").decode("utf-8")


def bad_request(error: DareError, param: str | None) -> ApiError:
    """A user's mistake, in one line, with the field of the request that holds it."""
    details = [f"{label}: {value}" for label, value in error.details.items() if value is not None and label != "where"]
    return ApiError(400, "; ".join([error.what, *details]), param=param, code="invalid_value")


def invalid_body(error: RequestValidationError, known: Sequence[str]) -> ApiError:
    """The first thing that is wrong with a request's body; `known` are the field names it may have."""
    errors = error.errors()
    # Of a field that may have several forms, the form that got furthest is the one that was meant.
    same = [item for item in errors if item["loc"][:2] == errors[0]["loc"][:2]]
    first = max(same, key=lambda item: (not item["type"].endswith("_type"), len(item["loc"])))
    path = _path(first, known)
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not valid JSON", code="invalid_json")
    if first["type"] == "extra_forbidden":
        close = closest_name(path[-1], known)
        hint = "" if close is None else f"; did you mean '{close}'?"
        return ApiError(400, f"unknown field '{param}'{hint}", param=param, code="unknown_field")
    if first["type"] == "missing" and not path:
        return ApiError(400, "the request has no body", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def _path(error: Any, known: Sequence[str]) -> list[str]:
    """Where an error is, without the names of the forms that pydantic tried."""
    parts = [part for part in error["loc"] if part != "body"]
    is_unknown = error["type"] == "extra_forbidden"
    kept = [part for part in parts[:-1] if isinstance(part, int) or part in known]
    last = [part for part in parts[-1:] if is_unknown or isinstance(part, int) or part in known]
    return [str(part) for part in kept + last]


def plain_error(error: HTTPException) -> ApiError:
    """What the web framework refuses by itself: unknown paths, methods, unreadable bodies."""
    answer = ApiError(error.status_code, str(error.detail), code="not_found" if error.status_code == 404 else None)
    answer.headers = error.headers
    return answer
