"""Every field of every route, with every kind of wrong value, sent to a real server: answers, never accidents.

`tests/contract` says which value is right for which field. Here stands what must hold for all of them with a model
behind: no status of 500 or above, refusals that name the field, the same processes afterwards, and nothing left
running. Values are JSON text, so that NaN, overflow and broken escapes get through.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import msgspec
import pytest
from tests.e2e.harness import RunningServer

from weft.router.schemas_native import GenerateParameters, GenerateRequest
from weft.router.schemas_openai import ChatRequest, CompletionRequest, Message

pytestmark = pytest.mark.e2e

VALUES = {
    "null": "null",
    "true": "true",
    "text": '"x"',
    "empty text": '""',
    "unicode": '"\\u0000\\ud7ff\U0010ffff\u202e\u0301"',
    "lone surrogate": '"\\ud800"',
    "array": "[]",
    "array of null": "[null]",
    "array of array": "[[[]]]",
    "object": "{}",
    "negative": "-1",
    "negative fraction": "-0.5",
    "zero": "0",
    "minus zero": "-0.0",
    "one": "1",
    "fraction": "0.5",
    "max int32": str(2**31 - 1),
    "max int32 + 1": str(2**31),
    "max uint32": str(2**32 - 1),
    "max uint32 + 1": str(2**32),
    "max uint64": str(2**64 - 1),
    "max uint64 + 1": str(2**64),
    "huge integer": "9" * 400,
    "huge number": "1e308",
    "overflow": "1e999",
    "NaN": "NaN",
    "Infinity": "-Infinity",
}
NOT_JSON = {"NaN", "Infinity", "lone surrogate"}
"""Refused by the parser, which knows no fields."""


@dataclass(frozen=True)
class Door:
    """A route, a small body that it takes, and the fields that may be put wrong in it."""

    path: str
    body: str
    """JSON with FIELD where a field may stand."""
    fields: tuple[str, ...]
    required: tuple[str, ...] = ()

    def cases(self) -> Iterator[tuple[str, str, str]]:
        """(field, kind of value, body)."""
        for field in self.fields:
            for kind, value in VALUES.items():
                yield field, kind, self.body.replace("FIELD", f'"{field}": {value}')


def names(struct: type[msgspec.Struct], *excluded: str) -> tuple[str, ...]:
    return tuple(field.name for field in msgspec.structs.fields(struct) if field.name not in excluded)


MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'
DOORS = (
    Door("/generate_stream", '{"inputs": "Hi", "parameters": {FIELD}}', names(GenerateParameters)),
    Door("/generate_stream", "{FIELD}", names(GenerateRequest, "parameters"), required=("inputs",)),
    Door("/generate_stream", '{"inputs": "Hi", FIELD}', ("parameters",)),
    Door("/v1/chat/completions", '{"stream": true, ' + MESSAGES + ", FIELD}", names(ChatRequest, "messages", "stream")),
    Door("/v1/chat/completions", '{"stream": true, FIELD}', ("messages",), required=("messages",)),
    Door("/v1/chat/completions", '{"stream": true, "messages": [{"role": "user", FIELD}]}', ("content",)),
    Door(
        "/v1/chat/completions",
        '{"stream": true, "messages": [{"role": "user", "content": "Hi", FIELD}]}',
        names(Message, "role", "content"),
    ),
    Door("/v1/chat/completions", '{"stream": true, "messages": [{"content": "Hi", FIELD}]}', ("role",), ("role",)),
    Door(
        "/v1/completions",
        '{"stream": true, "prompt": "Hi", FIELD}',
        names(CompletionRequest, "prompt", "stream"),
    ),
    Door("/v1/completions", '{"stream": true, FIELD}', ("prompt",), required=("prompt",)),
    Door("/v1/completions", '{"prompt": "Hi", "max_tokens": 1, FIELD}', ("stream",)),
)


@dataclass(frozen=True)
class Answer:
    """Status, and the body of a refusal."""

    status: int
    text: str


def ask(server: RunningServer, path: str, body: str) -> Answer:
    """Send a body, again when the server is too busy to look at it.

    A stream that begins well is left at once: what it would say is not in question here.
    """
    content = body.encode("utf-8", errors="surrogatepass")

    def send() -> Answer | None:
        with server.http.stream("POST", path, content=content, headers={"content-type": "application/json"}) as reply:
            text = "" if reply.status_code == 200 else reply.read().decode()
            return None if reply.status_code == 429 else Answer(reply.status_code, text)

    answer: Answer = server.wait_until(send, "a place for the request")
    return answer


@pytest.mark.parametrize("door", DOORS, ids=lambda door: f"{door.path} {door.fields[0]}")
def test_every_wrong_value_is_refused_by_name_or_served(running_server: RunningServer, door: Door) -> None:
    cases = list(door.cases())
    before = process_ids(running_server)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda case: ask(running_server, door.path, case[2]), cases))

    faults = [
        f"{field} = {kind}: {answer.status} {answer.text[:200]}"
        for (field, kind, _), answer in zip(cases, answers, strict=True)
        if not is_proper(door, field, kind, answer)
    ]
    assert not faults, "\n".join(faults)
    assert process_ids(running_server) == before, "a process was restarted"
    running_server.wait_idle()


def is_proper(door: Door, field: str, kind: str, answer: Answer) -> bool:
    """Served, or refused with the right status in the route's own form, naming the field."""
    if answer.status == 200:
        return True
    if answer.status not in {400, 404, 422}:
        return False
    body = json.loads(answer.text)
    if door.path.startswith("/v1"):
        error = body["error"]
        is_known = answer.status == (404 if error["code"] == "model_not_found" else 400)
        text = f"{error['param']} {error['message']}"
    else:
        is_known = body["error_type"] == "validation"
        text = body["error"]
    return is_known and (field in text or kind in NOT_JSON)


@pytest.mark.parametrize("door", [door for door in DOORS if door.required], ids=lambda door: door.fields[0])
def test_a_missing_field_is_named(running_server: RunningServer, door: Door) -> None:
    body = door.body.replace(", FIELD", "").replace("FIELD", "")

    answer = ask(running_server, door.path, body)

    assert answer.status in {400, 422}
    assert all(field in answer.text for field in door.required)


BODIES = {
    "nothing": b"",
    "no JSON": b"{",
    "no object": b'"text"',
    "number": b"1",
    "not UTF-8": b'{"inputs": "\xff\xfe"}',
    "a key twice": b'{"inputs": "a", "inputs": "b", "parameters": {"max_new_tokens": 1}}',
    "deep array": b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep object": b'{"x":' * 50_000 + b"1" + b"}" * 50_000,
    "too large": b'{"inputs": "' + b"a" * 3_000_000 + b'"}',
    "a long prompt": json.dumps({"inputs": "word " * 20_000}).encode(),
    "zero bytes": b'{"inputs": "a\\u0000b", "parameters": {"max_new_tokens": 1}}',
    "many fields": json.dumps({"inputs": "a" * 10**6, **{f"f{i}": i for i in range(50_000)}}).encode(),
}


@pytest.mark.parametrize("path", ["/generate", "/", "/v1/chat/completions", "/v1/completions", "/tokenize"])
@pytest.mark.parametrize("kind", BODIES)
def test_a_body_that_is_wrong_as_a_whole_gets_a_typed_answer(
    running_server: RunningServer, path: str, kind: str
) -> None:
    answer = running_server.http.post(path, content=BODIES[kind], headers={"content-type": "application/json"})

    assert answer.status_code in {200, 400, 413, 422}, answer.text
    if answer.status_code != 200:
        body = answer.json()
        assert body["error"]["message"] if path.startswith("/v1") else body["error_type"]


def test_a_wrong_method_path_or_type_gets_a_typed_answer(running_server: RunningServer) -> None:
    http = running_server.http

    assert http.get("/generate").status_code == 405
    assert http.post("/nowhere", json={}).status_code == 404
    assert http.post("/generate", content=b"inputs=a", headers={"content-type": "text/plain"}).status_code == 415
    assert http.get("/v1/models/nobody").json()["error"]["code"] == "model_not_found"


def process_ids(server: RunningServer) -> list[int]:
    """Of the processes that serve; workers for chat templates come and go."""
    return [server.process.pid, server.wait_child("router").pid, server.wait_child("shard-0").pid]
