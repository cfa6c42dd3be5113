"""A server that speaks OpenAI's API: where it is, which key it gets, and what its refusals say."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx2

from weft.errors import StartupError, UsageError

DEFAULT_URL = "http://localhost:3000"
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0
"""Between two pieces of an answer; the first may wait behind a queue and a long prompt."""
_TIMEOUT = httpx2.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
_MAX_SHOWN_CHARS = 500


class EndpointError(StartupError):
    """The server cannot be reached, or refused what a command needs."""

    code = "endpoint"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`root` has no path of the API: routes are appended to it."""

    root: str
    api_key: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What every request carries."""
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def client(self) -> httpx2.Client:
        """Timeouts as they fit streams of tokens."""
        return httpx2.Client(base_url=self.root, headers=self.headers, timeout=_TIMEOUT)

    def async_client(self, concurrency: int, transport: httpx2.AsyncBaseTransport | None = None) -> httpx2.AsyncClient:
        """As `client`, with a connection for each of so many requests at once; `transport` for tests."""
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        return httpx2.AsyncClient(
            base_url=self.root, headers=self.headers, timeout=_TIMEOUT, limits=limits, transport=transport
        )

    def unreachable(self, error: Exception) -> EndpointError:
        """What to do when nothing listens."""
        return EndpointError(
            f"nothing answers at {self.root} ({type(error).__name__}). Start a server in another terminal with "
            "`weft serve`, or name one with --url."
        )


def find_endpoint(url: str | None, environ: Mapping[str, str]) -> Endpoint:
    """The server at `url` (with or without `/v1`), or the one on this machine.

    The key is `WEFT_API_KEY`, or `API_KEY`; for a server that was named also `OPENAI_API_KEY`. A key never stands on
    a command line, where every process of the machine could read it.

    Raises   UsageError: not an http or https URL
    """
    names = ("WEFT_API_KEY", "API_KEY") if url is None else ("WEFT_API_KEY", "API_KEY", "OPENAI_API_KEY")
    api_key = next((environ[name] for name in names if environ.get(name)), None)
    return Endpoint(_root(url or DEFAULT_URL), api_key)


def _root(url: str) -> str:
    fault = UsageError(f"--url: must be http://HOST:PORT or https://HOST, without a user name. Given: {url[:200]!r}")
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
    except ValueError:  # half of the brackets of an IPv6 address
        raise fault from None
    try:
        # "host:" is a host without its port, and "http:/host" a host with the name http.
        has_port = (parts.port is None and not parts.netloc.endswith(":")) or bool(parts.port)
    except ValueError:
        has_port = False
    if parts.scheme not in {"http", "https"} or not parts.hostname or not has_port or parts.username is not None:
        raise fault
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def refusal_text(response: httpx2.Response) -> str:
    """What a server said when it refused: OpenAI's or TGI's error body, or the beginning of anything else.

    The body must have been read.
    """
    try:
        body = response.json()
    except ValueError:
        body = None
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else response.text.strip()
    return f"{response.status_code} {text[:_MAX_SHOWN_CHARS]}".strip()


def served_model(client: httpx2.Client, endpoint: Endpoint) -> str:
    """The first model that the server lists.

    Raises   EndpointError: no answer, a refusal, or no model
    """
    try:
        response = client.get("/v1/models")
    except httpx2.TransportError as error:
        raise endpoint.unreachable(error) from error
    if response.status_code == 401:
        raise EndpointError(f"{endpoint.root} wants an API key: put it into the variable WEFT_API_KEY.")
    if response.status_code != 200:
        raise EndpointError(f"{endpoint.root}/v1/models: {refusal_text(response)}")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise EndpointError(f"{endpoint.root} lists no model under /v1/models; name one with --model.") from error


def read_events(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events, up to `[DONE]`.

    Source  WHATWG HTML, "Server-sent events"; every event of these APIs is one line of data
    Raises  EndpointError: an event is not a JSON object
    """
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise EndpointError(f"the server sent an event that is not JSON: {data[:80]!r}") from error
        if not isinstance(event, dict):
            raise EndpointError(f"the server sent an event that is not an object: {data[:80]!r}")
        yield event
