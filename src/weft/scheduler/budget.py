"""How many prompt tokens a step may compute.

The scheduler has no clock. Each result brings the duration of its step, from which `StepCostModel` learns

    duration ≈ decode(rows) + prefill tokens × cost of one token

and `PrefillBudget` turns the inter-token target into a number of tokens. Old observations fade, one outlier counts
no more than a few times what was expected, so neither a hiccup nor a change of load misleads it for long. A few
tokens may cost no more than none (the weights are read anyway), so a chunk grows by steps, each one measured.
"""

from weft.scheduler.config import SchedulerConfig

_DECAY = 0.95  # an observation loses half its weight in 14 steps
_MAX_SURPRISE = 4.0  # a step counts at most as this many times its expected duration
_MIN_SAMPLES_TO_CLIP = 4
_MIN_TOKEN_NS = 1.0
_TRUSTED_GROWTH = 4  # costs are not extrapolated beyond this many times the largest chunk measured lately
_TRUSTED_TOKENS = 64  # …nor is less than this assumed to be known
# With no stream to protect a step may last this many targets: who arrives or leaves meanwhile waits for its end.
_TARGETS_WITHOUT_STREAMS = 4.0


class StepCostModel:
    """Running estimates of what decode rows and prompt tokens cost, in nanoseconds."""

    def __init__(self) -> None:
        self._num_decode_samples = 0
        self._weight = 0.0
        self._rows = 0.0
        self._rows_squared = 0.0
        self._ns = 0.0
        self._rows_times_ns = 0.0
        self._num_prefill_samples = 0
        self._prefill_tokens = 0.0
        self._prefill_ns = 0.0
        self._largest_chunk = 0.0

    @property
    def trusted_tokens(self) -> int:
        """Largest chunk for which `prefill_token_ns` is more than a guess."""
        return int(max(self._largest_chunk, _TRUSTED_TOKENS) * _TRUSTED_GROWTH)

    def decode_ns(self, num_rows: int) -> float:
        """Expected duration of a step of decode rows alone: a weighted regression line, never falling or negative."""
        if num_rows == 0 or self._weight == 0.0:
            return 0.0
        mean_rows = self._rows / self._weight
        mean_ns = self._ns / self._weight
        variance = self._rows_squared / self._weight - mean_rows**2
        if variance < 0.25:  # all steps had the same number of rows: nothing is known about the slope
            return mean_ns
        slope = (self._rows_times_ns / self._weight - mean_rows * mean_ns) / variance
        slope = min(max(slope, 0.0), mean_ns / mean_rows)
        return mean_ns + slope * (num_rows - mean_rows)

    def prefill_token_ns(self) -> float:
        """Expected duration that one more prompt token adds to a step."""
        if self._prefill_tokens == 0.0:
            return _MIN_TOKEN_NS
        return max(self._prefill_ns / self._prefill_tokens, _MIN_TOKEN_NS)

    def observe(self, num_decode_rows: int, num_prefill_tokens: int, elapsed_ns: int) -> None:
        """Learn from one applied step."""
        if num_prefill_tokens == 0:
            self._observe_decode(num_decode_rows, float(elapsed_ns))
        else:
            self._observe_prefill(num_decode_rows, num_prefill_tokens, float(elapsed_ns))

    def _observe_decode(self, num_rows: int, elapsed_ns: float) -> None:
        if self._num_decode_samples >= _MIN_SAMPLES_TO_CLIP:
            elapsed_ns = min(elapsed_ns, _MAX_SURPRISE * self.decode_ns(num_rows))
        self._num_decode_samples += 1
        self._weight = self._weight * _DECAY + 1.0
        self._rows = self._rows * _DECAY + num_rows
        self._rows_squared = self._rows_squared * _DECAY + num_rows**2
        self._ns = self._ns * _DECAY + elapsed_ns
        self._rows_times_ns = self._rows_times_ns * _DECAY + num_rows * elapsed_ns

    def _observe_prefill(self, num_rows: int, num_tokens: int, elapsed_ns: float) -> None:
        own_ns = max(elapsed_ns - self.decode_ns(num_rows), _MIN_TOKEN_NS * num_tokens)
        if self._num_prefill_samples >= _MIN_SAMPLES_TO_CLIP:
            own_ns = min(own_ns, _MAX_SURPRISE * self.prefill_token_ns() * num_tokens)
        self._num_prefill_samples += 1
        # A ratio of sums, not a mean of ratios: large chunks say more about the cost of a token than small ones.
        self._prefill_tokens = self._prefill_tokens * _DECAY + num_tokens
        self._prefill_ns = self._prefill_ns * _DECAY + own_ns
        self._largest_chunk = max(self._largest_chunk * _DECAY, num_tokens)


class PrefillBudget:
    """Prompt tokens that the next step may take, beside its decode rows."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.costs = StepCostModel()
        self._block_size = config.block_size_tokens
        self._max_tokens = config.prefill_budget_tokens
        self._target_ns = config.inter_token_target_ns

    def tokens(self, num_decode_rows: int) -> int:
        """At least one block, so that a waiting prompt always gets on; at most TGI's budget less the decode rows."""
        limit = max(self._max_tokens - num_decode_rows, self._block_size)
        if self._target_ns is None:
            return limit
        if num_decode_rows == 0:
            spare_ns = _TARGETS_WITHOUT_STREAMS * self._target_ns
        else:
            spare_ns = self._target_ns - self.costs.decode_ns(num_decode_rows)
        affordable = int(spare_ns / self.costs.prefill_token_ns())
        return max(min(limit, affordable, self.costs.trusted_tokens), self._block_size)


def fit_chunk(position: int, num_remaining: int, limit_tokens: int, block_size_tokens: int) -> int:
    """Length of the next chunk of a prompt: all that remains, or up to the last block border within the limit.

    Returns 0 when not even the next border is within the limit. Chunks end on borders because attention works in
    whole blocks and only full blocks can be shared.
    """
    if num_remaining <= limit_tokens:
        return num_remaining
    end = (position + limit_tokens) // block_size_tokens * block_size_tokens
    return max(end - position, 0)
