"""SageMaker, Vertex AI and KServe: the same generations in other frames."""

import copy
import json
from typing import Any

import pytest
from tests.contract.house import EOS, Script, build_house, ids_of, say, text_of
from tests.contract.test_bad_input import VALUES, as_json

from weft.core.request import Request
from weft.errors import GenerationError
from weft.router.lifecycle import ServerState

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def echo(request: Request) -> Script:
    """Says the prompt in capitals, so that an answer shows to whom it belongs."""
    return Script(token_ids=ids_of(text_of(request.prompt_token_ids).upper()))


class TestSageMaker:
    async def test_inputs_are_answered_as_the_root_answers_them(self):
        house = build_house(say("lo"))
        body = {"inputs": "hel", "parameters": {"details": True, "max_new_tokens": 2}}

        invoked, root = await house.post("/invocations", body), await house.post("/", body)

        assert invoked.json == root.json
        assert invoked.json[0]["generated_text"] == "hello"
        assert set(invoked.headers) == set(root.headers)

    async def test_inputs_are_streamed_as_the_root_streams_them(self):
        house = build_house(say("lo"))
        body = {"inputs": "hel", "stream": True}

        assert (await house.post("/invocations", body)).body == (await house.post("/", body)).body

    async def test_messages_are_answered_as_a_chat_completion(self):
        answer = await build_house(say("hello")).post("/invocations", CHAT)

        assert answer.json["object"] == "chat.completion"
        assert answer.json["choices"][0]["message"]["content"] == "hello"

    async def test_messages_are_streamed_as_a_chat_completion(self):
        answer = await build_house(say("hello")).post("/invocations", {**CHAT, "stream": True})

        assert answer.events[0]["object"] == "chat.completion.chunk"
        assert answer.events[-1] == "[DONE]"

    async def test_a_prompt_is_answered_as_a_completion(self):
        answer = await build_house(say("hello")).post("/invocations", {"prompt": "a"})

        assert answer.json["object"] == "text_completion"

    async def test_inputs_come_before_messages_and_null_is_absent(self):
        house = build_house(say("x"))

        both = await house.post("/invocations", {"inputs": "a", **CHAT})
        null = await house.post("/invocations", {"inputs": None, **CHAT})

        assert isinstance(both.json, list)
        assert null.json["object"] == "chat.completion"

    @pytest.mark.parametrize("body", [{}, {"input": "a"}, {"inputs": None, "messages": None}])
    async def test_a_body_of_no_shape_is_a_decode_error(self, body: dict[str, object]):
        answer = await build_house().post("/invocations", body)

        assert answer.status == 422
        assert answer.json["error"].startswith("Failed to deserialize the JSON body into the target type: ")
        for name in ("inputs", "messages", "prompt"):
            assert f"`{name}`" in answer.json["error"]

    async def test_errors_are_said_as_the_meant_route_says_them(self):
        house = build_house()

        native = await house.post("/invocations", {"inputs": "a", "parameters": {"top_k": 0}})
        chat = await house.post("/invocations", {**CHAT, "temperature": 9})

        assert (native.status, native.json["error_type"]) == (422, "validation")
        assert (chat.status, chat.json["error"]["param"]) == (400, "temperature")

    async def test_ping_is_health(self):
        ready, loading = build_house(), build_house(state=ServerState.LOADING)

        assert (await ready.get("/ping")).status == 200
        assert (await loading.get("/ping")).status == 503


class TestVertex:
    async def test_predictions_come_in_the_order_of_the_instances(self):
        house = build_house(echo)
        instances = [{"inputs": "abcd"}, {"inputs": "e"}, {"messages": CHAT["messages"]}]

        answer = await house.post("/vertex", {"instances": instances})

        assert answer.json == {"predictions": ["ABCD", "E", "[USER]HI[ASSISTANT]"]}
        assert not [name for name in answer.headers if name.startswith("x-compute")]

    async def test_every_parameter_is_honoured(self):
        """TGI used `max_new_tokens` and `seed` alone."""
        house = build_house(say("one two"))
        parameters = {"temperature": 0.5, "top_k": 3, "stop": ["one"], "seed": 7, "max_new_tokens": 9}

        answer = await house.post("/vertex", {"instances": [{"inputs": "a", "parameters": parameters}]})

        request = house.backend.requests[0]
        assert answer.json == {"predictions": ["one"]}
        assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 3, 7)
        assert request.stop.max_new_tokens == 9

    async def test_an_instance_samples_unless_it_says_otherwise(self):
        house = build_house()
        instances = [
            {"inputs": "a"},
            {"inputs": "a", "parameters": {"max_new_tokens": 2}},
            {"inputs": "a", "parameters": {"do_sample": False}},
        ]

        await house.post("/vertex", {"instances": instances})

        assert [request.sampling.is_greedy for request in house.backend.requests] == [False, False, True]

    async def test_details_are_returned_to_those_who_ask(self):
        answer = await build_house(say("hi")).post(
            "/vertex", {"instances": [{"inputs": "a", "parameters": {"details": True}}]}
        )

        (prediction,) = answer.json["predictions"]
        assert prediction["generated_text"] == "hi"
        assert prediction["details"]["tokens"][-1]["id"] == EOS

    async def test_best_of_of_one_instance_leaves_the_others_alone(self):
        scripts = iter([
            Script(token_ids=ids_of("first")),
            Script(token_ids=ids_of("bad"), logprob=-2.0),
            Script(token_ids=ids_of("good"), logprob=-1.0),
            Script(token_ids=ids_of("last")),
        ])  # fmt: skip
        instances = [{"inputs": "a"}, {"inputs": "b", "parameters": {"best_of": 2}}, {"inputs": "c"}]

        answer = await build_house(lambda _: next(scripts)).post("/vertex", {"instances": instances})

        assert answer.json == {"predictions": ["first", "good", "last"]}

    @pytest.mark.parametrize("field", ["stream", "logprobs"])
    async def test_what_a_prediction_cannot_say_is_refused_by_name(self, field: str):
        answer = await build_house().post("/vertex", {"instances": [{"inputs": "a"}], field: True})
        in_chat = await build_house().post("/vertex", {"instances": [{**CHAT, field: True}]})

        assert answer.status == 200
        assert in_chat.status == 422
        assert f"`{field}`" in in_chat.json["error"]

    @pytest.mark.parametrize(
        ("instances", "status", "part"),
        [
            ([], 422, "`instances` must hold 1 to 128 entries. Given: 0"),
            ([{"inputs": "a"}] * 129, 422, "Given: 129"),
            ([{"inputs": "a", "stream": True}], 422, "`stream` has no place in a prediction"),
            ([{"inputs": "a"}, {"inputs": "a", "parameters": {"top_k": 0}}], 422, "(in `instances[1]`)"),
            ([{"input": "a"}], 422, "Missing field `inputs`"),
            ([1], 422, "`instances[0]`"),
            ([{"messages": [{"role": "forbidden", "content": "a"}]}], 422, "Template error: "),
        ],
    )
    async def test_a_wrong_instance_is_named(self, instances: list[object], status: int, part: str):
        answer = await build_house().post("/vertex", {"instances": instances})

        assert answer.status == status
        assert part in answer.json["error"]

    async def test_failures_have_their_own_status(self):
        """TGI said 500 to everything."""
        failing = build_house(say("x", fail_after=0, error=GenerationError("lost")))
        full = build_house(settings={"max_concurrent_requests": 2})

        failed = await failing.post("/vertex", {"instances": [{"inputs": "a"}]})
        with full.context.admission.admit(1):
            refused = await full.post("/vertex", {"instances": [{"inputs": "a"}, {"inputs": "b"}]})

        assert (failed.status, failed.json["error_type"]) == (424, "generation")
        assert (refused.status, refused.json["error_type"]) == (429, "overloaded")
        assert full.context.admission.used == 0

    async def test_the_platforms_own_paths_are_served(self):
        """The path Vertex AI chooses begins with /v1 and is native all the same."""
        predict = "/v1/endpoints/123/deployedModels/456:predict"
        house = build_house(
            echo, settings={"aip_predict_route": predict, "aip_health_route": "/live/vertex", "api_key": "k" * 8}
        )
        body, key = {"instances": [{"inputs": "a"}]}, {"authorization": "Bearer " + "k" * 8}

        assert (await house.post(predict, body, key)).json == {"predictions": ["A"]}
        assert (await house.post(predict, body)).status == 401
        assert "error_type" in (await house.post(predict, {"instances": []}, key)).json
        assert (await house.get("/live/vertex")).status == 200

    async def test_the_platforms_path_wins_over_a_route_of_ours(self):
        house = build_house(echo, settings={"aip_predict_route": "/generate", "aip_health_route": "/health"})

        assert (await house.post("/generate", {"instances": [{"inputs": "a"}]})).json == {"predictions": ["A"]}
        assert (await house.get("/health")).status == 200


def tensor(*texts: str, name: str = "text") -> dict[str, object]:
    return {"name": name, "shape": [len(texts)], "datatype": "BYTES", "data": list(texts)}


class TestKServe:
    @pytest.mark.parametrize("path", ["/v2/models/m/infer", "/v2/models/m/versions/1/infer"])
    async def test_bytes_are_answered_with_bytes(self, path: str):
        """TGI's form: the bytes of a text as numbers."""
        body = {
            "id": "i-1",
            "inputs": [{"name": "in", "shape": [1], "datatype": "BYTES", "data": list("hé".encode())}],
            "outputs": [{"name": "out"}],
        }

        answer = await build_house(echo).post(path, body)

        text = list("HÉ".encode())
        assert answer.json == {
            "id": "i-1",
            "outputs": [{"name": "out", "shape": [1, len(text)], "datatype": "BYTES", "data": text}],
        }

    async def test_texts_are_answered_with_texts(self):
        """The protocol's own form of BYTES in JSON."""
        body = {"inputs": [tensor("a", "b", name="x"), tensor("c", name="y")]}

        answer = await build_house(echo).post("/v2/models/m/infer", body)

        assert answer.json["id"]
        assert answer.json["outputs"] == [
            {"name": "x", "shape": [2], "datatype": "BYTES", "data": ["A", "B"]},
            {"name": "y", "shape": [1], "datatype": "BYTES", "data": ["C"]},
        ]

    async def test_parameters_are_those_of_generate(self):
        house = build_house(say("one two"))
        parameters = {"stop": ["one"], "seed": 3, "do_sample": True, "return_full_text": True}

        answer = await house.post("/v2/models/m/infer", {"inputs": [tensor("a")], "parameters": parameters})

        assert answer.json["outputs"][0]["data"] == ["aone"]
        assert house.backend.requests[0].sampling.seed == 3

    @pytest.mark.parametrize(
        ("body", "error_type", "part"),
        [
            ({"inputs": [tensor("a")], "outputs": [{"name": "x"}] * 2}, "length mismatch",
             "Inputs and outputs length mismatch. Given: 1 `inputs` and 2 `outputs`"),
            ({"inputs": [tensor("a") | {"data": [255, 254]}]}, "utf8", "`inputs[0].data` is not UTF-8"),
            ({"inputs": [tensor("a") | {"data": ["a", 1]}]}, "validation", "must not mix"),
            ({"inputs": [tensor("a") | {"data": [256]}]}, "validation", "`inputs[0].data[0]` must be an integer"),
            ({"inputs": [tensor("a") | {"datatype": "FP32"}]}, "validation", "must be BYTES. Given: 'FP32'"),
            ({"inputs": []}, "validation", "`inputs` must hold 1 to 128"),
            ({"inputs": [tensor("")]}, "validation", "`inputs` cannot be empty"),
            ({"inputs": [tensor("a"), tensor("b", "")]}, "validation", "(in `inputs[1].data`)"),
            ({"inputs": [tensor("a") | {"data": []}]}, "validation", "(in `inputs[0].data`)"),
            ({"inputs": [tensor("a" * 80)]}, "validation", "(in `inputs[0].data`)"),
            ({"inputs": [tensor("a")], "parameters": {"details": True}}, "validation", "`details`"),
            ({"inputs": [tensor("a")], "parameters": {"top_k": 0}}, "validation", "`top_k`"),
        ],
    )  # fmt: skip
    async def test_a_wrong_request_is_refused(self, body: dict[str, object], error_type: str, part: str):
        answer = await build_house().post("/v2/models/m/infer", body)

        assert answer.status == 422
        assert answer.json["error_type"] == error_type
        assert part in answer.json["error"]

    async def test_metadata(self):
        house = build_house()

        server = await house.get("/v2")
        model = await house.get("/v2/models/m/versions/7")

        assert server.json["name"] == "text-generation-inference"
        assert server.json["extensions"] == ["health", "models", "metrics"]
        assert model.json == {"name": "m", "version": "7", "extensions": ["infer", "ready"]}
        assert (await house.get("/v2/models/m")).json["version"] == "1"

    async def test_probes_tell_the_truth(self):
        """TGI's were always live."""
        ready, loading = build_house(), build_house(state=ServerState.LOADING)
        paths = ["/v2/health/ready", "/v2/models/m/ready", "/v2/models/m/versions/1/ready"]

        assert [(await ready.get(path)).json for path in ["/v2/health/live", *paths]] == [{"live": True}] * 4
        assert (await loading.get("/v2/health/live")).status == 200
        assert [(await loading.get(path)).status for path in paths] == [503] * 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/invocations", CHAT),
        ("/vertex", {"instances": [{"inputs": "a"}, {"inputs": "b"}]}),
        ("/v2/models/{name}/infer", {"inputs": [tensor("a", "b")]}),
    ],
)
async def test_one_http_request_counts_once(path: str, body: dict[str, object]):
    house = build_house()

    await house.post(path, body)

    assert house.context.metrics.counter("tgi_request_count").value() == 1
    assert house.context.metrics.counter("tgi_request_success").value() == 1
    assert house.context.metrics.counter("weft_http_requests").value(path, "200") == 1


VERTEX = {"instances": [{"inputs": "a", "parameters": {}}]}
INFER = {"id": "1", "inputs": [tensor("a")], "outputs": [{"name": "o"}], "parameters": {}}
TEXTS = {"text", "number as text", "unicode"}
ANY_TEXT = TEXTS | {"empty text"}
OBJECTS = {"null", "object", "odd object"}
POSITIVE = {name for name, value in VALUES.items() if isinstance(value, int | float) and 0 < value <= 1e308} - {"true"}
PLACES: list[tuple[str, dict[str, Any], list[str | int], set[str]]] = [
    ("/vertex", VERTEX, ["instances"], set()),
    ("/vertex", VERTEX, ["instances", 0], set()),
    ("/vertex", VERTEX, ["instances", 0, "inputs"], TEXTS),
    ("/vertex", VERTEX, ["instances", 0, "parameters"], OBJECTS),
    ("/vertex", VERTEX, ["instances", 0, "parameters", "temperature"], {"null"} | POSITIVE),
    ("/vertex", VERTEX, ["instances", 0, "parameters", "watermark"], {"null", "true", "false"}),
    ("/invocations", VERTEX["instances"][0], ["inputs"], TEXTS),
    ("/invocations", VERTEX["instances"][0], ["stream"], {"null", "true", "false"}),
    ("/invocations", VERTEX["instances"][0], ["parameters", "temperature"], {"null"} | POSITIVE),
    ("/v2/models/m/infer", INFER, ["id"], {"null"} | ANY_TEXT),
    ("/v2/models/m/infer", INFER, ["inputs"], set()),
    ("/v2/models/m/infer", INFER, ["inputs", 0], set()),
    ("/v2/models/m/infer", INFER, ["inputs", 0, "name"], ANY_TEXT),
    ("/v2/models/m/infer", INFER, ["inputs", 0, "shape"], {"array", "array of int"}),
    ("/v2/models/m/infer", INFER, ["inputs", 0, "datatype"], set()),
    ("/v2/models/m/infer", INFER, ["inputs", 0, "data"], {"array of text", "array of int"}),
    ("/v2/models/m/infer", INFER, ["outputs"], {"null", "array"}),
    ("/v2/models/m/infer", INFER, ["outputs", 0], set()),
    ("/v2/models/m/infer", INFER, ["outputs", 0, "name"], ANY_TEXT),
    ("/v2/models/m/infer", INFER, ["parameters"], OBJECTS),
    ("/v2/models/m/infer", INFER, ["parameters", "temperature"], {"null"} | POSITIVE),
]


@pytest.mark.parametrize(("path", "body", "place", "fine"), PLACES)
async def test_a_wrong_value_anywhere_is_a_typed_error_that_names_its_place(
    path: str, body: dict[str, Any], place: list[str | int], fine: set[str]
):
    house = build_house()
    name = [step for step in place if isinstance(step, str)][-1]
    wrong = []
    for kind, value in VALUES.items():
        answer = await house.request("POST", path, _with(body, place, value))
        is_right = answer.status == 200 if kind in fine else answer.status == 422 and name in answer.json["error"]
        if not is_right:
            wrong.append((kind, answer.status, answer.body))
    assert wrong == []
    assert house.context.admission.used == 0


def _with(body: dict[str, Any], place: list[str | int], value: object) -> bytes:
    marker = "__value__"
    changed = copy.deepcopy(body)
    holder: Any = changed
    for step in place[:-1]:
        holder = holder[step]
    holder[place[-1]] = marker
    return json.dumps(changed).encode().replace(f'"{marker}"'.encode(), as_json(value))
