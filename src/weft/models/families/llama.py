"""Llama 1 to 3.3, and the many models that share its layout (SmolLM2, TinyLlama, Yi …).

Source   Touvron et al. 2023, arXiv 2302.13971; transformers `models/llama`
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

ARCHITECTURES = ("LlamaForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Llama checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    dims = read_dimensions(config)
    rope = read_rope(config, head_dim=dims.head_dim)
    activation = config.choice("hidden_act", ACTIVATIONS, "silu")
    attention_bias = config.boolean("attention_bias", False)
    mlp_bias = config.boolean("mlp_bias", False)

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=separate_attention(
                f"{prefix}.self_attn", dims, rope=rope, qkv_bias=attention_bias, output_bias=attention_bias
            ),
            ffn=separate_mlp(f"{prefix}.mlp", dims, activation=activation, bias=mlp_bias),
            mixer_norm=NormSpec(f"{prefix}.input_layernorm.weight", dims.hidden_size, dims.norm_eps),
            ffn_norm=NormSpec(f"{prefix}.post_attention_layernorm.weight", dims.hidden_size, dims.norm_eps),
        )

    return causal_decoder(config, dims, tuple(layer(index) for index in range(dims.num_layers)))
