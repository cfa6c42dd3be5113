"""Bodies of the `/v1` routes: wire types and nothing else. Null equals absent in every request.

Fields that OpenAI defines and this server does not implement yet are declared, so that they are refused by name.
Source: OpenAI API reference, chat completions, completions and models.
"""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from weft.router.json_values import ABSENT, Anything

Probability = Annotated[float | None, Meta(description="0 to 1; 1 is off")]


class StreamOptions(Struct, kw_only=True):
    """Options of a stream."""

    include_usage: Annotated[bool | None, Meta(description="End with a chunk that holds the usage")] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Read; nothing is obfuscated")] = None


class ContentPart(Struct, kw_only=True):
    """A part of a message; only text is supported yet."""

    type: Annotated[str, Meta(description="text, or refusal in an assistant's message")]
    text: str | None = None
    refusal: str | None = None


class FunctionCall(Struct, kw_only=True):
    """What an earlier answer called."""

    name: str | None = None
    arguments: Annotated[Anything, Meta(description="JSON, as text")] = ABSENT


class ToolCall(Struct, kw_only=True):
    """A call in an earlier answer."""

    id: str | None = None
    type: str | None = None
    function: FunctionCall | None = None


class Message(Struct, kw_only=True):
    """One turn of a conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: Annotated[str | None, Meta(description="What an earlier answer said instead of content")] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: Annotated[FunctionCall | None, Meta(description="An earlier form of tool_calls")] = None
    reasoning_content: str | None = None
    audio: Annotated[Anything, Meta(description="Not supported")] = ABSENT


class Prediction(Struct, kw_only=True):
    """What the answer will probably be."""

    type: str
    content: str | list[ContentPart]


class PromptCacheOptions(Struct, kw_only=True):
    """Hints about caching the prompt."""

    mode: Annotated[str | None, Meta(description="implicit or explicit")] = None
    ttl: str | None = None
    prewarm: Annotated[bool | None, Meta(description="Only false")] = None
    comparison_response_id: Annotated[str | None, Meta(description="Not supported")] = None


class SamplingFields(Struct, kw_only=True):
    """What chat and plain completions share."""

    model: Annotated[str | None, Meta(description="A name of /v1/models; absent = the model served")] = None
    temperature: Annotated[float | None, Meta(description="0 to 2; 0 is greedy, absent = 1")] = None
    top_p: Probability = None
    n: Annotated[int | None, Meta(description="Number of choices")] = None
    stop: Annotated[str | list[str] | None, Meta(description="Texts that end the answer; they are cut off")] = None
    max_tokens: Annotated[int | None, Meta(description="Most tokens to generate")] = None
    presence_penalty: Annotated[float | None, Meta(description="-2 to 2")] = None
    frequency_penalty: Annotated[float | None, Meta(description="-2 to 2")] = None
    logit_bias: Annotated[
        dict[str, float] | list[float] | None, Meta(description="Token id → added to its logit, -100 to 100")
    ] = None
    seed: Annotated[int | None, Meta(description="Same seed, same answer")] = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions that other servers have under the same names.
    top_k: Annotated[int | None, Meta(description="Sample among the k likeliest tokens; 0 or -1 is off")] = None
    min_p: Annotated[float | None, Meta(description="Drop tokens less likely than this share of the best")] = None
    typical_p: Probability = None
    repetition_penalty: Annotated[float | None, Meta(description="> 0; 1 is neutral")] = None
    min_tokens: Annotated[int | None, Meta(description="No end of text before this many tokens")] = None
    ignore_eos: Annotated[bool | None, Meta(description="Go on behind the end of text")] = None
    # Known and refused by name until they exist.
    guided_json: Annotated[Anything, Meta(description="Not supported yet")] = ABSENT
    guided_regex: Annotated[Anything, Meta(description="Not supported yet")] = ABSENT
    structured_outputs: Annotated[Anything, Meta(description="Not supported yet")] = ABSENT


class ChatRequest(SamplingFields, kw_only=True):
    """Body of /v1/chat/completions and /chat_tokenize."""

    messages: list[Message]
    max_completion_tokens: Annotated[int | None, Meta(description="Takes precedence over max_tokens")] = None
    logprobs: Annotated[bool | None, Meta(description="Return log-probabilities")] = None
    top_logprobs: Annotated[int | None, Meta(description="0 to 20 alternatives per place; needs logprobs")] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[
        dict[str, Anything] | None, Meta(description="Variables of the model's own template")
    ] = None
    tools: Annotated[list[Anything] | None, Meta(description="Not supported yet")] = None
    tool_choice: Annotated[Anything, Meta(description="none or auto")] = ABSENT
    tool_prompt: Annotated[str | None, Meta(description="TGI's; read, there are no tools yet")] = None
    response_format: Annotated[Anything, Meta(description="Only type text is supported yet")] = ABSENT
    chat_template: Annotated[str | None, Meta(description="Refused: templates come with the model")] = None
    functions: Annotated[list[Anything] | None, Meta(description="Not supported yet")] = None
    function_call: Annotated[Anything, Meta(description="none or auto")] = ABSENT
    modalities: Annotated[list[str] | None, Meta(description="Only text")] = None
    audio: Annotated[Anything, Meta(description="Not supported")] = ABSENT
    web_search_options: Annotated[Anything, Meta(description="Not supported")] = ABSENT
    moderation: Annotated[Anything, Meta(description="Not supported")] = ABSENT
    # Read and checked; `openai_fields.py` says why they change nothing.
    parallel_tool_calls: Annotated[bool | None, Meta(description="Read; there are no tools yet")] = None
    reasoning_effort: Annotated[str | None, Meta(description="Given to templates that read it")] = None
    verbosity: Annotated[str | None, Meta(description="low, medium or high: a hint to models that know it")] = None
    service_tier: Annotated[str | None, Meta(description="Read; there is one tier, default")] = None
    store: Annotated[bool | None, Meta(description="Only false; /v1/responses stores")] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="Up to 16 texts")] = None
    prediction: Annotated[Prediction | None, Meta(description="Read; nothing is predicted")] = None
    prompt_cache_key: Annotated[str | None, Meta(description="Read; shared prefixes are found without it")] = None
    prompt_cache_retention: Annotated[str | None, Meta(description="in_memory or 24h: a hint")] = None
    prompt_cache_options: PromptCacheOptions | None = None
    safety_identifier: Annotated[str | None, Meta(description="Read; nothing is kept about users")] = None


class CompletionRequest(SamplingFields, kw_only=True):
    """Body of /v1/completions."""

    prompt: Annotated[str | list[str | int | list[int]], Meta(description="Text, token ids, or a list of either")]
    echo: Annotated[bool | None, Meta(description="Put the prompt before the completion")] = None
    logprobs: Annotated[int | None, Meta(description="0 to 20 alternatives per place; OpenAI's models have 5")] = None
    best_of: Annotated[int | None, Meta(description="Only 1 and n are supported")] = None
    suffix: Annotated[str | None, Meta(description="Refused")] = None


# --- answers ------------------------------------------------------------------------------------------------------


class PromptTokensDetails(Struct, kw_only=True):
    """Of the prompt's tokens. Writing to the prefix cache costs nothing here and is not counted."""

    cached_tokens: int
    audio_tokens: int = 0
    cache_write_tokens: int = 0


class CompletionTokensDetails(Struct, kw_only=True):
    """Of the completion's tokens. Nothing is spoken or predicted."""

    reasoning_tokens: int
    audio_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0


class Usage(Struct, kw_only=True):
    """What was counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class TopLogprob(Struct, kw_only=True):
    """An alternative."""

    token: str
    logprob: Annotated[float, Meta(description="-9999 where there is no probability at all")]
    bytes: list[int] | None


class TokenLogprob(Struct, kw_only=True):
    """One token of the answer."""

    token: str
    logprob: Annotated[float, Meta(description="-9999 where there is no probability at all")]
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """Log-probabilities of the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Struct, kw_only=True):
    """The answer."""

    role: str
    content: str | None
    refusal: None = None
    annotations: list[str] = []


class ChatChoice(Struct, kw_only=True):
    """One of n answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(Struct, kw_only=True):
    """Answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    service_tier: Annotated[str | UnsetType, Meta(description="When one was asked for")] = UNSET


class Delta(Struct, kw_only=True, omit_defaults=True):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: UnsetType | None = UNSET


class ChunkChoice(Struct, kw_only=True):
    """One choice of a chunk."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatCompletionChunk(Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: Annotated[str | UnsetType, Meta(description="When one was asked for")] = UNSET


class CompletionLogprobs(Struct, kw_only=True):
    """Log-probabilities of a completion, as parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    """One completion."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(Struct, kw_only=True):
    """Answer of /v1/completions, and one event of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ErrorBody(Struct, kw_only=True):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Struct, kw_only=True):
    """Every error of a `/v1` route."""

    error: ErrorBody


class Model(Struct, kw_only=True):
    """One name of the served model."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int
    task: Annotated[str, Meta(description="generate or embed")]


class ModelList(Struct, kw_only=True):
    """Answer of /v1/models."""

    object: str = "list"
    data: list[Model]
