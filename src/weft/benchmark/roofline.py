"""How fast a machine could serve a load at best: bytes it must read, operations it must do, and the time for both.

The one owner of these formulas. Nothing here measures: bandwidth and peaks are taken beside the load and passed in.

* A decoding step reads every weight once, and the keys and values of all of its sequences.
* A token costs two operations per weight of the layers and four per query head, position seen and element of a head;
  the output layer runs for tokens that are sampled from, not for the rest of a prompt.
* One stream does one thing after another: its limit is the sum over its prompt and its steps, each bound by bytes or by
  operations. Several streams can hide one behind the other, so theirs is the larger of all bytes and all operations.

Weights that stay in the last-level cache between steps count as read from memory; a model that fits can pass 100 %.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from weft.benchmark.profiles import Profile

KV_BYTES_PER_ELEMENT = 2
"""bfloat16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a dense decoder with gated feed-forward layers."""

    num_layers: int
    hidden: int
    feed_forward: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From the values of a `config.json` of the Llama family."""
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            feed_forward=config["intermediate_size"],
            query_heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_size=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            vocabulary=config["vocab_size"],
        )

    @property
    def layer_weights(self) -> int:
        """Weights of the matrices of all layers."""
        query, kv = self.query_heads * self.head_size, self.kv_heads * self.head_size
        of_attention = self.hidden * (query + 2 * kv) + query * self.hidden
        return self.num_layers * (of_attention + 3 * self.hidden * self.feed_forward)

    @property
    def output_weights(self) -> int:
        """Weights of the output layer."""
        return self.vocabulary * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one position."""
        return self.num_layers * 2 * self.kv_heads * self.head_size * KV_BYTES_PER_ELEMENT

    def attention_operations(self, positions_seen: int) -> int:
        """Of one token, all layers: products with keys and with values."""
        return 4 * self.num_layers * self.query_heads * self.head_size * positions_seen


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """What a weight takes in memory, scales included, and which peak its products are measured against."""

    name: str
    layer_bytes: float
    """Per weight of the layers."""
    output_bytes: float
    """Per weight of the output layer."""
    peak: str
    """`bf16` or `int8`."""


WEIGHT_FORMATS = {
    form.name: form
    for form in (
        WeightFormat(name="bf16", layer_bytes=2.0, output_bytes=2.0, peak="bf16"),
        WeightFormat(name="int8", layer_bytes=1.0, output_bytes=1.0, peak="int8"),
        # Two 16-bit numbers for 32 codes; the vocabulary in 8 bits.
        WeightFormat(name="int4", layer_bytes=0.5 + 4 / 32, output_bytes=1.0, peak="int8"),
        # GGUF: 18 bytes for 32 weights, and 34 for the vocabulary.
        WeightFormat(name="q4_0", layer_bytes=18 / 32, output_bytes=34 / 32, peak="int8"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was measured beside a load."""

    bytes_per_s: float
    peaks: Mapping[str, float]
    """Operations per second: `bf16` and `int8`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Bytes to read and operations to do, the latter by the peak that bounds them."""

    num_bytes: float = 0.0
    operations: Mapping[str, float]

    def times(self, count: float) -> "Work":
        """This work `count` times."""
        operations = {peak: amount * count for peak, amount in self.operations.items()}
        return Work(num_bytes=self.num_bytes * count, operations=operations)

    def plus(self, other: "Work") -> "Work":
        """Both."""
        peaks = {**self.operations, **other.operations}
        return Work(
            num_bytes=self.num_bytes + other.num_bytes,
            operations={peak: self.operations.get(peak, 0.0) + other.operations.get(peak, 0.0) for peak in peaks},
        )

    def seconds_of_bytes(self, machine: Machine) -> float:
        """At the measured bandwidth."""
        return self.num_bytes / machine.bytes_per_s

    def seconds_of_operations(self, machine: Machine) -> float:
        """At the measured peaks, one kind after the other."""
        return sum(amount / machine.peaks[peak] for peak, amount in self.operations.items())

    def seconds(self, machine: Machine) -> float:
        """Reading and computing at the same time."""
        return max(self.seconds_of_bytes(machine), self.seconds_of_operations(machine))


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The least time that a load takes, and what sets it."""

    seconds: float
    is_bytes: bool

    def share(self, measured_s: float) -> float:
        """1.0: nothing is left to gain."""
        return self.seconds / measured_s

    @property
    def cause(self) -> str:
        """For a table."""
        return "bytes" if self.is_bytes else "operations"


def weight_bytes(shape: ModelShape, form: WeightFormat) -> float:
    """What every step reads."""
    return shape.layer_weights * form.layer_bytes + shape.output_weights * form.output_bytes


def decode_step(shape: ModelShape, form: WeightFormat, rows: int, context: float) -> Work:
    """One token for each of `rows` sequences that see `context` positions on average, prefixes not shared."""
    linear = 2.0 * rows * (shape.layer_weights + shape.output_weights)
    attention = rows * shape.attention_operations(1) * context
    return Work(
        num_bytes=weight_bytes(shape, form) + rows * context * shape.kv_bytes_per_token,
        operations=_operations(form, linear, attention),
    )


def prompt(shape: ModelShape, form: WeightFormat, new_tokens: int, cached_tokens: int = 0) -> Work:
    """A prompt in one step, its first token included; its own keys and values are still in the cache."""
    seen = sum(range(cached_tokens + 1, cached_tokens + new_tokens + 1))
    linear = 2.0 * (new_tokens * shape.layer_weights + shape.output_weights)
    return Work(
        num_bytes=weight_bytes(shape, form) + cached_tokens * shape.kv_bytes_per_token,
        operations=_operations(form, linear, shape.attention_operations(1) * seen),
    )


def _operations(form: WeightFormat, linear: float, attention: float) -> dict[str, float]:
    if form.peak == "bf16":
        return {"bf16": linear + attention}
    return {form.peak: linear, "bf16": attention}


def load_limit(
    shape: ModelShape, form: WeightFormat, profile: Profile, machine: Machine, *, is_prefix_cached: bool = False
) -> Limit:
    """The least seconds for all requests of a closed loop; see the head of this file.

    A shared prefix is computed once, or never when it `is_prefix_cached`; its keys and values are read once per step.
    """
    shared = profile.shared_prefix_tokens
    own_context = profile.prompt_tokens + profile.output_tokens / 2
    rows = min(profile.concurrency, profile.num_requests)
    steps = (profile.output_tokens - 1) * profile.num_requests / rows
    decoding = decode_step(shape, form, rows, own_context).plus(_shared_prefix(shape, rows, shared)).times(steps)
    prompts = prompt(shape, form, profile.prompt_tokens, shared).times(profile.num_requests)
    if shared and not is_prefix_cached:
        prompts = prompts.plus(prompt(shape, form, shared))
    if rows == 1:
        parts = (prompts, decoding)
        is_bytes = sum(part.seconds_of_bytes(machine) for part in parts) > sum(
            part.seconds_of_operations(machine) for part in parts
        )
        return Limit(seconds=sum(part.seconds(machine) for part in parts), is_bytes=is_bytes)
    # Prompts ride along in the steps of the others: they read no weights of their own.
    prompts = Work(operations=prompts.operations)
    total = decoding.plus(prompts)
    return Limit(
        seconds=total.seconds(machine), is_bytes=total.seconds_of_bytes(machine) > total.seconds_of_operations(machine)
    )


def _shared_prefix(shape: ModelShape, rows: int, shared_tokens: int) -> Work:
    return Work(
        num_bytes=shared_tokens * shape.kv_bytes_per_token,
        operations={"bf16": float(rows * shape.attention_operations(shared_tokens))},
    )
