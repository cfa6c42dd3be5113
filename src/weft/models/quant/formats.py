"""Which reader opens a checkpoint."""

from pathlib import Path

from weft.models.quant.gguf_source import GgufSource
from weft.models.spec import WeightFormat
from weft.models.weights.source import SafetensorsSource, WeightSource


def open_weights(path: Path, weight_format: WeightFormat) -> WeightSource:
    """Open a model directory or GGUF file. Raises ModelNotFoundError when it cannot be read."""
    match weight_format:
        case WeightFormat.SAFETENSORS:
            return SafetensorsSource(path)
        case WeightFormat.GGUF:
            return GgufSource(path)
