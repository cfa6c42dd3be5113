"""The pages of errors, endpoints and metrics say what the source says: `python docs/generate_http.py` writes them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from weft.errors import by_code
from weft.router.app import ROUTES
from weft.telemetry.metrics import METRICS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_http", DOCS / "generate_http.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["errors.md", "endpoints.md", "metrics.md"])
def test_a_generated_page_is_current(generator: ModuleType, name: str) -> None:
    assert (DOCS / "reference" / name).read_text() == generator.PAGES[name]()


def test_every_code_route_and_metric_is_on_its_page() -> None:
    errors, endpoints, metrics = (
        (DOCS / "reference" / f"{name}.md").read_text() for name in ("errors", "endpoints", "metrics")
    )

    assert [code for code in by_code() if f"| `{code}` |" not in errors] == ["request_error"]
    paths = [f"`{route.method} {route.path.replace(':path}', '}')}`" for route in ROUTES]
    assert [path for path in paths if path not in endpoints] == []
    assert [spec.name for spec in METRICS if f"| `{spec.name}` |" not in metrics] == []
