"""Bodies of `/v1/responses`: wire types and nothing else. Null equals absent in every request.

Fields that OpenAI defines and this server does not implement yet are declared, so that they are refused by name.
Source: OpenAI API reference, responses
"""

from typing import Annotated

from msgspec import Meta, Struct

from weft.router.json_values import ABSENT, Anything
from weft.router.schemas_openai import PromptCacheOptions, TokenLogprob

ItemId = Annotated[str, Meta(max_length=128)]

# --- what a client sends ------------------------------------------------------------------------------------------


class InputPart(Struct, kw_only=True):
    """A part of an input message; only text is supported yet."""

    type: str
    text: str | None = None
    refusal: str | None = None


class InputItem(Struct, kw_only=True):
    """A message, a tool's call or its output, a piece of reasoning, or only the id of an item of an earlier answer."""

    type: Annotated[
        str | None,
        Meta(description="message (default), function_call, function_call_output, reasoning, item_reference"),
    ] = None
    id: ItemId | None = None
    status: str | None = None
    role: Annotated[str | None, Meta(description="user, assistant, system or developer")] = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: Annotated[str | None, Meta(description="JSON, as text")] = None
    output: str | list[InputPart] | None = None
    summary: list[InputPart] | None = None
    encrypted_content: str | None = None


class TextFormat(Struct, kw_only=True):
    """How the text is shaped; only plain text is supported yet."""

    type: str


class TextOptions(Struct, kw_only=True):
    """Options of the answer's text."""

    format: TextFormat | None = None
    verbosity: Annotated[str | None, Meta(description="low, medium or high: a hint to models that know it")] = None


class ReasoningOptions(Struct, kw_only=True):
    """Hints for models that reason; this server's do not separate reasoning yet."""

    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(Struct, kw_only=True):
    """Options of a stream."""

    include_obfuscation: Annotated[bool | None, Meta(description="Read; nothing is obfuscated")] = None


class PromptFields(Struct, kw_only=True):
    """What makes the prompt: shared by create and by the counting of tokens."""

    model: Annotated[str | None, Meta(description="A name of /v1/models; absent = the model served")] = None
    input: Annotated[str | list[InputItem] | None, Meta(description="A text, or items in order")] = None
    instructions: Annotated[str | None, Meta(description="System message before everything; not carried on")] = None
    previous_response_id: Annotated[ItemId | None, Meta(description="Goes on behind that answer")] = None
    reasoning: ReasoningOptions | None = None
    text: TextOptions | None = None
    parallel_tool_calls: bool | None = None
    truncation: Annotated[str | None, Meta(description="Only disabled is supported")] = None
    tools: Annotated[list[Anything] | None, Meta(description="Not supported yet")] = None
    tool_choice: Annotated[Anything, Meta(description="none or auto")] = ABSENT
    conversation: Annotated[Anything, Meta(description="Not supported; use previous_response_id")] = ABSENT
    chat_template_kwargs: Annotated[
        dict[str, Anything] | None, Meta(description="Extension: variables of the model's own template")
    ] = None


class ResponsesRequest(PromptFields, kw_only=True):
    """Body of POST /v1/responses."""

    max_output_tokens: Annotated[int | None, Meta(description="Most tokens to generate")] = None
    temperature: Annotated[float | None, Meta(description="0 to 2; 0 is greedy, absent = 1")] = None
    top_p: Annotated[float | None, Meta(description="0 to 1; 1 is off")] = None
    top_logprobs: Annotated[
        int | None, Meta(description="0 to 20 alternatives per place; needs include message.output_text.logprobs")
    ] = None
    include: Annotated[list[str] | None, Meta(description="message.output_text.logprobs")] = None
    metadata: Annotated[dict[str, str] | None, Meta(description="Up to 16 texts, shown again with the answer")] = None
    store: Annotated[bool | None, Meta(description="Keep the answer for later; absent = true")] = None
    background: Annotated[bool | None, Meta(description="Go on when the client has left; needs store")] = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_tool_calls: int | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Annotated[str | None, Meta(description="in_memory or 24h: a hint")] = None
    prompt_cache_options: PromptCacheOptions | None = None
    # Extensions that other servers have under the same names.
    seed: Annotated[int | None, Meta(description="Extension: same seed, same answer")] = None
    stop: Annotated[str | list[str] | None, Meta(description="Extension: texts that end the answer")] = None
    presence_penalty: Annotated[float | None, Meta(description="Extension: -2 to 2")] = None
    frequency_penalty: Annotated[float | None, Meta(description="Extension: -2 to 2")] = None
    logit_bias: Annotated[dict[str, float] | None, Meta(description="Extension: token id → bias")] = None
    top_k: Annotated[int | None, Meta(description="Extension: 0 or -1 is off")] = None
    min_p: Annotated[float | None, Meta(description="Extension: 0 to 1")] = None
    repetition_penalty: Annotated[float | None, Meta(description="Extension: > 0; 1 is neutral")] = None
    min_tokens: Annotated[int | None, Meta(description="Extension: no end of text before")] = None
    ignore_eos: Annotated[bool | None, Meta(description="Extension: go on behind the end of text")] = None
    # Known and refused by name.
    prompt: Annotated[Anything, Meta(description="Not supported")] = ABSENT
    context_management: Annotated[list[Anything] | None, Meta(description="Not supported")] = None
    moderation: Annotated[Anything, Meta(description="Not supported")] = ABSENT
    access_programs: Annotated[Anything, Meta(description="Not supported")] = ABSENT
    image: Annotated[Anything, Meta(description="Not supported")] = ABSENT


class InputTokensRequest(PromptFields, kw_only=True):
    """Body of POST /v1/responses/input_tokens."""

    personality: Annotated[str | None, Meta(description="Not supported; use instructions")] = None


class InputItemsQuery(Struct, kw_only=True):
    """Query of GET /v1/responses/{id}/input_items."""

    after: Annotated[str | None, Meta(description="Id of the item before the first one wanted")] = None
    include: Annotated[str | None, Meta(description="Read; an item is shown whole")] = None
    limit: Annotated[int | None, Meta(description="1 to 100; absent = 20")] = None
    order: Annotated[str | None, Meta(description="asc or desc (default)")] = None


class ResponseQuery(Struct, kw_only=True):
    """Query of GET /v1/responses/{id}."""

    stream: Annotated[bool | None, Meta(description="Its events instead; only for background streams")] = None
    include: Annotated[str | None, Meta(description="Read; what was included at first is there")] = None
    include_obfuscation: Annotated[bool | None, Meta(description="Read; nothing is obfuscated")] = None
    starting_after: Annotated[int | None, Meta(description="Sequence number behind which the stream begins")] = None


# --- answers ------------------------------------------------------------------------------------------------------


class InputText(Struct, kw_only=True, tag_field="type", tag="input_text"):
    """Text that went in."""

    text: str


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    """Text that came out."""

    text: str
    annotations: list[str] = []
    logprobs: list[TokenLogprob] = []


class Refusal(Struct, kw_only=True, tag_field="type", tag="refusal"):
    """A refusal of an earlier answer."""

    refusal: str


class SummaryText(Struct, kw_only=True, tag_field="type", tag="summary_text"):
    """A part of a summary of reasoning."""

    text: str


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """A part of reasoning."""

    text: str


class MessageItem(Struct, kw_only=True, tag_field="type", tag="message"):
    """A message, of either side."""

    id: str
    status: str
    role: str
    content: list[InputText | OutputText | Refusal]


class FunctionCallItem(Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A tool's call in an earlier answer."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str


class FunctionCallOutputItem(Struct, kw_only=True, tag_field="type", tag="function_call_output"):
    """What a tool said."""

    id: str
    status: str
    call_id: str
    output: str


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """Reasoning of an earlier answer."""

    id: str
    status: str
    summary: list[SummaryText]
    content: list[ReasoningText]


Item = MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem


class InputTokensDetails(Struct, kw_only=True):
    """Of the input's tokens. Writing to the prefix cache costs nothing here and is not counted."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, kw_only=True):
    """Of the output's tokens."""

    reasoning_tokens: int


class ResponseUsage(Struct, kw_only=True):
    """What was counted."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Struct, kw_only=True):
    """Why a response ended early."""

    reason: str


class ShownTextFormat(Struct, kw_only=True, tag_field="type", tag="text"):
    """Plain text."""


class ShownTextOptions(Struct, kw_only=True):
    """Options of the text in force."""

    format: ShownTextFormat
    verbosity: str


class ShownReasoning(Struct, kw_only=True):
    """Hints that were given."""

    effort: str | None
    summary: str | None


class Response(Struct, kw_only=True):
    """Answer of /v1/responses: what was asked for, how far it is, what came out."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    completed_at: int | None = None
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[Item] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    prompt_cache_retention: str | None = None
    reasoning: ShownReasoning
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: ShownTextOptions
    tool_choice: str = "auto"
    tools: list[str] = []
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseDeleted(Struct, kw_only=True):
    """Answer of DELETE /v1/responses/{id}."""

    id: str
    object: str = "response"
    deleted: bool = True


class ItemList(Struct, kw_only=True):
    """Answer of GET /v1/responses/{id}/input_items."""

    object: str = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


class InputTokens(Struct, kw_only=True):
    """Answer of POST /v1/responses/input_tokens."""

    object: str = "response.input_tokens"
    input_tokens: int


# --- events -------------------------------------------------------------------------------------------------------


class ResponseEvent(Struct, kw_only=True):
    """An event that carries the response: created, queued, in_progress, completed, incomplete, failed."""

    type: str
    sequence_number: int
    response: Response


class OutputItemEvent(Struct, kw_only=True):
    """An item begins or is done."""

    type: str
    sequence_number: int
    output_index: int
    item: Item


class ContentPartEvent(Struct, kw_only=True):
    """A part of an item begins or is done."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    part: OutputText


class TextDeltaEvent(Struct, kw_only=True):
    """Text is added."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(Struct, kw_only=True):
    """The text is whole."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[TokenLogprob]
