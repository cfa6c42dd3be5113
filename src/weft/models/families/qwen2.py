"""Qwen 1.5 to 2.5: Llama's layout with biases on q, k and v, and a window on the upper layers when switched on.

Source   Yang et al. 2024, arXiv 2407.10671; transformers `models/qwen2`
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

ARCHITECTURES = ("Qwen2ForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Qwen 2 checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    dims = read_dimensions(config)
    rope = read_rope(config, head_dim=dims.head_dim)
    activation = config.choice("hidden_act", ACTIVATIONS, "silu")
    windows = upper_layer_windows(config, dims.num_layers)

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=separate_attention(f"{prefix}.self_attn", dims, rope=rope, qkv_bias=True, window=windows[index]),
            ffn=separate_mlp(f"{prefix}.mlp", dims, activation=activation),
            mixer_norm=NormSpec(f"{prefix}.input_layernorm.weight", dims.hidden_size, dims.norm_eps),
            ffn_norm=NormSpec(f"{prefix}.post_attention_layernorm.weight", dims.hidden_size, dims.norm_eps),
        )

    return causal_decoder(config, dims, tuple(layer(index) for index in range(dims.num_layers)))
