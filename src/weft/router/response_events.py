"""What one response has said so far, and the events that say it.

An event is a function of its sequence number and of what is known: nothing is remembered per event but the text it
adds. So a stream can be repeated from any place, while it runs, later, or from what was stored.

    0 created · 1 in_progress (background: 1 queued · 2 in_progress) · output_item.added · content_part.added ·
    output_text.delta … · output_text.done · content_part.done · output_item.done · completed | incomplete | failed

Source: OpenAI API reference, streaming events of responses; `[DONE]` behind the last one: openresponses.org
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import msgspec

from weft.router.backend import TokenBatch
from weft.router.choices import AnswerHead, ChoiceText
from weft.router.conversation import Conversation
from weft.router.schemas_openai import TokenLogprob, Usage
from weft.router.schemas_responses import (
    ContentPartEvent,
    InputTokensDetails,
    MessageItem,
    OutputItemEvent,
    OutputText,
    OutputTokensDetails,
    Response,
    ResponseEvent,
    ResponseUsage,
    TextDoneEvent,
)
from weft.router.stream import DONE_FRAME, encode_json, named_frame

QUEUED, IN_PROGRESS = "queued", "in_progress"
COMPLETED, INCOMPLETE, FAILED, CANCELLED = "completed", "incomplete", "failed", "cancelled"

_LAST_EVENTS = {
    COMPLETED: "response.completed",
    INCOMPLETE: "response.incomplete",
    FAILED: "response.failed",
    CANCELLED: "response.incomplete",
}
"""OpenAI has no event for `cancelled`; the status in the response says it."""
_NUM_OPENING = 2
_NUM_CLOSING = 3
_NO_LOGPROBS = b"[]"


class ResponseText(ChoiceText):
    """The text of a response, with log-probabilities where they were asked for."""

    def __init__(self, conversation: Conversation, head: AnswerHead, *, has_logprobs: bool) -> None:
        super().__init__(
            conversation.model,
            conversation.requests[0],
            conversation.checked.stop_strings,
            0,
            head,
            has_logprobs=has_logprobs,
            with_usage=False,
        )

    def take(self, batch: TokenBatch) -> tuple[str, list[TokenLogprob]]:
        """What a batch adds that may be shown."""
        text, records = self._advance(batch)
        return text, [self._token_logprob(record.event) for record in records]


@dataclass(slots=True)
class Transcript:
    """Everything that the events of one response say."""

    begun: Response
    """As it was created: no output, no usage."""
    item_id: str
    deltas: list[str] = field(default_factory=list)
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    """Of each delta; empty lists when they were not asked for."""
    is_text_done: bool = False
    final: Response | None = None
    _prefix: bytes = b""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.deltas)

    @property
    def status(self) -> str:
        """Of the response, now."""
        return self.begun.status if self.final is None else self.final.status

    @property
    def num_events(self) -> int:
        """How many there are now."""
        has_begun = bool(self.deltas) or self.is_text_done
        return (
            self._num_head
            + _NUM_OPENING * has_begun
            + len(self.deltas)
            + _NUM_CLOSING * self.is_text_done
            + (self.final is not None)
        )

    def add(self, text: str, logprobs: list[TokenLogprob]) -> None:
        """Text that may be shown; nothing is no delta."""
        if text or logprobs:
            self.deltas.append(text)
            self.logprobs.append(logprobs)

    def now(self) -> Response:
        """The response with what it has said so far."""
        if self.final is not None:
            return self.final
        if not self.deltas:
            return self.begun
        return msgspec.structs.replace(self.begun, output=[self.item(IN_PROGRESS)])

    def item(self, status: str) -> MessageItem:
        """The answer's only item, with its text so far."""
        return MessageItem(id=self.item_id, status=status, role="assistant", content=[self._part()])

    def frames(self, first: int) -> bytes:
        """Frames of all events that exist, from sequence number `first` on; `[DONE]` behind the last one there is."""
        end = self.num_events
        frames = [self._frame(number) for number in range(first, end)]
        return b"".join(frames) + (DONE_FRAME if self.final is not None else b"")

    @property
    def _num_head(self) -> int:
        return 3 if self.begun.background else 2

    def _frame(self, number: int) -> bytes:
        if number < self._num_head:
            return self._head_frame(number)
        place = number - self._num_head
        if self.final is not None and number == self.num_events - 1:
            return _response_frame(_LAST_EVENTS[self.final.status], number, self.final)
        if place < _NUM_OPENING:
            return self._opening_frame(place, number)
        place -= _NUM_OPENING
        if place < len(self.deltas):
            return self._delta_frame(place, number)
        return self._closing_frame(place - len(self.deltas), number)

    def _head_frame(self, number: int) -> bytes:
        in_progress = msgspec.structs.replace(self.begun, status=IN_PROGRESS)
        if not self.begun.background:
            return _response_frame(("response.created", "response.in_progress")[number], number, in_progress)
        if number == 2:
            return _response_frame("response.in_progress", number, in_progress)
        queued = msgspec.structs.replace(self.begun, status=QUEUED)
        return _response_frame(("response.created", "response.queued")[number], number, queued)

    def _opening_frame(self, place: int, number: int) -> bytes:
        if place == 0:
            item = MessageItem(id=self.item_id, status=IN_PROGRESS, role="assistant", content=[])
            return _item_frame("response.output_item.added", number, item)
        return self._part_frame("response.content_part.added", number, OutputText(text=""))

    def _delta_frame(self, place: int, number: int) -> bytes:
        if not self._prefix:
            self._prefix = b',"item_id":%b,"output_index":0,"content_index":0,"delta":' % encode_json(self.item_id)
        return (
            b"event: response.output_text.delta\n"
            b'data: {"type":"response.output_text.delta","sequence_number":%d%b%b,"logprobs":%b}\n\n'
        ) % (
            number,
            self._prefix,
            encode_json(self.deltas[place]),
            encode_json(self.logprobs[place]) if self.logprobs[place] else _NO_LOGPROBS,
        )

    def _closing_frame(self, place: int, number: int) -> bytes:
        if place == 0:
            name, part = "response.output_text.done", self._part()
            return named_frame(
                name,
                TextDoneEvent(
                    type=name,
                    sequence_number=number,
                    item_id=self.item_id,
                    output_index=0,
                    content_index=0,
                    text=part.text,
                    logprobs=part.logprobs,
                ),
            )
        if place == 1:
            return self._part_frame("response.content_part.done", number, self._part())
        status = COMPLETED if self.final is None else self.final.status
        return _item_frame("response.output_item.done", number, self.item(status))

    def _part_frame(self, name: str, number: int, part: OutputText) -> bytes:
        return named_frame(
            name,
            ContentPartEvent(
                type=name, sequence_number=number, item_id=self.item_id, output_index=0, content_index=0, part=part
            ),
        )

    def _part(self) -> OutputText:
        return OutputText(text=self.text, logprobs=[entry for entries in self.logprobs for entry in entries])


def restored(final: Response, delta_chars: Sequence[int]) -> Transcript:
    """The transcript of a stored response. Log-probabilities stand with the deltas that hold their tokens' text."""
    begun = msgspec.structs.replace(
        final, status=QUEUED, output=[], usage=None, completed_at=None, error=None, incomplete_details=None
    )
    item = next((item for item in final.output if isinstance(item, MessageItem)), None)
    part = next((part for part in item.content if isinstance(part, OutputText)), None) if item is not None else None
    if item is None or part is None:
        return Transcript(begun, "", final=final)
    ends = list(accumulate(delta_chars, initial=0))
    deltas = [part.text[start:end] for start, end in pairwise(ends)]
    return Transcript(
        begun,
        item.id,
        deltas=deltas,
        logprobs=_dealt(part.logprobs, deltas),
        is_text_done=final.status in (COMPLETED, INCOMPLETE),
        final=final,
    )


def _dealt(entries: Sequence[TokenLogprob], deltas: Sequence[str]) -> list[list[TokenLogprob]]:
    """Entries dealt to deltas by the bytes of their tokens; those of the last delta take the rest."""
    dealt: list[list[TokenLogprob]] = [[] for _ in deltas]
    if not entries:
        return dealt
    ends = list(accumulate(len(delta.encode()) for delta in deltas))
    place = num_bytes = 0
    for entry in entries:
        num_bytes += len(entry.bytes or ())
        while place < len(deltas) - 1 and num_bytes > ends[place]:
            place += 1
        dealt[place].append(entry)
    return dealt


def response_usage(usage: Usage) -> ResponseUsage:
    """The same numbers under the names of `/v1/responses`."""
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


def _response_frame(name: str, number: int, response: Response) -> bytes:
    return named_frame(name, ResponseEvent(type=name, sequence_number=number, response=response))


def _item_frame(name: str, number: int, item: MessageItem) -> bytes:
    return named_frame(name, OutputItemEvent(type=name, sequence_number=number, output_index=0, item=item))
