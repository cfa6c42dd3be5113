"""Every published chat template renders as transformers renders it, and fails where transformers fails."""

import dataclasses
from typing import Any

import pytest

from weft.errors import TemplateError
from weft.limits import LIMITS
from weft.text.chat import ChatTemplate

pytestmark = pytest.mark.slow

PATIENT = dataclasses.replace(LIMITS, template_timeout_s=60.0)
"""Not the time is tested here, and the machine may be busy."""

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Say what the <weather> & wind are",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "größere Stadt"}},
                "required": ["city"],
            },
        },
    }
]
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What's 2+2? <b>é</b>"}
ANSWER = {"role": "assistant", "content": "It is 4. "}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}
    ],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": "sunny"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hi"}]}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one question": {"messages": [USER]},
    "system and question": {"messages": [SYSTEM, USER]},
    "several turns": {"messages": [USER, ANSWER, USER]},
    "reasoning": {"messages": [USER, THOUGHT, USER]},
    "tools offered": {"messages": [SYSTEM, USER], "tools": TOOLS},
    "tool called": {"messages": [SYSTEM, USER, CALL, RESULT], "tools": TOOLS},
    "content in parts": {"messages": [PARTS]},
    "two questions in a row": {"messages": [USER, USER]},
    "answer to continue": {"messages": [USER, ANSWER], "continue_final_message": True},
    "no generation prompt": {"messages": [USER], "add_generation_prompt": False},
}


def render_by_transformers(
    source: str,
    messages: list[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    continue_final_message: bool = False,
    add_generation_prompt: bool = True,
) -> str | None:
    """The prompt, or None where transformers fails."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # `apply_chat_template` removes null keys before it calls this function.
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        rendered, _ = render_jinja_template(
            [cleaned],
            tools=tools,
            chat_template=source,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            **SPECIAL_TOKENS,
        )
    except Exception:  # noqa: BLE001  # templates raise anything
        return None
    prompt: str = rendered[0]
    return prompt


async def render(template: ChatTemplate, conversation: dict[str, Any]) -> str | None:
    """The prompt, or None where the template fails."""
    try:
        return await template.render(**conversation)
    except TemplateError:
        return None


async def test_templates_render_as_in_transformers(published_templates: dict[str, str]) -> None:
    assert len(published_templates) > 100
    num_rendered = dict.fromkeys(CONVERSATIONS, 0)
    for name, source in published_templates.items():
        template = ChatTemplate(source, SPECIAL_TOKENS, num_workers=1, limits=PATIENT)
        for title, conversation in CONVERSATIONS.items():
            prompt = await render(template, conversation)
            assert prompt == render_by_transformers(source, **conversation), f"{name}: {title}"
            num_rendered[title] += prompt is not None
        await template.close()

    # Some templates refuse two questions in a row, tools or content in parts; most accept each.
    assert min(num_rendered.values()) > 60, num_rendered


async def test_the_default_model_renders_as_apply_chat_template(default_model_gguf: Any, tmp_path: Any) -> None:
    from transformers import AutoTokenizer

    from weft.text.assets import load_text_assets

    theirs = AutoTokenizer.from_pretrained(default_model_gguf.parent, gguf_file=default_model_gguf.name)
    ours = load_text_assets(default_model_gguf, tmp_path)
    assert ours.chat_template is not None

    for messages in ([USER], [SYSTEM, USER], [USER, ANSWER, USER]):
        prompt = await ours.chat_template.render(messages)
        assert prompt == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # transformers leaves the cutting of digits out when it reads this file, so the ids are compared without any.
        letters = prompt.translate(str.maketrans("", "", "0123456789"))
        assert ours.tokenizer.encode(letters, False) == theirs(letters, add_special_tokens=False)["input_ids"]
    await ours.chat_template.close()
