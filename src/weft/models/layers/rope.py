"""The table of rotary cosines and sines, in the arithmetic of transformers so that logits agree to rounding.

Source   Su et al. 2021, arXiv 2104.09864; scalings as named in `spec/rope.py`; transformers `modeling_rope_utils.py`
"""

import math

import torch

from weft.models.spec import (
    FrequencyDivisors,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    YarnScaling,
)


def cos_sin_table(spec: RopeSpec, max_positions: int, device: torch.device) -> torch.Tensor:
    """Return `[max_positions, R]` float32: R/2 cosines, then R/2 sines, for each position."""
    frequencies, factor = _frequencies(spec, max_positions)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos() * factor, angles.sin() * factor), dim=1).to(device)


def _frequencies(spec: RopeSpec, max_positions: int) -> tuple[torch.Tensor, float]:
    """Radians per position `[R/2]`, and the factor on cosines and sines."""
    powers = spec.theta ** (torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim)
    base = 1.0 / powers
    match spec.scaling:
        case None:
            return base, 1.0
        case LinearScaling(factor=factor):
            return base / factor, 1.0
        case FrequencyDivisors(divisors=divisors):
            return base / torch.tensor(divisors, dtype=torch.float32), 1.0
        case Llama3Scaling():
            return _llama3(base, spec.scaling), 1.0
        case YarnScaling():
            return _yarn(powers, spec, spec.scaling), spec.scaling.attention_factor
        case LongRopeScaling() as scaling:
            # One list for the life of the server: keys already stored cannot change their rotation, and a token
            # must not depend on how long its neighbours are.
            is_long = max_positions > scaling.original_max_positions
            divisors = scaling.long_factors if is_long else scaling.short_factors
            return 1.0 / (torch.tensor(divisors, dtype=torch.float32) * powers), scaling.attention_factor


def _llama3(base: torch.Tensor, scaling: Llama3Scaling) -> torch.Tensor:
    wavelength = 2 * math.pi / base
    longest_kept = scaling.original_max_positions / scaling.high_freq_factor
    shortest_divided = scaling.original_max_positions / scaling.low_freq_factor
    ramp = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - ramp) * base / scaling.factor + ramp * base
    scaled = torch.where(wavelength > shortest_divided, base / scaling.factor, blended)
    return torch.where(wavelength < longest_kept, base, scaled)


def _yarn(powers: torch.Tensor, spec: RopeSpec, scaling: YarnScaling) -> torch.Tensor:
    def dimension_of(rotations: float) -> float:
        """The dimension that turns this often over the original context."""
        turns = scaling.original_max_positions / (rotations * 2 * math.pi)
        return spec.rotary_dim * math.log(turns) / (2 * math.log(spec.theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    if low == high:
        high += 0.001  # the ramp needs a width
    ramp = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept
