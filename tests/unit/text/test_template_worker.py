"""What templates may use and how their output is laid out. The comparison with transformers is in tests/numerics."""

import io
import json
import signal
import struct
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import pytest

from weft.text import template_worker
from weft.text.template_worker import DECLARED, FAILURE, TEXT, RenderError, TemplateSet, serve

USER = {"role": "user", "content": "hi"}


def render(source: str, messages: list[dict[str, Any]] | None = None, *, limit: int = 1000, **request: Any) -> str:
    defaults = {"tools": None, "documents": None, "add_generation_prompt": True, "continue_final_message": False}
    templates = TemplateSet({"default": source}, limit)
    messages = [USER] if messages is None else messages
    return templates.render(
        {"template": "default", "messages": messages, "variables": {}, **defaults, **request}
    ).decode()


def test_blocks_leave_neither_their_line_nor_their_indentation() -> None:
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}") == "hi\n"
    )


def test_loops_may_be_left_and_continued() -> None:
    source = (
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
    )

    assert render(source + "{% endfor %}") == "02"


def test_the_generation_tag_shows_its_body_and_keeps_its_variables_inside() -> None:
    source = "{% set x = 1 %}{% generation %}{% set x = 2 %}a{{ x }}{% endgeneration %}{{ x }}"

    assert render(source) == "a21"


def test_json_is_written_as_it_is_not_as_html() -> None:
    value = {"b": "<é>", "a": 1}

    assert render("{{ v | tojson }}", variables={"v": value}) == '{"b": "<é>", "a": 1}'
    assert render("{{ v | tojson(indent=1, sort_keys=true) }}", variables={"v": value}) == (
        '{\n "a": 1,\n "b": "<é>"\n}'
    )
    assert render("{{ v | tojson(separators=(',', ':')) }}", variables={"v": value}) == '{"b":"<é>","a":1}'


def test_the_date_is_that_of_this_machine() -> None:
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)  # noqa: DTZ005


def test_a_template_may_refuse() -> None:
    with pytest.raises(jinja2.exceptions.TemplateError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_null_keys_of_messages_are_absent() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": None}

    assert render("{{ 'content' in messages[0] }}{{ messages[0].tool_calls is defined }}", [message]) == "FalseFalse"


def test_reasoning_is_found_under_every_name() -> None:
    source = "{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}"

    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(source, [{**USER, name: "why"}]) == "why/why"


def test_namespaces_and_dictionaries_work_without_giving_away_their_classes() -> None:
    assert render("{% set n = namespace(self=1, b=2) %}{% set n.b = 3 %}{{ n.self }}{{ n.b }}") == "13"
    assert render("{{ dict(a=1).a }}{{ dict.fromkeys(['x'], 2).x }}{{ dict.mro is defined }}") == "12False"
    for source in ("{% set n = namespace(_x=1) %}", "{% set n = namespace() %}{% set n['__class__'] = 1 %}"):
        with pytest.raises(jinja2.exceptions.TemplateError):
            render(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", "<hi><The answer is "),
        ("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", "<hi><The answer is"),
    ],
    ids=["spacing kept", "spacing trimmed by the template"],
)
def test_a_continued_message_stays_open(source: str, expected: str) -> None:
    messages = [USER, {"role": "assistant", "content": "The answer is "}]

    assert render(source, messages, continue_final_message=True) == expected


def test_a_continued_message_may_be_a_list_of_parts_or_another_field() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    source = "{% for p in messages[0].content %}{{ p.text }}{% endfor %}."
    assert render(source, [{"role": "assistant", "content": parts}], continue_final_message=True) == "ab"

    message = {"role": "assistant", "content": "c", "reasoning": "because"}
    source = "<think>{{ messages[0].thinking }}</think>{{ messages[0].content }}"
    assert render(source, [message], continue_final_message="reasoning") == "<think>because"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].content }}", {"role": "assistant"}),
        ("{{ messages[0].role }}", {"role": "assistant", "content": "a"}),
        ("{{ messages[0].content | upper }}", {"role": "assistant", "content": "abc"}),
        ("{{ messages[0].content }}", {"role": "assistant", "content": [{"type": "image"}]}),
    ],
    ids=["nothing to continue", "field not used", "text changed", "no text part"],
)
def test_what_cannot_be_continued_is_refused(source: str, message: dict[str, Any]) -> None:
    with pytest.raises(RenderError) as caught:
        render(source, [message], continue_final_message=True)

    assert caught.value.kind == "continue"


@pytest.mark.parametrize(("limit", "fits"), [(4, True), (3, False)])
def test_the_limit_of_the_output_counts_bytes(limit: int, fits: bool) -> None:
    source = "{% for i in range(2) %}é{% endfor %}"

    if fits:
        assert render(source, limit=limit) == "éé"
    else:
        with pytest.raises(RenderError, match="longer than 3 bytes"):
            render(source, limit=limit)


def test_declared_variables_are_those_that_nobody_defines() -> None:
    source = "{% set a = b %}{{ a }}{{ messages }}{{ range(c) }}{{ raise_exception }}{% if d is defined %}{% endif %}"

    assert TemplateSet({"default": source}, 10).variables == {"default": ["b", "c", "d", "messages"]}


def test_the_wire_carries_length_kind_and_body() -> None:
    request = {"template": "default", "messages": [USER], "tools": None, "documents": None, "variables": {}}
    request |= {"add_generation_prompt": True, "continue_final_message": False}
    sent = b""
    for frame in (
        {"templates": {"default": "{{ messages[0].content + x }}"}},
        request,
        {**request, "variables": {"x": "!"}},
    ):
        body = json.dumps(frame).encode()
        sent += struct.pack(">I", len(body)) + body
    replies = io.BytesIO()

    serve(io.BytesIO(sent), replies, max_output_bytes=100, max_render_s=5.0)

    received, position = [], 0
    while position < len(replies.getvalue()):
        (length,) = struct.unpack_from(">I", replies.getvalue(), position)
        frame_bytes = replies.getvalue()[position + 4 : position + 4 + length]
        received.append((frame_bytes[:1], frame_bytes[1:]))
        position += 4 + length
    assert [kind for kind, _ in received] == [TEXT, DECLARED, FAILURE, TEXT]
    assert json.loads(received[1][1]) == {"default": ["messages", "x"]}
    assert json.loads(received[2][1])["kind"] == "template"
    assert received[3][1] == b"hi!"


def start_worker(max_render_s: float) -> subprocess.Popen[bytes]:
    limits = ["--memory-bytes=268435456", "--max-output-bytes=1000", f"--max-render-s={max_render_s}"]
    command = [sys.executable, "-I", template_worker.__file__, *limits]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_a_worker_ends_when_its_parent_is_gone() -> None:
    worker = start_worker(max_render_s=60.0)

    worker.communicate(timeout=30)

    assert worker.returncode == 0


def test_a_rendering_without_end_ends_also_when_its_parent_is_gone() -> None:
    source = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    body = json.dumps({"templates": {"default": source}}).encode()
    request = {"template": "default", "messages": [USER], "tools": None, "documents": None, "variables": {}}
    request |= {"add_generation_prompt": True, "continue_final_message": False}
    endless = json.dumps(request).encode()
    worker = start_worker(max_render_s=0.5)

    worker.communicate(struct.pack(">I", len(body)) + body + struct.pack(">I", len(endless)) + endless, timeout=30)

    assert worker.returncode == -signal.SIGALRM


def test_a_worker_has_no_more_memory_than_given_and_writes_no_file() -> None:
    worker = start_worker(max_render_s=60.0)
    limits = Path(f"/proc/{worker.pid}/limits")
    assert worker.stdout is not None
    worker.stdout.read(5)  # the greeting comes when the limits are set

    lines = {line[:26].strip(): line[26:].split()[:2] for line in limits.read_text().splitlines()}
    worker.communicate(timeout=30)

    assert lines["Max address space"] == ["268435456", "268435456"]
    assert lines["Max file size"] == ["0", "0"]
