"""The process that renders chat templates: a program of its own that imports only jinja2 and the standard library.

A chat template is code from a model repository. The sandbox of jinja2 keeps it from reaching Python, but nothing
inside Python keeps it from multiplying a string by 10⁹ or from looping for ever. So it runs here, under limits of
the kernel, and `chat.py` kills this process when a rendering takes too long. See ADR-0013.

Wire     both ways: length (4 bytes, big endian), then that many bytes; the length counts what follows it
Requests JSON. First {"templates": {name: source}}, then any number of render requests (see `render`)
Replies  one byte, `TEXT` or `FAILURE` or `DECLARED`, then UTF-8 text, or JSON {"kind": …, "message": …}, or JSON
         {name: [variable, …]}

Source: the rendering rules are those of transformers 5.23, `utils/chat_template_utils.py` and `apply_chat_template`:
environment, filters and globals, tags, removal of null keys, aliases of reasoning, continuing the final message.
"""

import argparse
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

TEXT, FAILURE, DECLARED = b"t", b"f", b"d"

Message = dict[str, Any]

_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK = "WEFT-CONTINUES-HERE "
"""Put behind the message that the model is to continue; its end shows whether the template trims messages."""
_MAX_FAILURE_CHARS = 500


class RenderError(Exception):
    """The template, or what it was given, is at fault. `kind` tells which limit or rule."""

    def __init__(self, message: str, kind: str = "template") -> None:
        super().__init__(message)
        self.kind = kind


class GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant said, for training; here it renders its body.

    A call block, as in transformers: a variable that the body sets is not seen behind it.
    """

    tags = {"generation"}  # noqa: RUF012  # the name and type that jinja2 asks for

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Returns a call of `_render_body` with the body as its macro."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render_body"), [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class DictFactory:
    """`dict(…)` and `dict.fromkeys(…)` without the class itself, whose attributes a template could climb."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: ANN401
        """Returns `dict(…)`."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401
        """Returns `dict.fromkeys`."""
        return dict.fromkeys(*args)


class GuardedNamespace(jinja2.utils.Namespace):
    """`namespace(…)` that refuses names with a leading underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # `namespace(self=1)` is a legal template
        self, *rest = args
        attributes: dict[Any, Any] = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
        _refuse_private_name(name)
        super().__setitem__(name, value)


def _refuse_private_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not hold the name {name!r}: it begins with `_`")


def make_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Returns the environment in which transformers compiles chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = DictFactory()
    environment.globals["namespace"] = GuardedNamespace
    return environment


def _to_json(
    x: Any,  # noqa: ANN401
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  # templates pass these by place
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(format: str) -> str:  # noqa: A002  # templates may name it
    return datetime.now().strftime(format)  # noqa: DTZ005  # templates speak of the server's local day


class TemplateSet:
    """The compiled templates of one model."""

    def __init__(self, sources: dict[str, str], max_output_bytes: int) -> None:
        self._sources = sources
        self._max_output_bytes = max_output_bytes
        environment = make_environment()
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self.variables = {
            name: sorted(jinja2.meta.find_undeclared_variables(environment.parse(source)) - set(environment.globals))
            for name, source in sources.items()
        }
        """Template name → variables that it reads and that neither it nor the environment defines."""

    def render(self, request: dict[str, Any]) -> bytes:
        """Returns the prompt.

        request   template (its name), messages, tools, documents, add_generation_prompt, continue_final_message
                  (False, True, or the field to continue), variables
        Raises    RenderError, and whatever the template raises
        """
        name = request["template"]
        messages = [_prepared(message) for message in request["messages"]]
        continued = _mark_final_message(messages, request["continue_final_message"], self._sources[name])
        chunks = self._templates[name].generate(
            messages=messages,
            tools=request["tools"],
            documents=request["documents"],
            add_generation_prompt=request["add_generation_prompt"],
            **request["variables"],
        )
        prompt = self._join(chunks)
        if continued is not None:
            prompt = _cut_behind(continued, prompt)
        encoded = prompt.encode()
        if len(encoded) > self._max_output_bytes:
            raise self._too_long()
        return encoded

    def _join(self, chunks: Iterator[str]) -> str:
        """Joins the output and stops as soon as it is too long (a character is at least a byte)."""
        joined: list[str] = []
        room = self._max_output_bytes
        for chunk in chunks:
            room -= len(chunk)
            if room < 0:
                raise self._too_long()
            joined.append(chunk)
        return "".join(joined)

    def _too_long(self) -> RenderError:
        return RenderError(f"the prompt is longer than {self._max_output_bytes} bytes", kind="output")


def _prepared(message: Message) -> Message:
    """Drops null keys (templates test for presence), and gives reasoning every name that templates read it under."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[field] for field in _REASONING_FIELDS if field in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _mark_final_message(messages: list[Message], continue_final_message: bool | str, source: str) -> str | None:  # noqa: FBT001
    """Puts the mark behind the text to continue and returns that text, or None when nothing is to be continued."""
    if not continue_final_message:
        return None
    field = continue_final_message if isinstance(continue_final_message, str) else "content"
    content = messages[-1].get(field) if messages else None
    if content is None:
        raise RenderError(f"the final message has no `{field}` to continue", kind="continue")
    fields = [field]
    if field in _REASONING_FIELDS:
        fields = [alias for alias in _REASONING_FIELDS if messages[-1].get(alias) == content]
    if not any(alias in source for alias in fields):
        raise RenderError(f"the chat template does not use `{field}`, so it cannot be continued", kind="continue")
    if isinstance(content, str):
        messages[-1].update(dict.fromkeys(fields, content + _CONTINUE_MARK))
        return content
    parts = content if isinstance(content, list) else []
    last_text = next((part for part in reversed(parts) if isinstance(part, dict) and "text" in part), None)
    if last_text is None:
        raise RenderError("the final message has no text to continue", kind="continue")
    text: str = last_text["text"]
    last_text["text"] = text + _CONTINUE_MARK
    return text


def _cut_behind(continued: str, prompt: str) -> str:
    """Returns the prompt up to the mark; where the template trimmed the message, the prompt is trimmed too."""
    mark = prompt.rfind(_CONTINUE_MARK.strip())
    if mark < 0 or continued.strip() not in prompt:
        raise RenderError("the chat template changes the final message, so it cannot be continued", kind="continue")
    cut = prompt[:mark]
    return cut if prompt.startswith(_CONTINUE_MARK, mark) else cut.rstrip()


def serve(requests: BinaryIO, replies: BinaryIO, max_output_bytes: int, max_render_s: float) -> None:
    """Answer requests until there are no more, or until memory ran out."""
    _send(replies, TEXT, b"")
    templates: TemplateSet | None = None
    while (request := _receive(requests)) is not None:
        # A second guard, for the case that the parent died and cannot kill a rendering without end.
        signal.setitimer(signal.ITIMER_REAL, max_render_s)
        try:
            if templates is None:
                templates = TemplateSet(request["templates"], max_output_bytes)
                kind, body = DECLARED, json.dumps(templates.variables).encode()
            else:
                kind, body = TEXT, templates.render(request)
        except MemoryError:
            _send(replies, FAILURE, _failure("memory", "it needs more memory than is allowed"))
            return
        except Exception as error:  # noqa: BLE001  # a process border: a template may raise anything
            kind, body = FAILURE, _failure(getattr(error, "kind", "template"), _describe(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, kind, body)


def _failure(kind: str, message: str) -> bytes:
    return json.dumps({"kind": kind, "message": message[:_MAX_FAILURE_CHARS]}).encode()


def _describe(error: Exception) -> str:
    """Returns the words of the template or of this file, and the class in front of those of Python."""
    if isinstance(error, RenderError | jinja2.exceptions.TemplateError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _receive(stream: BinaryIO) -> Any:  # noqa: ANN401
    header = stream.read(4)
    if len(header) < 4:
        return None
    return json.loads(stream.read(struct.unpack(">I", header)[0]))


def _send(stream: BinaryIO, kind: bytes, body: bytes) -> None:
    stream.write(struct.pack(">I", len(body) + 1) + kind + body)
    stream.flush()


def _limit_resources(memory_bytes: int) -> None:
    """No more memory than given, no file written, no core left behind, no terminal signal heard."""
    for limit, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
    ):
        _, hard = resource.getrlimit(limit)
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (ceiling, ceiling))
    # Ctrl-C reaches the whole group; the router decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Read the limits, lock the process down, serve on standard input and output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--max-output-bytes", type=int, required=True)
    parser.add_argument("--max-render-s", type=float, required=True)
    arguments = parser.parse_args()
    _limit_resources(arguments.memory_bytes)
    replies = os.fdopen(os.dup(1), "wb")
    # Whatever prints must not fall into the replies.
    os.dup2(2, 1)
    serve(sys.stdin.buffer, replies, arguments.max_output_bytes, arguments.max_render_s)


if __name__ == "__main__":
    main()
