"""Phi-3, Phi-3.5 and Phi-4 (mini): q, k, v and gate, up packed in the checkpoint; LongRoPE; partial rotation.

Source   Abdin et al. 2024, arXiv 2404.14219; transformers `models/phi3`
"""

from weft.models.spec import (
    ACTIVATIONS,
    AttentionSpec,
    DecoderSpec,
    Dimensions,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    NormSpec,
    RopeSpec,
    WeightRef,
    causal_decoder,
    plain_linear,
    read_dimensions,
    read_rope,
)
from weft.models.weights.config_file import ModelConfig

ARCHITECTURES = ("Phi3ForCausalLM",)


def spec(config: ModelConfig) -> DecoderSpec:
    """Describe a Phi-3 checkpoint. Raises ModelNotFoundError naming the field that is missing or out of range."""
    dims = read_dimensions(config)
    rope = read_rope(config, head_dim=dims.head_dim)
    activation = config.choice("hidden_act", ACTIVATIONS, "silu")
    window = config.optional_integer("sliding_window") or 0

    def layer(index: int) -> LayerSpec:
        prefix = f"model.layers.{index}"
        return LayerSpec(
            mixer=_attention(f"{prefix}.self_attn", dims, rope, window),
            ffn=_mlp(f"{prefix}.mlp", dims, activation),
            mixer_norm=NormSpec(f"{prefix}.input_layernorm.weight", dims.hidden_size, dims.norm_eps),
            ffn_norm=NormSpec(f"{prefix}.post_attention_layernorm.weight", dims.hidden_size, dims.norm_eps),
        )

    return causal_decoder(config, dims, tuple(layer(index) for index in range(dims.num_layers)))


def _attention(prefix: str, dims: Dimensions, rope: RopeSpec, window: int) -> AttentionSpec:
    query_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim

    def part(first_row: int, size: int) -> LinearSpec:
        ref = WeightRef(f"{prefix}.qkv_proj.weight", first_row, query_size + 2 * kv_size)
        return LinearSpec(ref, size, dims.hidden_size)

    return AttentionSpec(
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        scale=dims.head_dim**-0.5,
        rope=rope,
        query=part(0, query_size),
        key=part(query_size, kv_size),
        value=part(query_size + kv_size, kv_size),
        output=plain_linear(f"{prefix}.o_proj", dims.hidden_size, query_size),
        window=window,
    )


def _mlp(prefix: str, dims: Dimensions, activation: str) -> MlpSpec:
    size = dims.intermediate_size

    def part(first_row: int) -> LinearSpec:
        return LinearSpec(WeightRef(f"{prefix}.gate_up_proj.weight", first_row, 2 * size), size, dims.hidden_size)

    return MlpSpec(
        intermediate_size=size,
        activation=activation,
        gate=part(0),
        up=part(size),
        down=plain_linear(f"{prefix}.down_proj", dims.hidden_size, size),
    )
