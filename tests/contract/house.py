"""A router in this process: real application, a tokenizer of 256 bytes, a scripted engine, and a raw ASGI client."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from weft.config import Settings
from weft.core.info import EngineInfo
from weft.core.request import FinishReason, Request, TokenId
from weft.errors import TemplateError
from weft.router.app import build_app
from weft.router.backend import Script, ScriptedBackend
from weft.router.context import RouterContext
from weft.router.exchange import FLOW_KEY
from weft.router.lifecycle import Progress, ServerState
from weft.router.served import ServedModel
from weft.text.tokenizer import Tokenizer

BOS, EOS = 0, 1
NUM_SPECIAL = 2
VOCAB_SIZE = 256 + NUM_SPECIAL
MODEL_ID = "test/bytes"
MAX_TOTAL_TOKENS = 64


class FakeClock:
    """Moves by a microsecond at every reading, so that durations are small and never zero."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def now_ns(self) -> int:
        self.ns += 1_000
        return self.ns


def byte_tokenizer() -> Tokenizer:
    """Token id = byte + 2; <s> is put before every text, </s> ends it."""
    letters = _byte_level_letters()
    vocab = {"<s>": BOS, "</s>": EOS} | {letter: byte + NUM_SPECIAL for byte, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return Tokenizer(backend, num_threads=1)


def _byte_level_letters() -> list[str]:
    """GPT-2's letters for bytes, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def ids_of(text: str, *, eos: bool = True) -> list[int]:
    """What a model would have to sample to say `text`."""
    return [byte + NUM_SPECIAL for byte in text.encode()] + ([EOS] if eos else [])


def text_of(token_ids: Sequence[int]) -> str:
    return bytes(token_id - NUM_SPECIAL for token_id in token_ids if token_id >= NUM_SPECIAL).decode()


class FakeChatTemplate:
    """`[role]content` per message, `[assistant]` to ask for an answer."""

    def __init__(self) -> None:
        self.kwargs: Mapping[str, Any] = {}
        self.words: frozenset[str] = frozenset({"forbidden"})
        self.known_variables = frozenset({"messages", "add_generation_prompt"})

    def speaks_of(self, word: str) -> bool:
        return word in self.words

    async def variables(self, *, with_tools: bool = False) -> frozenset[str]:
        return self.known_variables

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        kwargs: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        self.kwargs = kwargs
        if any(message["role"] == "forbidden" for message in messages):
            raise TemplateError("Conversation roles must alternate")
        text = "".join(f"[{message['role']}]{message['content']}" for message in messages)
        return text + ("[assistant]" if add_generation_prompt and not continue_final_message else "")


@dataclass
class House:
    """The parts a test looks at."""

    context: RouterContext
    backend: ScriptedBackend
    app: Any
    template: FakeChatTemplate
    clock: FakeClock

    async def post(self, path: str, body: object, headers: Mapping[str, str] = MappingProxyType({})) -> "Answer":
        return await self.request("POST", path, body, headers)

    async def get(self, path: str, headers: Mapping[str, str] = MappingProxyType({})) -> "Answer":
        return await self.request("GET", path, None, headers)

    async def request(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> "Answer":
        """`body`: bytes as they are, anything else as JSON."""
        async with self.exchange(method, path, body, headers) as answer:
            await answer.finished()
        return answer

    @asynccontextmanager
    async def exchange(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        *,
        knows_flow: bool = False,
    ) -> AsyncIterator["Answer"]:
        """An exchange that goes on while the block runs. `knows_flow`: sending at once is possible, as on a socket."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        names = {name.lower() for name in headers}
        extra = {} if method != "POST" or "content-type" in names else {"content-type": "application/json"}
        scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": path.partition("?")[0],
            "raw_path": path.encode(),
            "query_string": path.partition("?")[2].encode(),
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in ({**extra, **headers}).items()],
        }
        answer = Answer()
        if knows_flow:
            scope[FLOW_KEY] = answer
        sent = False

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": content, "more_body": False}
            await answer.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            await answer.take(message)

        answer.task = asyncio.create_task(self.app(scope, receive, send))
        try:
            yield answer
        finally:
            answer.leave()
            await answer.task


@dataclass
class Answer:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)
    is_over: bool = False
    task: Any = None
    reads: asyncio.Event = field(default_factory=asyncio.Event)
    """Clear: a client that takes nothing from its socket."""

    def __post_init__(self) -> None:
        self.reads.set()

    async def take(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            await self.reads.wait()
            self.parts.append(message.get("body", b""))
            self.is_over = not message.get("more_body", False)
        async with self.arrived:
            self.arrived.notify_all()

    async def until(self, condition: Callable[["Answer"], bool]) -> None:
        async with asyncio.timeout(5), self.arrived:
            await self.arrived.wait_for(lambda: condition(self))

    async def finished(self) -> None:
        async with asyncio.timeout(5):
            await asyncio.shield(self.task)

    def leave(self) -> None:
        self.left.set()

    @property
    def write_paused(self) -> bool:
        return not self.reads.is_set()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Decoded `data:` lines; `[DONE]` as that text."""
        frames = [frame for frame in self.body.decode().split("\n\n") if frame and not frame.startswith(":")]
        assert all(frame.startswith("data: ") for frame in frames), frames
        return [frame[6:] if frame == "data: [DONE]" else json.loads(frame[6:]) for frame in frames]


def say(text: str, **changes: Any) -> Callable[[Request], Script]:
    """A backend that answers everything with `text` and the end of text."""
    script = replace(Script(token_ids=ids_of(text)), **changes)
    return lambda request: script


def build_house(
    script_for: Callable[[Request], Script] | None = None,
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
    state: ServerState = ServerState.READY,
    steps: asyncio.Semaphore | None = None,
    batch_size: int = 1,
    max_total_tokens: int = MAX_TOTAL_TOKENS,
    max_input_tokens: int | None = None,
    has_template: bool = True,
    info: Mapping[str, Any] = MappingProxyType({}),
    appended_token_id: int | None = None,
) -> House:
    """`settings` replaces fields of Settings, `info` those of EngineInfo."""
    engine = EngineInfo(
        model_id=MODEL_ID,
        vocab_size=VOCAB_SIZE,
        max_total_tokens=max_total_tokens,
        model_type="bytes",
        dtype="float32",
        fingerprint="0123456789abcdef",
        phases=(("load", 0.5),),
    )
    engine = replace(engine, **info)
    backend = ScriptedBackend(script_for or say("hello"), engine, steps=steps, batch_size=batch_size)
    clock = FakeClock()
    context = RouterContext(settings=replace(Settings(model_id=MODEL_ID), **settings), backend=backend, clock=clock)
    template = FakeChatTemplate()
    context.model = ServedModel(
        info=engine,
        tokenizer=byte_tokenizer(),
        chat_template=template if has_template else None,
        eos_token_ids=(TokenId(EOS),),
        max_input_tokens=max_total_tokens - 1 if max_input_tokens is None else max_input_tokens,
        max_total_tokens=max_total_tokens,
        created_s=1_700_000_000,
        appended_token_id=None if appended_token_id is None else TokenId(appended_token_id),
    )
    context.lifecycle.become(Progress(state, phase="load", percent=40))
    return House(context, backend, build_app(context), template, clock)


__all__ = ["BOS", "EOS", "Answer", "FinishReason", "House", "Script", "build_house", "ids_of", "say", "text_of"]
