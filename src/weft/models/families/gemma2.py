"""Gemma 2: norms around each block, soft caps on scores and logits, a window on every other layer.

Norms multiply by 1 + w and embeddings by √E.

Source   Gemma Team 2024, arXiv 2408.00118; transformers `models/gemma2`
"""

from functools import partial

from weft.models.spec import (
    ACTIVATIONS,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    DecoderSpec,
    LayerSpec,
    NormSpec,
    causal_decoder,
    layer_windows,
    read_dimensions,
    read_rope,
    refuse_bidirectional,
    separate_attention,
    separate_mlp,
)
from weft.models.weights.config_file import ModelConfig

ARCHITECTURES = ("Gemma2ForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Gemma 2 checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    refuse_bidirectional(config)
    dims = read_dimensions(config, head_dim=256)
    rope = read_rope(config, head_dim=dims.head_dim)
    activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    bias = config.boolean("attention_bias", False)
    scale = config.number("query_pre_attn_scalar", 256.0, minimum=1.0) ** -0.5
    softcap = config.optional_number("attn_logit_softcapping") or 0.0
    types = [FULL_ATTENTION if index % 2 else SLIDING_ATTENTION for index in range(dims.num_layers)]
    windows = layer_windows(config, types, window=config.integer("sliding_window", 4096))
    norm = partial(NormSpec, size=dims.hidden_size, eps=dims.norm_eps, weight_offset=1.0)

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=separate_attention(
                f"{prefix}.self_attn",
                dims,
                rope=rope,
                scale=scale,
                qkv_bias=bias,
                output_bias=bias,
                softcap=softcap,
                window=windows[index],
            ),
            ffn=separate_mlp(f"{prefix}.mlp", dims, activation=activation),
            mixer_norm=norm(f"{prefix}.input_layernorm.weight"),
            mixer_post_norm=norm(f"{prefix}.post_attention_layernorm.weight"),
            ffn_norm=norm(f"{prefix}.pre_feedforward_layernorm.weight"),
            ffn_post_norm=norm(f"{prefix}.post_feedforward_layernorm.weight"),
        )

    return causal_decoder(
        config,
        dims,
        tuple(layer(index) for index in range(dims.num_layers)),
        tied_default=True,
        norm_offset=1.0,
        embedding_scale=dims.hidden_size**0.5,
        logit_softcap=config.optional_number("final_logit_softcapping") or 0.0,
    )
