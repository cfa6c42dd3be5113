"""The parts that families share when they turn a configuration into a spec."""

from collections.abc import Sequence
from dataclasses import dataclass

from weft.models.spec.layout import (
    AttentionSpec,
    DecoderSpec,
    LayerSpec,
    LinearSpec,
    MlpSpec,
    NormSpec,
    WeightRef,
)
from weft.models.spec.rope import RopeSpec
from weft.models.weights.config_file import ModelConfig

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Configuration name → kind of `ops.gated_activation`."""


FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """The sizes that every family of this kind spells alike."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int


def read_dimensions(config: ModelConfig, *, head_dim: int | None = None) -> Dimensions:
    """Read sizes from a configuration; `head_dim` is the family's default, else hidden_size / num_attention_heads."""
    num_heads = config.integer("num_attention_heads", maximum=4096)
    num_kv_heads = config.integer("num_key_value_heads", num_heads, maximum=num_heads)
    if num_heads % num_kv_heads:
        raise config.fault("num_key_value_heads", f"a divisor of num_attention_heads = {num_heads}")
    hidden_size = config.integer("hidden_size")
    if head_dim is None and not config.has("head_dim") and hidden_size % num_heads:
        raise config.fault("hidden_size", f"a multiple of num_attention_heads = {num_heads}")
    head_size = config.integer("head_dim", head_dim or hidden_size // num_heads, maximum=4096)
    if head_size % 2:
        raise config.fault("head_dim", "even")
    return Dimensions(
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers", maximum=4096),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_size,
        norm_eps=config.number("rms_norm_eps", 1e-6),
        max_positions=config.integer("max_position_embeddings"),
    )


def separate_attention(  # noqa: PLR0913 — one keyword per mathematical difference between families
    prefix: str,
    dims: Dimensions,
    *,
    rope: RopeSpec,
    scale: float | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    head_norm_offset: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
) -> AttentionSpec:
    """Attention with one checkpoint tensor each for q, k, v and o.

    `head_norm_offset` switches on norms of the query and key heads, with that weight offset.
    """
    query_size, kv_size = dims.num_heads * dims.head_dim, dims.num_kv_heads * dims.head_dim

    def head_norm(name: str) -> NormSpec | None:
        if head_norm_offset is None:
            return None
        return NormSpec(f"{prefix}.{name}.weight", dims.head_dim, dims.norm_eps, head_norm_offset)

    return AttentionSpec(
        num_heads=dims.num_heads,
        num_kv_heads=dims.num_kv_heads,
        head_dim=dims.head_dim,
        scale=dims.head_dim**-0.5 if scale is None else scale,
        rope=rope,
        query=plain_linear(f"{prefix}.q_proj", query_size, dims.hidden_size, bias=qkv_bias),
        key=plain_linear(f"{prefix}.k_proj", kv_size, dims.hidden_size, bias=qkv_bias),
        value=plain_linear(f"{prefix}.v_proj", kv_size, dims.hidden_size, bias=qkv_bias),
        output=plain_linear(f"{prefix}.o_proj", dims.hidden_size, query_size, bias=output_bias),
        query_norm=head_norm("q_norm"),
        key_norm=head_norm("k_norm"),
        softcap=softcap,
        window=window,
    )


def separate_mlp(prefix: str, dims: Dimensions, *, activation: str, bias: bool = False) -> MlpSpec:
    """Gated feed-forward with one checkpoint tensor each for gate, up and down."""
    return MlpSpec(
        intermediate_size=dims.intermediate_size,
        activation=activation,
        gate=plain_linear(f"{prefix}.gate_proj", dims.intermediate_size, dims.hidden_size, bias=bias),
        up=plain_linear(f"{prefix}.up_proj", dims.intermediate_size, dims.hidden_size, bias=bias),
        down=plain_linear(f"{prefix}.down_proj", dims.hidden_size, dims.intermediate_size, bias=bias),
    )


def layer_windows(config: ModelConfig, default_types: Sequence[str], *, window: int) -> tuple[int, ...]:
    """The attention window of each layer by `layer_types` (or the family's default types); 0 = all positions.

    Raises   ModelNotFoundError: wrong number of types, or one that is neither full nor sliding attention
    """
    types = config.texts("layer_types") or default_types
    if len(types) != len(default_types) or not set(types) <= {FULL_ATTENTION, SLIDING_ATTENTION}:
        allowed = f"a list of {len(default_types)} times {FULL_ATTENTION} or {SLIDING_ATTENTION}"
        raise config.fault("layer_types", allowed, show=False)
    return tuple(window if kind == SLIDING_ATTENTION else 0 for kind in types)


def upper_layer_windows(config: ModelConfig, num_layers: int) -> tuple[int, ...]:
    """Qwen's windows: `sliding_window` counts only with `use_sliding_window`, from layer `max_window_layers` on."""
    if not config.boolean("use_sliding_window", False):
        return (0,) * num_layers
    first = config.integer("max_window_layers", 28, minimum=0)
    types = [SLIDING_ATTENTION if index >= first else FULL_ATTENTION for index in range(num_layers)]
    return layer_windows(config, types, window=config.integer("sliding_window", 4096))


def refuse_bidirectional(config: ModelConfig) -> None:
    """Raise ModelNotFoundError for a checkpoint that encodes text in both directions: it cannot generate."""
    if config.boolean("use_bidirectional_attention", False):
        raise config.fault("use_bidirectional_attention", "false for text generation", show=False)


def plain_linear(prefix: str, out_features: int, in_features: int, *, bias: bool = False) -> LinearSpec:
    """A linear layer stored as `<prefix>.weight` and `<prefix>.bias`."""
    return LinearSpec(
        WeightRef(f"{prefix}.weight"), out_features, in_features, WeightRef(f"{prefix}.bias") if bias else None
    )


def causal_decoder(
    config: ModelConfig,
    dims: Dimensions,
    layers: tuple[LayerSpec, ...],
    *,
    tied_default: bool = False,
    norm_offset: float = 0.0,
    embedding_scale: float = 1.0,
    logit_softcap: float = 0.0,
) -> DecoderSpec:
    """Put layers between the embedding, final norm and head that transformers calls by these names."""
    embedding = WeightRef("model.embed_tokens.weight")
    is_tied = config.boolean("tie_word_embeddings", tied_default)
    return DecoderSpec(
        vocab_size=dims.vocab_size,
        hidden_size=dims.hidden_size,
        embedding=embedding,
        layers=layers,
        final_norm=NormSpec("model.norm.weight", dims.hidden_size, dims.norm_eps, norm_offset),
        head=embedding if is_tied else WeightRef("lm_head.weight"),
        embedding_scale=embedding_scale,
        logit_softcap=logit_softcap,
    )
