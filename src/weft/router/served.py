"""The model as the router sees it. Exists once the shards are ready."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, Self

from weft.config import DEFAULT_MODEL, DEFAULT_MODEL_SAMPLING, Settings
from weft.core.info import EngineInfo
from weft.core.request import TokenId
from weft.text.assets import TextAssets
from weft.text.chat import JsonObject
from weft.text.tokenizer import Tokenizer, TokenSpan


class ChatTemplate(Protocol):
    """The model's chat template, rendered in a bounded worker: `text/chat.py`, which says more."""

    def speaks_of(self, word: str) -> bool:
        """Whether the word stands in the template, for example the name of a role."""
        ...

    async def variables(self, *, with_tools: bool = False) -> frozenset[str]:
        """The variables that the template reads."""
        ...

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
class SamplingDefaults:
    """What /v1 uses for parameters that a request leaves out. Without recommendations: OpenAI's values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def choose(cls, settings: Settings, recommended: Mapping[str, float]) -> Self:
        """`--default-sampling`, where auto means `recommended`, or what suits the built-in default model."""
        text = settings.default_sampling
        if text == "auto" and settings.model_id == DEFAULT_MODEL:
            text = DEFAULT_MODEL_SAMPLING
        if text == "auto":
            values = dict(recommended)
        elif text == "none":
            values = {}
        else:
            values = {name: float(value) for name, _, value in (pair.partition("=") for pair in text.split(","))}
        # Values out of range would fail every request that says nothing: they count as not given.
        return cls(
            temperature=min(values.get("temperature", 1.0), 2.0),
            top_p=values.get("top_p", 1.0) if 0 < values.get("top_p", 1.0) <= 1 else 1.0,
            top_k=int(values.get("top_k", 0)),
            min_p=values.get("min_p", 0.0) if values.get("min_p", 0.0) <= 1 else 0.0,
            repetition_penalty=values.get("repetition_penalty", 1.0) or 1.0,
        )


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
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    pipeline_tag: str | None = "text-generation"
    appended_token_id: TokenId | None = None
    """Put behind a text that is embedded, where the tokenizer does not do it by itself; None: nothing is."""
    created_s: int = 0
    """Unix time at which the model became ready."""

    @property
    def task(self) -> str:
        """What the model is for: `generate` or `embed`."""
        return "embed" if self.info.pooling else "generate"

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


def served_model(settings: Settings, info: EngineInfo, assets: TextAssets) -> ServedModel:
    """The model with the limits in force: what was asked for, within what the shards can hold."""
    max_total_tokens = min(info.max_total_tokens, settings.max_total_tokens or info.max_total_tokens)
    if settings.max_total_tokens is None and assets.model_max_length is not None:
        max_total_tokens = min(max_total_tokens, assets.model_max_length)
    # A vector takes no place behind its text.
    longest_prompt = max_total_tokens - (not info.pooling)
    return ServedModel(
        info=info,
        tokenizer=assets.tokenizer,
        chat_template=assets.chat_template,
        eos_token_ids=tuple(TokenId(token_id) for token_id in assets.eos_token_ids if token_id < info.vocab_size),
        max_input_tokens=min(settings.max_input_tokens or longest_prompt, longest_prompt),
        max_total_tokens=max_total_tokens,
        sampling_defaults=SamplingDefaults.choose(settings, assets.recommended_sampling),
        pipeline_tag="feature-extraction" if info.pooling else "text-generation",
        appended_token_id=None if assets.appended_token_id is None else TokenId(assets.appended_token_id),
        created_s=int(time.time()),
    )
