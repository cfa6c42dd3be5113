"""uvicorn's HTTP protocol with limits that act before memory is spent: bytes, number and time of the headers.

uvicorn with httptools takes a header of any size and waits for the rest of one for ever (RELIABILITY, "the HTTP server
is not an edge"). Bytes are counted as they arrive, not as headers are complete, so a single endless header ends too.
Body limits are in `body.py`.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import cast

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from weft.errors import BadRequestError, HeadersTooLargeError, RequestError, RequestTimeoutError
from weft.limits import LIMITS
from weft.router.error_replies import body_of, dialect_of, status_of
from weft.router.exchange import ABORT_KEY, FLOW_KEY, new_request_id
from weft.router.lifecycle import Progress, ServerState

_OVERHEAD_PER_HEADER = 4
"""Colon, space, carriage return, line feed."""
_NO_PROGRESS = Progress(ServerState.READY)


class _Refused(Exception):
    """Raised inside a parser callback: stops parsing at once."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _is_reading_headers = False
    _is_idle = True
    _header_bytes = 0
    _refusal: RequestError | None = None
    _header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that connects and says nothing has the same time as one that sends half a header."""
        super().connection_made(transport)
        _let_dead_peers_go(transport)
        self._start_header_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing may fire for a connection that is gone."""
        self._stop_header_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count, then parse."""
        self._unset_keepalive_if_required()
        self._is_idle = False
        was_reading_headers = self._is_reading_headers
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            return  # no upgrade is offered: the request is answered as it stands
        except httptools.HttpParserError:
            self._refuse(self._refusal or BadRequestError("The request is not valid HTTP"))
            return
        if self._is_reading_headers and was_reading_headers:
            # The part of an unfinished header that no callback has seen yet.
            self._header_bytes += len(data)
            if self._header_bytes > LIMITS.max_header_bytes:
                self._refuse(_too_large())

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._is_reading_headers = True
        self._header_bytes = 0
        if self._header_timer is None:
            self._start_header_timer()

    def on_url(self, url: bytes) -> None:
        """The target, or a part of it."""
        super().on_url(url)
        if len(self.url) > LIMITS.max_url_bytes:
            self._stop_parsing(HeadersTooLargeError(f"The URL must have at most {LIMITS.max_url_bytes} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header is complete."""
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + _OVERHEAD_PER_HEADER
        if len(self.headers) > LIMITS.max_headers or self._header_bytes > LIMITS.max_header_bytes:
            self._stop_parsing(_too_large())

    def on_headers_complete(self) -> None:
        """The application takes over."""
        self._is_reading_headers = False
        self._stop_header_timer()
        if self.parser.get_http_version() not in ("1.0", "1.1"):
            self._stop_parsing(BadRequestError("Only HTTP/1.0 and HTTP/1.1 are spoken here"))
        scope = cast("dict[str, object]", self.scope)
        scope[ABORT_KEY], scope[FLOW_KEY] = self.transport.abort, self.flow
        super().on_headers_complete()

    def _stop_parsing(self, error: RequestError) -> None:
        self._refusal = error
        raise _Refused

    def _refuse(self, error: RequestError) -> None:
        """Answer without the application, and close: what follows cannot be trusted to be a request."""
        self._stop_header_timer()
        if self.transport.is_closing():
            return
        is_answering_another = self.cycle is not None and not self.cycle.response_complete
        if not is_answering_another:
            self.transport.write(self._response(error))
        self.transport.close()

    def _response(self, error: RequestError) -> bytes:
        dialect = dialect_of(getattr(self, "url", b"")[:256].decode("latin-1"))
        request_id = new_request_id()
        body = body_of(error, dialect, _NO_PROGRESS, request_id)
        headers = (
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            b"x-request-id: " + request_id.encode("ascii"),
        )
        status = 400 if type(error) is BadRequestError else status_of(error, dialect)
        return STATUS_LINE[status] + b"\r\n".join(headers) + b"\r\n\r\n" + body

    def _start_header_timer(self) -> None:
        self._header_timer = self.loop.call_later(LIMITS.header_timeout_s, self._on_header_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        self._header_timer = None
        if self._is_idle:
            self.transport.close()
        else:
            self._refuse(RequestTimeoutError("The headers of the request came too slowly"))


def _let_dead_peers_go(transport: asyncio.Transport) -> None:
    """Have the kernel end connections whose peer is gone, or takes nothing of what we have already written."""
    connection = transport.get_extra_info("socket")
    if connection is None or connection.family == socket.AF_UNIX:
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform == "linux":
        timeout_ms = int(2 * LIMITS.stream_stall_timeout_s * 1000)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)


def _too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(
        f"The request must have at most {LIMITS.max_headers} headers and {LIMITS.max_header_bytes} bytes of them"
    )


class HttpServer(uvicorn.Server):
    """uvicorn's server without its signal handlers: the process decides when to stop (`main.py`)."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield
