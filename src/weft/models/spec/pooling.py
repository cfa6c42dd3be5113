"""What a checkpoint says about turning texts into vectors: sentence-transformers' files, or keys of a GGUF file.

Source   sentence-transformers `modules.json`, `1_Pooling/config.json`, `sentence_bert_config.json` (versions 2 to 5);
         llama.cpp `LLAMA_POOLING_TYPE_*` and docs/gguf.md
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weft.core.request import Pooling
from weft.errors import ModelNotFoundError
from weft.models.weights.config_file import ModelConfig, read_json_object, read_json_objects

_MODULES_FILE = "modules.json"
_MODES = {
    "pooling_mode_lasttoken": Pooling.LAST,
    "pooling_mode_mean_tokens": Pooling.MEAN,
    "pooling_mode_cls_token": Pooling.CLS,
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
}
"""Switches of `1_Pooling/config.json`; None: not supported."""
_MODE_NAMES = {"lasttoken": Pooling.LAST, "mean": Pooling.MEAN, "cls": Pooling.CLS}
"""Values of `pooling_mode`, which newer versions write instead of the switches."""
_GGUF_POOLING = {0: None, 1: Pooling.MEAN, 2: Pooling.CLS, 3: Pooling.LAST}


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingSpec:
    """How the normed hidden states of a text become its vector."""

    mode: Pooling
    normalizes: bool = True
    """The vector is divided by its length."""
    dimensions: tuple[int, ...] = ()
    """Lengths that a vector may be cut to (matryoshka); none: every length."""
    max_tokens: int | None = None
    """Longest text that the authors embed; None: the model's context."""


def read_pooling(directory: Path, config: ModelConfig) -> PoolingSpec | None:
    """What sentence-transformers' files in a model directory say; None when there are none.

    Raises   ModelNotFoundError: a module or a pooling that is not supported, or a damaged file
    """
    file = directory / _MODULES_FILE
    if not file.is_file():
        return None
    modules = [ModelConfig(module, _MODULES_FILE) for module in read_json_objects(file)]
    # A class is named by its full path, which differs from version to version.
    kinds = [module.text("type").rpartition(".")[2] for module in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise ModelNotFoundError(
            f"{_MODULES_FILE}: the modules must be Transformer, Pooling and, at the end, Normalize or nothing. "
            f"Given: {', '.join(kinds)[:200]}."
        )
    mode = _mode(ModelConfig(read_json_object(_module_file(directory, modules[1])), "the pooling's config.json"))
    lengths = directory / "sentence_bert_config.json"
    max_tokens = None
    if lengths.is_file():
        max_tokens = ModelConfig(read_json_object(lengths), lengths.name).optional_integer("max_seq_length")
    return PoolingSpec(
        mode=mode,
        normalizes=len(kinds) == 3,
        dimensions=config.sizes("matryoshka_dimensions"),
        max_tokens=max_tokens,
    )


def read_gguf_pooling(metadata: Mapping[str, object], architecture: str, file_name: str) -> PoolingSpec | None:
    """What the keys of a GGUF file say; None when it generates text. Vectors have length 1, as llama.cpp's have.

    Raises   ModelNotFoundError: a pooling that is not supported
    """
    number = metadata.get(f"{architecture}.pooling_type")
    if number is None:
        return None
    if not isinstance(number, int) or number not in _GGUF_POOLING:
        raise ModelNotFoundError(
            f"{file_name}: `{architecture}.pooling_type` must be 0 (none), 1 (mean), 2 (cls) or 3 (last). "
            f"Given: {str(number)[:60]}."
        )
    mode = _GGUF_POOLING[number]
    return None if mode is None else PoolingSpec(mode=mode)


def _module_file(directory: Path, module: ModelConfig) -> Path:
    path = module.text("path")
    # The file comes with the model, so its path may be anything.
    if "/" in path or "\\" in path or path in {"", ".", ".."}:
        raise module.fault("path", "the name of a folder beside it")
    return directory / path / "config.json"


def _mode(config: ModelConfig) -> Pooling:
    allowed = "one of lasttoken, mean and cls"
    if config.has("pooling_mode"):
        name = config.text("pooling_mode")
        if name not in _MODE_NAMES:
            raise config.fault("pooling_mode", allowed)
        return _MODE_NAMES[name]
    chosen = [name for name in _MODES if config.boolean(name, default=False)]
    if len(chosen) != 1:
        raise ModelNotFoundError(
            f"the pooling's config.json: one of {', '.join(_MODES)} must be true. Given: {', '.join(chosen) or 'none'}."
        )
    mode = _MODES[chosen[0]]
    if mode is None:
        raise config.fault(chosen[0], f"false: the pooling must be {allowed}", show=False)
    return mode
