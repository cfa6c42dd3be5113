"""What each token adds to a text: the table behind exact and linear detokenization.

The decoders of language-model tokenizers work token by token, except at the very start of a text, where some strip a
space. Every completion continues a prompt, so in it a token always adds the same bytes, and the text is the UTF-8
reading of the joined bytes. The table fills as tokens are met.

`tokenizers.decoders.DecodeStream`, which decodes a growing window again and again, is not used: it keeps back the end
of a text that is no UTF-8, needs quadratic time for a long run of such tokens (4,000: 2.3 s), and 0.49 µs for an
ordinary token where this table needs 0.06. Two texts differ from the decoder of the library by intent: behind invalid
byte tokens (`<0xF0>`) it takes back whole characters that a stream has already shown, and it writes one U+FFFD per
byte where Unicode asks for one per broken character.
"""

import json
from collections.abc import Callable, Collection
from typing import Any

import tokenizers

Piece = str | bytes
"""Text when the token is whole characters, else its bytes."""

Step = Callable[[Piece], Piece]


class TokenPieces(dict[int, Piece]):
    """Token id → piece; "" for ids in `skipped_ids` and for ids that the vocabulary does not have."""

    def __init__(self, backend: tokenizers.Tokenizer, skipped_ids: Collection[int]) -> None:
        super().__init__()
        self._backend = backend
        self._skipped_ids = skipped_ids
        self._steps = _decoder_steps(backend)

    def __missing__(self, token_id: int) -> Piece:
        token = self._backend.id_to_token(token_id)
        if token is None:
            # Not stored: ids without a token are without number.
            return ""
        piece = "" if token_id in self._skipped_ids else self._piece(token_id, token)
        self[token_id] = piece
        return piece

    def _piece(self, token_id: int, token: str) -> Piece:
        if self._steps is None:
            return self._text_after_an_ordinary_token(token_id)
        piece: Piece = token
        for step in self._steps:
            piece = step(piece)
        return _as_text_if_whole(piece)

    def _text_after_an_ordinary_token(self, token_id: int) -> str:
        """Decodes behind a word, so that rules for the start of a text do not act (WordPiece, word-end marks)."""
        anchor = self._backend.encode("a", add_special_tokens=False).ids
        before: str = self._backend.decode(anchor, skip_special_tokens=False)
        after: str = self._backend.decode([*anchor, token_id], skip_special_tokens=False)
        return after.removeprefix(before)


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[Step] | None:
    """Returns the decoder as functions on single tokens, None when it does not work token by token."""
    if backend.decoder is None:
        return None
    description: dict[str, Any] = json.loads(backend.decoder.__getstate__())
    parts = description["decoders"] if description["type"] == "Sequence" else [description]
    steps: list[Step] = []
    is_fused = False
    for part in parts:
        is_fused = is_fused or part["type"] == "Fuse"
        if _acts_at_text_start_only(part, is_fused=is_fused):
            continue
        step = _step(part)
        if step is None or is_fused:
            return None
        steps.append(step)
    return steps


def _acts_at_text_start_only(part: dict[str, Any], *, is_fused: bool) -> bool:
    match part:
        case {"type": "Fuse"}:
            return True
        case {"type": "Strip", "stop": 0}:
            return is_fused
    return False


def _step(part: dict[str, Any]) -> Step | None:
    match part:
        case {"type": "ByteLevel"}:
            return _from_byte_level
        case {"type": "ByteFallback"}:
            return _from_byte_token
        case {"type": "Metaspace", "replacement": str(mark)}:
            return _replacement(mark, " ")
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)}:
            return _replacement(pattern, content)
    return None


def _replacement(pattern: str, content: str) -> Step:
    return lambda piece: piece.replace(pattern, content) if isinstance(piece, str) else piece


def _from_byte_token(piece: Piece) -> Piece:
    """Turns `<0x0A>` into the byte 10 and leaves other tokens alone."""
    if isinstance(piece, str) and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            return piece
    return piece


def _from_byte_level(piece: Piece) -> Piece:
    """Maps each character back to the byte it stands for; a token with any other character stands for itself."""
    if isinstance(piece, bytes):
        return piece
    try:
        return bytes(BYTE_ALPHABET[character] for character in piece)
    except KeyError:
        return piece


def _as_text_if_whole(piece: Piece) -> Piece:
    try:
        return piece if isinstance(piece, str) else piece.decode()
    except UnicodeDecodeError:
        return piece


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's printable stand-ins for the 256 bytes: visible Latin-1 as it is, the others from U+0100 on.

    Source: Radford et al. 2019, the byte-level alphabet of GPT-2's `encoder.py`
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


BYTE_ALPHABET = _byte_alphabet()
"""Character in a byte-level vocabulary → the byte it stands for."""
