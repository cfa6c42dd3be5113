"""Text to token ids and back for one model, from its `tokenizer.json`.

A thin face over the `tokenizers` library (Rust, releases the interpreter lock): this file adds a thread pool, exact
single-token texts and byte offsets. It knows nothing of models, templates or requests.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import tokenizers

from weft.errors import ModelNotFoundError, ValidationError
from weft.limits import LIMITS
from weft.text.token_pieces import TokenPieces


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """A token and where it came from. Units: start and stop are UTF-8 byte offsets into the encoded text.

    A token that the tokenizer added by itself (BOS) has the text "" and the span 0 to 0.
    Source: TGI 3.3.7, `/tokenize`.
    """

    id: int
    text: str
    start: int
    stop: int


class Tokenizer:
    """Encodes and decodes. Safe to share between threads and requests."""

    def __init__(self, backend: tokenizers.Tokenizer, *, num_threads: int = 2) -> None:
        # A tokenizer.json may carry the padding and truncation of somebody's training run; serving wants neither.
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._executor = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="tokenize")
        added_tokens = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added_tokens.items() if token.special)
        self.longest_token_chars = max(map(len, backend.get_vocab(with_added_tokens=True)), default=1)
        """Length in characters of the longest token: bounds the text that fits into a number of tokens."""
        self._pieces = TokenPieces(backend, skipped_ids=())
        self._pieces_without_special = TokenPieces(backend, skipped_ids=self._special_ids)

    @classmethod
    def load(cls, path: Path, *, num_threads: int = 2) -> "Tokenizer":
        """Read `tokenizer.json` in the directory `path`.

        Raises   ModelNotFoundError: missing, larger than the limit, or not a tokenizer
        """
        return cls(read_tokenizer_file(path / "tokenizer.json"), num_threads=num_threads)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:  # noqa: FBT001
        """Returns the ids of `text`. Blocks, about 0.7 µs per token: on an event loop await `encode_async`.

        Raises   ValidationError: `text` holds half of a surrogate pair, which has no UTF-8 form
        """
        try:
            # This form leaves out the offsets and releases the interpreter lock.
            encodings = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _not_unicode(text) from error
        ids: list[int] = encodings[0].ids
        return ids

    async def encode_async(self, text: str, add_special_tokens: bool) -> list[int]:  # noqa: FBT001
        """Returns the ids of `text`, encoded on a thread. Raises as `encode`."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self.encode, text, add_special_tokens)

    def encode_with_offsets(self, text: str, add_special_tokens: bool) -> list[TokenSpan]:  # noqa: FBT001
        """Returns the tokens of `text` with their places in it. Raises as `encode`."""
        try:
            encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise _not_unicode(text) from error
        byte_offsets = _byte_offsets(text)
        return [
            TokenSpan(token_id, text[start:stop], byte_offsets[start], byte_offsets[stop])
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:  # noqa: FBT001
        """Returns the text of a whole sequence, as the tokenizer's own decoder has it."""
        text: str = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """Returns what the token, special or not, adds in the middle of a text: its leading space stays.

        A token that holds a part of a character gives U+FFFD, an id outside the vocabulary "".
        """
        piece = self._pieces[token_id]
        return piece if isinstance(piece, str) else piece.decode(errors="replace")

    def pieces(self, *, skip_special_tokens: bool) -> TokenPieces:
        """Returns the table of what each token adds to a text, shared by all detokenizers."""
        return self._pieces_without_special if skip_special_tokens else self._pieces

    def is_special(self, token_id: int) -> bool:
        """True for control tokens such as BOS, EOS and role marks."""
        return token_id in self._special_ids

    def token_to_id(self, token: str) -> int | None:
        """Returns the id of a token spelled as in the vocabulary, None when there is none."""
        token_id: int | None = self._backend.token_to_id(token)
        return token_id

    def id_to_token(self, token_id: int) -> str | None:
        """Returns the vocabulary's spelling of a token, None when there is none."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. A model's embedding table may be padded beyond it."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def close(self) -> None:
        """End the threads; an encoding in flight finishes."""
        self._executor.shutdown(wait=False, cancel_futures=True)


def read_tokenizer_file(file: Path) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`.

    Raises   ModelNotFoundError: missing, larger than the limit, or not a tokenizer
    """
    try:
        size = file.stat().st_size
    except OSError as error:
        raise ModelNotFoundError("The model has no tokenizer.json. Choose a model directory that has one.") from error
    if size > LIMITS.max_tokenizer_file_bytes:
        limit = LIMITS.max_tokenizer_file_bytes
        raise ModelNotFoundError(f"tokenizer.json has {size} bytes; at most {limit} are read. Check the model's files.")
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception, whatever is wrong with the file
        raise ModelNotFoundError(f"tokenizer.json cannot be read: {error}. Fetch the model again.") from error


def _byte_offsets(text: str) -> Sequence[int]:
    """Returns for each character position of `text`, its end included, the position in UTF-8 bytes."""
    if text.isascii():
        return range(len(text) + 1)
    return list(accumulate((len(character.encode()) for character in text), initial=0))


def _not_unicode(text: str) -> ValidationError:
    """Explains why the library did not take `text` for a string."""
    place = next(index for index, character in enumerate(text) if "\ud800" <= character <= "\udfff")
    return ValidationError(
        f"The text must be valid Unicode. Given: half of a surrogate pair at character {place}", field="inputs"
    )
