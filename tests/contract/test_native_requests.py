"""TGI 3.3.7's native HTTP contract, row by row, the requests: routes, parameters, what reaches the engine, transport.

A row that differs from TGI says why beside it; the decisions stand in docs/reference/endpoints.md.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.contract.house import Answer, House, build_house

WHOLE, STREAM, COMPAT = "/generate", "/generate_stream", "/"
MODEL_LIMITS = {"max_total_tokens": 64, "max_input_tokens": 40}


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    parameters: dict[str, Any] | None
    says: str = ""
    """The message, without its prefix; empty: accepted."""
    paths: tuple[str, ...] = (WHOLE, STREAM, COMPAT)
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: str = "abc"


async def asked(row: Row, path: str) -> tuple[House, Answer]:
    house = build_house(settings=row.settings, **MODEL_LIMITS)
    body: dict[str, Any] = {"inputs": row.inputs}
    if row.parameters is not None:
        body["parameters"] = row.parameters
    return house, await house.post(path, body)


def rows_and_paths(rows: list[Row]) -> list[Any]:
    return [pytest.param(row, path, id=f"{row.name} {path}") for row in rows for path in row.paths]


NO_STREAM = (WHOLE, COMPAT)

# --- routes -------------------------------------------------------------------------------------------------------

ROUTES_OF_TGI = [
    *(("POST", path) for path in (
        "/", "/generate", "/generate_stream", "/v1/chat/completions", "/v1/completions", "/vertex", "/invocations",
        "/tokenize", "/chat_tokenize", "/v2/models/m/versions/1/infer", "/predict",
    )),
    *(("GET", path) for path in (
        "/", "/info", "/model_info", "/health", "/ping", "/metrics", "/v1/models", "/docs", "/api-doc/openapi.json",
        "/v2/models/m/versions/1", "/v2/models/m/versions/1/ready", "/v2", "/v2/health/live", "/v2/health/ready",
        "/alive",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES_OF_TGI)
async def test_every_route_of_tgi_is_there(method: str, path: str):
    """With those that TGI has in builds for Google's and KServe's platforms, and the older /model_info."""
    house = build_house(settings={"aip_predict_route": "/predict", "aip_health_route": "/alive"})

    answer = await house.request(method, path, b"{}" if method == "POST" else None)

    assert answer.status == (200 if method == "GET" else 400 if path.startswith("/v1") else 422)


# --- parameters: bounds and messages ------------------------------------------------------------------------------

REFUSED = [
    Row("best_of above the limit", {"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3",
        NO_STREAM),
    Row("best_of where none is allowed", {"best_of": 2, "do_sample": True},
        "`best_of` != 1 is not allowed for this endpoint. Given: 2", NO_STREAM, {"max_best_of": 1}),
    Row("best_of without sampling", {"best_of": 2}, "you must use sampling when `best_of` is > 1. Given: 2", NO_STREAM),
    Row("best_of in a stream", {"best_of": 2, "do_sample": True},
        "`best_of` != 1 is not supported when streaming tokens. Given: 2", (STREAM,)),
    Row("best_of 0 in a stream", {"best_of": 0}, "`best_of` != 1 is not supported when streaming tokens. Given: 0",
        (STREAM,)),
    Row("temperature 0", {"temperature": 0}, "`temperature` must be strictly positive. Given: 0.0"),
    Row("temperature below 0", {"temperature": -0.1}, "`temperature` must be strictly positive. Given: -0.1"),
    Row("repetition_penalty 0", {"repetition_penalty": 0.0},
        "`repetition_penalty` must be strictly positive. Given: 0.0"),
    Row("frequency_penalty high", {"frequency_penalty": 2.01},
        "`frequency_penalty` must be >= -2.0 and <= 2.0. Given: 2.01"),
    Row("frequency_penalty low", {"frequency_penalty": -2.01},
        "`frequency_penalty` must be >= -2.0 and <= 2.0. Given: -2.01"),
    Row("top_k 0", {"top_k": 0}, "`top_k` must be strictly positive. Given: 0"),
    Row("top_k below 0", {"top_k": -1}, "`top_k` must be strictly positive. Given: -1"),
    Row("top_p 0", {"top_p": 0.0}, "`top_p` must be > 0.0 and < 1.0. Given: 0.0"),
    Row("top_p above 1", {"top_p": 1.01}, "`top_p` must be > 0.0 and < 1.0. Given: 1.01"),
    Row("typical_p 0", {"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0. Given: 0.0"),
    Row("typical_p above 1", {"typical_p": 1.01}, "`typical_p` must be > 0.0 and < 1.0. Given: 1.01"),
    Row("max_new_tokens 0", {"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive. Given: 0"),
    Row("five stop sequences", {"stop": list("vwxyz")}, "`stop` supports up to 4 stop sequences. Given: 5"),
    Row("truncate 0", {"truncate": 0}, "`truncate` must be strictly positive and less than 40. Given: 0"),
    Row("truncate above the limit", {"truncate": 41},
        "`truncate` must be strictly positive and less than 40. Given: 41"),
    Row("decoder_input_details in a stream", {"decoder_input_details": True},
        "`decoder_input_details` == true is not supported when streaming tokens. Given: true", (STREAM,)),
    Row("top_n_tokens above the limit", {"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    Row("seed below 0", {"seed": -1}, "`seed` must be >= 0 and <= 18446744073709551615. Given: -1"),
    Row("a seed of many digits", {"seed": 10**4000},
        "`seed` must be >= 0 and <= 18446744073709551615. Given: 1000000000000000… (4001 characters)"),
    Row("empty inputs", {}, "`inputs` cannot be empty", inputs=""),
    Row("a prompt that is too long", {}, "`inputs` must have less than 40 tokens. Given: 41", inputs="a" * 40),
    Row("a prompt without room behind it", {"max_new_tokens": 1},
        "`inputs` tokens + `max_new_tokens` must be <= 64. Given: 65 `inputs` tokens and 1 `max_new_tokens`",
        inputs="a" * 64),
    # TGI takes the form and then speaks of the grammar itself; here none is supported yet.
    Row("a grammar", {"grammar": {"type": "json", "value": {"properties": {}}}}, "`grammar` is not supported yet"),
    Row("a grammar where none is wanted", {"grammar": {"type": "regex", "value": "a"}},
        "grammar is not supported here (--disable-grammar-support)", settings={"disable_grammar_support": True}),
    # TGI takes any name for the base model.
    Row("an adapter", {"adapter_id": "a"}, "`adapter_id` is not supported yet"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "path"), rows_and_paths(REFUSED))
async def test_a_value_out_of_range_is_refused_with_tgis_words(row: Row, path: str):
    """TGI says so in an event of a stream with status 200; here every failure known in time has its status.

    Behind TGI's sentence stand the value, where it lacks it, and what to do.
    """
    _, answer = await asked(row, path)

    assert answer.status == 422
    assert set(answer.json) == {"error", "error_type"}
    assert answer.json["error_type"] == "validation"
    sentence, _, rest = answer.json["error"].partition(row.says)
    assert sentence == "Input validation error: "
    assert rest.startswith("; ")
    assert not [name for name in answer.headers if name.startswith("x-compute")]


ACCEPTED = [
    Row("best_of 0 is 1", {"best_of": 0}, paths=NO_STREAM),
    Row("best_of at the limit", {"best_of": 2, "do_sample": True}, paths=NO_STREAM),
    Row("temperature 1.0 counts as sampling for best_of", {"best_of": 2, "temperature": 1.0}, paths=NO_STREAM),
    # TGI refuses a seed with best_of, because its sequences would be alike; here seeds are derived from it.
    Row("seed with best_of", {"best_of": 2, "do_sample": True, "seed": 1}, paths=NO_STREAM),
    Row("a small temperature", {"temperature": 1e-6}),
    Row("repetition_penalty below 1", {"repetition_penalty": 0.5}),
    Row("frequency_penalty at its ends", {"frequency_penalty": -2.0}),
    Row("frequency_penalty at its other end", {"frequency_penalty": 2}),
    Row("top_k 1", {"top_k": 1}),
    Row("top_p 0.99", {"top_p": 0.99}),
    # TGI refuses 1.0 although it is the neutral value that clients send.
    Row("top_p 1.0 is off", {"top_p": 1.0}),
    Row("typical_p 1.0 is off", {"typical_p": 1}),
    Row("four stop sequences", {"stop": list("wxyz")}),
    Row("no stop sequence", {"stop": []}),
    Row("truncate at the limit", {"truncate": 40}),
    Row("truncate saves a prompt that is too long", {"truncate": 10}, inputs="a" * 60),
    Row("top_n_tokens 0", {"top_n_tokens": 0}),
    Row("top_n_tokens at the limit", {"top_n_tokens": 5}),
    Row("top_n_tokens at another limit", {"top_n_tokens": 4}, settings={"max_top_n_tokens": 4}),
    Row("the largest seed", {"seed": 2**64 - 1}),
    # TGI checks the first 1024 tokens alone and cuts silently, or refuses; here the answer says what is left.
    Row("max_new_tokens beyond the context", {"max_new_tokens": 1_000_000}),
    Row("a prompt of the longest length", {}, inputs="a" * 39),
    Row("fields that TGI does not know", {"stop_sequences": ["a"], "max_time": 1, "num_return_sequences": 2,
        "min_p": 0.1, "logit_bias": {}, "min_new_tokens": 3, "ignore_eos_token": True}),
    # The client package of TGI sends nulls; TGI refuses `parameters: null`.
    Row("null parameters", {"best_of": None, "temperature": None, "stop": None, "do_sample": None, "details": None}),
    Row("no parameters", None),
]  # fmt: skip


@pytest.mark.parametrize(("row", "path"), rows_and_paths(ACCEPTED))
async def test_a_value_in_range_is_accepted(row: Row, path: str):
    house, answer = await asked(row, path)

    assert answer.status == 200
    for request in house.backend.requests:
        request.check(vocab_size=258, max_total_tokens=64)


ORDER = [
    ({"best_of": 9, "temperature": 0}, "`best_of`"),
    ({"temperature": 0, "top_p": 0}, "`temperature`"),
    ({"repetition_penalty": 0, "frequency_penalty": 9}, "`repetition_penalty`"),
    ({"frequency_penalty": 9, "top_p": 0}, "`frequency_penalty`"),
    ({"top_p": 0, "typical_p": 0}, "`top_p`"),
    ({"typical_p": 0, "top_k": 0}, "`typical_p`"),
    ({"top_k": 0, "max_new_tokens": 0}, "`top_k`"),
    ({"max_new_tokens": 0, "stop": list("vwxyz")}, "`max_new_tokens`"),
    ({"stop": list("vwxyz"), "top_n_tokens": 9}, "`stop`"),
    ({"top_n_tokens": 9, "truncate": 0}, "`top_n_tokens`"),
    ({"truncate": 0, "grammar": {"type": "json", "value": {}}}, "`inputs`"),
]


@pytest.mark.parametrize(("parameters", "first"), ORDER)
async def test_the_first_failure_in_tgis_order_wins(parameters: dict[str, Any], first: str):
    answer = await build_house().post(WHOLE, {"inputs": "", "parameters": parameters})

    assert answer.json["error"].startswith(f"Input validation error: {first}")


async def test_overload_is_said_after_validation():
    """TGI takes the place first, so that a wrong request is told to come back and be refused."""
    house = build_house(settings={"max_concurrent_requests": 1})
    with house.context.admission.admit(1):
        wrong = await house.post(WHOLE, {"inputs": "a", "parameters": {"top_k": 0}})
        right = await house.post(WHOLE, {"inputs": "a"})

    assert (wrong.status, right.status) == (422, 429)


# --- what is asked of the engine ----------------------------------------------------------------------------------

GREEDY = [
    (None, False),
    ({}, True),
    ({"temperature": 1.0}, True),
    ({"temperature": 0.9}, False),
    ({"do_sample": True}, False),
    ({"do_sample": False}, True),
    ({"do_sample": False, "temperature": 0.5}, False),
    ({"top_k": 5}, False),
    ({"top_p": 0.9}, False),
    ({"top_p": 1.0}, True),
    ({"typical_p": 0.9}, False),
    ({"repetition_penalty": 1.3, "frequency_penalty": 1.0, "watermark": True, "seed": 3}, True),
]


@pytest.mark.parametrize(("parameters", "is_greedy"), GREEDY)
async def test_sampling_is_on_exactly_where_tgi_has_it_on(parameters: dict[str, Any] | None, is_greedy: bool):
    house = build_house()
    body = {"inputs": "a"} | ({} if parameters is None else {"parameters": parameters})

    answer = await house.post(WHOLE, body | {"stream": True})  # `stream` means nothing on this route

    assert answer.headers["content-type"] == "application/json"
    assert house.backend.requests[0].sampling.is_greedy is is_greedy


async def test_two_requests_without_a_seed_have_different_ones():
    house = build_house()

    await house.post(WHOLE, {"inputs": "a"})
    await house.post(WHOLE, {"inputs": "a"})

    first, second = house.backend.requests
    assert first.sampling.seed != second.sampling.seed


# --- transport ----------------------------------------------------------------------------------------------------

JSON = {"content-type": "application/json"}
TRANSPORT = [
    (b"{}", {"content-type": "text/plain"}, 415,
     "Expected request with `Content-Type: application/json`. Given: `text/plain`"),
    (b"{}", {"content-type": ""}, 415, "Expected request with `Content-Type: application/json`. Given: nothing"),
    (b"{}", JSON | {"content-encoding": "gzip"}, 415, "Expected request without `Content-Encoding`. Given: `gzip`"),
    (b"", JSON, 400, "Failed to parse the request body as JSON: Input data was truncated. "),
    (b"{", JSON, 400, "Failed to parse the request body as JSON: "),
    (b'{"inputs":"\xff"}', JSON, 400, "Failed to parse the request body as JSON: not UTF-8. "),
    (b'{"inputs":"\\ud800"}', JSON, 400, "Failed to parse the request body as JSON: "),
    (b'\xef\xbb\xbf{"inputs":"a"}', JSON, 400, "Failed to parse the request body as JSON: "),
    (b'{"inputs":"a"} 1', JSON, 400, "Failed to parse the request body as JSON: trailing characters"),
    (b'{"inputs":"a","inputs":"a"}', JSON, 422,
     "Failed to deserialize the JSON body into the target type: Duplicate field `inputs`; send it once"),
    (b'{"inputs":"a","parameters":{"top_k":1,"top_\\u006b":2}}', JSON, 422, "Duplicate field `top_k`"),
    (b'{"inputs":"a","parameters":{"temperature":1e400}}', JSON, 422, "`parameters.temperature`"),
    (b'{"inputs":1}', JSON, 422, "Failed to deserialize the JSON body into the target type: `inputs`"),
    (b"{}", JSON, 422, "Failed to deserialize the JSON body into the target type: Missing field `inputs`"),
    (b'{"inputs":"a","parameters":3}', JSON, 422, "`parameters`"),
    (b'{"inputs":"a","parameters":{"max_new_tokens":-1}}', JSON, 422,
     "`parameters.max_new_tokens` must be an integer >= 0. Given: -1"),
    (b'{"inputs":"a","parameters":{"top_k":1.5}}', JSON, 422, "must be an integer or null. Given: 1.5"),
    (b'{"inputs":"a","parameters":{"stop":"x"}}', JSON, 422, "`parameters.stop`"),
    (b'{"inputs":"' + b"a" * 1000 + b'"}', JSON, 413, "Failed to buffer the request body: length limit exceeded"),
    (b'{"inputs":"' + b"a" * 488 + b'"}', JSON, 413, "At most 500 bytes are read (--payload-limit). Given: "),
]  # fmt: skip


@pytest.mark.parametrize("path", [WHOLE, STREAM, COMPAT])
@pytest.mark.parametrize(("body", "headers", "status", "says"), TRANSPORT)
async def test_a_body_that_cannot_be_read(path: str, body: bytes, headers: dict[str, str], status: int, says: str):
    """TGI's framework answers these with plain text; here they have the form of every other error."""
    answer = await build_house(settings={"payload_limit": 500}).post(path, body, headers)

    assert answer.status == status
    assert says in answer.json["error"]
    assert answer.json["error_type"] == "validation"


@pytest.mark.parametrize("headers", [{}, {"content-length": "20"}])
async def test_a_body_may_have_exactly_as_many_bytes_as_the_limit(headers: dict[str, str]):
    body = b'{"inputs":"a"}'.ljust(20)

    assert (await build_house(settings={"payload_limit": 20}).post(WHOLE, body, headers)).status == 200
    assert (await build_house(settings={"payload_limit": 19}).post(WHOLE, body, headers)).status == 413


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "application/x+json"])
async def test_json_content_types_are_read(media_type: str):
    headers = {"content-type": media_type, "content-encoding": "identity"}

    assert (await build_house().post(WHOLE, b'{"inputs":"a"}', headers)).status == 200
