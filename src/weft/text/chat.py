"""Render chat templates as transformers does, in processes that can be killed.

`ChatTemplate` owns a small pool of `template_worker.py` processes. A rendering has limits of time, memory and output;
one that breaks a limit costs its worker and gives a `TemplateError`, and the next rendering gets a fresh worker.
Nothing of a template is compiled or run in this process. See ADR-0013.
"""

import asyncio
import contextlib
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from weft.errors import InvariantBroken, OverloadedError, TemplateError, ValidationError
from weft.limits import LIMITS, Limits
from weft.text import template_worker

JsonObject = dict[str, Any]
"""A decoded JSON object: what clients send as a message, a tool or a template variable."""

DEFAULT_TEMPLATE: Final = "default"
TOOL_USE_TEMPLATE: Final = "tool_use"

_START_TIMEOUT_S = 30.0
"""For a worker to start and import jinja2: 0.1 s on an idle machine."""
_MAX_FAILURE_BYTES = 16 * 1024
_PASSED_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
_RESERVED_VARIABLES = frozenset(
    {
        "messages",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "bos_token",
        "eos_token",
        "unk_token",
        "sep_token",
        "pad_token",
        "cls_token",
        "mask_token",
    }
)
"""Variables that the request's own fields or the tokenizer decide."""


class _WorkerLost(Exception):
    """The worker died or spoke nonsense."""


class _Worker:
    """One process with the templates compiled in it. Serves one rendering at a time."""

    def __init__(self, process: asyncio.subprocess.Process, limits: Limits) -> None:
        if process.stdin is None or process.stdout is None:
            raise InvariantBroken("a template worker was started without pipes")
        self._process = process
        self._requests = process.stdin
        self._replies = process.stdout
        self._max_reply_bytes = limits.max_template_output_bytes + _MAX_FAILURE_BYTES

    @classmethod
    async def start(cls, limits: Limits) -> "_Worker":
        program = Path(template_worker.__file__)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            str(program),
            f"--memory-bytes={limits.template_memory_bytes}",
            f"--max-output-bytes={limits.max_template_output_bytes}",
            f"--max-render-s={limits.template_timeout_s + limits.template_compile_timeout_s}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={name: os.environ[name] for name in _PASSED_ENVIRONMENT if name in os.environ},
        )
        worker = cls(process, limits)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await worker._reply()
        except BaseException:
            worker.kill()
            raise
        return worker

    async def call(self, request: bytes, timeout_s: float) -> tuple[bytes, bytes]:
        """Returns kind and body of the reply. Raises TimeoutError, _WorkerLost; the worker must be killed then."""
        async with asyncio.timeout(timeout_s):
            try:
                self._requests.write(struct.pack(">I", len(request)) + request)
                await self._requests.drain()
                return await self._reply()
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                raise _WorkerLost from error

    async def _reply(self) -> tuple[bytes, bytes]:
        (length,) = struct.unpack(">I", await self._replies.readexactly(4))
        if not 0 < length <= self._max_reply_bytes:
            raise _WorkerLost
        reply = await self._replies.readexactly(length)
        return reply[:1], reply[1:]

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._requests.close()

    async def wait(self) -> None:
        """Returns when the killed process is gone. What it had still sent is read, or its pipe would stay open."""
        await self._replies.read()
        await self._process.wait()


class ChatTemplate:
    """The chat template of a model, or its set of named ones (`default`, `tool_use`).

    Belongs to one event loop. Workers start with the first rendering, or all at once in `start`.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] = MappingProxyType({}),
        *,
        num_workers: int = LIMITS.num_template_workers,
        limits: Limits = LIMITS,
    ) -> None:
        self._templates = {DEFAULT_TEMPLATE: templates} if isinstance(templates, str) else dict(templates)
        self._special_tokens = dict(special_tokens)
        self._num_workers = num_workers
        self._limits = limits
        self._free_places = asyncio.Semaphore(num_workers)
        self._idle_workers: list[_Worker] = []
        self._all_workers: set[_Worker] = set()
        self._deaths: set[asyncio.Task[None]] = set()
        self._variables: dict[str, list[str]] = {}
        self._defect: str | None = None
        """Why no worker can ever compile the templates."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the templates, `default` for a single one."""
        return tuple(self._templates)

    def source(self, name: str = DEFAULT_TEMPLATE) -> str | None:
        """Returns the text of a template, None when there is none of that name."""
        return self._templates.get(name)

    def speaks_of(self, word: str) -> bool:
        """Whether the word stands in one of the templates, for example the name of a role."""
        return any(word in text for text in self._templates.values())

    async def start(self) -> None:
        """Start every worker, so that no request waits for one. Raises TemplateError: a template does not compile."""
        missing = self._num_workers - len(self._all_workers)
        started = await asyncio.gather(*(self._start_worker() for _ in range(missing)), return_exceptions=True)
        self._idle_workers.extend(worker for worker in started if isinstance(worker, _Worker))
        for failure in started:
            if isinstance(failure, BaseException):
                raise failure

    async def close(self) -> None:
        """End every worker; a rendering in flight fails."""
        for worker in list(self._all_workers):
            self._discard(worker)
        await asyncio.gather(*self._deaths)

    async def variables(self, *, with_tools: bool = False) -> frozenset[str]:
        """Returns the variables that the template reads: `"tools" in await template.variables()`."""
        name = self._choose(with_tools=with_tools)
        if not self._variables:
            async with self._free_places:
                self._idle_workers.append(await self._start_worker())
        return frozenset(self._variables[name])

    async def render(
        self,
        messages: Sequence[JsonObject],
        *,
        tools: Sequence[JsonObject] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """Returns the prompt for a conversation.

        messages, tools         plain JSON data; transformers' rules apply (null keys are dropped)
        continue_final_message  leave the last message open; a string names the field to continue instead of
                                `content`; no generation prompt is added then
        kwargs                  further variables (`chat_template_kwargs`): only those that the template reads
        Raises   ValidationError: no messages, a kwarg that the template does not know, values outside JSON
                 TemplateError: it refused, failed, or broke a limit · OverloadedError: all workers stayed busy
        """
        if not messages:
            raise ValidationError("`messages` must hold at least one message. Given: 0", field="messages")
        name = self._choose(with_tools=tools is not None)
        if kwargs:
            self._check_kwargs(kwargs, await self.variables(with_tools=tools is not None))
        variables = {**self._special_tokens, **kwargs}
        request = _encode(
            {
                "template": name,
                "messages": messages,
                "tools": tools,
                "documents": variables.pop("documents", None),
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
                "continue_final_message": continue_final_message,
                "variables": variables,
            }
        )
        return (await self._call(request)).decode()

    def _choose(self, *, with_tools: bool) -> str:
        if with_tools and TOOL_USE_TEMPLATE in self._templates:
            return TOOL_USE_TEMPLATE
        if DEFAULT_TEMPLATE in self._templates:
            return DEFAULT_TEMPLATE
        names = ", ".join(f"`{name}`" for name in self._templates)
        raise TemplateError(f"The model has chat templates named {names} but none named `{DEFAULT_TEMPLATE}`.")

    def _check_kwargs(self, kwargs: Mapping[str, Any], variables: frozenset[str]) -> None:
        allowed = variables - _RESERVED_VARIABLES - self._special_tokens.keys()
        for key in kwargs:
            if key not in allowed:
                choices = ", ".join(f"`{name}`" for name in sorted(allowed)) or "none"
                raise ValidationError(
                    f"`chat_template_kwargs.{key}` is not a variable of this model's chat template. Allowed: {choices}",
                    field=f"chat_template_kwargs.{key}",
                )

    async def _call(self, request: bytes) -> bytes:
        """Renders on a free worker. Waiting and rendering are bounded each: a busy machine is nobody's fault."""
        try:
            async with asyncio.timeout(self._limits.template_queue_timeout_s):
                await self._free_places.acquire()
        except TimeoutError as error:
            raise OverloadedError("All chat template workers are busy. Try again later.", retry_after_s=1.0) from error
        try:
            worker = self._take_idle_worker() or await self._start_worker()
            return await self._render_on(worker, request, self._limits.template_timeout_s)
        finally:
            self._free_places.release()

    def _take_idle_worker(self) -> _Worker | None:
        """Returns a living worker; one that was killed from outside is no fault of the next request."""
        while self._idle_workers:
            worker = self._idle_workers.pop()
            if worker.is_alive:
                return worker
            self._discard(worker)
        return None

    async def _render_on(self, worker: _Worker, request: bytes, timeout_s: float) -> bytes:
        is_reusable = False
        try:
            kind, body = await worker.call(request, timeout_s)
            failure = msgspec.json.decode(body) if kind == template_worker.FAILURE else None
            is_reusable = failure is None or failure["kind"] != "memory"
        except TimeoutError as error:
            raise TemplateError(
                f"The chat template ran for more than {self._limits.template_timeout_s} s. "
                "Send fewer or shorter messages."
            ) from error
        except _WorkerLost as error:
            raise TemplateError("The chat template broke its worker process.") from error
        finally:
            # Also when this task is cancelled: the reply that is still to come must not meet the next request.
            if is_reusable:
                self._idle_workers.append(worker)
            else:
                self._discard(worker)
        if failure is not None:
            raise TemplateError(f"The chat template failed: {failure['message']}")
        return body

    async def _start_worker(self) -> _Worker:
        """Starts a worker and compiles the templates in it."""
        if self._defect is not None:
            raise TemplateError(self._defect)
        try:
            worker = await _Worker.start(self._limits)
        except (_WorkerLost, TimeoutError, OSError, asyncio.IncompleteReadError) as error:
            raise TemplateError("The worker process for chat templates does not start. Check the log.") from error
        self._all_workers.add(worker)
        try:
            kind, body = await worker.call(
                _encode({"templates": self._templates}), self._limits.template_compile_timeout_s
            )
        except (TimeoutError, _WorkerLost) as error:
            self._discard(worker)
            fault = "The model's chat template cannot be compiled within the limits of time and memory."
            if not self._variables:
                # It never did. Where it once compiled, the machine is to blame, and the next try may succeed.
                self._defect = fault
            raise TemplateError(fault) from error
        except BaseException:
            self._discard(worker)
            raise
        if kind != template_worker.DECLARED:
            self._discard(worker)
            self._defect = f"The model's chat template does not compile: {msgspec.json.decode(body)['message']}"
            raise TemplateError(self._defect)
        self._variables = msgspec.json.decode(body, type=dict[str, list[str]])
        return worker

    def _discard(self, worker: _Worker) -> None:
        worker.kill()
        self._all_workers.discard(worker)
        if worker in self._idle_workers:
            self._idle_workers.remove(worker)
        death = asyncio.create_task(worker.wait())
        self._deaths.add(death)
        death.add_done_callback(self._deaths.discard)


def _encode(request: JsonObject) -> bytes:
    try:
        return msgspec.json.encode(request)
    except (UnicodeEncodeError, RecursionError, TypeError) as error:
        raise ValidationError(
            "`messages` must be JSON with valid Unicode and moderate depth.", field="messages"
        ) from error
