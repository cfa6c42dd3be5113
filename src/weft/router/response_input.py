"""Items of `/v1/responses` ↔ messages of a conversation.

An item is normalized once, when it arrives: it gets an id and its content becomes a list of parts. That form is stored
and shown by `input_items`; the same form of earlier turns and of earlier answers makes the prompt of a later turn.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec

from weft.errors import NotSupportedError, ValidationError
from weft.limits import LIMITS
from weft.router.exchange import new_request_id
from weft.router.schemas_openai import FunctionCall, Message, ToolCall
from weft.router.schemas_responses import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputItem,
    InputPart,
    InputText,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    Refusal,
    SummaryText,
)

_ROLES = ("user", "assistant", "system", "developer")
_TEXT_PARTS = ("input_text", "output_text", "text")
_SYSTEM = "system"
_REFERENCE = "item_reference"


def is_reference(item: InputItem) -> bool:
    """Whether it names an item instead of being one; the type may be left out."""
    is_bare = item.type is None and item.role is None and item.content is None
    return item.type == _REFERENCE or (is_bare and item.id is not None)


def normalized(
    given: str | Sequence[InputItem] | None, referenced: Mapping[str, Item] = MappingProxyType({})
) -> list[Item]:
    """`input` as items with ids. Raises ValidationError, NotSupportedError.

    Units    referenced: the items that references in `given` name, by id
    """
    if given is None:
        return []
    if isinstance(given, str):
        return [_message("user", [InputText(text=given)], None)]
    if len(given) > LIMITS.max_messages:
        raise ValidationError(
            f"`input` must hold at most {LIMITS.max_messages} items. Given: {len(given)}", field="input"
        )
    return [
        referenced[_needed(item.id, f"input[{index}].id")]
        if is_reference(item)
        else _normalized_item(item, f"input[{index}]")
        for index, item in enumerate(given)
    ]


def messages_of(instructions: str | None, items: Sequence[Item]) -> list[Message]:
    """The conversation that items tell. Instructions, system and developer messages in front become one message."""
    messages: list[Message] = [] if instructions is None else [Message(role=_SYSTEM, content=instructions)]
    reasoning: list[str] = []
    for item in items:
        match item:
            case ReasoningItem():
                reasoning += [part.text for part in item.content]
                continue
            case MessageItem():
                message = _said(item)
            case FunctionCallItem():
                message = _called(item)
            case FunctionCallOutputItem():
                message = Message(role="tool", content=item.output, tool_call_id=item.call_id)
        if reasoning and message.role == "assistant":
            message.reasoning_content = "\n".join(reasoning)
        reasoning = []
        _append(messages, message)
    return messages


def _append(messages: list[Message], message: Message) -> None:
    last = messages[-1] if messages else None
    if last is None:
        messages.append(message)
    elif message.role == last.role == _SYSTEM and len(messages) == 1:
        # Many templates allow one system message, in front.
        last.content = f"{last.content}\n\n{message.content}"
    elif message.tool_calls and last.role == "assistant":
        last.tool_calls = [*(last.tool_calls or ()), *message.tool_calls]
    else:
        messages.append(message)


def _said(item: MessageItem) -> Message:
    text = "".join(part.refusal if isinstance(part, Refusal) else part.text for part in item.content)
    return Message(role=item.role, content=text)


def _called(item: FunctionCallItem) -> Message:
    call = FunctionCall(name=item.name, arguments=msgspec.Raw(msgspec.json.encode(item.arguments)))
    return Message(role="assistant", tool_calls=[ToolCall(id=item.call_id, type="function", function=call)])


def _normalized_item(item: InputItem, place: str) -> Item:
    match item.type or "message":
        case "message":
            return _normalized_message(item, place)
        case "function_call":
            return FunctionCallItem(
                id=item.id or f"fc_{new_request_id()}",
                status=item.status or "completed",
                call_id=_needed(item.call_id, f"{place}.call_id"),
                name=_needed(item.name, f"{place}.name"),
                arguments=_needed(item.arguments, f"{place}.arguments"),
            )
        case "function_call_output":
            if item.output is None:
                raise _missing(f"{place}.output")
            return FunctionCallOutputItem(
                id=item.id or f"fco_{new_request_id()}",
                status=item.status or "completed",
                call_id=_needed(item.call_id, f"{place}.call_id"),
                output=_text(item.output, f"{place}.output"),
            )
        case "reasoning":
            content = item.content if isinstance(item.content, list) else []
            return ReasoningItem(
                id=item.id or f"rs_{new_request_id()}",
                status=item.status or "completed",
                summary=[SummaryText(text=part.text or "") for part in item.summary or ()],
                content=[ReasoningText(text=part.text or "") for part in content],
            )
        case kind:
            raise NotSupportedError(
                f"`{place}.type` {kind[:64]!r} is not supported. Send message, function_call, function_call_output, "
                "reasoning or item_reference",
                field="input",
            )


def _normalized_message(item: InputItem, place: str) -> MessageItem:
    if item.role not in _ROLES:
        given = "nothing" if item.role is None else repr(item.role[:64])
        raise ValidationError(f"`{place}.role` must be one of {', '.join(_ROLES)}. Given: {given}", field="input")
    if item.content is None:
        raise _missing(f"{place}.content")
    parts = [InputPart(type="input_text", text=item.content)] if isinstance(item.content, str) else item.content
    shown = [_part(part, item.role, f"{place}.content[{index}]") for index, part in enumerate(parts)]
    return _message(item.role, shown, item)


def _message(role: str, content: list[InputText | OutputText | Refusal], item: InputItem | None) -> MessageItem:
    return MessageItem(
        id=(item and item.id) or f"msg_{new_request_id()}",
        status=(item and item.status) or "completed",
        role=role,
        content=content,
    )


def _part(part: InputPart, role: str, place: str) -> InputText | OutputText | Refusal:
    if part.type == "refusal":
        return Refusal(refusal=_needed(part.refusal, f"{place}.refusal"))
    if part.type not in _TEXT_PARTS:
        raise NotSupportedError(
            f"`{place}.type` {part.type[:64]!r} is not supported by this model; send input_text", field="input"
        )
    text = _needed(part.text, f"{place}.text")
    return OutputText(text=text) if role == "assistant" else InputText(text=text)


def _text(content: str | list[InputPart], place: str) -> str:
    if isinstance(content, str):
        return content
    parts = [_part(part, "tool", f"{place}[{index}]") for index, part in enumerate(content)]
    return "".join(part.text for part in parts if not isinstance(part, Refusal))


def _needed(value: str | None, place: str) -> str:
    if value is None:
        raise _missing(place)
    return value


def _missing(place: str) -> ValidationError:
    return ValidationError(f"`{place}` is missing; add it", field="input")
