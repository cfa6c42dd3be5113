"""Messages → prompt text, through the model's own template."""

import msgspec

from weft.errors import NotSupportedError, TemplateError, ValidationError
from weft.router.json_values import JsonValue, is_given
from weft.router.schemas_openai import ChatRequest, ContentPart, FunctionCall, Message, ToolCall
from weft.router.served import ChatTemplate, ServedModel
from weft.text.chat import JsonObject

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_TEXT_PARTS = ("text", "input_text")
_EFFORT = "reasoning_effort"


async def render_chat(body: ChatRequest, model: ServedModel) -> str:
    """The prompt of a conversation. Raises TemplateError, ValidationError.

    A conversation that ends with an assistant's message is continued, not answered: the prompt ends with that text
    without white space behind it (TGI's behaviour), unless `add_generation_prompt` or `continue_final_message` say
    otherwise; with `continue_final_message` the text stays as it is.
    """
    if model.chat_template is None:
        raise TemplateError("The model has no chat template. Use a plain completion, or serve a model that has one.")
    if not body.messages:
        raise ValidationError("`messages` must hold at least one message. Given: 0", field="messages")
    last = body.messages[-1]
    is_answered = last.role != "assistant" or bool(last.tool_calls) or bool(body.add_generation_prompt)
    continues = not is_answered if body.continue_final_message is None else body.continue_final_message
    if continues and body.add_generation_prompt:
        raise ValidationError(
            "`continue_final_message` and `add_generation_prompt` must not both be true; choose one",
            field="continue_final_message",
        )
    text = await model.chat_template.render(
        _conversation(body.messages, model.chat_template),
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        kwargs=await _variables(body, model.chat_template),
    )
    return text.rstrip() if continues and body.continue_final_message is None else text


async def _variables(body: ChatRequest, template: ChatTemplate) -> dict[str, JsonValue]:
    """What the client gives the template: its own variables, and the effort where the template reads one."""
    given: dict[str, JsonValue] = {
        name: msgspec.json.decode(value) for name, value in (body.chat_template_kwargs or {}).items()
    }
    if body.reasoning_effort is not None and _EFFORT not in given and _EFFORT in await template.variables():
        given[_EFFORT] = body.reasoning_effort
    return given


def _conversation(messages: list[Message], template: ChatTemplate) -> list[JsonObject]:
    """The messages as templates expect them.

    `developer` is OpenAI's newer word for `system`. A template that does not speak of it would refuse such a message
    or write it as nothing that the model has learned, so there it becomes a system message; next to another one both
    are joined, as many templates know a single system message.
    """
    shown: list[JsonObject] = []
    knows_developer = template.speaks_of("developer")
    was_renamed = False
    for index, message in enumerate(messages):
        if message.role not in _ROLES and not template.speaks_of(message.role):
            raise ValidationError(
                f"`messages[{index}].role` must be one of {', '.join(_ROLES)}, or one that the model's chat "
                f"template speaks of. Given: {message.role!r}",
                field=f"messages[{index}].role",
            )
        is_renamed = message.role == "developer" and not knows_developer
        turn = _template_message(message, "system" if is_renamed else message.role, f"messages[{index}]")
        last = shown[-1] if shown else turn
        if last is not turn and last["role"] == turn["role"] == "system" and (is_renamed or was_renamed):
            last["content"] = f"{last['content']}\n\n{turn['content']}"
        else:
            shown.append(turn)
        was_renamed = is_renamed
    return shown


def _template_message(message: Message, role: str, place: str) -> JsonObject:
    """Text content, arguments of calls as objects, nothing that was not given."""
    if is_given(message.audio):
        raise NotSupportedError(f"`{place}.audio` is not supported; send the text in `content`", field="messages")
    shown: JsonObject = {"role": "tool" if role == "function" else role, "content": _content(message, place)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value: str | None = getattr(message, name)
        if value is not None:
            shown[name] = value
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(type="function", function=message.function_call))
    if calls:
        shown["tool_calls"] = [_tool_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)]
    return shown


def _content(message: Message, place: str) -> str:
    """All text of a message. Only an assistant's may have none: it called, or refused."""
    if message.content is None:
        if message.role != "assistant":
            raise ValidationError(
                f"`{place}.content` must be a text or a list of parts. Given: null; only an assistant's message may "
                "have none",
                field=f"{place}.content",
            )
        return message.refusal or ""
    if isinstance(message.content, str):
        return message.content
    return "".join(_text_of(part, f"{place}.content[{index}]") for index, part in enumerate(message.content))


def _text_of(part: ContentPart, place: str) -> str:
    if part.type == "refusal":
        return _needed(part.refusal, f"{place}.refusal")
    if part.type not in _TEXT_PARTS:
        raise NotSupportedError(
            f"`{place}.type` {part.type[:64]!r} is not supported by this model; send text", field="messages"
        )
    return _needed(part.text, f"{place}.text")


def _needed(text: str | None, place: str) -> str:
    if text is None:
        raise ValidationError(f"`{place}` is missing; add it", field="messages")
    return text


def _tool_call(call: ToolCall, place: str) -> JsonObject:
    if call.type not in (None, "function"):
        raise NotSupportedError(
            f"`{place}.type` {call.type[:64]!r} is not supported; send calls of type function", field="messages"
        )
    function = call.function or FunctionCall()
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": function.name, "arguments": _arguments(function.arguments)},
    }


def _arguments(raw: msgspec.Raw) -> JsonValue:
    """OpenAI's wire has JSON as text; templates write the object itself."""
    if not is_given(raw):
        return {}
    value: JsonValue = msgspec.json.decode(raw)
    if not isinstance(value, str):
        return value
    try:
        decoded: JsonValue = msgspec.json.decode(value)
    except msgspec.DecodeError:
        return value
    return decoded
