"""How a client connects, and how long it waits before it tries again."""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2

from weft_client.errors import (
    ApiError,
    ConnectionFailedError,
    InvalidArgumentError,
    NotReadyError,
    OverloadedError,
    ServerError,
)

_MAX_WAIT_S = 60.0
_RETRIED_SERVER_STATUSES = frozenset({502, 504})


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """Shared by both clients. `max_retries` counts the tries behind the first."""

    base_url: str
    api_key: str | None
    timeout_s: float
    max_retries: int

    @classmethod
    def of(cls, base_url: str, api_key: str | None, timeout_s: float, max_retries: int) -> "ConnectionSettings":
        """`base_url` may end with `/v1`; without a key, WEFT_API_KEY is taken.

        Raises   InvalidArgumentError: names the argument and what it may be
        """
        key = api_key or os.environ.get("WEFT_API_KEY") or None
        if not _is_http_url(base_url):
            raise InvalidArgumentError(f"`base_url` must be http://HOST:PORT or https://HOST. Given: {base_url!r}")
        if key is not None and not (isinstance(key, str) and key.isascii() and key.isprintable()):
            raise InvalidArgumentError("`api_key` must be printable ASCII, as HTTP headers are. Given: a secret")
        if not timeout_s > 0:
            raise InvalidArgumentError(f"`timeout_s` must be more than 0. Given: {timeout_s!r}")
        if max_retries < 0:
            raise InvalidArgumentError(f"`max_retries` must be 0 or more. Given: {max_retries!r}")
        return cls(base_url.rstrip("/").removesuffix("/v1"), key, timeout_s, max_retries)

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request carries."""
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"content-type": "application/json", "accept": "application/json, text/event-stream", **key}

    @property
    def timeout(self) -> httpx2.Timeout:
        """Short to connect, long between two pieces of an answer."""
        return httpx2.Timeout(self.timeout_s, connect=min(10.0, self.timeout_s))

    def wait_before_retry_s(self, error: ApiError | ConnectionFailedError, attempt: int) -> float | None:
        """Seconds until the next try, attempt counted from 0; None when there is none.

        Tried again is what never began: a refused connection, a full or loading server. What the server asks for
        counts; otherwise the pause doubles, with jitter so that many clients do not come back at once.
        """
        is_passing = isinstance(error, OverloadedError | NotReadyError | ConnectionFailedError) or (
            isinstance(error, ServerError) and error.status in _RETRIED_SERVER_STATUSES
        )
        if not is_passing or attempt >= self.max_retries:
            return None
        asked_s = error.retry_after_s if isinstance(error, ApiError) else None
        if asked_s is not None:
            return asked_s if asked_s <= _MAX_WAIT_S else None
        return min(_MAX_WAIT_S, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def _is_http_url(url: object) -> bool:
    if not isinstance(url, str):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, half of the brackets of an IPv6 address
        return False
