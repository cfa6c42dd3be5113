"""Bodies of `/v1/messages`: wire types and nothing else. Null equals absent in every request.

Fields that Anthropic defines and this server does not implement yet are declared, so that they are refused by name.
Source: Anthropic API reference, messages, version 2023-06-01
"""

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from weft.router.json_values import ABSENT, Anything

# --- what a client sends ------------------------------------------------------------------------------------------


class Block(Struct, kw_only=True):
    """A block of a message: text, or a call of an earlier answer with what came of it."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Anything = ABSENT
    tool_use_id: str | None = None
    content: Annotated[Anything, Meta(description="Of a tool_result: a text, or text blocks")] = ABSENT


class AnthropicMessage(Struct, kw_only=True):
    """One turn."""

    role: Annotated[str, Meta(description="user, assistant or system")]
    content: str | list[Block]


class MessageMetadata(Struct, kw_only=True):
    """About the request."""

    user_id: str | None = None


class ThinkingOptions(Struct, kw_only=True):
    """Whether the model thinks first; only disabled is supported yet."""

    type: str


class OutputOptions(Struct, kw_only=True):
    """How the answer is made."""

    effort: Annotated[str | None, Meta(description="Given to templates that read it")] = None
    format: Annotated[Anything, Meta(description="Not supported yet")] = ABSENT


class ToolChoice(Struct, kw_only=True):
    """Whether tools are called."""

    type: str


class MessagePromptFields(Struct, kw_only=True):
    """What makes the prompt: shared by create and by the counting of tokens."""

    model: Annotated[str, Meta(description="A name of /v1/models")]
    messages: list[AnthropicMessage]
    system: str | list[Block] | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions | None = None
    tools: Annotated[list[Anything] | None, Meta(description="Not supported yet")] = None
    tool_choice: Annotated[ToolChoice | None, Meta(description="none or auto")] = None
    cache_control: Annotated[Anything, Meta(description="Read; shared prefixes are found without it")] = ABSENT
    speed: Annotated[str | None, Meta(description="standard or fast; there is one speed")] = None
    chat_template_kwargs: Annotated[
        dict[str, Anything] | None, Meta(description="Extension: variables of the model's own template")
    ] = None


class MessagesRequest(MessagePromptFields, kw_only=True):
    """Body of POST /v1/messages."""

    max_tokens: Annotated[int, Meta(description="Most tokens to generate; what the context has is the limit")]
    metadata: MessageMetadata | None = None
    stop_sequences: Annotated[list[str] | None, Meta(description="Texts that end the answer; they are cut off")] = None
    stream: bool | None = None
    temperature: Annotated[float | None, Meta(description="0 to 1; 0 is greedy, absent = 1")] = None
    top_k: Annotated[int | None, Meta(description="Sample among the k likeliest tokens; 0 is off")] = None
    top_p: Annotated[float | None, Meta(description="0 to 1; 1 is off")] = None
    service_tier: Annotated[str | None, Meta(description="auto or standard_only; there is one tier")] = None
    inference_geo: Annotated[str | None, Meta(description="Only global; the server is where it is")] = None
    # Known and refused by name.
    container: Anything = ABSENT
    mcp_servers: list[Anything] | None = None
    context_management: Anything = ABSENT
    diagnostics: Anything = ABSENT


class CountTokensRequest(MessagePromptFields, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""


# --- answers ------------------------------------------------------------------------------------------------------


class TextBlock(Struct, kw_only=True, tag_field="type", tag="text"):
    """Text of the answer."""

    text: str
    citations: None = None


class MessageTokensDetails(Struct, kw_only=True):
    """Of the output's tokens."""

    thinking_tokens: int


class MessageDeltaUsage(Struct, kw_only=True):
    """What was counted. `input_tokens` are those that the prefix cache did not have."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: MessageTokensDetails


class MessageUsage(MessageDeltaUsage, kw_only=True):
    """The same, in the answer itself."""

    service_tier: str = "standard"


class AnthropicAnswer(Struct, kw_only=True, tag_field="type", tag="message"):
    """Answer of /v1/messages."""

    id: str
    role: str
    model: str
    content: list[TextBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class TokensCount(Struct, kw_only=True):
    """Answer of /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicModel(Struct, kw_only=True, tag_field="type", tag="model"):
    """One name of the served model."""

    id: str
    display_name: str
    created_at: Annotated[str, Meta(description="When it became ready, RFC 3339")]
    lifecycle: str = "active"
    max_input_tokens: int
    max_tokens: int


class AnthropicModelList(Struct, kw_only=True):
    """Answer of /v1/models to clients of Anthropic."""

    data: list[AnthropicModel]
    has_more: bool
    first_id: str | None
    last_id: str | None


class AnthropicModelsQuery(Struct, kw_only=True):
    """Query of GET /v1/models; for clients of Anthropic only."""

    after_id: Annotated[str | None, Meta(description="Id of the model before the first one wanted")] = None
    before_id: Annotated[str | None, Meta(description="Id of the model behind the last one wanted")] = None
    limit: Annotated[int | None, Meta(description="1 to 1000; absent = 20")] = None


class AnthropicErrorBody(Struct, kw_only=True):
    """What went wrong."""

    type: str
    message: str


class AnthropicError(Struct, kw_only=True, tag_field="type", tag="error"):
    """Every error of /v1/messages, and the last event of a stream that fails."""

    error: AnthropicErrorBody
    request_id: str | UnsetType = UNSET


# --- events -------------------------------------------------------------------------------------------------------


class MessageStart(Struct, kw_only=True, tag_field="type", tag="message_start"):
    """The answer begins."""

    message: AnthropicAnswer


class ContentBlockStart(Struct, kw_only=True, tag_field="type", tag="content_block_start"):
    """A block begins."""

    index: int
    content_block: TextBlock


class Ping(Struct, kw_only=True, tag_field="type", tag="ping"):
    """Nothing; the connection lives."""


class TextDelta(Struct, kw_only=True, tag_field="type", tag="text_delta"):
    """Text is added."""

    text: str


class ContentBlockDelta(Struct, kw_only=True, tag_field="type", tag="content_block_delta"):
    """A block grows."""

    index: int
    delta: TextDelta


class ContentBlockStop(Struct, kw_only=True, tag_field="type", tag="content_block_stop"):
    """A block is whole."""

    index: int


class StopDelta(Struct, kw_only=True):
    """How the answer ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(Struct, kw_only=True, tag_field="type", tag="message_delta"):
    """The answer is whole."""

    delta: StopDelta
    usage: MessageDeltaUsage


class MessageStop(Struct, kw_only=True, tag_field="type", tag="message_stop"):
    """Nothing follows."""


MessageStreamEvent = (
    MessageStart,
    ContentBlockStart,
    Ping,
    ContentBlockDelta,
    ContentBlockStop,
    MessageDelta,
    MessageStop,
    AnthropicError,
)
