"""Recorded requests asked again, many at once, and compared token by token and bit by bit."""

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import httpx2
import msgspec

from weft.commands.batch_run import asked_wait_s
from weft.commands.endpoint import Endpoint, EndpointError, refusal_text
from weft.core.request import FinishReason
from weft.router.recording import RequestLine, UnreadableRecordingError
from weft.router.replay import ReplayAnswer, ReplayRequest

MAX_ATTEMPTS = 100
"""For a server that says that it is busy or loading; anything else it says is final."""
_BUSY = frozenset({429, 503})
_WAIT_S = 0.5
_PARTS = ("other weights", "another numeric configuration", "other kernels")


@dataclass(frozen=True, slots=True)
class Token:
    """One side of a difference; None where that side has ended."""

    token_id: int
    logprob: str
    """Hexadecimal."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a replay leaves its recording for the first time."""

    line: RequestLine
    position: int
    """0-based place among the completion tokens."""
    recorded: Token | None
    got: Token | None
    problem: str = ""
    """Instead of tokens: why there is nothing to compare."""


@dataclass(slots=True)
class Tally:
    """What has been compared."""

    num_requests: int = 0
    num_tokens: int = 0
    num_different: int = 0


def differing_parts(recorded: str, served: str) -> list[str]:
    """What two system fingerprints say is not the same; empty when they are equal."""
    if recorded == served:
        return []
    ours, theirs = (text.removeprefix("fp_").split("-") for text in (recorded, served))
    if len(ours) != len(_PARTS) or len(theirs) != len(_PARTS):
        return ["another server"]
    return [part for part, one, other in zip(_PARTS, ours, theirs, strict=True) if one != other]


def replay_body(line: RequestLine) -> bytes:
    """What `/replay` reads. A text that a stop string ended is as long as it was, because ids know no strings."""
    stop = line.stop
    if line.finish_reason not in {FinishReason.LENGTH, FinishReason.EOS_TOKEN}:
        count = len(line.token_ids)
        stop = replace(stop, max_new_tokens=count, min_new_tokens=min(stop.min_new_tokens, count))
    # Reports beside the tokens; the choice does not depend on them.
    sampling = replace(line.sampling, top_n_tokens=0, prompt_logprobs=False, prompt_top_n_tokens=0)
    return msgspec.json.encode(ReplayRequest(prompt_token_ids=line.prompt_token_ids, sampling=sampling, stop=stop))


def first_difference(line: RequestLine, answer: ReplayAnswer) -> Difference | None:
    """None when every id and every bit is the same, and the reason to end."""
    recorded = [Token(*pair) for pair in zip(line.token_ids, line.logprobs, strict=True)]
    got = [Token(*pair) for pair in zip(answer.token_ids, answer.logprobs, strict=True)]
    for position, pair in enumerate(zip(recorded, got, strict=False)):
        if pair[0] != pair[1]:
            return Difference(line, position, *pair)
    shorter = min(len(recorded), len(got))
    if len(recorded) != len(got):
        ends = [side[shorter] if shorter < len(side) else None for side in (recorded, got)]
        return Difference(line, shorter, ends[0], ends[1])
    is_engines = line.finish_reason in {FinishReason.LENGTH, FinishReason.EOS_TOKEN}
    if is_engines and line.finish_reason != answer.finish_reason:
        problem = f"recorded the end {line.finish_reason}, got {answer.finish_reason}"
        return Difference(line, shorter, None, None, problem)
    return None


class Lines(Protocol):
    """Requests that are read when they are asked for; a list will do."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> RequestLine: ...


class VerifyRun:
    """One pass over a recording. A server that cannot be reached ends it; anything else is a difference."""

    def __init__(
        self,
        endpoint: Endpoint,
        lines: Lines,
        *,
        concurrency: int,
        shuffle_seed: int | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        """`shuffle_seed` None: in the order of the recording."""
        self._endpoint = endpoint
        self._lines = lines
        self._order = list(range(len(lines)))
        if shuffle_seed is not None:
            random.Random(shuffle_seed).shuffle(self._order)  # noqa: S311 - an order, repeatable
        self._concurrency = concurrency
        self._transport = transport
        self._sleep = sleep
        self.tally = Tally()

    async def run(self, show: Callable[[Difference | None], None]) -> None:
        """Ask everything; `show` hears of each answer: its difference, or None.

        Raises   EndpointError: nothing answers there; UnreadableRecordingError: the recording changed meanwhile
        """
        waiting = iter(self._order)
        client = self._endpoint.async_client(self._concurrency, self._transport)

        async def work() -> None:
            for place in waiting:
                line = self._lines[place]
                difference = await self._compare(client, line)
                self.tally.num_requests += 1
                self.tally.num_tokens += len(line.token_ids)
                self.tally.num_different += difference is not None
                show(difference)

        try:
            async with client, asyncio.TaskGroup() as group:
                for _ in range(min(self._concurrency, len(self._order))):
                    group.create_task(work())
        except* (EndpointError, UnreadableRecordingError) as failed:
            raise failed.exceptions[0] from None

    async def _compare(self, client: httpx2.AsyncClient, line: RequestLine) -> Difference | None:
        response = await self._ask(client, line)
        if response.status_code != 200:
            return Difference(line, 0, None, None, f"the server refused it: {refusal_text(response)}")
        try:
            answer = msgspec.json.decode(response.content, type=ReplayAnswer)
        except msgspec.MsgspecError as error:
            raise EndpointError(f"{self._endpoint.root}/replay does not answer as Weft does ({error}).") from error
        return first_difference(line, answer)

    async def _ask(self, client: httpx2.AsyncClient, line: RequestLine) -> httpx2.Response:
        body, headers = replay_body(line), {"content-type": "application/json"}
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                response = await client.post("/replay", content=body, headers=headers)
            except httpx2.TransportError as error:
                raise self._endpoint.unreachable(error) from error
            if response.status_code == 404:
                raise EndpointError(
                    f"{self._endpoint.root} has no /replay: it is no Weft, or an older one. Verify with the Weft that "
                    "recorded."
                )
            if response.status_code not in _BUSY or attempt == MAX_ATTEMPTS:
                break
            await self._sleep(asked_wait_s(response) or _WAIT_S)
        return response
