import importlib.util
from pathlib import Path

from weft.models.registry import supported_model_types

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_supported_models_is_what_the_source_says() -> None:
    """`python docs/generate_models.py` writes it."""
    spec = importlib.util.spec_from_file_location("generate_models", DOCS / "generate_models.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)

    written = (DOCS / "reference" / "models.md").read_text()

    assert written == generator.page()
    assert all(f"| `{model_type}` |" in written for model_type in supported_model_types())
