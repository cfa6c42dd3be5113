"""One HTTP request and its answer, from the first byte in to the log line after the last byte out.

`Edge` is the outermost ASGI application: it gives every exchange its id, sees every response begin, and writes one
log event and the HTTP metrics when it is over. Prompts and completions never get here.
"""

import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.core.clock import Clock
from weft.errors import RequestError
from weft.limits import LIMITS
from weft.telemetry.metrics import Registry
from weft.telemetry.tracing import OpenSpan

log = structlog.get_logger("weft.http")

RawHeaders = list[tuple[bytes, bytes]]

SCOPE_KEY = "weft.exchange"
ABORT_KEY = "weft.abort"
"""Scope entry of our HTTP protocol: closes the transport at once."""
FLOW_KEY = "weft.flow"
"""Scope entry of our HTTP protocol: knows whether the client reads what is sent."""

UNMATCHED = "unmatched"
_SANE_REQUEST_ID = re.compile(rf"[\x21-\x7e]{{1,{LIMITS.max_request_id_chars}}}")


@dataclass(slots=True, kw_only=True)
class Timings:
    """Clock readings of one generation, in nanoseconds; 0 = has not happened."""

    started_ns: int
    queued_ns: int = 0
    queue_ns: int = 0
    """How long the engine let the request wait, by its own clock."""
    first_token_ns: int = 0
    finished_ns: int = 0

    @property
    def validation_ns(self) -> int:
        """Arrival to the engine's queue."""
        return max(self.queued_ns - self.started_ns, 0)

    @property
    def inference_ns(self) -> int:
        """First step to last token."""
        return max(self.finished_ns - self.queued_ns - self.queue_ns, 0)

    @property
    def total_ns(self) -> int:
        """Arrival to last token."""
        return max(self.finished_ns - self.started_ns, 0)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What is known about one request while it is answered."""

    scope: Scope
    receive: Receive
    send: Send
    send_body: Send
    """The server's own: for what follows the status line, at which no layer looks any more."""
    request_id: str
    timings: Timings
    route: str = UNMATCHED
    speaks_like: str = ""
    """Path of the route whose dialect an error is said in; empty: this exchange's own."""
    body: bytes = b""
    has_whole_body: bool = False
    """Nothing of it is still to come."""
    path_params: dict[str, str] = field(default_factory=dict)
    status: int = 0
    stage: str = "headers"
    """How far the request has come, for cancellations: headers body validate template tokenize queue decode."""
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    max_new_tokens: int = 0
    finish_reason: str = ""
    error: RequestError | None = None
    span: OpenSpan | None = None
    """Where the request is traced; None without a collector."""
    system_fingerprint: str = ""
    """Header x-system-fingerprint of whatever generates; empty: none."""
    end_stream: Callable[[RequestError], Awaitable[None]] | None = None
    """Set while an event stream is open: how it says that it failed."""
    generates_later: bool = False
    """Its generation goes on behind the answer and is accounted for when it ends."""
    counts_vectors: bool = False
    """It was answered with vectors: there are no tokens whose number or pace could be counted."""
    is_complete: bool = False
    """The last byte of the answer is on its way: what the client does now changes nothing."""

    def header(self, name: bytes) -> str | None:
        """Value of a request header given in lower case; of a repeated one, the first."""
        return next((value.decode("latin-1") for key, value in self.scope["headers"] if key == name), None)

    def headers(self, name: bytes) -> list[str]:
        """All values of a request header given in lower case."""
        return [value.decode("latin-1") for key, value in self.scope["headers"] if key == name]

    @property
    def is_answering(self) -> bool:
        """The status line is out."""
        return self.status != 0

    @property
    def sends_at_once(self) -> bool:
        """Sending would not wait: the client reads. False where nobody knows."""
        flow = self.scope.get(FLOW_KEY)
        return flow is not None and not flow.write_paused

    def abort_connection(self) -> None:
        """Close the connection without waiting for a reader that does not read."""
        abort = self.scope.get(ABORT_KEY)
        if abort is not None:
            abort()

    async def reply(
        self,
        status: int,
        body: bytes,
        content_type: bytes = b"application/json",
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        """Send a whole response."""
        start: RawHeaders = [(b"content-length", b"%d" % len(body))]
        if body:
            start.append((b"content-type", content_type))
        await self.send({"type": "http.response.start", "status": status, "headers": [*start, *headers]})
        self.is_complete = True
        await self.send({"type": "http.response.body", "body": body, "more_body": False})

    @asynccontextmanager
    async def lingering_reply(self, status: int, body: bytes, headers: RawHeaders) -> AsyncIterator[None]:
        """Send a whole JSON response at once, and close the connection behind the block."""
        start = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json"), *headers]
        await self.send({"type": "http.response.start", "status": status, "headers": start})
        self.is_complete = True
        await self.send({"type": "http.response.body", "body": body, "more_body": True})
        yield
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})


class Edge:
    """The outermost application."""

    def __init__(self, app: ASGIApp, clock: Clock, metrics: Registry) -> None:
        self._app = app
        self._clock = clock
        self._requests = metrics.counter("weft_http_requests")
        self._in_flight = metrics.gauge("weft_http_requests_in_flight")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = choose_request_id(scope)
        # Clients of Anthropic look for the shorter name.
        id_headers = [(name, request_id.encode("ascii")) for name in (b"x-request-id", b"request-id")]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *id_headers]
                if exchange.system_fingerprint:
                    value = exchange.system_fingerprint.encode("latin-1")
                    message["headers"].append((b"x-system-fingerprint", value))
            await send(message)

        exchange = Exchange(
            scope=scope,
            receive=receive,
            send=send_with_id,
            send_body=send,
            request_id=request_id,
            timings=Timings(started_ns=self._clock.now_ns()),
        )
        scope[SCOPE_KEY] = exchange
        self._in_flight.add(1)
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._in_flight.add(-1)
            self._finished(exchange)

    def _finished(self, exchange: Exchange) -> None:
        timings = exchange.timings
        status = exchange.error.http_status if exchange.error and not exchange.status else exchange.status
        self._requests.add(1, exchange.route, str(status))
        fields: dict[str, str | int | float] = {
            "request_id": exchange.request_id,
            "method": exchange.scope["method"],
            "route": exchange.route,
            "status": status,
            "duration_ms": _ms(self._clock.now_ns() - timings.started_ns),
        }
        if exchange.error is not None:
            fields.update(error=exchange.error.code, stage=exchange.stage)
        if timings.queued_ns:
            fields.update(
                prompt_tokens=exchange.num_prompt_tokens,
                cached_tokens=exchange.num_cached_tokens,
                completion_tokens=exchange.num_completion_tokens,
                finish_reason=exchange.finish_reason,
                validation_ms=_ms(timings.validation_ns),
                queue_ms=_ms(timings.queue_ns),
                first_token_ms=_ms(max(timings.first_token_ns - timings.started_ns, 0)),
            )
        # Probes come every few seconds for ever; they are worth a line only to somebody who looks for it.
        level = "debug" if exchange.route in _QUIET_ROUTES and exchange.scope["method"] != "POST" else "info"
        getattr(log, level)("request.finished", **fields)


_QUIET_ROUTES = frozenset({"/", "/health", "/health/live", "/health/ready", "/ping", "/metrics"})


def choose_request_id(scope: Scope) -> str:
    """The client's own id when it is short and printable, else a new one. Never used as a key."""
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            text: str = value.decode("latin-1")
            if _SANE_REQUEST_ID.fullmatch(text):
                return text
            break
    return new_request_id()


def new_request_id() -> str:
    """128 random bits, readable."""
    return secrets.token_hex(16)


def _ms(duration_ns: int) -> float:
    return round(duration_ns / 1e6, 3)
