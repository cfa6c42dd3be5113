"""`weft chat`: a conversation in the terminal with any server that speaks OpenAI's API."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

import httpx2
from rich.console import Console
from rich.markup import escape

from weft.commands.arguments import CommandParser, integer, is_unicode, number, unicode_text
from weft.commands.endpoint import Endpoint, EndpointError, find_endpoint, read_events, refusal_text, served_model
from weft.commands.markdown_stream import MarkdownStream
from weft.commands.own_server import own_server
from weft.errors import UsageError

_EPILOG = """\
With MODEL, a server for it runs as long as the chat does; otherwise one that runs already is used: --url, or
http://localhost:3000. The API key is read from WEFT_API_KEY (with --url also from OPENAI_API_KEY).

  weft chat
  weft chat HuggingFaceTB/SmolLM2-135M-Instruct
  weft chat --url https://api.example.com/v1 --model NAME
  echo "Why is the sky blue?" | weft chat
"""
_HELP = """\
/reset          forget the conversation; the system text stays
/system TEXT    set the system text and begin anew; without TEXT show it
/save FILE      write the conversation: JSON, or Markdown for a name that ends in .md
/help           this list
/exit           leave (also Ctrl-D)
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer."""


@dataclass(slots=True)
class Conversation:
    """What has been said. The system text, if any, comes first whenever it is sent."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        """As the API wants them."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def save(self, path: Path) -> None:
        """Write the conversation. Raises OSError."""
        if path.suffix == ".md":
            parts = [f"**{message['role']}**\n\n{message['content']}\n" for message in self.messages]
            path.write_text("\n".join(parts), encoding="utf-8")
        else:
            content = {"messages": self.messages}
            path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How an answer went. Times are nanoseconds of one clock."""

    sent_ns: int
    first_ns: int | None
    """The first piece of text; None when none came."""
    last_ns: int
    prompt_tokens: int | None
    completion_tokens: int
    is_counted: bool
    """The server reported usage; otherwise pieces were counted."""
    cached_tokens: int = 0

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens behind the first; None for fewer than two."""
        if self.first_ns is None or self.completion_tokens < 2 or self.last_ns <= self.first_ns:
            return None
        return (self.completion_tokens - 1) / ((self.last_ns - self.first_ns) / 1e9)

    def __str__(self) -> str:
        parts = [] if self.first_ns is None else [f"first token {(self.first_ns - self.sent_ns) / 1e6:,.0f} ms"]
        if self.tokens_per_s is not None:
            parts.append(f"{self.tokens_per_s:,.1f} tok/s")
        parts.append(f"{'' if self.is_counted else '≈ '}{self.completion_tokens:,} tokens")
        if self.prompt_tokens is not None:
            cached = f", {self.cached_tokens:,} cached" if self.cached_tokens else ""
            parts.append(f"prompt {self.prompt_tokens:,} tokens{cached}")
        return " · ".join(parts)


class Reply:
    """One answer while it streams: iterate over its pieces of text, then read `timings` and `finish_reason`.

    Leaving the block closes the connection, which ends the generation at the server.
    """

    def __init__(
        self,
        client: httpx2.Client,
        endpoint: Endpoint,
        body: dict[str, Any],
        now_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        self._client = client
        self._endpoint = endpoint
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._now_ns = now_ns
        self._cleanup = ExitStack()
        self._sent_ns = self._last_ns = now_ns()
        self._first_ns: int | None = None
        self._num_pieces = 0
        self._usage: dict[str, Any] | None = None
        self.finish_reason: str | None = None

    def __enter__(self) -> Self:
        """Send the request. Raises EndpointError when it is not accepted."""
        self._sent_ns = self._now_ns()
        try:
            stream = self._client.stream("POST", "/v1/chat/completions", json=self._body)
            self._response = self._cleanup.enter_context(stream)
            is_accepted = self._response.status_code == 200
            if not is_accepted:
                self._response.read()
        except httpx2.TransportError as error:
            self._cleanup.close()
            raise self._endpoint.unreachable(error) from error
        if not is_accepted:
            self._cleanup.close()
            raise EndpointError(refusal_text(self._response))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        self._cleanup.close()

    def __iter__(self) -> Iterator[str]:
        """Pieces of text. Raises EndpointError when the answer breaks off."""
        try:
            for event in read_events(self._response.iter_lines()):
                if "error" in event:
                    error = event["error"]
                    raise EndpointError(str(error.get("message", error) if isinstance(error, dict) else error))
                self._usage = event.get("usage") or self._usage
                for choice in event.get("choices") or ():
                    self.finish_reason = choice.get("finish_reason") or self.finish_reason
                    text = (choice.get("delta") or {}).get("content")
                    if text:
                        self._last_ns = self._now_ns()
                        self._first_ns = self._first_ns or self._last_ns
                        self._num_pieces += 1
                        yield text
        except httpx2.TransportError as error:
            raise EndpointError(
                f"the connection broke in the middle of the answer ({type(error).__name__})."
            ) from error
        if self.finish_reason is None:
            raise EndpointError("the answer ended without saying why; it may be incomplete.")

    @property
    def timings(self) -> Timings:
        """What is known so far."""
        usage = self._usage or {}
        details = usage.get("prompt_tokens_details") or {}
        return Timings(
            sent_ns=self._sent_ns,
            first_ns=self._first_ns,
            last_ns=self._last_ns,
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens", self._num_pieces),
            is_counted="completion_tokens" in usage,
            cached_tokens=details.get("cached_tokens") or 0,
        )


class _Writer(Protocol):
    """Takes the pieces of an answer."""

    def push(self, text: str) -> None: ...


class _PlainWriter:
    """Text as it comes, for pipes and files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def push(self, text: str) -> None:
        """Write and flush: the reader may show it at once."""
        self._stream.write(text)
        self._stream.flush()


@dataclass(slots=True, kw_only=True)
class Chat:
    """A conversation with one model at one server."""

    client: httpx2.Client
    endpoint: Endpoint
    model: str
    options: dict[str, Any]
    conversation: Conversation
    console: Console
    is_plain: bool

    def ask(self, text: str) -> bool:
        """Send `text` with everything before it, show the answer, remember both. False: Ctrl-C stopped the answer.

        A refusal leaves the conversation as it was; an answer that was stopped or broke off is kept as far as it came.

        Raises   EndpointError: refused, or broken off
        """
        turns = self.conversation.turns
        turns.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self.conversation.messages, **self.options}
        pieces: list[str] = []
        reply = Reply(self.client, self.endpoint, body)
        is_stopped = False
        try:
            with reply, self._writer() as writer:
                for piece in reply:
                    pieces.append(piece)
                    writer.push(piece)
        except KeyboardInterrupt:
            is_stopped = True
        finally:
            if pieces:
                turns.append({"role": "assistant", "content": "".join(pieces)})
            else:
                turns.pop()
        self._show_end(reply, is_stopped=is_stopped)
        return not is_stopped

    def _writer(self) -> AbstractContextManager[_Writer]:
        return nullcontext(_PlainWriter(sys.stdout)) if self.is_plain else MarkdownStream(self.console)

    def _show_end(self, reply: Reply, *, is_stopped: bool) -> None:
        if self.is_plain:
            sys.stdout.write("\n")
            sys.stdout.flush()
        note = "stopped · " if is_stopped else ""
        if reply.finish_reason == "length":
            note = "cut at the length limit · "
        if not self.is_plain or sys.stderr.isatty():
            self.console.print(f"{note}{reply.timings}", style="dim", highlight=False)

    def run_command(self, line: str) -> bool:
        """Do what a line that begins with `/` says. False: the user leaves."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/exit" | "/quit":
                return False
            case "/reset":
                self.conversation.turns.clear()
                self._say("The conversation is empty.")
            case "/system" if rest:
                self.conversation.system = rest
                self.conversation.turns.clear()
                self._say("System text set; the conversation is empty.")
            case "/system":
                self._say(self.conversation.system or "There is no system text.")
            case "/save" if rest:
                self._save(Path(rest).expanduser())
            case "/save":
                self._say("/save needs the name of a file.")
            case "/help":
                self._say(_HELP)
            case _:
                self._say(f"There is no command {name}. /help lists them.")
        return True

    def _save(self, path: Path) -> None:
        try:
            self.conversation.save(path)
        except OSError as error:
            self._say(f"Cannot write {path}: {error.strerror}.")
            return
        self._say(f"Saved to {path}.")

    def _say(self, text: str) -> None:
        self.console.print(escape(text), style="dim", highlight=False)


def chat(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Talk until the user leaves; with something piped in, answer that and end."""
    arguments = _parse(argv)
    console = Console(stderr=not sys.stdout.isatty())
    with ExitStack() as stack:
        endpoint = _endpoint(arguments, environ, stack, console)
        client = stack.enter_context(endpoint.client())
        conversation = Chat(
            client=client,
            endpoint=endpoint,
            model=arguments.model or served_model(client, endpoint),
            options=_options(arguments),
            conversation=Conversation(arguments.system),
            console=console,
            is_plain=arguments.plain or not sys.stdout.isatty(),
        )
        if sys.stdin.isatty():
            return _converse(conversation)
        text = _piped_text()
        if not text:
            raise UsageError("weft chat: nothing was piped in. Pipe a question, or run it in a terminal.")
        return 0 if conversation.ask(text) else 130


def _piped_text() -> str:
    try:
        return sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"weft chat: what was piped in is not UTF-8 (byte {error.start}).") from error


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser("weft chat", "Talk to a model in the terminal.", _EPILOG)
    parser.add_argument("serve", nargs="?", metavar="MODEL", help="serve this model while the chat runs")
    parser.add_argument("--url", help="server to talk to; default http://localhost:3000")
    parser.add_argument(
        "--model",
        type=unicode_text,
        metavar="NAME",
        help="model to ask for; default: the first one that the server lists",
    )
    parser.add_argument("--system", type=unicode_text, metavar="TEXT", help="system text")
    parser.add_argument("--temperature", type=number(0, 2), metavar="X", help="0 is greedy; default: the server's")
    parser.add_argument("--max-tokens", type=integer(1, 10**9), metavar="N", help="longest answer")
    parser.add_argument("--seed", type=integer(0, 2**63 - 1), metavar="N", help="same seed, same answer")
    parser.add_argument("--plain", action="store_true", help="show text as it comes, without Markdown")
    arguments = parser.parse_args(argv)
    if arguments.serve and arguments.url:
        raise UsageError("weft chat: MODEL starts a server and --url names one; give one of them.")
    return arguments


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(arguments, name) for name in ("temperature", "max_tokens", "seed")}
    return {name: value for name, value in given.items() if value is not None}


def _endpoint(
    arguments: argparse.Namespace, environ: Mapping[str, str], stack: ExitStack, console: Console
) -> Endpoint:
    if arguments.serve is None:
        return find_endpoint(arguments.url, environ)
    with console.status(f"starting {escape(arguments.serve)}") as status:
        return stack.enter_context(own_server(arguments.serve, (), environ, lambda text: status.update(escape(text))))


def _converse(talk: Chat) -> int:
    _use_line_editing()
    talk.console.print(
        f"[bold]{escape(talk.model)}[/] at {escape(talk.endpoint.root)}. /help lists commands.", highlight=False
    )
    while (line := _read_line()) is not None:
        text = line.strip()
        if not text:
            continue
        if not is_unicode(text):
            talk.console.print("[red]Error:[/] that is not valid Unicode; nothing was sent.", highlight=False)
            continue
        if text.startswith("/"):
            if not talk.run_command(text):
                break
            continue
        try:
            talk.ask(text)
        except EndpointError as error:
            talk.console.print(f"[red]Error:[/] {escape(error.message)}", highlight=False)
    return 0


def _use_line_editing() -> None:
    """History and editing keys for `input`, where the platform has them."""
    if os.name == "posix":
        import readline  # noqa: F401 - importing it is all


def _read_line() -> str | None:
    """A line, with those it goes on in; None at the end of the input. Ctrl-C drops what was typed."""
    lines: list[str] = []
    while True:
        try:
            line = input("… " if lines else "› ")
        except EOFError:
            sys.stdout.write("\n")
            return "\n".join(lines) or None
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            lines.clear()
            continue
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])
