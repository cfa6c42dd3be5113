"""Whatever the OpenAPI document allows and forbids is tried: no bug answers, and every answer is as described.

Bounded and repeatable in `make test`; `make fuzz` tries many more, and other ones each time.
"""

from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from tests.contract.house import build_house, say
from tests.contract.live import Live, serve

from weft.router.app import ROUTES

IS_FUZZING = settings.default.max_examples > 1_000
NUM_EXAMPLES = 300 if IS_FUZZING else 10
CHECKS: list[CheckFunction] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SHOWN = [route for route in ROUTES if not route.is_hidden]
TAKES_INPUT = [route for route in SHOWN if route.body is not None or route.query is not None]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serve(lambda: build_house(say("hello"), max_total_tokens=4096)) as server:
        yield server


@pytest.fixture(scope="module")
def schema(live: Live) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(httpx.get(f"{live.url}/openapi.json").json())


def attempt(live: Live, schema: schemathesis.BaseSchema, label: str, mode: GenerationMode) -> None:
    method, _, path = label.partition(" ")
    operation = schema[path.replace(":path}", "}")][method]
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS

    @settings(
        max_examples=NUM_EXAMPLES,
        derandomize=not IS_FUZZING,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: Case) -> None:
        case.validate_response(case.call(base_url=live.url), checks=checks)

    call()


@pytest.mark.parametrize("label", [f"{route.method} {route.path}" for route in SHOWN])
def test_what_the_document_allows_is_answered_as_described(live: Live, schema: schemathesis.BaseSchema, label: str):
    attempt(live, schema, label, GenerationMode.POSITIVE)


@pytest.mark.parametrize("label", [f"{route.method} {route.path}" for route in TAKES_INPUT])
def test_what_the_document_forbids_is_refused_as_described(live: Live, schema: schemathesis.BaseSchema, label: str):
    attempt(live, schema, label, GenerationMode.NEGATIVE)
