"""Weft: a text-generation server for open models, and the drop-in heir of Text Generation Inference.

In a program: `from weft import LLM, SamplingParams`. Both are loaded when they are first asked for, because they
need torch and nothing else here does.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.offline import LLM, SamplingParams

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> object:
    if name not in {"LLM", "SamplingParams"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("weft.offline"), name)
