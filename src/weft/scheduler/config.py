"""The numbers a scheduler works with, and what each of TGI's knobs means here."""

from dataclasses import dataclass

DEFAULT_BLOCK_SIZE_TOKENS = {"cpu": 32, "cuda": 64}
"""By type of device."""
DEFAULT_MAX_BATCH_PREFILL_TOKENS = 4096
MIN_PREFIX_KEY_BYTES = 16
MAX_PREFIX_KEY_BYTES = 64  # the longest key of BLAKE2b


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and targets of one engine. Raises ValueError naming the field that cannot be.

    Every number is already resolved (no "auto"): the launcher and the start-up measurement chose it.
    """

    max_num_sequences: int
    """Slots of the runner's tables: most sequences that run at once."""
    num_blocks: int
    """Blocks of the KV pool, ids 0 … num_blocks - 1, all of them handed out."""
    block_size_tokens: int
    max_total_tokens: int
    """Longest sequence, prompt plus completion."""
    vocab_size: int
    """Bound on token ids, of requests and of what the sampler returns."""
    max_batch_prefill_tokens: int
    """TGI's flag, TGI's meaning with chunked prefill: most tokens of one step, of which decode rows take their
    share first. Rounded up to whole blocks. The chunk may be smaller to protect running streams."""
    prefix_key: bytes
    """Secret of 16 to 64 bytes that keys the prefix digests. Chance has no place in the scheduler, so it is given."""
    max_batch_total_tokens: int | None = None
    """TGI's flag: most tokens held in the pool, rounded down to whole blocks. None = all `num_blocks`."""
    max_batch_size: int | None = None
    """TGI's flag: most sequences that run at once; here it also counts after the first batch. None = the slots."""
    waiting_served_ratio: float = 0.3
    """TGI's flag, accepted and without effect, as in TGI with chunked prefill: it rations the pauses that a
    prefill causes to running sequences, and here a prefill never pauses them. The inter-token target rules."""
    max_waiting_tokens: int = 20
    """TGI's flag, accepted and without effect for the same reason: waiting prompts get a chunk in every step."""
    max_queue_requests: int = 1024
    """Requests that may wait for their first step; one more is refused. Preempted ones are not counted."""
    prefix_caching: bool = True
    growth_reserve_blocks: int = 2
    """Blocks left to each running sequence when another one is admitted. At four times the demand that the pool can
    hold, 1 has 12 % of all tokens computed twice, 2 only 5 %, and 3 leaves memory idle."""
    inter_token_target_ns: int | None = None
    """Time between two tokens of a running sequence that prefill chunks must not exceed; None = no target. A step
    without running sequences may last four times as long, so that newcomers and aborts are noticed."""
    attention_cost: float = 0.0
    """What a prompt token is assumed to cost per position it attends to, as a share of its cost without attention,
    until a long prompt was measured."""

    def __post_init__(self) -> None:
        for name in (
            "max_num_sequences",
            "num_blocks",
            "block_size_tokens",
            "vocab_size",
            "max_batch_prefill_tokens",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.max_total_tokens >= 2, "max_total_tokens", self.max_total_tokens, "at least 2")
        _require(self.max_queue_requests >= 0, "max_queue_requests", self.max_queue_requests, "at least 0")
        _require(self.growth_reserve_blocks >= 0, "growth_reserve_blocks", self.growth_reserve_blocks, "at least 0")
        if self.max_batch_size is not None:
            _require(self.max_batch_size >= 1, "max_batch_size", self.max_batch_size, "at least 1")
        if self.max_batch_total_tokens is not None:
            _require(
                self.max_batch_total_tokens >= self.block_size_tokens,
                "max_batch_total_tokens",
                self.max_batch_total_tokens,
                f"at least one block ({self.block_size_tokens} tokens)",
            )
        if self.inter_token_target_ns is not None:
            _require(self.inter_token_target_ns > 0, "inter_token_target_ns", self.inter_token_target_ns, "positive")
        _require(self.attention_cost >= 0, "attention_cost", self.attention_cost, "at least 0")
        _require(
            MIN_PREFIX_KEY_BYTES <= len(self.prefix_key) <= MAX_PREFIX_KEY_BYTES,
            "prefix_key length",
            len(self.prefix_key),
            f"{MIN_PREFIX_KEY_BYTES} to {MAX_PREFIX_KEY_BYTES} bytes",
        )

    @property
    def usable_blocks(self) -> int:
        """Blocks that sequences and the prefix index may hold together."""
        if self.max_batch_total_tokens is None:
            return self.num_blocks
        return min(self.num_blocks, self.max_batch_total_tokens // self.block_size_tokens)

    @property
    def max_running(self) -> int:
        """Most sequences that run at once."""
        return min(self.max_num_sequences, self.max_batch_size or self.max_num_sequences)

    @property
    def prefill_budget_tokens(self) -> int:
        """`max_batch_prefill_tokens` in whole blocks, rounded up as TGI does."""
        return -(-self.max_batch_prefill_tokens // self.block_size_tokens) * self.block_size_tokens

    @property
    def max_step_tokens(self) -> int:
        """No plan computes more tokens than this (T): what the runner's buffers and the activation memory must hold.

        A prompt gets at least one block beside the decode rows, so that it is never shut out.
        """
        return max(self.prefill_budget_tokens, self.max_running + self.block_size_tokens)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:  # noqa: FBT001 - it is the check itself
    if not condition:
        raise ValueError(f"`{name}` must be {allowed}. Given: {value}")
