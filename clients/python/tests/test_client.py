"""Both clients against answers written down beforehand, and against a real socket where that matters."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import httpx2
import pytest

import weft_client
from weft_client import (
    ApiError,
    AsyncClient,
    AuthenticationError,
    ChatOptions,
    Client,
    CompletionOptions,
    ConnectionFailedError,
    GenerateOptions,
    InvalidArgumentError,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    OverloadedError,
    ServerError,
    StreamInterruptedError,
    UnreadableAnswerError,
)

MESSAGES = [{"role": "user", "content": "Hi"}]
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": {"cached_tokens": 1}}
CHAT = {
    "id": "c", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE,
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
}  # fmt: skip


class Script:
    """Answers calls in order, remembers them, and drives a client of either kind by the same words."""

    def __init__(self, *answers: httpx2.Response | Exception, is_async: bool = False, **settings: Any) -> None:
        self.requests: list[httpx2.Request] = []
        self.slept: list[float] = []
        self._answers = iter(answers)
        self.is_async = is_async
        transport = httpx2.MockTransport(self._answer)
        if is_async:
            self.client: Any = AsyncClient("http://server.test", transport=transport, sleep=self._sleep, **settings)
        else:
            self.client = Client("http://server.test", transport=transport, sleep=self.slept.append, **settings)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        # A copy: a response belongs to the client that has read it, and both kinds get the same answers.
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        result = getattr(self.client, method)(*arguments, **options)
        return asyncio.run(result) if self.is_async else result

    def stream(self, method: str, *arguments: Any, **options: Any) -> list[Any]:
        events = getattr(self.client, method)(*arguments, **options)
        if not self.is_async:
            return list(events)

        async def collect() -> list[Any]:
            return [event async for event in events]

        return asyncio.run(collect())

    @property
    def body(self) -> Any:
        return json.loads(self.requests[-1].content)


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def script(request: pytest.FixtureRequest):
    return lambda *answers, **settings: Script(*answers, is_async=request.param, **settings)


def ok(body: Any) -> httpx2.Response:
    return httpx2.Response(200, json=body)


def sse(*events: Any) -> httpx2.Response:
    parts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    return httpx2.Response(200, content="".join(f": keep-alive\n\ndata:{part}\n\n" for part in parts).encode())


def chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "c", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def token(text: str, **last: Any) -> dict[str, Any]:
    return {"index": 1, "token": {"id": 7, "text": text, "logprob": -0.5, "special": False}, **last}


def test_generate_sends_parameters_and_reads_details(script) -> None:
    details = {
        "finish_reason": "length",
        "generated_tokens": 1,
        "seed": None,
        "prefill": [],
        "tokens": [token("a")["token"]],
    }
    talk = script(ok({"generated_text": "a", "details": details, "new_field": 1}))

    answer = talk.call("generate", "x", max_new_tokens=1, stop=["b"])

    assert (answer.generated_text, answer.details.tokens[0].logprob) == ("a", -0.5)
    assert talk.requests[0].url.path == "/generate"
    assert talk.body == {"inputs": "x", "parameters": {"details": True, "max_new_tokens": 1, "stop": ["b"]}}


def test_a_native_stream_ends_with_the_whole_text(script) -> None:
    last = {"generated_text": "ab", "details": {"finish_reason": "length", "generated_tokens": 2}}
    events = script(sse(token("a"), token("b", **last))).stream("generate_stream", "x")
    assert [event.token.text for event in events] == ["a", "b"]
    assert events[-1].generated_text == "ab"


def test_chat_and_its_text(script) -> None:
    talk = script(ok(CHAT))

    answer = talk.call("chat", MESSAGES, max_tokens=5, extra={"guided": 1})

    assert (answer.text, answer.usage.prompt_tokens_details.cached_tokens) == ("Hello", 1)
    assert talk.body == {"messages": MESSAGES, "max_tokens": 5, "guided": 1}


def test_a_chat_stream_ends_with_the_usage(script) -> None:
    talk = script(sse(chunk("Hel"), chunk("lo", "stop"), {"choices": [], "usage": USAGE}, "[DONE]"))

    events = talk.stream("chat_stream", MESSAGES)

    assert "".join(event.text for event in events) == "Hello"
    assert events[-1].usage.completion_tokens == 2
    assert (talk.body["stream"], talk.body["stream_options"]) == (True, {"include_usage": True})


def test_completions_of_texts_and_ids(script) -> None:
    answer = {
        "id": "c",
        "created": 1,
        "model": "m",
        "usage": USAGE,
        "choices": [{"index": 0, "text": "b", "logprobs": None}],
    }
    talk = script(ok(answer), sse({"choices": [{"index": 0, "text": "b", "finish_reason": "stop"}]}, "[DONE]"))
    assert talk.call("completion", [1, 2], n=1).text == "b"
    assert talk.body == {"prompt": [1, 2], "n": 1}
    assert [event.text for event in talk.stream("completion_stream", "a")] == ["b"]


def test_models_info_and_tokens(script) -> None:
    talk = script(
        ok({"object": "list", "data": [{"id": "m", "object": "model"}]}),
        ok({"model_id": "m", "max_total_tokens": 9, "more": 1}),
        ok([{"id": 1, "text": "a", "start": 0, "stop": 1}]),
    )
    assert [model.id for model in talk.call("models")] == ["m"]
    assert talk.call("info").max_total_tokens == 9
    assert talk.call("tokenize", "a")[0].stop == 1


def test_not_being_ready_is_an_answer_of_health_and_not_an_error(script) -> None:
    loading = {"error": "loading", "error_type": "healthcheck", "state": "loading", "phase": "load", "percent": 40}
    talk = script(
        httpx2.Response(503, json=loading),
        httpx2.Response(200),
        httpx2.Response(503, text="proxy"),
        httpx2.Response(404),
    )

    health = talk.call("health")

    assert (health.is_ready, health.phase, health.percent) == (False, "load", 40)
    assert talk.call("health").is_ready
    assert not talk.call("health").is_ready
    with pytest.raises(NotFoundError):
        talk.call("health")
    assert talk.slept == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidRequestError),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFoundError),
        (413, InvalidRequestError),
        (422, InvalidRequestError),
        (429, OverloadedError),
        (500, ServerError),
        (503, NotReadyError),
        (418, ServerError),
    ],
)
def test_an_error_has_its_class_and_what_the_server_said(script, status: int, kind: type[ApiError]) -> None:
    body = {"error": {"message": "no", "type": "t", "param": "temperature", "code": "c"}}
    talk = script(httpx2.Response(status, json=body, headers={"x-request-id": "r"}), max_retries=0)
    with pytest.raises(kind) as caught:
        talk.call("chat", MESSAGES)
    error = caught.value
    assert type(error) is kind
    assert (error.status, error.message, error.param, error.code, error.request_id) == (
        status,
        f"{status}: no",
        "temperature",
        "c",
        "r",
    )


@pytest.mark.parametrize(
    ("response", "message", "code"),
    [
        (httpx2.Response(422, json={"error": "bad", "error_type": "validation"}), "422: bad", "validation"),
        (httpx2.Response(422, text="<html>"), "422: <html>", None),
        (httpx2.Response(422), "422: no further explanation", None),
        (httpx2.Response(422, content=b"\xff\xfe"), "422: \ufffd\ufffd", None),
    ],
)
def test_errors_of_every_form_are_read(script, response: httpx2.Response, message: str, code: str | None) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        script(response).call("info")
    assert (caught.value.message, caught.value.code) == (message, code)


def test_a_busy_server_is_asked_again_when_it_says(script) -> None:
    busy = httpx2.Response(429, json={"error": {"message": "busy"}}, headers={"retry-after": "3"})
    sooner = httpx2.Response(503, headers={"retry-after-ms": "250", "retry-after": "1"})
    talk = script(busy, sooner, ok(CHAT))

    assert talk.call("chat", MESSAGES).text == "Hello"
    assert talk.slept == [3.0, 0.25]


def test_pauses_grow_when_the_server_says_nothing(script) -> None:
    talk = script(*[httpx2.ConnectError("refused")] * 4, max_retries=3)
    with pytest.raises(ConnectionFailedError, match="nobody answers"):
        talk.call("info")
    assert len(talk.requests) == 4
    assert all(0.25 * 2**step <= pause <= 0.5 * 2**step for step, pause in enumerate(talk.slept))


@pytest.mark.parametrize(
    "answer",
    [
        httpx2.Response(400),
        httpx2.Response(500),
        httpx2.Response(429, headers={"retry-after": "3600"}),
        httpx2.ReadError("reset"),
        httpx2.ReadTimeout("slow"),
    ],
)
def test_what_would_not_help_or_may_have_begun_is_not_sent_again(script, answer) -> None:
    talk = script(answer)
    with pytest.raises((ApiError, ConnectionFailedError)):
        talk.call("generate", "x")
    assert (len(talk.requests), talk.slept) == (1, [])


def test_a_stream_that_was_refused_is_tried_again_before_it_begins(script) -> None:
    talk = script(httpx2.Response(503, headers={"retry-after": "1"}), sse(chunk("a", "stop"), "[DONE]"))
    assert [event.text for event in talk.stream("chat_stream", MESSAGES)] == ["a"]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (sse(chunk("a"), {"error": {"message": "shard died"}}), "shard died"),
        (sse(chunk("a"), {"error": "shard died", "error_type": "generation"}), "shard died"),
        (sse(chunk("a")), "before its last event"),
        (sse(), "before its last event"),
    ],
)
def test_a_stream_that_breaks_off_is_an_error(script, answer: httpx2.Response, message: str) -> None:
    with pytest.raises(StreamInterruptedError, match=message):
        script(answer).stream("chat_stream", MESSAGES)


@pytest.mark.parametrize("content", [b"<html>", b"{}", b'{"id": 7}', b"\xff"])
def test_an_answer_of_another_api_is_told(script, content: bytes) -> None:
    with pytest.raises(UnreadableAnswerError):
        script(httpx2.Response(200, content=content)).call("chat", MESSAGES)
    with pytest.raises(UnreadableAnswerError):
        script(sse(content.decode(errors="replace") or "x", "[DONE]") if content != b"{}" else sse("x")).stream(
            "chat_stream", MESSAGES
        )


@pytest.mark.parametrize("base_url", ["http://server.test", "http://server.test/", "http://server.test/v1"])
def test_the_address_may_end_with_v1(base_url: str) -> None:
    seen = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return ok({"data": []})

    with Client(base_url, transport=httpx2.MockTransport(answer), api_key="k") as client:
        client.models()
    assert str(seen[0].url) == "http://server.test/v1/models"
    assert seen[0].headers["authorization"] == "Bearer k"


def test_the_key_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, script) -> None:
    monkeypatch.setenv("WEFT_API_KEY", "from-environment")
    talk = script(ok({"data": []}))
    talk.call("models")
    assert talk.requests[0].headers["authorization"] == "Bearer from-environment"


async def test_leaving_a_stream_closes_its_connection() -> None:
    gone = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        writer.write(f"data: {json.dumps(chunk('a'))}\n\n".encode())
        await writer.drain()
        while await reader.read(1000):
            pass
        gone.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with AsyncClient(url) as client:
        stream = client.chat_stream(MESSAGES)
        assert (await anext(stream)).text == "a"
        await stream.aclose()
        await asyncio.wait_for(gone.wait(), 5)
    server.close()
    await server.wait_closed()


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    def surface(client: type) -> dict[str, set[str]]:
        methods = {name: value for name, value in vars(client).items() if not name.startswith("_") and callable(value)}
        return {name: set(get_type_hints(method)) for name, method in methods.items()}

    assert surface(Client) == surface(AsyncClient)


def test_the_options_are_those_of_the_server() -> None:
    """Where the server's package is installed, too: an option that it does not know would be silently ignored."""
    native = pytest.importorskip("weft.router.schemas_native")
    openai = pytest.importorskip("weft.router.schemas_openai")
    assert set(GenerateOptions.__annotations__) <= set(native.GenerateParameters.__struct_fields__)
    assert set(ChatOptions.__annotations__) - {"extra"} <= set(openai.ChatRequest.__struct_fields__)
    assert set(CompletionOptions.__annotations__) - {"extra"} <= set(openai.CompletionRequest.__struct_fields__)


def test_neither_the_server_nor_torch_is_loaded() -> None:
    code = "import sys, weft_client; sys.exit(bool({'weft', 'torch', 'numpy'} & set(sys.modules)))"
    source = Path(weft_client.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=source, check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    assert [name for name in weft_client.__all__ if not hasattr(weft_client, name)] == []


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("url", "settings", "named"),
    [
        ("server.test", {}, "`base_url` must be http://HOST:PORT"),
        ("ftp://server.test", {}, "`base_url`"),
        ("http://server.test:port", {}, "`base_url`"),
        (5, {}, "`base_url`"),
        ("http://server.test", {"api_key": "schlüssel"}, "`api_key` must be printable ASCII"),
        ("http://server.test", {"api_key": "two\nlines"}, "`api_key`"),
        ("http://server.test", {"timeout_s": 0}, "`timeout_s` must be more than 0. Given: 0"),
        ("http://server.test", {"timeout_s": float("nan")}, "`timeout_s`"),
        ("http://server.test", {"max_retries": -1}, "`max_retries` must be 0 or more. Given: -1"),
    ],
)
def test_a_wrong_argument_of_a_client_is_named_at_once(kind: Any, url: Any, settings: Any, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named) as caught:
        kind(url, **settings)
    assert "schl" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": float("nan")}, "`temperature` must be a finite number. Given: nan"),
        ({"logit_bias": {"5": float("inf")}}, r"`logit_bias.5` must be a finite number"),
        ({"stop": ["\ud800"]}, r"`stop\[0\]` must be valid Unicode"),
        ({"user": object()}, "cannot be written as JSON"),
    ],
)
def test_what_json_cannot_say_is_refused_before_anything_is_sent(options: Any, named: str) -> None:
    script = Script()

    with pytest.raises(InvalidArgumentError, match=named):
        script.client.chat(MESSAGES, **options)

    assert script.requests == []


def test_messages_that_are_none_go_to_the_server_which_says_so() -> None:
    script = Script(httpx2.Response(422, json={"error": {"message": "`messages` must be a list"}}))

    with pytest.raises(InvalidRequestError, match="`messages`"):
        script.client.chat(None)
