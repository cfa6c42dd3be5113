"""Qwen 3 dense models: Llama's layout with a norm on every query and key head, and heads of their own size.

Source   Yang et al. 2025, arXiv 2505.09388; transformers `models/qwen3`
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
    upper_layer_windows,
)
from weft.models.weights.config_file import ModelConfig

ARCHITECTURES = ("Qwen3ForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Qwen 3 checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    dims = read_dimensions(config, head_dim=128)
    rope = read_rope(config, head_dim=dims.head_dim)
    activation = config.choice("hidden_act", ACTIVATIONS, "silu")
    bias = config.boolean("attention_bias", False)
    windows = upper_layer_windows(config, dims.num_layers)

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=separate_attention(
                f"{prefix}.self_attn",
                dims,
                rope=rope,
                qkv_bias=bias,
                output_bias=bias,
                head_norm_offset=0.0,
                window=windows[index],
            ),
            ffn=separate_mlp(f"{prefix}.mlp", dims, activation=activation),
            mixer_norm=NormSpec(f"{prefix}.input_layernorm.weight", dims.hidden_size, dims.norm_eps),
            ffn_norm=NormSpec(f"{prefix}.post_attention_layernorm.weight", dims.hidden_size, dims.norm_eps),
        )

    return causal_decoder(config, dims, tuple(layer(index) for index in range(dims.num_layers)))
