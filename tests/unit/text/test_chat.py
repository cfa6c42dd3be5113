"""The pool of template workers: results, limits, recovery, and what callers may pass."""

import asyncio
import dataclasses
import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from weft.errors import OverloadedError, TemplateError, ValidationError
from weft.limits import LIMITS
from weft.text.chat import ChatTemplate

NORMAL = [{"role": "user", "content": "hi"}]
ENDLESS = [{"role": "user", "content": "endless"}]
GREEDY = [{"role": "user", "content": "greedy"}]
SOURCE = (
    "{% if messages[0].content == 'endless' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}{% elif messages[0].content == 'greedy' %}{{ messages[0].content * (10 ** 9) }}"
    "{% else %}{{ bos_token }}{{ messages[0].content }}{{ style }}{% endif %}"
)
QUICK = dataclasses.replace(LIMITS, template_timeout_s=0.5, template_queue_timeout_s=0.75)


@pytest_asyncio.fixture
async def template() -> AsyncIterator[ChatTemplate]:
    template = ChatTemplate(SOURCE, {"bos_token": "<s>"}, limits=QUICK)
    yield template
    await template.close()


async def test_a_conversation_becomes_a_prompt(template: ChatTemplate) -> None:
    assert await template.render(NORMAL, kwargs={"style": "!"}) == "<s>hi!"


async def test_many_at_once_get_their_own_prompts() -> None:
    # Fifty renders share two workers: on a busy machine the last one waits longer than a quick limit allows.
    patient = dataclasses.replace(LIMITS, template_timeout_s=30.0)
    template = ChatTemplate(SOURCE, {"bos_token": "<s>"}, limits=patient)
    messages = [[{"role": "user", "content": str(number)}] for number in range(50)]

    prompts = await asyncio.gather(*map(template.render, messages))
    await template.close()

    assert prompts == [f"<s>{number}" for number in range(50)]


async def test_a_prompt_larger_than_any_pipe_arrives_whole(template: ChatTemplate) -> None:
    text = "ü" * 1_000_000

    assert await template.render([{"role": "user", "content": text}]) == f"<s>{text}"


@pytest.mark.parametrize("messages", [ENDLESS, GREEDY], ids=["endless", "greedy"])
async def test_a_rendering_beyond_its_limits_fails_alone_and_the_pool_heals(
    template: ChatTemplate, messages: list[dict[str, str]]
) -> None:
    for _ in range(2):
        with pytest.raises(TemplateError):
            await template.render(messages)

    assert await template.render(NORMAL) == "<s>hi"


async def test_others_go_on_while_one_rendering_never_ends(template: ChatTemplate) -> None:
    await template.start()
    endless = asyncio.create_task(template.render(ENDLESS))
    await asyncio.sleep(0)

    prompts = [await template.render(NORMAL) for _ in range(20)]

    assert (prompts, endless.done()) == (["<s>hi"] * 20, False)
    with pytest.raises(TemplateError, match=r"more than 0\.5 s"):
        await endless


async def test_the_wait_for_a_worker_is_bounded() -> None:
    template = ChatTemplate(SOURCE, num_workers=1, limits=QUICK)
    await template.start()

    outcomes = await asyncio.gather(*(template.render(ENDLESS) for _ in range(6)), return_exceptions=True)
    await template.close()

    overloaded = [outcome for outcome in outcomes if isinstance(outcome, OverloadedError)]
    assert len(overloaded) >= 3
    assert all(outcome.retry_after_s == 1.0 for outcome in overloaded)


async def test_a_cancelled_rendering_never_answers_the_next_request(template: ChatTemplate) -> None:
    for _ in range(4):
        rendering = asyncio.create_task(template.render([{"role": "user", "content": "x" * 500_000}]))
        await asyncio.sleep(0.001)
        rendering.cancel()
        await asyncio.wait([rendering])

        assert await template.render(NORMAL) == "<s>hi"


async def test_a_worker_that_dies_is_replaced(template: ChatTemplate) -> None:
    await template.start()
    for worker in list(template._idle_workers):
        worker._process.kill()
        await worker._process.wait()

    assert [await template.render(NORMAL) for _ in range(2)] == ["<s>hi"] * 2


async def test_a_worker_that_dies_while_rendering_costs_that_rendering_alone() -> None:
    template = ChatTemplate(SOURCE, num_workers=1)
    await template.start()
    (worker,) = template._all_workers
    rendering = asyncio.create_task(template.render(ENDLESS))
    await asyncio.sleep(0)
    worker._process.kill()

    with pytest.raises(TemplateError, match="worker process"):
        await rendering
    prompt = await template.render(NORMAL)
    await template.close()

    assert prompt == "hi"


async def test_output_beyond_the_limit_is_an_error() -> None:
    limits = dataclasses.replace(QUICK, max_template_output_bytes=10)
    template = ChatTemplate("{{ messages[0].content }}", limits=limits, num_workers=1)

    with pytest.raises(TemplateError, match="longer than 10 bytes"):
        await template.render([{"role": "user", "content": "x" * 11}])
    prompt = await template.render([{"role": "user", "content": "x" * 10}])
    await template.close()

    assert len(prompt) == 10


@pytest.mark.parametrize("key", ["messages", "tools", "bos_token", "add_generation_prompt", "unknown", "tokenize"])
async def test_only_the_variables_of_the_template_may_be_passed(template: ChatTemplate, key: str) -> None:
    with pytest.raises(ValidationError, match=rf"`chat_template_kwargs\.{key}`.*Allowed: `style`") as caught:
        await template.render(NORMAL, kwargs={key: []})

    assert caught.value.field == f"chat_template_kwargs.{key}"


async def test_documents_reach_a_template_that_reads_them() -> None:
    template = ChatTemplate("{{ documents[0].text if documents is not none else 'none' }}", num_workers=1)

    prompts = [await template.render(NORMAL, kwargs=kwargs) for kwargs in ({}, {"documents": [{"text": "d"}]})]
    await template.close()

    assert prompts == ["none", "d"]


async def test_tools_choose_the_template_for_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "{{ tools[0].name }}"}, num_workers=1)

    prompts = [await template.render(NORMAL), await template.render(NORMAL, tools=[{"name": "f"}])]
    reads_tools = ["tools" in await template.variables(with_tools=with_tools) for with_tools in (False, True)]
    await template.close()

    assert (prompts, reads_tools) == (["plain", "f"], [False, True])


async def test_a_set_of_templates_without_a_default_says_so() -> None:
    with pytest.raises(TemplateError, match="`rag` but none named `default`"):
        await ChatTemplate({"rag": "x"}).render(NORMAL)


async def test_a_continued_message_gets_no_generation_prompt() -> None:
    source = "{% for m in messages %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    template = ChatTemplate(source, num_workers=1)

    prompts = [await template.render(NORMAL, continue_final_message=open_end) for open_end in (False, True)]
    await template.close()

    assert prompts == ["hi;assistant:", "hi"]


@pytest.mark.parametrize("source", ["{% if %}", "{{ 'a' * 10 ** 9 }}{% if", "{% include 'x' %}{% endfor %}"])
async def test_a_template_that_does_not_compile_is_reported_at_start_and_at_every_request(source: str) -> None:
    template = ChatTemplate(source, num_workers=1)

    for attempt in (template.start(), template.render(NORMAL), template.render(NORMAL)):
        with pytest.raises(TemplateError, match="does not compile"):
            await attempt
    await template.close()


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user", "content": "\ud800"}], [{"role": "user", "content": object()}]]
)
async def test_messages_outside_json_are_refused(template: ChatTemplate, messages: list[dict[str, object]]) -> None:
    with pytest.raises(ValidationError) as caught:
        await template.render(messages)

    assert caught.value.field == "messages"


async def test_the_words_of_a_template_reach_the_client_but_not_without_end() -> None:
    template = ChatTemplate("{{ raise_exception('no system role ' ~ 'x' * 10000) }}", num_workers=1)

    with pytest.raises(TemplateError, match="no system role") as caught:
        await template.render(NORMAL)
    await template.close()

    assert len(caught.value.message) < 600


async def test_workers_inherit_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    template = ChatTemplate("ok", num_workers=1)
    await template.start()
    process = template._idle_workers[0]._process
    with open(f"/proc/{process.pid}/environ", "rb") as environment:  # noqa: ASYNC230, PTH123
        visible = environment.read()
    await template.close()

    assert b"secret" not in visible
    assert process.returncode is not None


def test_text_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, weft.text.assets, weft.text.detokenize, weft.text.stop;"
        "print(sorted({'torch', 'transformers', 'sentencepiece'} & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "[]"
