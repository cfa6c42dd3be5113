"""Weft: a text-generation server for open models, and the drop-in heir of Text Generation Inference."""

__version__ = "0.1.0"

__all__ = ["__version__"]
