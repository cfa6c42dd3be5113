"""Rotary position embedding as data, and how configurations spell it.

transformers 5 writes one object `rope_parameters` (one per layer type in Gemma 3); earlier versions wrote
`rope_theta` beside `rope_scaling`. Both are read. The arithmetic is in `layers/rope.py`.
"""

import math
from dataclasses import dataclass

from weft.models.weights.config_file import ModelConfig


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Long wavelengths divided by a factor, short ones kept, a ramp between (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Per-frequency mix of interpolation and extrapolation (Peng et al. 2023, arXiv 2309.00071)."""

    factor: float
    original_max_positions: int
    attention_factor: float
    """Multiplies cosines and sines."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """Per-frequency divisors, one list for short and one for long contexts (Ding et al. 2024, arXiv 2402.13753)."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_max_positions: int
    attention_factor: float


@dataclass(frozen=True, slots=True)
class FrequencyDivisors:
    """Per-frequency divisors given by the checkpoint itself (GGUF `rope_freqs`)."""

    divisors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | FrequencyDivisors


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of the first `rotary_dim` of D dimensions, half-split layout."""

    theta: float
    rotary_dim: int
    scaling: RopeScaling | None = None


def read_rope(
    config: ModelConfig, *, head_dim: int, default_theta: float = 10_000.0, parameters: ModelConfig | None = None
) -> RopeSpec:
    """Read the rotary embedding of a model (or, with `parameters`, of one of its layer types).

    Raises   ModelNotFoundError: unknown kind, or a field missing or out of range
    """
    section = parameters or config.section("rope_parameters") or config.section("rope_scaling")
    theta = _number_in(section, config, "rope_theta", default_theta)
    fraction = _number_in(section, config, "partial_rotary_factor", 1.0)
    rotary_dim = int(head_dim * fraction)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise config.fault("partial_rotary_factor", f"such that an even part of head_dim = {head_dim} is rotated")
    if section is None:
        return RopeSpec(theta, rotary_dim)
    return RopeSpec(theta, rotary_dim, _read_scaling(section, config, rotary_dim))


def _number_in(section: ModelConfig | None, config: ModelConfig, name: str, default: float) -> float:
    if section is not None and section.has(name):
        return section.number(name)
    return config.number(name, default)


def _read_scaling(section: ModelConfig, config: ModelConfig, rotary_dim: int) -> RopeScaling | None:
    kind = section.text("rope_type" if section.has("rope_type") else "type", "default")
    match kind:
        # `dynamic` stretches only beyond max_position_embeddings, which is where serving ends; mrope equals the
        # default for text.
        case "default" | "dynamic" | "mrope":
            return None
        case "linear":
            return LinearScaling(section.number("factor", minimum=1.0))
        case "llama3":
            return Llama3Scaling(
                factor=section.number("factor", minimum=1.0),
                low_freq_factor=section.number("low_freq_factor"),
                high_freq_factor=section.number("high_freq_factor"),
                original_max_positions=_original_max_positions(section, config),
            )
        # Early Phi-3 files say yarn and mean longrope; only the latter has lists of factors.
        case "yarn" if not section.has("long_factor"):
            return _read_yarn(section, config)
        case "longrope" | "su" | "yarn":
            return _read_long_rope(section, config, rotary_dim)
        case "divisors":  # our own spelling of GGUF's `rope_freqs` tensor, see weights/gguf_config.py
            return FrequencyDivisors(section.numbers("divisors", rotary_dim // 2))
    raise section.fault("rope_type", "one of default, dynamic, linear, llama3, longrope, yarn")


def _original_max_positions(section: ModelConfig, config: ModelConfig) -> int:
    # transformers gives the field beside the section precedence over the one inside.
    name = "original_max_position_embeddings"
    return config.optional_integer(name) or section.integer(name, config.integer("max_position_embeddings"))


def _read_yarn(section: ModelConfig, config: ModelConfig) -> YarnScaling:
    original = _original_max_positions(section, config)
    factor = section.number("factor", config.integer("max_position_embeddings") / original)
    attention_factor = section.optional_number("attention_factor")
    if attention_factor is None:
        mscale, mscale_all = section.number("mscale", 0.0), section.number("mscale_all_dim", 0.0)
        # Peng et al. 2023, eq. 22, with DeepSeek's pair of multipliers where a configuration has both.
        attention_factor = (
            _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all)
            if mscale and mscale_all
            else (_yarn_mscale(factor, 1.0))
        )
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=attention_factor,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.boolean("truncate", True),
    )


def _yarn_mscale(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0


def _read_long_rope(section: ModelConfig, config: ModelConfig, rotary_dim: int) -> LongRopeScaling:
    original = _original_max_positions(section, config)
    factor = section.number("factor", config.integer("max_position_embeddings") / original)
    attention_factor = section.optional_number("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factors=section.numbers("short_factor", rotary_dim // 2),
        long_factors=section.numbers("long_factor", rotary_dim // 2),
        original_max_positions=original,
        attention_factor=attention_factor,
    )
