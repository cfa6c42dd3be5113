"""What a shard says about itself: once (`EngineInfo`), after each step (`EngineStats`), when asked (`EngineHealth`)."""

from dataclasses import dataclass, field

import msgspec


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReceipt:
    """How near a model of few bits is to itself in the type that activations have, on a fixed text."""

    reference: str
    """That type, for example `bfloat16`."""
    top1_agreement: float
    """Share of the positions where both have the same most likely token, 0-1."""
    kl_nats: float
    """Mean divergence of the rounded model's distribution from the other's, in nats per token."""
    num_tokens: int
    """Positions compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What is served and with which limits. Constant while a shard lives."""

    model_id: str
    revision: str = ""
    model_type: str = ""
    num_parameters: int = 0
    dtype: str = ""
    quantization: str = ""
    device_type: str = "cpu"
    device_name: str = ""
    kernel_set: str = ""
    """Instruction set or kernel set in use, for people."""
    vocab_size: int
    max_total_tokens: int
    """Longest sequence, prompt and completion together."""
    max_batch_prefill_tokens: int = 0
    max_batch_total_tokens: int = 0
    max_num_sequences: int = 0
    block_size_tokens: int = 0
    num_blocks: int = 0
    weights_bytes: int = 0
    kv_pool_bytes: int = 0
    activation_bytes: int = 0
    free_bytes: int = 0
    prefix_caching: bool = True
    batch_invariant: bool = False
    """A request's tokens do not depend on what shares its batch."""
    world_size: int = 1
    fingerprint: str = ""
    """Hashes of weights, numeric configuration and kernel set, WEIGHTS-CONFIGURATION-KERNELS; equal ones give equal
    tokens."""
    quality: QualityReceipt | None = None
    """What few bits cost; None when nothing is rounded or nobody has measured."""
    pooling: str = ""
    """How prompts become vectors, a value of `core.request.Pooling`; empty: the model generates text."""
    embedding_size: int = 0
    """E: numbers in a vector."""
    normalizes: bool = False
    """Vectors have length 1."""
    embedding_dimensions: tuple[int, ...] = ()
    """Lengths that a vector may be cut to; none: every length."""
    phases: tuple[tuple[str, float], ...] = field(default=())
    """(start-up phase, seconds) in order."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State after a step. Counters count since the process started."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    total_blocks: int = 0
    num_preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    step_decode_rows: int = 0
    step_prefill_rows: int = 0
    step_tokens: int = 0
    step_elapsed_ns: int = 0
    step_starts: int = 0
    """Sequences that took a slot in the step."""
    step_plan_ns: int = 0
    """Making the plan."""
    step_apply_ns: int = 0
    """Turning the result into events."""
    num_failed_steps: int = 0
    """Steps that raised instead of yielding tokens."""
    oldest_waiting_ns: int = 0
    """How long the request at the head of the queue has been waiting; 0 = nobody waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """Whether the engine can take requests, and how long ago it last made progress."""

    is_ready: bool
    stalled_ns: int = 0
