"""A model recorded once and replayed with each step's batch, where the device has a way to do that.

On the CPU a recording is a flat program of the compiled kernels (`kernels/cpu/program.py`): one call per step instead
of some eight per layer, in which the interpreter lock is free and the worker threads stay awake. It is made from the
decoder's own calls and proved at once: the batch it was recorded with must give the same bits when it is replayed.
A model that cannot be recorded runs operation by operation, and whoever starts it is told why.
"""

import numpy as np
import numpy.typing as npt
import torch

from weft.kernels import kv_layout, ops
from weft.kernels.cpu.program import Arena, NotExpressible, Program, record
from weft.kernels.registry import notice
from weft.models.decoder import Decoder
from weft.models.forward_batch import ForwardBatch, LayerKv
from weft.parallel.groups import Group

__all__ = ["NotExpressible", "ReplayedDecoder", "record_decoder"]

_ROW_LENGTHS = (3, 1, 2)
"""Of the recorded batch: its numbers of tokens, sequences and rows of logits differ."""
_LOGIT_ROWS = (2, 5)

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]


class ReplayedDecoder:
    """A decoder whose steps are replayed; implements `runner.Model`. A result is valid until the next step."""

    def __init__(self, decoder: Decoder, *, forward: Program, greedy: Program, hidden_states: Program) -> None:
        self._decoder = decoder
        self._forward = forward
        self._greedy = greedy
        self._hidden_states = hidden_states
        self._chosen: tuple[torch.Tensor, ...] = ()
        """What the two arrays below are views of; the same from step to step while the batch keeps its size."""
        self._chosen_on_host = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))

    @property
    def num_operations(self) -> int:
        """Operations that one call runs."""
        return self._forward.num_operations

    def reserve(self, num_tokens: int, num_logits: int) -> None:
        """Take the memory for steps up to a size; it is touched as far as steps use it."""
        self._greedy.reserve(num_tokens, num_logits)

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Decoder.forward`."""
        (logits,) = self._forward.run(batch)
        return logits

    def greedy(self, batch: ForwardBatch) -> tuple[Int64Array, Float32Array]:
        """See `runner.ChoosingModel`: the worker threads are still awake when it comes to choosing."""
        chosen = self._greedy.run(batch)
        if chosen is not self._chosen:
            token_ids, logprobs = self._chosen = chosen
            self._chosen_on_host = token_ids.numpy(), logprobs.numpy()
        return self._chosen_on_host

    def hidden_states(self, batch: ForwardBatch) -> torch.Tensor:
        """See `Decoder.hidden_states`."""
        (hidden_states,) = self._hidden_states.run(batch)
        return hidden_states

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `Decoder.logits`: two operations, which need no recording."""
        return self._decoder.logits(hidden_states)

    def time_operations(self, batch: ForwardBatch) -> dict[str, int]:
        """Run a step and tell the nanoseconds that each kind of operation took."""
        return self._greedy.time_operations(batch)


def record_decoder(decoder: Decoder, group: Group, *, block_size_tokens: int, dtype: torch.dtype) -> ReplayedDecoder:
    """Record a decoder on the CPU; `dtype` is that of its KV pool.

    Raises   NotExpressible: it must run operation by operation; the message is the reason, for the user
    """
    if notice():
        raise NotExpressible(notice())
    if group.world_size > 1:
        raise NotExpressible("several ranks exchange sums between the operations")
    batch, arena = _example_batch(decoder, block_size_tokens, dtype), Arena()
    replayed = ReplayedDecoder(
        decoder,
        forward=record(decoder.forward, batch, arena),
        greedy=record(lambda batch: ops.greedy(decoder.forward(batch)), batch, arena),
        hidden_states=record(decoder.hidden_states, batch, arena),
    )
    _prove(replayed, decoder, block_size_tokens, dtype)
    return replayed


def _prove(replayed: ReplayedDecoder, decoder: Decoder, block_size_tokens: int, dtype: torch.dtype) -> None:
    """Compare replay and decoder, bit for bit. An operation that no recorder sees would show here."""
    called, replay = (_example_batch(decoder, block_size_tokens, dtype) for _ in range(2))
    is_same = torch.equal(decoder.forward(called), replayed.forward(replay))
    for left, right in zip(called.kv, replay.kv, strict=True):
        is_same = is_same and torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)
    if not is_same:
        raise NotExpressible("its replay gives other numbers than its operations one by one")


def _example_batch(decoder: Decoder, block_size_tokens: int, dtype: torch.dtype) -> ForwardBatch:
    """A small batch with a KV pool of its own, one block for each sequence."""
    num_sequences = len(_ROW_LENGTHS)
    places = [(block, position) for block, length in enumerate(_ROW_LENGTHS) for position in range(length)]
    starts = [sum(_ROW_LENGTHS[:index]) for index in range(num_sequences + 1)]

    def pool(num_heads: int, head_size: int) -> torch.Tensor:
        width = kv_layout.pool_width(head_size, dtype)
        return torch.zeros(num_sequences, num_heads, block_size_tokens, width, dtype=dtype)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    return ForwardBatch(
        token_ids=integers([(1 + 7 * row) % decoder.spec.vocab_size for row in range(len(places))]),
        positions=integers([position for _, position in places]),
        kv_slots=integers([block * block_size_tokens + position for block, position in places]),
        query_starts=integers(starts),
        context_lens=integers(list(_ROW_LENGTHS)),
        block_tables=integers(list(range(num_sequences))).view(num_sequences, 1),
        logit_rows=integers(list(_LOGIT_ROWS)),
        kv=[LayerKv(keys=pool(*shape), values=pool(*shape)) for shape in decoder.kv_shapes],
        max_context_len=max(_ROW_LENGTHS),
        max_query_len=max(_ROW_LENGTHS),
    )
