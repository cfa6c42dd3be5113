"""From files to a `ModelDescription`: which family a checkpoint belongs to, found by file name. Torch-free.

A family is a module `families/<model_type>.py` with `ARCHITECTURES` and `spec(config) -> DecoderSpec`; adding the
file is all it takes. Configuration files are data: `auto_map` and every other field that names code is never read.
"""

import importlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol, cast

from weft.core.request import Pooling
from weft.errors import ModelNotFoundError
from weft.models.spec import (
    DecoderSpec,
    ModelDescription,
    PoolingSpec,
    WeightFormat,
    YarnScaling,
    read_gguf_pooling,
    read_pooling,
)
from weft.models.weights.config_file import ModelConfig, read_json_object
from weft.models.weights.gguf_config import architecture, config_from_metadata
from weft.models.weights.gguf_file import GgufFile
from weft.models.weights.safetensors_file import (
    DTYPE_NAMES,
    PICKLED_SUFFIXES,
    pickled_checkpoint,
    read_header,
    weight_files,
)

FAMILIES_DIRECTORY = Path(__file__).parent / "families"


class Family(Protocol):
    """What a module in `families/` provides."""

    ARCHITECTURES: tuple[str, ...]
    """Class names that transformers writes into `config.json: architectures`."""

    def spec(self, config: ModelConfig) -> DecoderSpec:
        """Describe a checkpoint by its configuration."""
        ...


@cache
def supported_model_types() -> tuple[str, ...]:
    """Every model type there is a family file for, sorted."""
    return tuple(sorted(path.stem for path in FAMILIES_DIRECTORY.glob("*.py") if path.stem != "__init__"))


def load_family(model_type: str) -> Family:
    """Import the family of a model type.

    Raises   ModelNotFoundError: there is none; the message lists those there are
    """
    if model_type not in supported_model_types():
        raise ModelNotFoundError(
            f"Model type `{model_type[:80]}` is not supported. Supported: {', '.join(supported_model_types())}."
        )
    return cast(Family, importlib.import_module(f"weft.models.families.{model_type}"))


@dataclass(frozen=True, slots=True)
class Use:
    """What a model is to be used for: `--task` and `--pooling`, where auto asks the model's files."""

    task: str = "auto"
    pooling: str = "auto"

    def pooling_of(self, found: PoolingSpec | None) -> PoolingSpec | None:
        """How texts become vectors, given what the files say; None: the model is to generate text."""
        says_nothing = found is None and self.pooling == "auto"
        if self.task == "generate" or (self.task == "auto" and says_nothing):
            return None
        spec = found or PoolingSpec(mode=Pooling.LAST)
        return spec if self.pooling == "auto" else replace(spec, mode=Pooling(self.pooling))


ANY_USE = Use()


def describe(path: Path, use: Use = ANY_USE) -> ModelDescription:
    """Describe a model directory (config.json and safetensors) or a GGUF file without reading its weights.

    Raises   ModelNotFoundError: nothing there, an unsupported model type, or a field or header out of range
    """
    if path.is_dir():
        return _describe_directory(path, use)
    if not path.is_file():
        raise ModelNotFoundError(f"{path.name}: no such file or directory.")
    if path.suffix in PICKLED_SUFFIXES:
        raise pickled_checkpoint(path.name)
    return _describe_gguf(path, use)


def describe_config(file: Path, stored_dtype: str, use: Use = ANY_USE) -> ModelDescription:
    """Describe a model by its `config.json` alone, before its weights are on this machine. Raises as `describe`."""
    config = _read_config(file)
    pooling = None if use.task == "generate" else use.pooling_of(read_pooling(file.parent, config))
    return _description(config, WeightFormat.SAFETENSORS, stored_dtype, pooling)


def _read_config(file: Path) -> ModelConfig:
    config = ModelConfig(read_json_object(file), "config.json")
    if config.has("quantization_config"):
        raise ModelNotFoundError(
            "config.json: `quantization_config` names a packed format that is not supported. "
            "Use the unquantized checkpoint, or a GGUF file."
        )
    return config


def _describe_directory(directory: Path, use: Use) -> ModelDescription:
    config = _read_config(directory / "config.json")
    files = weight_files(directory)
    stored: dict[str, int] = {}
    for entry in read_header(files[0]):
        stored[entry.dtype] = stored.get(entry.dtype, 0) + entry.num_bytes
    main = max(stored, key=lambda dtype: stored[dtype], default="F32")
    pooling = None if use.task == "generate" else use.pooling_of(read_pooling(directory, config))
    return _description(config, WeightFormat.SAFETENSORS, DTYPE_NAMES.get(main, main), pooling)


def _describe_gguf(path: Path, use: Use) -> ModelDescription:
    file = GgufFile(path)
    try:
        config = config_from_metadata(file)
        pooling: PoolingSpec | None = None
        if use.task != "generate":
            pooling = use.pooling_of(read_gguf_pooling(file.metadata.scalars, architecture(file), file.name))
        stored: dict[str, int] = {}
        for tensor in file.tensors.values():
            stored[tensor.ggml_type.name] = stored.get(tensor.ggml_type.name, 0) + tensor.num_bytes
    finally:
        file.close()
    main = max(stored, key=lambda kind: stored[kind], default="F32")
    return _description(config, WeightFormat.GGUF, main, pooling)


def _description(
    config: ModelConfig,
    weight_format: WeightFormat,
    stored_dtype: str,
    pooling: PoolingSpec | None,
) -> ModelDescription:
    model_type = config.text("model_type")
    family = load_family(model_type)
    _check_architecture(config, family, embeds=pooling is not None)
    spec = family.spec(config)
    if pooling is not None:
        _check_causal(config)
        # Vectors need no output layer, and most embedding models come without one.
        spec = replace(spec, head=spec.embedding)
    return ModelDescription(
        model_type=model_type,
        family=model_type,
        weight_format=weight_format,
        stored_dtype=stored_dtype,
        spec=spec,
        max_positions=_max_positions(config, spec, pooling),
        pooling=pooling,
    )


def _check_architecture(config: ModelConfig, family: Family, *, embeds: bool) -> None:
    """Refuse classifiers and draft heads, which share a model type with the model they were made from.

    A model without its output layer can embed and not generate.
    """
    written = config.texts("architectures")
    known = {name.lower() for name in family.ARCHITECTURES}  # early files write LLaMAForCausalLM
    if embeds:
        known |= {name.replace("forcausallm", "model") for name in known}
    if written and not any(name.lower() in known for name in written):
        raise config.fault("architectures", f"one that generates text: {', '.join(family.ARCHITECTURES)}", show=False)


def _check_causal(config: ModelConfig) -> None:
    """Refuse embedding models whose tokens see those behind them."""
    for name in ("is_causal", "use_bidirectional_attention"):
        if config.has(name) and config.boolean(name, False) != (name == "is_causal"):
            raise config.fault(
                name, f"{'true' if name == 'is_causal' else 'false'}: attention in both directions is not supported"
            )


def _max_positions(config: ModelConfig, spec: DecoderSpec, pooling: PoolingSpec | None) -> int:
    """The context served: what the configuration says, or what YaRN stretches the original one to.

    Files that switch YaRN on by hand leave `max_position_embeddings` at its old value. Embedding models name the
    longest text that they were made for.
    """
    if pooling is not None and pooling.max_tokens is not None:
        return min(pooling.max_tokens, _max_positions(config, spec, None))
    scalings = [layer.mixer.rope.scaling for layer in spec.layers]
    stretched = [int(s.factor * s.original_max_positions) for s in scalings if isinstance(s, YarnScaling)]
    return max([config.integer("max_position_embeddings"), *stretched])
