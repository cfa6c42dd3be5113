"""One row per supported family and per mathematical variant of it: a configuration small enough to run in a moment.

Heads, vocabulary and feed-forward sizes are deliberately not multiples of one another, windows are shorter than the
prompts, and positions pass the original context where a rotary scaling has one.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

SMALL = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}


ABSENT = object()
"""Takes a field out of SMALL."""


@dataclass(frozen=True)
class FamilyRow:
    name: str
    config_class: str
    changes: dict[str, Any] = field(default_factory=dict)
    served_positions: int | None = None
    """Overrides the configuration's context, as an operator's limit does."""

    @property
    def values(self) -> dict[str, Any]:
        # A copy all the way down: transformers writes into the nested objects it is given.
        return copy.deepcopy({key: value for key, value in (SMALL | self.changes).items() if value is not ABSENT})


ROPE = {"rope_theta": 10_000.0}
PACKED = {"head_dim": ABSENT, "hidden_size": 96, "pad_token_id": 0, "eos_token_id": 2}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
}
NESTED_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}

FAMILIES = [
    FamilyRow("llama", "LlamaConfig"),
    FamilyRow(
        "llama-tied-biased", "LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    FamilyRow("llama-heads-of-18", "LlamaConfig", {"head_dim": 18}),
    FamilyRow("llama-one-kv-head", "LlamaConfig", {"num_key_value_heads": 1}),
    FamilyRow("llama-linear", "LlamaConfig", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    FamilyRow("llama-dynamic", "LlamaConfig", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    FamilyRow(
        "llama-3",
        "LlamaConfig",
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    FamilyRow(
        "llama-yarn",
        "LlamaConfig",
        {
            "rope_parameters": ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0}
        },
    ),
    FamilyRow("mistral", "MistralConfig", {"sliding_window": 12}),
    FamilyRow("mistral-full", "MistralConfig", {"sliding_window": None}),
    FamilyRow("qwen2", "Qwen2Config", {"head_dim": ABSENT, "hidden_size": 96}),
    FamilyRow(
        "qwen2-window",
        "Qwen2Config",
        {
            "head_dim": ABSENT,
            "hidden_size": 96,
            "use_sliding_window": True,
            "sliding_window": 10,
            "max_window_layers": 1,
        },
    ),
    FamilyRow("qwen3", "Qwen3Config", {"tie_word_embeddings": True}),
    FamilyRow("qwen3-biased", "Qwen3Config", {"attention_bias": True}),
    FamilyRow(
        "gemma2",
        "Gemma2Config",
        {"sliding_window": 10, "query_pre_attn_scalar": 24, "num_hidden_layers": 3, "tie_word_embeddings": True},
    ),
    FamilyRow(
        "gemma3_text",
        "Gemma3TextConfig",
        {
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 7,
            "tie_word_embeddings": True,
            "rope_parameters": NESTED_ROPE,
        },
    ),
    FamilyRow("phi3", "Phi3Config", PACKED | {"sliding_window": 14}),
    FamilyRow(
        "phi3-partial-rotary", "Phi3Config", PACKED | {"rope_parameters": ROPE | {"partial_rotary_factor": 0.75}}
    ),
    FamilyRow(
        "phi3-long",
        "Phi3Config",
        PACKED | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16},
    ),
    FamilyRow(
        "phi3-long-served-short",
        "Phi3Config",
        PACKED | {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 128},
        served_positions=128,
    ),
]
