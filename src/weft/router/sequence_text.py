"""The text of one sequence while its tokens arrive: detokenizing, stop strings, and the end.

The engine decides about end-of-text tokens and length; stop strings end a sequence here, because text exists here.
Tokens behind a stop string are neither shown nor counted.
"""

from collections.abc import Sequence

from weft.core.events import TokenEvent
from weft.core.request import FinishReason
from weft.errors import InternalError
from weft.router.served import ServedModel
from weft.text.detokenize import Detokenizer
from weft.text.stop import StopMatcher


class SequenceText:
    """One sequence. `push` its events in order until `finish_reason` is set."""

    __slots__ = (
        "_detokenizer",
        "_is_special",
        "_matcher",
        "_model",
        "_push_token",
        "finish_reason",
        "index",
        "is_special",
        "num_tokens",
        "token_text",
    )

    def __init__(
        self,
        model: ServedModel,
        prompt_ids: Sequence[int],
        stop_strings: Sequence[str],
        *,
        index: int = 0,
        keeps_stop: bool = False,
    ) -> None:
        """`keeps_stop`: the stop string stays in the text, as on TGI's native routes."""
        self._model = model
        self._detokenizer = Detokenizer(model.tokenizer, prompt_ids)
        self._push_token = self._detokenizer.push
        self._is_special = model.tokenizer.is_special
        self._matcher = StopMatcher(stop_strings, includes_match=keeps_stop) if stop_strings else None
        self.index = index
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None
        self.token_text = ""
        """What the newest token added, stop strings not considered; a special token's own spelling."""
        self.is_special = False
        """The newest token is no part of the text."""

    @property
    def has_stop_strings(self) -> bool:
        """The text may end before the engine says so."""
        return self._matcher is not None

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text, if one did."""
        is_stopped = self.finish_reason is FinishReason.STOP_SEQUENCE
        return self._matcher.matched if is_stopped and self._matcher is not None else None

    def push(self, event: TokenEvent) -> str:
        """Text that may be shown now: characters are whole, and nothing of it can belong to a stop string."""
        if event.token_index != self.num_tokens:
            raise InternalError("A token arrived out of order; the request was stopped")
        self.num_tokens += 1
        token_id, reason = event.token_id, event.finish_reason
        text = ""
        self.is_special = reason is FinishReason.EOS_TOKEN or self._is_special(token_id)
        if self.is_special:
            self.token_text = self._model.tokenizer.token_text(token_id)
        else:
            self.token_text = text = self._push_token(token_id)
        if reason is not None:
            rest = self._detokenizer.finish()
            text += rest
            if not self.is_special:
                self.token_text += rest
        if self._matcher is not None:
            return self._push_matcher(self._matcher, text, reason)
        self.finish_reason = reason
        return text

    def _push_matcher(self, matcher: StopMatcher, text: str, reason: FinishReason | None) -> str:
        shown = matcher.push(text).text
        if reason is not None:
            shown += matcher.flush()
        if matcher.matched is not None and reason is not FinishReason.EOS_TOKEN:
            self.finish_reason = FinishReason.STOP_SEQUENCE
        else:
            self.finish_reason = reason
        return shown
