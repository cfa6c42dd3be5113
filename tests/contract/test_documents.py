"""The OpenAPI document describes what is there, and the pages need nothing from elsewhere."""

import re

import jsonschema
import openapi_spec_validator
import pytest
from tests.contract.house import build_house, say

from weft.router.app import ROUTES

BODIES = {
    "/generate": {"inputs": "a", "parameters": {"details": True, "top_n_tokens": 1, "decoder_input_details": True}},
    "/": {"inputs": "a"},
    "/tokenize": {"inputs": "a"},
    "/chat_tokenize": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2},
    "/v1/completions": {"prompt": "a", "logprobs": 1},
    "/invocations": {"prompt": "a"},
    "/vertex": {"instances": [{"inputs": "a"}, {"inputs": "a", "parameters": {"details": True}}]},
    "/v2/models/{name}/infer": {"inputs": [{"name": "x", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
}


async def document():
    return (await build_house().get("/openapi.json")).json


def schema_for(spec, schema):
    return {**schema, "components": spec["components"]}


async def test_the_document_is_valid_openapi_3_1():
    spec = await document()

    openapi_spec_validator.validate(spec)
    assert spec["openapi"].startswith("3.1")
    assert (await build_house().get("/api-doc/openapi.json")).json == spec


async def test_every_route_that_is_not_an_alias_is_described():
    spec = await document()

    described = {(method.upper(), path) for path, methods in spec["paths"].items() for method in methods}
    expected = {(route.method, route.path.replace(":path}", "}")) for route in ROUTES if not route.is_hidden}
    assert described == expected
    ids = [operation["operationId"] for methods in spec["paths"].values() for operation in methods.values()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", list(BODIES))
async def test_answers_and_examples_are_as_described(path: str):
    spec = await document()
    operation = spec["paths"][path]["post"]
    media = operation["requestBody"]["content"]["application/json"]

    jsonschema.validate(media["example"], schema_for(spec, media["schema"]))
    answer = await build_house().post(path, BODIES[path])
    error = await build_house().post(path, {})

    answer_schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate(answer.json, schema_for(spec, answer_schema))
    error_schema = operation["responses"][str(error.status)]["content"]["application/json"]["schema"]
    jsonschema.validate(error.json, schema_for(spec, error_schema))


@pytest.mark.parametrize("path", ["/generate_stream", "/v1/chat/completions", "/v1/completions", "/invocations"])
async def test_events_are_as_described(path: str):
    spec = await document()
    stream = spec["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    data = stream["properties"]["data"]
    event_schema = (data["anyOf"][0] if "anyOf" in data else data)["contentSchema"]
    body = {
        "inputs": "a",
        "parameters": {"details": True},
        "prompt": "a",
        "messages": [{"role": "user", "content": "a"}],
    }

    answer = await build_house(say("hi")).post(
        path, {**body, "stream": True, "stream_options": {"include_usage": True}}
    )

    for event in answer.events:
        if event != "[DONE]":
            jsonschema.validate(event, schema_for(spec, event_schema))


@pytest.mark.parametrize("path", ["/info", "/v1/models", "/v1/models/test/bytes"])
async def test_facts_are_as_described(path: str):
    spec = await document()
    described = path if path in spec["paths"] else "/v1/models/{model_id}"

    answer_schema = spec["paths"][described]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    jsonschema.validate((await build_house().get(path)).json, schema_for(spec, answer_schema))
    to_anthropic = await build_house().get(path, {"anthropic-version": "2023-06-01"})
    jsonschema.validate(to_anthropic.json, schema_for(spec, answer_schema))


@pytest.mark.parametrize("path", ["/docs", "/docs/docs.css", "/docs/docs.js"])
async def test_the_page_works_offline(path: str):
    answer = await build_house().get(path)

    assert answer.status == 200
    assert len(answer.body) > 500
    assert not re.search(rb"(https?:)?//[a-z0-9.-]+\.[a-z]{2,}", answer.body)
    assert "default-src 'none'" in answer.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["landing.html", "docs.html", "../app.py", "..%2fapp.py", "nothing"])
async def test_no_other_file_is_served(name: str):
    assert (await build_house().get(f"/docs/{name}")).status == 404
