"""Small model files written byte by byte, so that each byte can be wrong on purpose."""

import json
import struct
from pathlib import Path
from typing import Any

LLAMA_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_json(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def safetensors_bytes(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, payload) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload
    return with_header(header, data)


def with_header(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_model(directory: Path, config: dict[str, Any] | None = None) -> Path:
    """A directory that can be described; its one tensor is only there to be counted."""
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", config or LLAMA_CONFIG)
    payload = safetensors_bytes({"model.norm.weight": ("BF16", [8], bytes(16))})
    (directory / "model.safetensors").write_bytes(payload)
    return directory


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf_bytes(
    metadata: dict[str, tuple[int, bytes]], tensors: list[tuple[str, tuple[int, ...], int, int]], data: bytes
) -> bytes:
    """metadata: key → (value type, encoded value); tensors: (name, file-order shape, type, offset)."""
    out = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    for key, (value_type, value) in metadata.items():
        out += text(key) + struct.pack("<I", value_type) + value
    for name, shape, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", kind, offset)
    return out + bytes(-len(out) % 32) + data


def uint32(value: int) -> tuple[int, bytes]:
    return 4, struct.pack("<I", value)


def float32(value: float) -> tuple[int, bytes]:
    return 6, struct.pack("<f", value)


def string(value: str) -> tuple[int, bytes]:
    return 8, text(value)


def strings(values: list[str]) -> tuple[int, bytes]:
    return 9, struct.pack("<IQ", 8, len(values)) + b"".join(text(value) for value in values)


def llama_gguf(more: dict[str, tuple[int, bytes]] | None = None) -> bytes:
    metadata = {
        "general.architecture": string("llama"),
        "llama.block_count": uint32(1),
        "llama.context_length": uint32(64),
        "llama.embedding_length": uint32(32),
        "llama.feed_forward_length": uint32(64),
        "llama.attention.head_count": uint32(4),
        "llama.attention.head_count_kv": uint32(2),
        "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
        "tokenizer.ggml.tokens": strings([f"t{index}" for index in range(16)]),
        "tokenizer.ggml.eos_token_id": uint32(2),
        "tokenizer.ggml.bos_token_id": uint32(1),
    }
    return gguf_bytes(metadata | (more or {}), [("token_embd.weight", (32, 16), 8, 0)], bytes(16 * 34))
