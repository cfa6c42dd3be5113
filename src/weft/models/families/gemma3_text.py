"""Gemma 3's text models: five windowed layers to each full one, with a rotary base of their own; norms on heads.

As in Gemma 2, norms stand around each block and multiply by 1 + w, and embeddings are scaled by √E.

Source   Gemma Team 2025, arXiv 2503.19786; transformers `models/gemma3`
"""

from functools import partial

from weft.models.spec import (
    ACTIVATIONS,
    FULL_ATTENTION,
    SLIDING_ATTENTION,
    DecoderSpec,
    LayerSpec,
    NormSpec,
    RopeSpec,
    causal_decoder,
    layer_windows,
    read_dimensions,
    read_rope,
    refuse_bidirectional,
    separate_attention,
    separate_mlp,
)
from weft.models.weights.config_file import ModelConfig

ARCHITECTURES = ("Gemma3ForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Gemma 3 checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    refuse_bidirectional(config)
    dims = read_dimensions(config, head_dim=256)
    global_rope, local_rope = _ropes(config, dims.head_dim)
    activation = config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh")
    bias = config.boolean("attention_bias", False)
    scale = config.number("query_pre_attn_scalar", 256.0, minimum=1.0) ** -0.5
    softcap = config.optional_number("attn_logit_softcapping") or 0.0
    pattern = config.integer("sliding_window_pattern", 6)
    types = [SLIDING_ATTENTION if (index + 1) % pattern else FULL_ATTENTION for index in range(dims.num_layers)]
    windows = layer_windows(config, types, window=config.integer("sliding_window", 4096))
    norm = partial(NormSpec, size=dims.hidden_size, eps=dims.norm_eps, weight_offset=1.0)

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=separate_attention(
                f"{prefix}.self_attn",
                dims,
                rope=local_rope if windows[index] else global_rope,
                scale=scale,
                qkv_bias=bias,
                output_bias=bias,
                head_norm_offset=1.0,
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


def _ropes(config: ModelConfig, head_dim: int) -> tuple[RopeSpec, RopeSpec]:
    """The rotary embeddings of full and of windowed layers: nested in transformers 5, flat before."""
    nested = config.section("rope_parameters")
    if nested is not None:
        full = read_rope(config, head_dim=head_dim, default_theta=1e6, parameters=nested.section(FULL_ATTENTION))
        sliding = read_rope(config, head_dim=head_dim, parameters=nested.section(SLIDING_ATTENTION))
        return full, sliding
    full = read_rope(config, head_dim=head_dim, default_theta=1e6)
    return full, RopeSpec(config.number("rope_local_base_freq", 10_000.0), head_dim)
