"""Messages → prompt text, through the model's own template."""

import msgspec

from weft.errors import NotSupportedError, TemplateError, ValidationError
from weft.router.json_values import JsonValue, is_given
from weft.router.schemas_openai import ChatRequest, ContentPart, FunctionCall, Message, ToolCall
from weft.router.served import ServedModel
from weft.text.chat import JsonObject


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
        [_template_message(message) for message in body.messages],
        add_generation_prompt=not continues and body.add_generation_prompt is not False,
        continue_final_message=continues,
        kwargs={name: msgspec.json.decode(value) for name, value in (body.chat_template_kwargs or {}).items()},
    )
    return text.rstrip() if continues and body.continue_final_message is None else text


def _template_message(message: Message) -> JsonObject:
    """As templates expect it: text content, arguments of calls as objects, nothing that was not given."""
    shown: JsonObject = {"role": message.role, "content": _content(message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value: str | None = getattr(message, name)
        if value is not None:
            shown[name] = value
    if message.tool_calls:
        shown["tool_calls"] = [_tool_call(call) for call in message.tool_calls]
    return shown


def _content(message: Message) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    return "".join(map(_text_of, message.content))


def _text_of(part: ContentPart) -> str:
    if part.type not in ("text", "input_text"):
        raise NotSupportedError(
            f"`messages.content` parts of type {part.type[:64]!r} are not supported by this model; send text",
            field="messages",
        )
    if part.text is None:
        raise ValidationError("`messages.content` parts of type 'text' need `text`", field="messages")
    return part.text


def _tool_call(call: ToolCall) -> JsonObject:
    function = call.function or FunctionCall()
    return {
        "id": call.id,
        "type": call.type or "function",
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
