"""One choice of a `/v1` answer: its text, its log-probabilities, its frames and its whole form.

Several tokens that arrive together become one chunk. Log-probabilities follow the text: an entry appears when the
text of its token is shown, and never for text that a stop string cut off.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from msgspec import UNSET, UnsetType

from weft.core.events import PromptReport, TokenEvent
from weft.core.plan import TopTokens
from weft.core.request import FinishReason, Request
from weft.router.json_values import shown_logprob
from weft.router.schemas_openai import (
    AssistantMessage,
    ChatChoice,
    ChatCompletionChunk,
    ChatLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from weft.router.sequence_text import SequenceText
from weft.router.served import ServedModel
from weft.router.stream import encode_json, frame
from weft.text.detokenize import Detokenizer

_REPLACEMENT = "\ufffd"
_NO_PROBABILITY = -9999.0
FINISH_REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
    FinishReason.ABORT: "stop",
}


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What every object and chunk of one answer repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    service_tier: str | UnsetType = UNSET
    """Only of a chat completion that asked for one."""


@dataclass(frozen=True, slots=True)
class _TokenRecord:
    """A token with its log-probability, waiting for its text to be shown."""

    event: TokenEvent
    start: int
    stop: int
    """Characters of the sequence's text before and behind it."""


class _LogprobTrail:
    """Records in order of their text."""

    def __init__(self) -> None:
        self._waiting: list[_TokenRecord] = []
        self._num_chars = 0

    def add(self, event: TokenEvent, num_chars: int) -> None:
        """A token that added `num_chars` characters."""
        start, self._num_chars = self._num_chars, self._num_chars + num_chars
        self._waiting.append(_TokenRecord(event, start, self._num_chars))

    def release(self, num_shown_chars: int, *, is_final: bool) -> list[_TokenRecord]:
        """Records whose text is shown; at the end also the one of which a part is shown."""
        waiting = self._waiting
        if is_final:
            # An empty token behind everything shown (an end-of-text token) belongs to the answer, too.
            shown = [record for record in waiting if record.start < num_shown_chars or record.stop <= num_shown_chars]
            self._waiting = []
            return shown
        count = 0
        while count < len(waiting) and waiting[count].stop <= num_shown_chars:
            count += 1
        self._waiting = waiting[count:]
        return waiting[:count]


class ChoiceText:
    """What all kinds of choice share: pushing tokens, counting, remembering."""

    shows_special_logprobs = False

    def __init__(
        self,
        model: ServedModel,
        request: Request,
        stop_strings: Sequence[str],
        index: int,
        head: AnswerHead,
        *,
        has_logprobs: bool,
        with_usage: bool,
    ) -> None:
        """`with_usage`: every chunk has the field, as OpenAI's do when usage was asked for."""
        self._model = model
        self._request = request
        self._head = head
        self._usage_field = None if with_usage else UNSET
        self.sequence = SequenceText(model, request.prompt_token_ids, stop_strings, index=index)
        self._trail = _LogprobTrail() if has_logprobs else None
        self._num_shown_chars = 0
        self._text: list[str] = []
        self._records: list[_TokenRecord] = []

    @property
    def index(self) -> int:
        """Place among the choices."""
        return self.sequence.index

    @property
    def num_shown_tokens(self) -> int:
        """Completion tokens that count."""
        return self.sequence.num_tokens

    @property
    def finish_reason(self) -> str | None:
        """OpenAI's word for it."""
        reason = self.sequence.finish_reason
        return None if reason is None else FINISH_REASONS[reason]

    def collect(self, batch: Sequence[TokenEvent]) -> None:
        """Remember a batch for the whole answer."""
        text, records = self._advance(batch)
        self._text.append(text)
        self._records += records

    def _advance(self, batch: Sequence[TokenEvent]) -> tuple[str, list[_TokenRecord]]:
        """Text and records that may be shown now."""
        sequence, trail = self.sequence, self._trail
        if trail is None and len(batch) == 1:
            return sequence.push(batch[0]), []
        shown: list[str] = []
        for event in batch:
            shown.append(sequence.push(event))
            if trail is not None and (self.shows_special_logprobs or not sequence.is_special):
                trail.add(event, 0 if sequence.is_special else len(sequence.token_text))
            if sequence.finish_reason is not None:
                break
        text = "".join(shown)
        if trail is None:
            return text, []
        self._num_shown_chars += len(text)
        return text, trail.release(self._num_shown_chars, is_final=sequence.finish_reason is not None)

    def _token_logprob(self, event: TokenEvent) -> TokenLogprob:
        count = self._request.sampling.top_n_tokens
        alternatives = _alternatives(event.top_tokens, count, event.token_id, event.logprob)
        return TokenLogprob(
            token=self._model.tokenizer.token_text(event.token_id),
            logprob=_shown(event.logprob),
            bytes=list(self._model.token_bytes(event.token_id)),
            top_logprobs=[
                TopLogprob(
                    token=self._model.tokenizer.token_text(token_id),
                    logprob=_shown(logprob),
                    bytes=list(self._model.token_bytes(token_id)),
                )
                for token_id, logprob in alternatives
            ],
        )


class StreamedChoice(ChoiceText, ABC):
    """A choice that becomes chunks of its own."""

    @abstractmethod
    def frames(self, batch: Sequence[TokenEvent]) -> bytes:
        """The chunks of a batch; may be empty."""

    @abstractmethod
    def usage_frame(self, usage: Usage) -> bytes:
        """The chunk behind the last one, without choices."""


class ChatChoiceText(StreamedChoice):
    """A choice of a chat completion."""

    _has_begun = False

    def __init__(
        self,
        model: ServedModel,
        request: Request,
        stop_strings: Sequence[str],
        index: int,
        head: AnswerHead,
        *,
        has_logprobs: bool,
        with_usage: bool,
    ) -> None:
        """Builds the bytes around the text of the usual chunk once."""
        super().__init__(model, request, stop_strings, index, head, has_logprobs=has_logprobs, with_usage=with_usage)
        marker = "\0"
        before, _, after = self._chunk(Delta(content=marker)).partition(encode_json(marker))
        self._before_text, self._after_text = before, after

    def frames(self, batch: Sequence[TokenEvent]) -> bytes:
        """Role first, then text, then the finish reason in a chunk of its own."""
        text, records = self._advance(batch)
        if self._has_begun and not records and self.sequence.finish_reason is None:
            return self._before_text + encode_json(text) + self._after_text if text else b""
        frames: list[bytes] = []
        if not self._has_begun:
            self._has_begun = True
            frames.append(self._chunk(Delta(role="assistant", content="", refusal=None)))
        if records:
            frames.append(self._chunk(Delta(content=text), self._logprobs(records)))
        elif text:
            frames.append(self._before_text + encode_json(text) + self._after_text)
        if self.finish_reason is not None:
            frames.append(self._chunk(Delta(), finish_reason=self.finish_reason))
        return b"".join(frames)

    def usage_frame(self, usage: Usage) -> bytes:
        """See `StreamedChoice.usage_frame`."""
        head = self._head
        return frame(
            ChatCompletionChunk(
                id=head.id,
                created=head.created,
                model=head.model,
                system_fingerprint=head.system_fingerprint,
                choices=[],
                usage=usage,
                service_tier=head.service_tier,
            )
        )

    def whole(self) -> ChatChoice:
        """The choice of a whole answer."""
        return ChatChoice(
            index=self.index,
            message=AssistantMessage(role="assistant", content="".join(self._text)),
            logprobs=None if self._trail is None else self._logprobs(self._records),
            finish_reason=self.finish_reason or "stop",
        )

    def _chunk(self, delta: Delta, logprobs: ChatLogprobs | None = None, finish_reason: str | None = None) -> bytes:
        head = self._head
        return frame(
            ChatCompletionChunk(
                id=head.id,
                created=head.created,
                model=head.model,
                system_fingerprint=head.system_fingerprint,
                choices=[ChunkChoice(index=self.index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)],
                usage=self._usage_field,
                service_tier=head.service_tier,
            )
        )

    def _logprobs(self, records: Sequence[_TokenRecord]) -> ChatLogprobs:
        return ChatLogprobs(content=[self._token_logprob(record.event) for record in records])


class CompletionChoiceText(StreamedChoice):
    """A choice of a plain completion, which may begin with its prompt (`echo`)."""

    shows_special_logprobs = True

    def __init__(
        self,
        model: ServedModel,
        request: Request,
        stop_strings: Sequence[str],
        index: int,
        head: AnswerHead,
        *,
        body: CompletionRequest,
        echo_text: str,
        with_usage: bool,
    ) -> None:
        """`echo_text` stands before the completion; "" without echo."""
        super().__init__(
            model, request, stop_strings, index, head, has_logprobs=body.logprobs is not None, with_usage=with_usage
        )
        self._echo_text = echo_text
        # OpenAI: `max_tokens` 0 with `echo` scores the prompt. The engine needs one token; it is not shown.
        self._hides_completion = body.max_tokens == 0
        self._prompt: PromptReport | None = None
        self._has_begun = False
        marker = "\0"
        before, _, after = self._chunk(marker, None).partition(encode_json(marker))
        self._before_text, self._after_text = before, after

    @property
    def num_shown_tokens(self) -> int:
        """See `ChoiceText.num_shown_tokens`."""
        return 0 if self._hides_completion else super().num_shown_tokens

    def collect(self, batch: Sequence[TokenEvent]) -> None:
        """See `ChoiceText.collect`."""
        self._note_prompt(batch)
        super().collect(batch)

    def frames(self, batch: Sequence[TokenEvent]) -> bytes:
        """The prompt first when it is echoed, then text, then the finish reason in a chunk of its own."""
        text, records = self._advance(batch)
        if self._hides_completion:
            text, records = "", []
        if self._has_begun and not records and self.sequence.finish_reason is None:
            return self._before_text + encode_json(text) + self._after_text if text else b""
        frames: list[bytes] = []
        if not self._has_begun:
            self._has_begun = True
            self._note_prompt(batch)
            if self._echo_text:
                frames.append(self._chunk(self._echo_text, self._logprobs([], with_prompt=True)))
        if records:
            frames.append(self._chunk(text, self._logprobs(records, with_prompt=False)))
        elif text:
            frames.append(self._before_text + encode_json(text) + self._after_text)
        if self.finish_reason is not None:
            frames.append(self._chunk("", None, self.finish_reason))
        return b"".join(frames)

    def usage_frame(self, usage: Usage) -> bytes:
        """See `StreamedChoice.usage_frame`."""
        return frame(self._completion([], usage))

    def whole(self) -> CompletionChoice:
        """The choice of a whole answer."""
        text = "" if self._hides_completion else "".join(self._text)
        records = [] if self._hides_completion else self._records
        return CompletionChoice(
            index=self.index,
            text=self._echo_text + text,
            logprobs=self._logprobs(records, with_prompt=bool(self._echo_text)),
            finish_reason=self.finish_reason,
        )

    def _note_prompt(self, batch: Sequence[TokenEvent]) -> None:
        report = batch[0].prompt
        if report is not None and report.prompt_logprobs is not None:
            self._prompt = report

    def _chunk(self, text: str, logprobs: CompletionLogprobs | None, finish_reason: str | None = None) -> bytes:
        choice = CompletionChoice(index=self.index, text=text, logprobs=logprobs, finish_reason=finish_reason)
        return frame(self._completion([choice], self._usage_field))

    def _completion(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        head = self._head
        return Completion(
            id=head.id,
            created=head.created,
            model=head.model,
            system_fingerprint=head.system_fingerprint,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, records: Sequence[_TokenRecord], *, with_prompt: bool) -> CompletionLogprobs | None:
        if self._trail is None:
            return None
        count = self._request.sampling.top_n_tokens
        lists = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[] if count else None, text_offset=[])
        if with_prompt and self._prompt is not None:
            self._add_prompt(lists, self._prompt)
        for record in records:
            event = record.event
            best = _alternatives(event.top_tokens, count, event.token_id, event.logprob)
            self._add(lists, event.token_id, event.logprob, _with_own(best, event.token_id, event.logprob))
            lists.text_offset[-1] = len(self._echo_text) + record.start
        return lists

    def _add_prompt(self, lists: CompletionLogprobs, prompt: PromptReport) -> None:
        """The prompt's tokens; the first has neither a log-probability nor alternatives."""
        token_ids = self._request.prompt_token_ids
        tops = prompt.prompt_top_tokens or (TopTokens((), ()),) * (len(token_ids) - 1)
        self._add(lists, token_ids[0], None, ())
        for token_id, logprob, top in zip(token_ids[1:], prompt.prompt_logprobs or (), tops, strict=True):
            best = _alternatives(top, len(top.token_ids), token_id, logprob)
            self._add(lists, token_id, logprob, _with_own(best, token_id, logprob))
        lists.text_offset[:] = self._echo_offsets()

    def _echo_offsets(self) -> list[int]:
        """Where the text of each prompt token begins in the echoed text, which does not show every special token."""
        tokenizer, text = self._model.tokenizer, self._echo_text
        detokenizer = Detokenizer(tokenizer)
        offsets: list[int] = []
        place = 0
        for token_id in self._request.prompt_token_ids:
            offsets.append(place)
            if not tokenizer.is_special(token_id):
                place += len(detokenizer.push(token_id))
            elif text.startswith(spelling := tokenizer.token_text(token_id), place):
                place += len(spelling)
        return offsets

    def _add(
        self,
        lists: CompletionLogprobs,
        token_id: int,
        logprob: float | None,
        alternatives: Sequence[tuple[int, float]],
    ) -> None:
        lists.tokens.append(self._spelling(token_id))
        lists.token_logprobs.append(None if logprob is None else _shown(logprob))
        lists.text_offset.append(0)
        if lists.top_logprobs is not None:
            shown: dict[str, float | None] = {}
            for other, value in alternatives:
                shown.setdefault(self._spelling(other), _shown(value))
            lists.top_logprobs.append(shown or None)

    def _spelling(self, token_id: int) -> str:
        """A token as a text; a part of a character as OpenAI writes it, so that no two of them look the same."""
        text = self._model.tokenizer.token_text(token_id)
        if _REPLACEMENT not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self._model.token_bytes(token_id))


def _shown(logprob: float) -> float:
    """As OpenAI shows it: a number also where there is no probability at all."""
    return _NO_PROBABILITY if (shown := shown_logprob(logprob)) is None else shown


def _alternatives(top: TopTokens | None, count: int, token_id: int, logprob: float) -> list[tuple[int, float]]:
    """The `count` best tokens of a place. The chosen one has the very number that is told beside them.

    The two were computed in two ways and may differ in the last bit; clients compare them to see whether a token was
    the likeliest.
    """
    if top is None:
        return []
    pairs = zip(top.token_ids[:count], top.logprobs[:count], strict=True)
    return [(other, logprob if other == token_id else value) for other, value in pairs]


def _with_own(pairs: list[tuple[int, float]], token_id: int, logprob: float) -> list[tuple[int, float]]:
    """The alternatives, and the token itself where it is none of them."""
    return pairs if any(other == token_id for other, _ in pairs) else [*pairs, (token_id, logprob)]
