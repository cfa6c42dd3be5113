"""Requests of a batch in flight: bounded in number, retried where that helps, written down as they are answered."""

import asyncio
import random
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import httpx2

from weft.commands.batch_file import AppendedLines, BatchInput, encode_body
from weft.commands.endpoint import Endpoint, EndpointError

_JSON = {"content-type": "application/json"}
MAX_ATTEMPTS = 6
MAX_BUSY_ATTEMPTS = 100
"""A server that says it is busy, or not ready, is waited for much longer than one that fails."""
MAX_WAIT_S = 60.0
_ATTEMPTS = {
    408: MAX_ATTEMPTS,
    429: MAX_BUSY_ATTEMPTS,
    500: MAX_ATTEMPTS,
    502: MAX_ATTEMPTS,
    503: MAX_BUSY_ATTEMPTS,
    504: MAX_ATTEMPTS,
}
"""Status → how often a request is sent that gets it; any other status is final."""
_MAX_UNWRITTEN = 64


@dataclass(frozen=True, slots=True)
class Outcome:
    """A line of the output or of the errors."""

    line: dict[str, Any]
    is_answer: bool
    completion_tokens: int = 0


class BatchRun:
    """One pass over a batch. A server that cannot be reached at all ends the run; anything else ends one request."""

    def __init__(
        self,
        endpoint: Endpoint,
        source: BatchInput,
        done: Collection[str],
        answers: AppendedLines,
        failures: AppendedLines,
        *,
        concurrency: int,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._source = source
        self._done = done
        self._answers = answers
        self._failures = failures
        self._concurrency = concurrency
        self._transport = transport
        self._sleep = sleep
        self.num_answered = 0
        self.num_failed = 0
        self.completion_tokens = 0

    async def run(self, show: Callable[[Outcome], None]) -> None:
        """Send what is open and write every outcome; `show` hears of each one that is on the disk.

        Raises   EndpointError: the server went away, or the disk takes no more
        """
        outcomes: asyncio.Queue[Outcome | None] = asyncio.Queue(_MAX_UNWRITTEN)
        waiting = (request for request in self._source.requests() if request["custom_id"] not in self._done)
        client = self._endpoint.async_client(self._concurrency, self._transport)

        async def work() -> None:
            for request in waiting:
                await outcomes.put(await self._answer(client, request))
            await outcomes.put(None)

        try:
            async with client, asyncio.TaskGroup() as group:
                group.create_task(self._write(outcomes, show))
                for _ in range(self._concurrency):
                    group.create_task(work())
        except* EndpointError as failed:
            raise failed.exceptions[0] from None

    async def _write(self, outcomes: asyncio.Queue[Outcome | None], show: Callable[[Outcome], None]) -> None:
        """Write outcomes together that came together, because the disk confirms each write slowly.

        Each worker ends with a None.
        """
        num_workers = self._concurrency
        while num_workers:
            came = [await outcomes.get()]
            while not outcomes.empty():
                came.append(outcomes.get_nowait())
            group = [outcome for outcome in came if outcome is not None]
            num_workers -= len(came) - len(group)
            await asyncio.to_thread(self._append, group)
            for outcome in group:
                self.num_answered += outcome.is_answer
                self.num_failed += not outcome.is_answer
                self.completion_tokens += outcome.completion_tokens
                show(outcome)

    def _append(self, group: list[Outcome]) -> None:
        for file, is_answer in ((self._answers, True), (self._failures, False)):
            lines = [outcome.line for outcome in group if outcome.is_answer is is_answer]
            if not lines:
                continue
            try:
                file.append(lines)
            except OSError as error:
                raise EndpointError(f"cannot write the answers: {error.strerror}. What is written stays.") from error

    async def _answer(self, client: httpx2.AsyncClient, request: dict[str, Any]) -> Outcome:
        """Ask until there is an answer, a refusal that will stay one, or no attempt left."""
        attempt = 0
        content = encode_body(request["body"])
        while True:
            attempt += 1
            wait_s = min(MAX_WAIT_S, 2.0 ** min(attempt - 1, 10)) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
            try:
                response = await client.post(request["url"], content=content, headers=_JSON)
            except httpx2.ConnectError as error:
                if attempt >= MAX_ATTEMPTS:
                    raise self._endpoint.unreachable(error) from error
            except httpx2.TransportError as error:
                if attempt >= MAX_ATTEMPTS:
                    return _lost(request, error)
            else:
                if attempt >= _ATTEMPTS.get(response.status_code, 1):
                    return _answered(request, response)
                wait_s = asked_wait_s(response) or wait_s
            await self._sleep(wait_s)


def asked_wait_s(response: httpx2.Response) -> float | None:
    """What `Retry-After` asks for, within reason; None when it names no number of seconds."""
    try:
        return min(max(float(response.headers.get("retry-after", "")), 0.0), MAX_WAIT_S)
    except ValueError:
        return None


def _answered(request: dict[str, Any], response: httpx2.Response) -> Outcome:
    try:
        body = response.json()
    except ValueError:
        body = {"error": {"message": response.text[:1000], "type": "server_error", "param": None, "code": None}}
    usage = body.get("usage") if isinstance(body, dict) else None
    line = {
        "id": _line_id(),
        "custom_id": request["custom_id"],
        "response": {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id", ""),
            "body": body,
        },
        "error": None,
    }
    is_answer = response.status_code == 200
    counts = usage if isinstance(usage, dict) else {}
    tokens = counts.get("completion_tokens", counts.get("output_tokens"))
    return Outcome(line, is_answer, tokens if is_answer and isinstance(tokens, int) else 0)


def _lost(request: dict[str, Any], error: Exception) -> Outcome:
    fault = {"code": "connection_failed", "message": f"{type(error).__name__}: {error}"}
    return Outcome(
        {"id": _line_id(), "custom_id": request["custom_id"], "response": None, "error": fault}, is_answer=False
    )


def _line_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"
