"""What a caller is told when a request is not answered: HTTP status and OpenAI's JSON shape."""

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
        error: Value, rule and remedy, for the caller's eyes.
        code: OpenAI's word for the kind of refusal, such as ``model_not_found``.
        param: The field of the request that is at fault.
        headers: Further HTTP headers.
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
        """The error as OpenAI's clients read it."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(error: FlexpertsError) -> RefusedError:
    """Return the refusal of a request that was not taken: what the caller did wrong is told in full."""
    return RefusedError(400, error) if isinstance(error, ConfigError | DataError) else failed(error)


def failed(error: FlexpertsError) -> RefusedError:
    """Return the refusal of a request that could not be answered; the cause may be another caller's."""
    log.error("%s", error)
    told = ServingError("this request", "the engine could not answer it", "ask again, or tell the operator")
    return RefusedError(503, told, code="engine_failed")


def invalid(value: str, rule: str, remedy: str, param: str | None = None) -> RefusedError:
    """Return the refusal of a malformed or unsupported request."""
    return RefusedError(400, ConfigError(value, rule, remedy), param=param)


def stopping() -> RefusedError:
    """Return the refusal of a request that the server's end has cut off, or that came after it."""
    error = ServingError("this request", "the server is stopping", "ask again later")
    return RefusedError(503, error, code="stopping")


def later(status: int, value: str, rule: str, code: str, seconds: int) -> RefusedError:
    """Return the refusal of a request that may be taken when it is sent again after some seconds."""
    error = ServingError(value, rule, f"try again in {seconds} s")
    return RefusedError(status, error, code=code, headers={"Retry-After": str(seconds)})
