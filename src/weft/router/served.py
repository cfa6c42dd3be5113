"""The model as the router sees it. Exists once the shards are ready."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from weft.core.info import EngineInfo
from weft.core.request import TokenId
from weft.text.chat import JsonObject
from weft.text.tokenizer import Tokenizer, TokenSpan


class ChatTemplate(Protocol):
    """The model's chat template, rendered in a bounded worker: `text/chat.py`, which says more."""

    async def render(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The prompt. Raises TemplateError, ValidationError, OverloadedError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """Everything about the model that answering a request needs."""

    info: EngineInfo
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None: the model has none, and chat routes say so."""
    eos_token_ids: tuple[TokenId, ...]
    max_input_tokens: int
    max_total_tokens: int
    """Prompt and completion together."""
    pipeline_tag: str | None = "text-generation"
    created_s: int = 0
    """Unix time at which the model became ready."""

    @property
    def max_prompt_chars(self) -> int:
        """More characters cannot fit into `max_input_tokens`, so longer texts are refused before they cost time."""
        return self.max_input_tokens * self.tokenizer.longest_token_chars

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text."""
        piece = self.tokenizer.pieces(skip_special_tokens=False)[token_id]
        return piece if isinstance(piece, bytes) else piece.encode()

    async def encode_with_offsets(self, text: str, *, add_special_tokens: bool) -> Sequence[TokenSpan]:
        """Text → tokens and their places, on a thread."""
        return await asyncio.to_thread(self.tokenizer.encode_with_offsets, text, add_special_tokens)
