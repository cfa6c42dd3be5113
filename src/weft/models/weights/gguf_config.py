"""GGUF metadata as the configuration that transformers would have written, so that one family file reads both.

Source   docs/gguf.md (keys) and src/llama-model.cpp (defaults that no key carries) of github.com/ggml-org
"""

import struct

from weft.errors import ModelNotFoundError
from weft.models.weights.config_file import ModelConfig
from weft.models.weights.gguf_file import GgmlType, GgufFile

MODEL_TYPES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "llama": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""GGUF architecture → transformers' model_type. Mistral's files say `llama`."""

SANDWICH_NORMS = frozenset({"gemma2", "gemma3"})
"""Architectures that norm before and after each block."""

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attention.causal": "is_causal",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""The 27B members scale attention by hidden size / heads instead of the head size, and no key says so."""


def architecture(file: GgufFile) -> str:
    """The value of `general.architecture`. Raises ModelNotFoundError when there is none."""
    value = file.metadata.scalars.get("general.architecture")
    if not isinstance(value, str) or not value:
        raise ModelNotFoundError(f"{file.name}: `general.architecture` is missing.")
    return value


def config_from_metadata(file: GgufFile) -> ModelConfig:
    """Return the model configuration that the metadata amounts to.

    Raises   ModelNotFoundError: an architecture that is not in `MODEL_TYPES`; the message lists those that are
    """
    arch = architecture(file)
    if arch not in MODEL_TYPES:
        raise ModelNotFoundError(
            f"{file.name}: architecture `{arch[:80]}` is not supported. Supported: {', '.join(sorted(MODEL_TYPES))}."
        )
    if file.metadata.scalars.get(f"{arch}.expert_count"):
        raise ModelNotFoundError(f"{file.name}: mixtures of experts (`{arch}.expert_count`) are not supported.")
    values: dict[str, object] = {"model_type": MODEL_TYPES[arch]}
    for key, name in _KEYS.items():
        value = file.metadata.scalars.get(f"{arch}.{key}")
        if value is not None:
            values[name] = value
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        values["vocab_size"] = embedding.shape[0]
    values["tie_word_embeddings"] = "output.weight" not in file.tensors
    has_bias = "blk.0.attn_q.bias" in file.tensors
    values["attention_bias"] = has_bias
    values["use_sliding_window"] = False
    if arch in SANDWICH_NORMS:
        values.update(_gemma_values(arch, ModelConfig(values, file.name)))
    values["rope_parameters"] = _rope_parameters(file, arch, values)
    return ModelConfig(values, file.name)


def _gemma_values(arch: str, config: ModelConfig) -> dict[str, object]:
    head_dim = config.integer("head_dim")
    scalar = head_dim
    if config.integer("num_hidden_layers") == _LAYERS_OF_27B[arch]:
        scalar = config.integer("hidden_size") // config.integer("num_attention_heads")
    return {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh"}


def _rope_parameters(file: GgufFile, arch: str, values: dict[str, object]) -> dict[str, object]:
    metadata = file.metadata.scalars
    default_theta = 1_000_000.0 if arch == "gemma3" else 10_000.0
    parameters: dict[str, object] = {"rope_theta": metadata.get(f"{arch}.rope.freq_base", default_theta)}
    head_dim = values.get("head_dim")
    rotary_dim = metadata.get(f"{arch}.rope.dimension_count")
    if head_dim is None:
        hidden_size, num_heads = values.get("hidden_size"), values.get("num_attention_heads")
        head_dim = hidden_size // num_heads if isinstance(hidden_size, int) and isinstance(num_heads, int) else None
    if isinstance(rotary_dim, int) and isinstance(head_dim, int) and head_dim > 0:
        parameters["partial_rotary_factor"] = rotary_dim / head_dim
    parameters.update(_scaling(file, arch))
    if arch != "gemma3":
        return parameters
    local_theta = metadata.get(f"{arch}.rope.freq_base_swa", 10_000.0)
    return {
        "full_attention": parameters,
        "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
    }


def _scaling(file: GgufFile, arch: str) -> dict[str, object]:
    """The fields of `rope_parameters` beside base and size."""
    metadata = file.metadata.scalars
    if "rope_freqs.weight" in file.tensors:
        return {"rope_type": "divisors", "divisors": _float_tensor(file, "rope_freqs.weight")}
    original = metadata.get(f"{arch}.rope.scaling.original_context_length")
    if "rope_factors_long.weight" in file.tensors:
        return {
            "rope_type": "longrope",
            "long_factor": _float_tensor(file, "rope_factors_long.weight"),
            "short_factor": _float_tensor(file, "rope_factors_short.weight"),
            "original_max_position_embeddings": original,
            "attention_factor": metadata.get(f"{arch}.rope.scaling.attn_factor"),
        }
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    return {
        "rope_type": kind,
        "factor": metadata.get(f"{arch}.rope.scaling.factor"),
        "original_max_position_embeddings": original,
        "beta_fast": metadata.get(f"{arch}.rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.get(f"{arch}.rope.scaling.yarn_beta_slow"),
    }


def _float_tensor(file: GgufFile, name: str) -> list[float]:
    tensor = file.tensors.get(name)
    if tensor is None or tensor.ggml_type is not GgmlType.F32 or len(tensor.shape) != 1:
        raise ModelNotFoundError(f"{file.name}: tensor `{name}` must be one row of F32.")
    return list(struct.unpack_from(f"<{tensor.shape[0]}f", file.data, tensor.offset))
