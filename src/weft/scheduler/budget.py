"""How many prompt tokens a step may compute.

The scheduler has no clock. Each result brings the duration of its step, from which `StepCostModel` learns

    duration ≈ decode(rows) + prefill tokens × (base + slope × mean position attended to)

because attention makes a late token of a prompt dearer than an early one. `PrefillBudget` turns what the inter-token
target leaves into a `StepBudget`, and each chunk of the step takes from it the tokens it can pay for at its position.

Old observations fade, one outlier counts no more than a few times what was expected, so neither a hiccup nor a change
of load misleads it for long. The slope outlives a run of prompts that say nothing about it; until the first long one it
is what the model's shape lets expect. A few tokens may cost no more than none (the weights are read anyway), so a chunk
grows by steps, each one measured.
"""

from math import sqrt

from weft.scheduler.config import SchedulerConfig

_DECAY = 0.95  # an observation loses half its weight in 14 steps
_MAX_SURPRISE = 4.0  # a step counts at most as this many times its expected duration
_MIN_SAMPLES_TO_CLIP = 4
_MIN_TOKEN_NS = 1.0
_TRUSTED_GROWTH = 4  # costs are not extrapolated beyond this many times what was measured
_TRUSTED_TOKENS = 64  # …nor is a chunk of less than this assumed to be known
_MIN_SPREAD_POSITIONS = 256.0  # standard deviation of positions from which on noise does not drown the slope
# With no stream to protect a step may last this many targets: who arrives or leaves meanwhile waits for its end.
_TARGETS_WITHOUT_STREAMS = 4.0


def attended_positions(first_position: int, num_tokens: int) -> float:
    """Positions that the tokens of a chunk attend to, summed over them. Cached and shared ones count as all do."""
    return num_tokens * (first_position + num_tokens / 2)


class StepCostModel:
    """Running estimates of what decode rows and prompt tokens cost, in nanoseconds."""

    def __init__(self, attention_cost: float = 0.0) -> None:
        """See `SchedulerConfig.attention_cost`."""
        self._decode = _DecodeCost()
        self.prefill = PrefillCost(attention_cost)

    def decode_ns(self, num_rows: int) -> float:
        """Expected duration of a step of decode rows alone: never falling with their number, never negative."""
        return self._decode.expected_ns(num_rows)

    def observe(self, num_decode_rows: int, num_prefill_tokens: int, num_attended: float, elapsed_ns: int) -> None:
        """Learn from one applied step. `num_attended` is the sum of its chunks' `attended_positions`."""
        if num_prefill_tokens == 0:
            self._decode.observe(num_decode_rows, float(elapsed_ns))
        else:
            own_ns = elapsed_ns - self.decode_ns(num_decode_rows)
            self.prefill.observe(num_prefill_tokens, num_attended / num_prefill_tokens, own_ns)


class _DecodeCost:
    """A fading regression line of duration over decode rows."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._weight = 0.0
        self._rows = 0.0
        self._rows_squared = 0.0
        self._ns = 0.0
        self._rows_times_ns = 0.0

    def expected_ns(self, num_rows: int) -> float:
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

    def observe(self, num_rows: int, elapsed_ns: float) -> None:
        if self._num_samples >= _MIN_SAMPLES_TO_CLIP:
            elapsed_ns = min(elapsed_ns, _MAX_SURPRISE * self.expected_ns(num_rows))
        self._num_samples += 1
        self._weight = self._weight * _DECAY + 1.0
        self._rows = self._rows * _DECAY + num_rows
        self._rows_squared = self._rows_squared * _DECAY + num_rows**2
        self._ns = self._ns * _DECAY + elapsed_ns
        self._rows_times_ns = self._rows_times_ns * _DECAY + num_rows * elapsed_ns


class PrefillCost:
    """A fading line of the cost of one token over its position, neither end of which is negative.

    Chunks count by their tokens: large ones say more about the cost of a token than small ones.
    """

    def __init__(self, attention_cost: float = 0.0) -> None:
        """See `SchedulerConfig.attention_cost`."""
        self._attention_cost = attention_cost
        self._is_slope_measured = False
        self._num_samples = 0
        self._tokens = 0.0
        self._positions = 0.0
        self._positions_squared = 0.0
        self._ns = 0.0
        self._positions_times_ns = 0.0
        self._largest_chunk = 0.0
        self._base_ns = 0.0
        self._slope_ns = 0.0
        self._farthest = 0.0
        """Largest mean position measured; it does not fade, as little as the slope does."""

    @property
    def trusted_tokens(self) -> int:
        """Largest chunk whose cost is more than a guess."""
        return int(max(self._largest_chunk, _TRUSTED_TOKENS) * _TRUSTED_GROWTH)

    def token_ns(self, position: float) -> float:
        """Expected duration that one more prompt token at `position` adds to a step."""
        return max(self._base_ns + self._slope_ns * min(position, self._trusted_position), _MIN_TOKEN_NS)

    def chunk_ns(self, first_position: int, num_tokens: int) -> float:
        """Expected duration that a chunk adds to a step."""
        return num_tokens * self.token_ns(first_position + num_tokens / 2)

    def affordable_tokens(self, first_position: int, spare_ns: float) -> int:
        """Longest chunk from `first_position` on that adds at most `spare_ns`; 0 if even one token adds more."""
        if spare_ns <= 0.0:
            return 0
        first_ns = self.token_ns(first_position)
        slope_ns = self._slope_ns if first_position < self._trusted_position else 0.0
        # The positive root of slope/2 × n² + first × n = spare, in the form that no flat line divides by zero.
        return int(2 * spare_ns / (first_ns + sqrt(first_ns**2 + 2 * slope_ns * spare_ns)))

    def observe(self, num_tokens: int, mean_position: float, elapsed_ns: float) -> None:
        """Learn from the chunks of one step, whose decode rows are not in `elapsed_ns`. `mean_position` > 0."""
        own_ns = max(elapsed_ns, _MIN_TOKEN_NS * num_tokens)
        if self._num_samples >= _MIN_SAMPLES_TO_CLIP:
            own_ns = min(own_ns, _MAX_SURPRISE * self.token_ns(mean_position) * num_tokens)
        self._num_samples += 1
        self._tokens = self._tokens * _DECAY + num_tokens
        self._positions = self._positions * _DECAY + num_tokens * mean_position
        self._positions_squared = self._positions_squared * _DECAY + num_tokens * mean_position**2
        self._ns = self._ns * _DECAY + own_ns
        self._positions_times_ns = self._positions_times_ns * _DECAY + mean_position * own_ns
        self._largest_chunk = max(self._largest_chunk * _DECAY, num_tokens)
        self._farthest = max(self._farthest, mean_position)
        self._fit()

    @property
    def _trusted_position(self) -> float:
        return self._farthest * _TRUSTED_GROWTH

    def _fit(self) -> None:
        """Least squares, base ≥ 0 and slope ≥ 0. While all chunks are near one position the slope stays as it was.

        Before it was ever measured it is `attention_cost` times the base.
        """
        mean_position = self._positions / self._tokens
        mean_ns = self._ns / self._tokens
        variance = self._positions_squared / self._tokens - mean_position**2
        if variance >= _MIN_SPREAD_POSITIONS**2:
            self._is_slope_measured = True
            covariance = self._positions_times_ns / self._tokens - mean_position * mean_ns
            self._slope_ns = max(covariance / variance, 0.0)
            if self._slope_ns * mean_position > mean_ns:  # the base would be negative: the best line through zero
                self._slope_ns = self._positions_times_ns / self._positions_squared
        elif self._is_slope_measured:
            self._slope_ns = min(self._slope_ns, mean_ns / mean_position)
        else:
            self._slope_ns = self._attention_cost * mean_ns / (1.0 + self._attention_cost * mean_position)
        self._base_ns = max(mean_ns - self._slope_ns * mean_position, 0.0)


class PrefillBudget:
    """What prompts may take of each step, beside its decode rows."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.costs = StepCostModel(config.attention_cost)
        self._block_size = config.block_size_tokens
        self._max_tokens = config.prefill_budget_tokens
        self._target_ns = config.inter_token_target_ns

    def for_step(self, num_decode_rows: int) -> "StepBudget":
        """The budget of the next step: at most TGI's less the decode rows, and what the target leaves of time."""
        limit = max(self._max_tokens - num_decode_rows, self._block_size)
        if self._target_ns is None:
            return StepBudget(self.costs.prefill, limit, None, self._block_size)
        if num_decode_rows == 0:
            spare_ns = _TARGETS_WITHOUT_STREAMS * self._target_ns
        else:
            spare_ns = self._target_ns - self.costs.decode_ns(num_decode_rows)
        limit = min(limit, max(self.costs.prefill.trusted_tokens, self._block_size))
        return StepBudget(self.costs.prefill, limit, spare_ns, self._block_size)


class StepBudget:
    """Tokens and nanoseconds that the chunks of one step share. None = no bound on time.

    A step affords at least one block, wherever it lies, so that a waiting prompt always gets on.
    """

    def __init__(self, cost: PrefillCost, limit_tokens: int, spare_ns: float | None, sure_tokens: int) -> None:
        self._cost = cost
        self._limit_tokens = limit_tokens
        self._spare_ns = spare_ns
        self._sure_tokens = sure_tokens

    def tokens_at(self, position: int) -> int:
        """Longest chunk that may still begin at `position`; the earlier, the longer."""
        if self._spare_ns is None:
            return self._limit_tokens
        affordable = self._cost.affordable_tokens(position, self._spare_ns)
        return min(self._limit_tokens, max(affordable, self._sure_tokens))

    def spend(self, position: int, num_tokens: int) -> None:
        """Take a chunk that begins at `position` out of the budget."""
        self._limit_tokens -= num_tokens
        self._sure_tokens = max(self._sure_tokens - num_tokens, 0)
        if self._spare_ns is not None:
            self._spare_ns -= self._cost.chunk_ns(position, num_tokens)


def fit_chunk(position: int, num_remaining: int, limit_tokens: int, block_size_tokens: int) -> int:
    """Length of the next chunk of a prompt: all that remains, or up to the last block border within the limit.

    Returns 0 when not even the next border is within the limit. Chunks end on borders because attention works in
    whole blocks and only full blocks can be shared.
    """
    if num_remaining <= limit_tokens:
        return num_remaining
    end = (position + limit_tokens) // block_size_tokens * block_size_tokens
    return max(end - position, 0)
