"""Mistral 7B to Small: Llama's layout with an optional sliding window on every layer.

Source   Jiang et al. 2023, arXiv 2310.06825; transformers `models/mistral`
"""

from weft.models.spec import (
    ACTIVATIONS,
    DecoderSpec,
    LayerSpec,
    NormSpec,
    causal_decoder,
    read_dimensions,
    read_rope,
    separate_attention,
    separate_mlp,
)
from weft.models.weights.config_file import ModelConfig

ARCHITECTURES = ("MistralForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Mistral checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    dims = read_dimensions(config)
    rope = read_rope(config, head_dim=dims.head_dim)
    activation = config.choice("hidden_act", ACTIVATIONS, "silu")
    window = config.optional_integer("sliding_window") or 0

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=separate_attention(f"{prefix}.self_attn", dims, rope=rope, window=window),
            ffn=separate_mlp(f"{prefix}.mlp", dims, activation=activation),
            mixer_norm=NormSpec(f"{prefix}.input_layernorm.weight", dims.hidden_size, dims.norm_eps),
            ffn_norm=NormSpec(f"{prefix}.post_attention_layernorm.weight", dims.hidden_size, dims.norm_eps),
        )

    return causal_decoder(config, dims, tuple(layer(index) for index in range(dims.num_layers)))
