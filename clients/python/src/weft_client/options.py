"""What a request may say besides its prompt. Left out means: the server's default."""

from typing import Any, TypedDict


class Message(TypedDict, total=False):
    """One turn of a conversation."""

    role: str
    content: str | list[dict[str, Any]] | None
    name: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str


class GenerateOptions(TypedDict, total=False):
    """Parameters of TGI's native API."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    typical_p: float
    repetition_penalty: float
    frequency_penalty: float
    seed: int
    stop: list[str]
    """These texts end the generation and stay in it."""
    truncate: int
    return_full_text: bool
    best_of: int
    watermark: bool
    decoder_input_details: bool
    top_n_tokens: int
    adapter_id: str
    grammar: dict[str, Any]


class _OpenAiOptions(TypedDict, total=False):
    """Shared by chat and plain completions; names that OpenAI does not have are extensions of this server."""

    model: str
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    stop: str | list[str]
    presence_penalty: float
    frequency_penalty: float
    logit_bias: dict[str, float]
    seed: int
    user: str
    top_k: int
    min_p: float
    typical_p: float
    repetition_penalty: float
    min_tokens: int
    ignore_eos: bool
    extra: dict[str, Any]
    """Further fields of the body, for servers that have more."""


class ChatOptions(_OpenAiOptions, total=False):
    """Parameters of chat completions."""

    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int
    chat_template_kwargs: dict[str, Any]
    continue_final_message: bool
    add_generation_prompt: bool


class CompletionOptions(_OpenAiOptions, total=False):
    """Parameters of plain completions."""

    echo: bool
    logprobs: int
