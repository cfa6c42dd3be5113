"""Tiny GGUF files, written with the `gguf` package from transformers models: its writer, name tables and quantizers.

Row orders and the offset of Gemma's norms follow llama.cpp's converter, so that reading them back is a real test.
"""

import math
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

MODEL_ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}

QUANTIZABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""What the `gguf` package can write; for the other types blocks are drawn at random."""

K_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")

SCALE_OFFSETS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where a block's float16 scales stand: random bytes there could be NaN or huge."""


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0, *, scale: float = 1.0) -> np.ndarray:
    """Blocks with every bit pattern equally likely, and scales around `scale` of both signs: `[rows, bytes]`."""
    numbers, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // numbers, block_bytes), dtype=np.uint8)
    for offset in SCALE_OFFSETS[kind]:
        scales = (scale * draw.uniform(-1, 1, len(blocks))).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def write_gguf(path: Path, model: torch.nn.Module, *, kind: str = "F32") -> dict[str, torch.Tensor]:
    """Write a model with its matrices stored as `kind`; returns the float32 state dict that the file holds."""
    config = model.config
    arch = MODEL_ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    _write_metadata(writer, config)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    held: dict[str, torch.Tensor] = {}
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = _as_stored(name, parameter.numpy(), config)
        data, raw_type, decoded = _encode(stored, kind if parameter.dim() == 2 else "F32")
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=raw_type)
        held[name] = torch.from_numpy(_as_used(name, decoded, config).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if config.tie_word_embeddings:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    return held


def _write_metadata(writer: gguf.GGUFWriter, config) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(config))
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        writer.add_tensor("rope_factors_long.weight", np.array(rope["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(rope["short_factor"], np.float32))
    if config.model_type == "phi3":
        head_size = config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_token_list([f"token {index}" for index in range(config.vocab_size)])
    writer.add_eos_token_id(3)
    writer.add_bos_token_id(1)


def _llama3_divisors(config) -> np.ndarray:
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return (1.0 / (config.rope_parameters["rope_theta"] ** exponents) / scaled).numpy()


def _as_stored(name: str, values: np.ndarray, config) -> np.ndarray:
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return values + 1
    return values


def _as_used(name: str, values: np.ndarray, config) -> np.ndarray:
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return values - 1
    return values


def _encode(values: np.ndarray, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType, np.ndarray]:
    """What to write, its type, and what it decodes to."""
    quantization = gguf.GGMLQuantizationType[kind]
    values = np.ascontiguousarray(values, dtype=np.float32)
    if kind in K_TYPES:
        data = random_blocks(kind, *values.shape, seed=values.shape[0], scale=0.02 / values.shape[1] ** 0.5)
    else:
        data = gguf.quants.quantize(values, quantization)
    return data, quantization, gguf.quants.dequantize(data, quantization)
