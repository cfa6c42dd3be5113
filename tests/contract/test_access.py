"""Who may call what, and what every answer carries: keys, browsers, ids, methods, types, sizes."""

import re

import pytest
from tests.contract.house import build_house

from weft.router.app import ROUTES
from weft.router.routes import Access, Route, RouteTable

KEY = "sk-Correct-Horse"
BEARER = {"authorization": f"Bearer {KEY}"}
BODIES = {
    "/generate": {"inputs": "a"},
    "/generate_stream": {"inputs": "a"},
    "/": {"inputs": "a"},
    "/tokenize": {"inputs": "a"},
    "/chat_tokenize": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"prompt": "a"},
    "/invocations": {"inputs": "a"},
    "/vertex": {"instances": [{"inputs": "a"}]},
}


def concrete(route: Route) -> str:
    return route.path.replace("{model_id:path}", "test/bytes").replace("{name}", "docs.css")


class TestKeys:
    @pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
    @pytest.mark.parametrize(
        ("headers", "is_right"),
        [
            ({}, False),
            ({"authorization": "Bearer wrong"}, False),
            ({"authorization": f"Bearer {KEY.lower()}"}, False),
            ({"authorization": f"Bearer {KEY}x"}, False),
            ({"authorization": f"Bearer {KEY[:-1]}"}, False),
            ({"authorization": f"Basic {KEY}"}, False),
            ({"authorization": KEY}, False),
            ({"authorization": "Bearer "}, False),
            ({"authorization": "Bearer \xe9"}, False),
            ({"x-api-key": f"{KEY}x"}, False),
            ({"x-api-key": f"Bearer {KEY}"}, False),
            ({"x-api-key": KEY}, True),
            (BEARER, True),
            ({"authorization": f"bearer {KEY}"}, True),
        ],
    )
    async def test_a_route_opens_to_the_exact_key_only(self, route: Route, headers: dict[str, str], is_right: bool):
        house = build_house(settings={"api_key": KEY})

        answer = await house.request(route.method, concrete(route), BODIES.get(route.path, route.example), headers)

        is_open = is_right or route.access is not Access.USER
        refused = {"/v1/embeddings": 400, "/embed": 422}
        found = 404 if "{response_id}" in route.path else refused.get(route.path, 200)
        assert answer.status == (found if is_open else 401)

    @pytest.mark.parametrize("header", [(b"authorization", f"Bearer {KEY}".encode()), (b"x-api-key", KEY.encode())])
    async def test_a_key_sent_twice_is_no_key(self, header: tuple[bytes, bytes]):
        """Which of the two a proxy in front has checked is anybody's guess."""
        house = build_house(settings={"api_key": KEY})
        async with house.exchange("GET", "/info", None, BEARER) as answer:
            await answer.finished()
        scope_headers = [header] * 2
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        await house.app({"type": "http", "method": "GET", "path": "/info", "headers": scope_headers}, receive, send)

        assert answer.status == 200
        assert sent[0]["status"] == 401

    @pytest.mark.parametrize("path", ["/info", "/v1/models"])
    async def test_a_refusal_speaks_the_dialect_of_its_route(self, path: str):
        answer = await build_house(settings={"api_key": KEY}).get(path)

        assert answer.headers["www-authenticate"] == "Bearer"
        if path.startswith("/v1"):
            assert answer.json["error"]["code"] == "invalid_api_key"
        else:
            assert answer.json["error_type"] == "unauthorized"

    async def test_probes_can_be_closed_too(self):
        house = build_house(settings={"api_key": KEY, "protect_health": True, "protect_metrics": True})

        for path in ("/health", "/ping", "/metrics", "/"):
            assert (await house.get(path)).status == 401
            assert (await house.get(path, BEARER)).status == 200

    async def test_without_a_key_everything_is_open(self):
        assert (await build_house().get("/info")).status == 200

    def test_a_route_without_an_access_class_is_a_start_up_error(self):
        route = Route(method="GET", path="/x", handler=None, access=None, summary="", tag="")

        with pytest.raises(ValueError, match="does not declare who may call it"):
            RouteTable([route])

    def test_a_route_that_stands_twice_is_a_start_up_error(self):
        with pytest.raises(ValueError, match="twice"):
            RouteTable([ROUTES[0], ROUTES[0]])


class TestPaths:
    @pytest.mark.parametrize(
        "path", ["/nothing", "/v1/nothing", "//generate", "/generate/", "/v1/models/", "/generate;x", "/GENERATE"]
    )
    async def test_a_path_that_is_not_in_the_table_is_404(self, path: str):
        answer = await build_house().get(path)

        assert answer.status == 404
        assert "error" in answer.json

    @pytest.mark.parametrize(("method", "path"), [("GET", "/generate"), ("DELETE", "/health"), ("POST", "/v1/models")])
    async def test_a_wrong_method_is_405(self, method: str, path: str):
        assert (await build_house().request(method, path)).status == 405

    async def test_head_is_get(self):
        assert (await build_house().request("HEAD", "/health")).status == 200


class TestIds:
    async def test_every_answer_has_an_id(self):
        house = build_house()

        for path in ("/health", "/nothing", "/metrics"):
            assert re.fullmatch("[0-9a-f]{32}", (await house.get(path)).headers["x-request-id"])
        assert (await house.post("/generate_stream", {"inputs": "a"})).headers["x-request-id"]

    async def test_a_sane_id_of_the_client_is_echoed(self):
        answer = await build_house().get("/health", {"x-request-id": "trace-7/a.b"})

        assert answer.headers["x-request-id"] == "trace-7/a.b"

    @pytest.mark.parametrize("value", ["", "a b", "x" * 129, "line\nbreak", "caf\xe9", "\x1b[31m"])
    async def test_an_odd_id_of_the_client_is_replaced(self, value: str):
        answer = await build_house().get("/health", {"x-request-id": value})

        assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"])

    async def test_the_clients_id_never_becomes_the_engines(self):
        house = build_house()

        await house.post("/generate", {"inputs": "a"}, {"x-request-id": "7"})
        await house.post("/generate", {"inputs": "a"}, {"x-request-id": "7"})

        first, second = (request.request_id for request in house.backend.requests)
        assert first != second
        assert 7 not in (first, second)


class TestBrowsers:
    PREFLIGHT = {  # noqa: RUF012
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }

    async def test_any_origin_may_call_and_send_a_key(self):
        answer = await build_house(settings={"api_key": KEY}).request("OPTIONS", "/generate", None, self.PREFLIGHT)

        assert answer.status == 200
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "authorization" in answer.headers["access-control-allow-headers"]
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "x-request-id" in answer.headers

    async def test_origins_can_be_listed(self):
        house = build_house(settings={"cors_allow_origin": ("https://app.example",)})
        stranger = {**self.PREFLIGHT, "origin": "https://evil.example"}

        friend = await house.request("OPTIONS", "/generate", None, self.PREFLIGHT)
        refused = await house.request("OPTIONS", "/generate", None, stranger)

        assert friend.headers["access-control-allow-origin"] == "https://app.example"
        assert refused.status == 400
        assert "access-control-allow-origin" not in refused.headers

    async def test_errors_can_be_read_by_the_page_too(self):
        answer = await build_house().post("/generate", {}, {"origin": "https://app.example"})

        assert answer.status == 422
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


class TestBodies:
    @pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
    async def test_a_body_that_is_not_called_json_is_415(self, content_type: str):
        answer = await build_house().post("/generate", {"inputs": "a"}, {"content-type": content_type})

        assert answer.status == 415
        assert "application/json" in answer.json["error"]

    @pytest.mark.parametrize(
        "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/x+json"]
    )
    async def test_every_kind_of_json_is_json(self, content_type: str):
        assert (await build_house().post("/generate", {"inputs": "a"}, {"content-type": content_type})).status == 200

    @pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
    async def test_a_body_over_the_limit_is_413(self, path: str):
        house = build_house(settings={"payload_limit": 100})

        answer = await house.post(path, {"inputs": "a" * 200})
        declared = await house.post(path, b"{}", {"content-length": "101"})

        assert (answer.status, declared.status) == (413, 413)
        assert answer.headers["connection"] == "close"

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"nope", b'{"inputs":"a"} x', b"\xff\xfe", b'{"inputs":"\xff"}', b'{"inputs": NaN}']
    )
    @pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
    async def test_what_is_no_json_is_400(self, path: str, body: bytes):
        answer = await build_house().post(path, body)

        assert answer.status == 400
        assert answer.json["error"]

    @pytest.mark.parametrize("depth", [10**2, 10**4, 10**6])
    async def test_deep_json_is_refused_before_it_is_parsed(self, depth: int):
        house = build_house(settings={"payload_limit": 10_000_000})
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            if depth * len(opening) > 4_000_000:
                continue
            body = b'{"inputs":"a","x":' + opening * depth + b"1" + closing * depth + b"}"

            answer = await house.post("/generate", body)

            assert answer.status == 422
            assert "64 levels" in answer.json["error"]

    async def test_brackets_inside_strings_are_not_depth(self):
        assert (await build_house().post("/generate", {"inputs": "a", "x": "[" * 500 + '\\"{' * 50})).status == 200
