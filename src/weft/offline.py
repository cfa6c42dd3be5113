"""A model inside this process: `LLM("path or id").generate("…")`, without HTTP.

Engine, scheduler, runner, tokenizer, templates, stop strings and parameter checks are those of the server; only the
way in and out differs. The engine runs on threads of its own, so this works in notebooks and beside a running event
loop. A rule: nothing of a loaded model refers back to its `LLM`, so that one that is forgotten frees its memory.
"""

import asyncio
import dataclasses
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeGuard, TypeVar, cast, overload

import msgspec
import structlog

from weft.config import Settings, options, resolve, setting_named
from weft.core.clock import Clock
from weft.core.events import EmbeddingEvent, Event, FailureEvent, TokenEvent, is_final
from weft.core.info import EngineInfo, EngineStats
from weft.core.plan import TopTokens
from weft.core.request import FinishReason, Request, RequestId
from weft.errors import (
    EngineFatal,
    GenerationError,
    NotReadyError,
    RequestError,
    UsageError,
    ValidationError,
    by_code,
)
from weft.kernels import registry as kernel_registry
from weft.launcher.download import fetch
from weft.limits import LIMITS
from weft.router.chat_prompt import render_chat
from weft.router.embedding_inputs import (
    check_text,
    checked_dimensions,
    fitted,
    require_embedding,
    require_generation,
    vector_request,
    with_end,
)
from weft.router.schemas_openai import ChatRequest, CompletionRequest, SamplingFields
from weft.router.sequence_text import SequenceText
from weft.router.served import ServedModel, served_model
from weft.router.validate import Checked, Origin, build_requests, check_chat, check_completion, fit_openai
from weft.router.vectors import finished_vector
from weft.scheduler.scheduler import Scheduler
from weft.server.engine import Engine
from weft.server.executor import LocalExecutor
from weft.server.startup import COMPILING_NOTICE, PhaseTimer, start_rank
from weft.text.assets import load_text_assets

log = structlog.get_logger("weft.offline")

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`, as on OpenAI's API."""

Prompt = str | Sequence[int]
"""Text, or token ids that are used as they are."""

_MAX_OPEN_REQUESTS = LIMITS.max_queue_requests // 2
"""Of one call: the engine's queue has room for another call beside it."""
_SERVER_GROUPS = frozenset({"Network and access", "Processes", "Logs and telemetry"})
_CLOSE_TIMEOUT_S = 10.0
_NEVER_NS = 2**63 - 1

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a completion ends. Names, ranges and meaning are those of OpenAI's API.

    None means what it means there: the model's recommendation (`default_sampling`), or the neutral value.

    max_tokens      at most, and never more than the context leaves; None: that many
    temperature     0 is greedy
    stop            texts that end a completion; they are cut off
    seed            same seed, same completion; None draws one
    logprobs        None: none; n: of each token, and of the n likeliest ones (0 to 20)
    """

    max_tokens: int | None = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    seed: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

    def as_fields(self) -> dict[str, Any]:
        """As the body of a request has them."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["stop"] = list(self.stop) if isinstance(self.stop, tuple) else self.stop
        if isinstance(self.logit_bias, Mapping):
            fields["logit_bias"] = {str(token_id): bias for token_id, bias in self.logit_bias.items()}
        return fields


Params = SamplingParams | Sequence[SamplingParams] | None
"""For every prompt, or one for each; None is `SamplingParams()`."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What was counted, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens that an earlier request had computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated for one prompt."""

    text: str
    """Without special tokens and without the stop string."""
    token_ids: tuple[int, ...]
    """Every token, the end-of-text token and those of a stop string included."""
    finish_reason: str
    """`stop` for an end-of-text token or a stop string, `length` for `max_tokens`."""
    usage: Usage
    prompt_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None = None
    """Natural logarithm of each token's probability under the model itself; None unless asked for."""
    top_logprobs: tuple[dict[int, float], ...] | None = None
    """Of the likeliest tokens at each place, by id."""


class _MonotonicClock(Clock):
    def now_ns(self) -> int:
        return time.monotonic_ns()


_Delivery = list[Event] | EngineFatal
_Inbox = queue.SimpleQueue[_Delivery]


class _Postbox:
    """Takes events from the engine's thread to whoever waits for them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inboxes: dict[RequestId, _Inbox] = {}
        self._fatal: EngineFatal | None = None

    def open(self, request_id: RequestId, inbox: _Inbox) -> None:
        """Expect events. Raises EngineFatal when there will be none."""
        with self._lock:
            if self._fatal is not None:
                raise self._fatal
            self._inboxes[request_id] = inbox

    def close(self, request_id: RequestId) -> None:
        """Events of this request are dropped from now on."""
        with self._lock:
            self._inboxes.pop(request_id, None)

    def deliver(self, events: Sequence[Event], _stats: EngineStats) -> None:
        """`publish` of the engine."""
        batches: dict[int, tuple[_Inbox, list[Event]]] = {}
        with self._lock:
            for event in events:
                inbox = self._inboxes.get(event.request_id)
                if inbox is not None:
                    batches.setdefault(id(inbox), (inbox, []))[1].append(event)
        for inbox, batch in batches.values():
            inbox.put(batch)

    def fail(self, error: EngineFatal) -> None:
        """`on_fatal` of the engine."""
        with self._lock:
            self._fatal = error
            inboxes = list(self._inboxes.values())
        for inbox in inboxes:
            inbox.put(error)


class _Job:
    """One prompt on its way to a `Completion`."""

    def __init__(
        self, model: ServedModel, request: Request, stop_strings: Sequence[str], num_logprobs: int | None
    ) -> None:
        self.request = request
        self._text = SequenceText(model, request.prompt_token_ids, stop_strings)
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._num_cached = 0
        self._num_logprobs = num_logprobs
        self._logprobs: list[float] = []
        self._top: list[dict[int, float]] = []

    @property
    def is_finished(self) -> bool:
        return self._text.finish_reason is not None

    def push(self, event: TokenEvent) -> str:
        piece = self._text.push(event)
        self._pieces.append(piece)
        self._token_ids.append(event.token_id)
        if event.prompt is not None:
            self._num_cached = event.prompt.num_cached_tokens
        if self._num_logprobs is not None:
            self._logprobs.append(event.logprob)
            self._top.append(_top_logprobs(event.top_tokens, self._num_logprobs))
        return piece

    def completion(self) -> Completion:
        has_logprobs = self._num_logprobs is not None
        return Completion(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish_reason="length" if self._text.finish_reason is FinishReason.LENGTH else "stop",
            usage=Usage(len(self.request.prompt_token_ids), len(self._token_ids), self._num_cached),
            prompt_token_ids=self.request.prompt_token_ids,
            logprobs=tuple(self._logprobs) if has_logprobs else None,
            top_logprobs=tuple(self._top) if has_logprobs else None,
        )


@dataclass(slots=True)
class _VectorJob:
    """One text on its way to its vector."""

    request: Request
    values: bytes = b""

    @property
    def is_finished(self) -> bool:
        return bool(self.values)


def _top_logprobs(top: TopTokens | None, count: int) -> dict[int, float]:
    return {} if top is None else dict(list(zip(top.token_ids, top.logprobs, strict=True))[:count])


@dataclass(slots=True)
class _Loaded:
    """A model that runs, and all it takes. Closed by the stack that its parts were put on."""

    settings: Settings
    model: ServedModel
    engine: Engine
    postbox: _Postbox
    loop: asyncio.AbstractEventLoop

    def await_(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        """The result of a coroutine, run on the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def run(self, jobs: Sequence[_Job | _VectorJob]) -> Iterator[str]:
        """Drive jobs to their ends; yields what each token adds. Leaving early, by any way, aborts what is open."""
        inbox: _Inbox = queue.SimpleQueue()
        waiting = iter(jobs)
        open_jobs: dict[RequestId, _Job | _VectorJob] = {}
        try:
            while True:
                while len(open_jobs) < _MAX_OPEN_REQUESTS and (job := next(waiting, None)) is not None:
                    self.postbox.open(job.request.request_id, inbox)
                    open_jobs[job.request.request_id] = job
                    self.engine.add(job.request)
                if not open_jobs:
                    return
                delivery = inbox.get()
                if isinstance(delivery, EngineFatal):
                    raise delivery
                for event in delivery:
                    yield from self._apply(event, open_jobs)
        finally:
            for request_id in open_jobs:
                self.postbox.close(request_id)
                self.engine.abort(request_id)

    def _apply(self, event: Event, open_jobs: dict[RequestId, _Job | _VectorJob]) -> Iterator[str]:
        job = open_jobs.get(event.request_id)
        if job is None:
            return  # came while the request was being ended by a stop string
        if isinstance(event, FailureEvent):
            raise by_code().get(event.code, GenerationError)(event.message)
        piece = ""
        if isinstance(event, TokenEvent) and isinstance(job, _Job):
            piece = job.push(event)
        elif isinstance(event, EmbeddingEvent) and isinstance(job, _VectorJob):
            job.values = event.values
        if job.is_finished:
            del open_jobs[event.request_id]
            self.postbox.close(event.request_id)
            if not is_final(event):
                self.engine.abort(event.request_id)
        if piece:
            yield piece


class TextStream:
    """Iterate over the text of one completion as it is generated; afterwards `completion` holds all of it.

    Leaving the `with` block, or `close`, ends the generation.
    """

    def __init__(self, pieces: Iterator[str], job: _Job) -> None:
        self._pieces = pieces
        self._job = job

    def __iter__(self) -> Iterator[str]:
        """Itself: a stream can be read once."""
        return self._pieces

    @property
    def completion(self) -> Completion:
        """What was generated. Raises ValidationError before the end."""
        if not self._job.is_finished:
            raise ValidationError("`completion` exists once the stream has been read to its end")
        return self._job.completion()

    def close(self) -> None:
        """End the generation."""
        cast("Any", self._pieces).close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()


class LLM:
    """A model in this process.

    with LLM("HuggingFaceTB/SmolLM2-135M-Instruct", max_total_tokens=2048) as llm:
        print(llm.generate("Once upon a time", SamplingParams(max_tokens=40)).text)
        print(llm.chat([{"role": "user", "content": "Hello!"}]).text)

    Methods may be called from several threads at once; their requests share the batch.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **settings: object) -> None:
        """Load a model: a directory, a .gguf file, a hub id or a registry reference, which is downloaded once.

        settings   those of `weft serve` about model, limits, engine and files, with underscores: `dtype="float32"`,
                   `kv_pool_bytes="2GiB"`. The environment counts as it does there. Without a model, the default one

        Raises   UsageError, ModelNotFoundError, DoesNotFitError, DeviceError: as `weft serve`, naming the setting
        """
        _keep_standard_output_clean()
        resolved = _resolve(None if model is None else os.fspath(model), settings)
        with ExitStack() as stack:
            self._loaded = _load(resolved, stack)
            self._close = weakref.finalize(self, stack.pop_all().close)

    @property
    def info(self) -> EngineInfo:
        """What is loaded, and with which limits."""
        return self._loaded.model.info

    @overload
    def generate(self, prompts: str, params: Params = None) -> Completion: ...  # type: ignore[overload-overlap]
    @overload
    def generate(self, prompts: Sequence[Prompt], params: Params = None) -> list[Completion]: ...
    def generate(self, prompts: str | Sequence[Prompt], params: Params = None) -> Completion | list[Completion]:
        """Complete a text, or each prompt of a list (texts or lists of token ids), all in one batch.

        params   for all prompts, or one for each

        Raises   ValidationError, ContextLengthError: names the field, and in a note the prompt; nothing has run then
        """
        if isinstance(prompts, str):
            return self._completions([self._prompt_job], [prompts], params)[0]
        _check_list(prompts, "prompts", "a text, or a list of texts and of lists of token ids")
        return self._completions([self._prompt_job] * len(prompts), prompts, params)

    @overload
    def chat(self, messages: Sequence[Message], params: Params = None) -> Completion: ...
    @overload
    def chat(self, messages: Sequence[Sequence[Message]], params: Params = None) -> list[Completion]: ...
    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: Params = None,
    ) -> Completion | list[Completion]:
        """Answer a conversation, or each of a list, through the model's chat template.

        Raises   as `generate`; TemplateError: the model has no template, or it refuses the conversation
        """
        _check_list(messages, "messages", 'a conversation as [{"role": "user", "content": "Hello"}], or a list of them')
        if _is_conversation(messages):
            return self._completions([self._chat_job], [messages], params)[0]
        return self._completions([self._chat_job] * len(messages), messages, params)

    def stream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None) -> TextStream:
        """Complete one prompt, or answer one conversation, piece by piece.

        for text in llm.stream("Once upon a time"):
            print(text, end="", flush=True)

        Raises   as `generate`
        """
        loaded = self._require_open()
        require_generation(loaded.model, loaded.settings)
        own = _one_each(params, 1)[0]
        if not isinstance(prompt, str) and _is_conversation(prompt):
            job = self._chat_job(prompt, own)
        else:
            job = self._prompt_job(cast("Prompt", prompt), own)
        return TextStream(loaded.run([job]), job)

    @overload
    def embed(self, texts: str, *, dimensions: int | None = None) -> list[float]: ...  # type: ignore[overload-overlap]
    @overload
    def embed(self, texts: Sequence[Prompt], *, dimensions: int | None = None) -> list[list[float]]: ...
    def embed(self, texts: str | Sequence[Prompt], *, dimensions: int | None = None) -> list[float] | list[list[float]]:
        """The vector of a text, or of each one of a list (texts or lists of token ids), all in one batch.

        dimensions   keep this many numbers of each vector; None: all

        Raises   as `generate`; NotSupportedError: the model generates text (see `task`)
        """
        loaded = self._require_open()
        require_embedding(loaded.model, loaded.settings)
        kept = checked_dimensions(dimensions, loaded.model)
        each = [texts] if isinstance(texts, str) else texts
        jobs: list[_VectorJob] = []
        for place, text in enumerate(each):
            try:
                jobs.append(self._vector_job(text))
            except RequestError as error:
                error.add_note(f"text {place} of {len(each)}, counted from 0")
                raise
        for _ in loaded.run(jobs):
            pass
        normalizes = loaded.model.info.normalizes
        vectors = [finished_vector(job.values, kept, normalizes=normalizes) for job in jobs]
        return vectors[0] if isinstance(texts, str) else vectors

    def close(self) -> None:
        """Free the model. Further calls raise NotReadyError."""
        self._close()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()

    def _require_open(self) -> _Loaded:
        if not self._close.alive:
            raise NotReadyError("This LLM is closed; make a new one")
        return self._loaded

    def _completions(
        self,
        makers: Sequence[Callable[[Any, SamplingParams], _Job]],
        prompts: Sequence[Any],
        params: Params,
    ) -> list[Completion]:
        loaded = self._require_open()
        require_generation(loaded.model, loaded.settings)
        each = _one_each(params, len(prompts))
        jobs: list[_Job] = []
        for place, (make_job, prompt, own) in enumerate(zip(makers, prompts, each, strict=True)):
            try:
                jobs.append(make_job(prompt, own))
            except RequestError as error:
                error.add_note(f"prompt {place} of {len(prompts)}, counted from 0")
                raise
        for _ in loaded.run(jobs):
            pass
        return [job.completion() for job in jobs]

    def _prompt_job(self, prompt: Prompt, params: SamplingParams) -> _Job:
        model = self._loaded.model
        body = _body(CompletionRequest, params, prompt="")
        checked = check_completion(body, self._loaded.settings, model)
        ids = model.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else _token_ids(prompt)
        if not ids:
            raise ValidationError("`prompt` must have at least one token. Given: none", field="prompt")
        return self._job(ids, checked, params, "prompt")

    def _vector_job(self, text: Prompt) -> _VectorJob:
        model = self._loaded.model
        if isinstance(text, str):
            check_text(text, None, model)
            ids = with_end(model.tokenizer.encode(text, add_special_tokens=True), model)
        else:
            ids = list(text)
        request = vector_request(fitted(ids, None, model), model, Origin(deadline_ns=_NEVER_NS))
        return _VectorJob(request)

    def _chat_job(self, messages: Sequence[Message], params: SamplingParams) -> _Job:
        loaded = self._loaded
        body = _body(ChatRequest, params, messages=list(messages))
        checked = check_chat(body, loaded.settings, loaded.model)
        text = loaded.await_(render_chat(body, loaded.model))
        ids = loaded.model.tokenizer.encode(text, add_special_tokens=False)
        return self._job(ids, checked, params, "messages")

    def _job(self, ids: Sequence[int], checked: Checked, params: SamplingParams, field: str) -> _Job:
        model = self._loaded.model
        if params.max_tokens == 0:  # fine over HTTP, where it scores the prompt of an `echo`
            raise ValidationError("`max_tokens` must be >= 1. Given: 0", field="max_tokens")
        room = fit_openai(len(ids), dataclasses.replace(checked, max_new_tokens=None), model, field)
        max_new_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        request = build_requests(checked, ids, max_new_tokens, model, Origin(deadline_ns=_NEVER_NS))[0]
        request.check(vocab_size=model.info.vocab_size, max_total_tokens=model.max_total_tokens)
        return _Job(model, request, checked.stop_strings, params.logprobs)


def _is_conversation(messages: Sequence[Any]) -> TypeGuard[Sequence[Message]]:
    return isinstance(messages, Sequence) and len(messages) > 0 and isinstance(messages[0], Mapping)


def _check_list(value: object, field: str, allowed: str) -> None:
    """Raises ValidationError for what is no list: types say so, and not everybody checks types."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValidationError(f"`{field}` must be {allowed}. Given: {_shown(value)}", field=field)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _token_ids(prompt: object) -> list[int]:
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        ids = [item for item in prompt if isinstance(item, int) and not isinstance(item, bool)]
        if len(ids) == len(prompt):
            return ids
    raise ValidationError(f"`prompt` must be a text or a list of token ids. Given: {_shown(prompt)}", field="prompt")


def _one_each(params: Params, num_prompts: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if not isinstance(params, Sequence) or not all(isinstance(own, SamplingParams) for own in params):
        raise ValidationError(
            f"`params` must be SamplingParams(…), or one for each prompt. Given: {_shown(params)}", field="params"
        )
    if len(params) != num_prompts:
        raise ValidationError(
            f"`params` must be one SamplingParams, or one for each of {num_prompts} prompts. Given: {len(params)}",
            field="params",
        )
    return params


_Body = TypeVar("_Body", bound=SamplingFields)


def _body(kind: type[_Body], params: SamplingParams, **content: object) -> _Body:
    """The request body that a client would send, so that it is checked by the same rules.

    Raises   ValidationError: a parameter or message has the wrong type
    """
    fields = params.as_fields()
    if kind is ChatRequest and params.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": params.logprobs}
    try:
        return msgspec.convert({**fields, **content}, kind)
    except msgspec.ValidationError as error:
        name = str(error).rpartition("`$.")[2].rstrip("`") or None
        raise ValidationError(f"{error}".replace("`$.", "`"), field=name) from error


def _resolve(model: str | None, given: Mapping[str, object]) -> Settings:
    words: list[str] = [] if model is None else ["--model-id", model]
    for word, value in given.items():
        name = setting_named(word) or word
        option = options().get(name)
        if option is None or name == "model_id" or option.is_internal or option.flag is None:
            raise UsageError(f"LLM: there is no setting `{word}`. weft serve --help-all lists them.")
        if option.group in _SERVER_GROUPS:
            raise UsageError(f"LLM: `{word}` is a setting of a server and means nothing here; leave it out.")
        if value is not None:
            words.append(f"{option.flag}={_spelled(value)}")
    settings = resolve(words, os.environ)
    if (settings.num_shard or 1) > 1:
        raise UsageError("LLM: runs one shard, in this process. Use `weft serve` for --num-shard (NUM_SHARD) above 1.")
    return settings


def _spelled(value: object) -> str:
    """As it would stand on a command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value)


def _load(settings: Settings, stack: ExitStack) -> _Loaded:
    """Bring up everything; `stack` takes it down again, in reverse order."""
    found = fetch(settings.model_id, settings)
    settings = dataclasses.replace(
        settings,
        model_path=str(found.path),
        model_sha=found.sha,
        threads=settings.threads or len(os.sched_getaffinity(0)),
    )
    tokenizer_config = settings.tokenizer_config_path
    assets = load_text_assets(
        found.path, Path(settings.cache_dir), None if tokenizer_config is None else Path(tokenizer_config)
    )
    stack.callback(assets.tokenizer.close)
    loop = _start_loop(stack)
    if kernel_registry.must_compile():
        log.warning("llm.first_start", note=COMPILING_NOTICE)  # else a notebook would stand still without a word
    started = start_rank(settings, rank=0, world_size=1, timer=PhaseTimer())
    executor = LocalExecutor(started.runner)
    stack.callback(executor.close)
    postbox = _Postbox()
    engine = Engine(
        Scheduler(started.scheduler_config),
        executor,
        _MonotonicClock(),
        postbox.deliver,
        postbox.fail,
        lookahead=settings.lookahead,
    )
    engine.start()
    stack.callback(engine.stop)
    stack.callback(postbox.fail, EngineFatal("the LLM was closed while this request ran"))
    loaded = _Loaded(settings, served_model(settings, started.info, assets), engine, postbox, loop)
    if assets.chat_template is not None:
        stack.callback(_close_template, loaded, assets.chat_template)
    return loaded


def _close_template(loaded: _Loaded, template: Any) -> None:  # noqa: ANN401
    asyncio.run_coroutine_threadsafe(template.close(), loaded.loop).result(_CLOSE_TIMEOUT_S)


def _start_loop(stack: ExitStack) -> asyncio.AbstractEventLoop:
    """An event loop on a thread of its own: a notebook's is taken, and chat templates need one."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="weft-loop", daemon=True)
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_CLOSE_TIMEOUT_S)
        loop.close()

    stack.callback(stop)
    return loop


def _keep_standard_output_clean() -> None:
    """Unless the program has chosen otherwise: only warnings, and those to standard error.

    structlog by itself prints every event to standard output, into the middle of a notebook or a pipe.
    """
    if not structlog.is_configured():
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
