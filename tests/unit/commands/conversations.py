"""A server of OpenAI's API made of answers written down beforehand."""

import json
from collections.abc import Callable
from typing import Any

import httpx2

from weft.commands.endpoint import Endpoint

ENDPOINT = Endpoint("http://server.test")


def sse(*events: Any) -> bytes:
    """A stream of these events, texts as they are."""
    parts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return "".join(f"data: {part}\n\n" for part in parts).encode()


def text_event(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def answer(*texts: str, usage: dict[str, Any] | None = None) -> bytes:
    """A complete answer."""
    events: list[Any] = [*map(text_event, texts), text_event("", "stop")]
    if usage is not None:
        events.append({"choices": [], "usage": usage})
    return sse(*events, "[DONE]")


def client_of(handler: Callable[[httpx2.Request], httpx2.Response]) -> httpx2.Client:
    return httpx2.Client(base_url=ENDPOINT.root, transport=httpx2.MockTransport(handler))
