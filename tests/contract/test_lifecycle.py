"""Loading, ready, draining, failed: what probes and clients hear."""

import pytest
from tests.contract.house import build_house, say

from weft.core.info import EngineHealth
from weft.errors import DeadlineError, OverloadedError, RequestError
from weft.router.lifecycle import Progress, ServerState

GENERATIONS = {
    "/generate": {"inputs": "a"},
    "/generate_stream": {"inputs": "a"},
    "/": {"inputs": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/invocations": {"inputs": "a"},
    "/vertex": {"instances": [{"inputs": "a"}]},
}


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/health/ready"])
async def test_a_healthy_server_answers_200_and_nothing(path: str):
    answer = await build_house().get(path)

    assert (answer.status, answer.body) == (200, b"")


@pytest.mark.parametrize("path", ["/health", "/ping", "/", "/health/ready"])
async def test_a_loading_server_says_how_far_it_is(path: str):
    answer = await build_house(state=ServerState.LOADING).get(path)

    assert answer.status == 503
    assert answer.json == {
        "error": "The model is loading: load, 40 %. Try again later.",
        "error_type": "healthcheck",
        "state": "loading",
        "phase": "load",
        "percent": 40,
    }
    assert answer.headers["retry-after"] == "2"


@pytest.mark.parametrize("state", list(ServerState))
async def test_a_living_process_is_live_in_every_state(state: ServerState):
    assert (await build_house(state=state).get("/health/live")).status == 200


@pytest.mark.parametrize("state", [ServerState.LOADING, ServerState.DRAINING, ServerState.FAILED])
@pytest.mark.parametrize("path", list(GENERATIONS))
async def test_generations_are_refused_unless_ready(path: str, state: ServerState):
    house = build_house(state=state)

    answer = await house.post(path, GENERATIONS[path])

    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert house.backend.requests == []
    if path.startswith("/v1"):
        assert answer.json["error"]["code"] == "not_ready"
    else:
        assert answer.json["state"] == state
        assert answer.json["percent"] == 40


async def test_a_server_that_drains_never_becomes_ready_again():
    house = build_house(state=ServerState.DRAINING)

    house.context.lifecycle.become(Progress(ServerState.READY))

    assert (await house.get("/health/ready")).status == 503
    assert (await house.get("/health/live")).status == 200


@pytest.mark.parametrize(
    "health", [EngineHealth(is_ready=False), EngineHealth(is_ready=True, stalled_ns=11_000_000_000)]
)
async def test_a_dead_or_hung_engine_is_unhealthy(health: EngineHealth):
    house = build_house()
    house.backend.health_now = health

    answer = await house.get("/health")

    assert answer.status == 503
    assert answer.json["error"] == "unhealthy"


async def test_many_probes_ask_the_engine_once_a_second():
    house = build_house()
    num_asked = 0

    async def count() -> EngineHealth:
        nonlocal num_asked
        num_asked += 1
        return EngineHealth(is_ready=True)

    house.backend.health = count
    for _ in range(10):
        await house.get("/health")
    assert num_asked == 1
    house.clock.ns += 2_000_000_000
    await house.get("/health")

    assert num_asked == 2


@pytest.mark.parametrize("path", ["/info", "/v1/models"])
async def test_facts_wait_for_the_model_and_then_stay(path: str):
    house = build_house(state=ServerState.LOADING)
    assert (await house.get(path)).status == 200
    house.context.model = None

    assert (await house.get(path)).status == 503


@pytest.mark.parametrize("state", list(ServerState))
async def test_browsers_get_a_page_at_the_root(state: ServerState):
    answer = await build_house(state=state).get("/", {"accept": "text/html,application/xhtml+xml"})

    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert b"test/bytes" in answer.body
    assert state.encode() in answer.body


class TestAdmission:
    async def test_a_full_house_answers_429_with_retry_after(self):
        house = build_house(settings={"max_concurrent_requests": 1})
        with house.context.admission.admit(1):
            for path, body in GENERATIONS.items():
                answer = await house.post(path, body)

                assert answer.status == 429
                assert int(answer.headers["retry-after"]) >= 1
                if path.startswith("/v1"):
                    assert answer.json["error"]["type"] == "rate_limit_error"
                else:
                    assert answer.json == {"error": "Model is overloaded", "error_type": "overloaded"}

        assert (await house.post("/generate", {"inputs": "a"})).status == 200

    @pytest.mark.parametrize(("error", "status"), [(OverloadedError("full"), 429), (DeadlineError("too late"), 503)])
    async def test_an_engine_that_is_full_or_late_says_when_to_come_back(self, error: RequestError, status: int):
        house = build_house(say("x", fail_after=0, error=error))

        for path, body in GENERATIONS.items():
            answer = await house.post(path, body)

            assert (answer.status, answer.headers["retry-after"]) == (status, "2")

    async def test_a_bad_request_is_told_so_even_by_a_full_house(self):
        house = build_house(settings={"max_concurrent_requests": 1})
        with house.context.admission.admit(1):
            answer = await house.post("/generate", {"inputs": "a", "parameters": {"temperature": 0}})

        assert answer.status == 422

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/generate", {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2}),
            ("/v1/completions", {"prompt": ["a", "b"]}),
        ],
    )
    async def test_every_sequence_takes_a_place(self, path: str, body: dict[str, object]):
        house = build_house(settings={"max_concurrent_requests": 2})

        assert (await house.post(path, body)).status == 200
        with house.context.admission.admit(1):
            assert (await house.post(path, body)).status == 429

    async def test_more_sequences_than_places_are_no_overload(self):
        """TGI says 429, too; who came back would come back for ever."""
        house = build_house(settings={"max_concurrent_requests": 1})

        native = await house.post("/generate", {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}})
        chat = await house.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 2})

        assert (native.status, chat.status) == (422, 400)
        assert "--max-concurrent-requests" in native.json["error"]

    async def test_places_come_back_after_success_and_failure(self):
        house = build_house(settings={"max_concurrent_requests": 1})

        for _ in range(3):
            assert (await house.post("/generate", {"inputs": "a"})).status == 200
            house.backend._script_for = lambda _: 1 / 0
            assert (await house.post("/generate", {"inputs": "a"})).status == 500
            house.backend._script_for = build_house().backend._script_for
        assert house.context.admission.used == 0
        assert house.context.lifecycle.num_generating == 0
