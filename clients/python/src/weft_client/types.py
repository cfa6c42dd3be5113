"""What comes back. Fields that a server does not send have their defaults; fields unknown here are skipped."""

from typing import Any

from msgspec import Struct, field


class Token(Struct, frozen=True, kw_only=True):
    """A token of TGI's native API."""

    id: int
    text: str
    logprob: float | None = None
    special: bool = False


class SequenceDetails(Struct, frozen=True, kw_only=True):
    """How one generation went."""

    finish_reason: str
    """`length`, `eos_token` or `stop_sequence`."""
    generated_tokens: int
    seed: int | None = None
    prefill: list[Token] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    top_tokens: list[list[Token]] = field(default_factory=list)
    generated_text: str | None = None
    """Only of the other sequences of `best_of`."""
    best_of_sequences: list["SequenceDetails"] = field(default_factory=list)


class Generation(Struct, frozen=True, kw_only=True):
    """Answer of /generate."""

    generated_text: str
    details: SequenceDetails | None = None


class StreamDetails(Struct, frozen=True, kw_only=True):
    """How a streamed generation went."""

    finish_reason: str
    generated_tokens: int
    input_length: int = 0
    seed: int | None = None


class StreamToken(Struct, frozen=True, kw_only=True):
    """One event of /generate_stream; the last one has `generated_text` and `details`."""

    token: Token
    index: int = 0
    top_tokens: list[Token] = field(default_factory=list)
    generated_text: str | None = None
    details: StreamDetails | None = None


class PromptTokensDetails(Struct, frozen=True, kw_only=True):
    """Of the prompt's tokens."""

    cached_tokens: int | None = None


class Usage(Struct, frozen=True, kw_only=True):
    """What was counted, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ChatMessage(Struct, frozen=True, kw_only=True):
    """An answer."""

    role: str = "assistant"
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class TokenLogprob(Struct, frozen=True, kw_only=True):
    """A token of a chat completion, with alternatives."""

    token: str
    logprob: float | None
    bytes: list[int] | None = None
    top_logprobs: list["TokenLogprob"] = field(default_factory=list)


class ChatLogprobs(Struct, frozen=True, kw_only=True):
    """Log-probabilities of an answer."""

    content: list[TokenLogprob] | None = None


class ChatChoice(Struct, frozen=True, kw_only=True):
    """One of n answers."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    """`stop`, `length` or `tool_calls`."""
    logprobs: ChatLogprobs | None = None


class ChatCompletion(Struct, frozen=True, kw_only=True):
    """Answer of /v1/chat/completions."""

    id: str
    model: str
    created: int
    choices: list[ChatChoice]
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """Of the first answer."""
        return (self.choices[0].message.content or "") if self.choices else ""


class ChatDelta(Struct, frozen=True, kw_only=True):
    """What a chunk adds."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """One choice of a chunk."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: ChatLogprobs | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    """One event of a streamed chat completion; the last one has `usage` and no choices."""

    id: str = ""
    model: str = ""
    created: int = 0
    choices: list[ChatChunkChoice] = field(default_factory=list)
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """What it adds to the first answer."""
        return "".join(choice.delta.content or "" for choice in self.choices if choice.index == 0)


class CompletionLogprobs(Struct, frozen=True, kw_only=True):
    """Log-probabilities of a plain completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int] = field(default_factory=list)
    top_logprobs: list[dict[str, float | None] | None] | None = None


class CompletionChoice(Struct, frozen=True, kw_only=True):
    """One of n completions, or a piece of it."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: CompletionLogprobs | None = None


class Completion(Struct, frozen=True, kw_only=True):
    """Answer of /v1/completions, or one event of it."""

    id: str = ""
    model: str = ""
    created: int = 0
    choices: list[CompletionChoice] = field(default_factory=list)
    usage: Usage | None = None
    system_fingerprint: str | None = None

    @property
    def text(self) -> str:
        """Of the first completion."""
        return "".join(choice.text for choice in self.choices if choice.index == 0)


class Model(Struct, frozen=True, kw_only=True):
    """A model that the server serves."""

    id: str
    created: int = 0
    owned_by: str = ""


class ModelList(Struct, frozen=True, kw_only=True):
    """Answer of /v1/models."""

    data: list[Model]


class Info(Struct, frozen=True, kw_only=True):
    """Answer of /info: what is served, and within which limits."""

    model_id: str
    model_sha: str | None = None
    model_pipeline_tag: str | None = None
    max_concurrent_requests: int = 0
    max_best_of: int = 0
    max_stop_sequences: int = 0
    max_input_tokens: int = 0
    max_total_tokens: int = 0
    max_client_batch_size: int = 0
    router: str = ""
    version: str = ""
    sha: str | None = None
    docker_label: str | None = None
    validation_workers: int = 0


class Health(Struct, frozen=True, kw_only=True):
    """Whether requests are served now, and how far a start has come."""

    is_ready: bool
    state: str = ""
    phase: str = ""
    percent: float = 0.0
    message: str = ""


class TokenSpan(Struct, frozen=True, kw_only=True):
    """A token and its place in the text; offsets are those of the server, bytes in Weft."""

    id: int
    text: str
    start: int = 0
    stop: int = 0
