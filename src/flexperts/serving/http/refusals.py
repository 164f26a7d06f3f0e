"""Error replies: the HTTP status and OpenAI's JSON for a request that is not answered."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from flexperts.errors import ConfigError, DataError, FlexpertsError, ServingError

log = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class RefusedError(Exception):
    """A request is not answered.

    Args:
        status: HTTP status.
        error: Value, rule and remedy, shown to the caller.
        code: OpenAI's code for the kind of error, such as ``model_not_found``.
        param: The invalid field of the request.
        headers: Additional HTTP headers.
    """

    def __init__(
        self,
        status: int,
        error: FlexpertsError,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(str(error))
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's JSON format."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(error: FlexpertsError) -> RefusedError:
    """Return the refusal of a request that was not accepted, with the full message if it is the caller's error."""
    return RefusedError(400, error) if isinstance(error, ConfigError | DataError) else failed(error)


def failed(error: FlexpertsError) -> RefusedError:
    """Return the refusal of a request that failed; it hides the cause, which may be another caller's request."""
    log.error("%s", error)
    told = ServingError("this request", "the engine could not answer it", "try again, or tell the operator")
    return RefusedError(503, told, code="engine_failed")


def invalid(value: str, rule: str, remedy: str, param: str | None = None) -> RefusedError:
    """Return the refusal of a malformed or unsupported request."""
    return RefusedError(400, ConfigError(value, rule, remedy), param=param)


def stopping() -> RefusedError:
    """Return the refusal of a request that was running, or arrived, while the server stops."""
    error = ServingError("this request", "the server is stopping", "try again later")
    return RefusedError(503, error, code="stopping")


def later(status: int, value: str, rule: str, code: str, seconds: int) -> RefusedError:
    """Return the refusal of a request that may be accepted after some seconds."""
    error = ServingError(value, rule, f"try again in {seconds} s")
    return RefusedError(status, error, code=code, headers={"Retry-After": str(seconds)})
