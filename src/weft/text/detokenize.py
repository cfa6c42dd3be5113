"""Token ids to text, one token at a time, never splitting a character.

The text of a completion continues its prompt: a leading space stays, and a character that the prompt left unfinished
is finished. The pieces joined are the same for a stream and for a whole answer, whatever the tokens: bytes that are
no UTF-8 become U+FFFD as soon as that is certain, and at the latest in `finish`. Linear time, constant state.
"""

import codecs
from collections.abc import Sequence

from weft.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 8
"""Prompt tokens looked at for an unfinished character: it has at most 3 bytes, and some tokens add none."""

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns the completion tokens of one sequence into text, as if it stood behind the prompt."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._pieces = tokenizer.pieces(skip_special_tokens=skip_special_tokens)
        self._utf8_decoder = _new_utf8_decoder(errors="replace")
        self._is_inside_character = False
        for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Returns the text that is certain now; "" while a character is incomplete."""
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._is_inside_character:
                return piece
            if not piece:
                return ""
            piece = piece.encode()
        text = self._utf8_decoder.decode(piece)
        self._is_inside_character = bool(self._utf8_decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """Returns what is left: U+FFFD when the last character is incomplete, else ""."""
        self._is_inside_character = False
        return self._utf8_decoder.decode(b"", final=True)
