"""Runs decoders by hand over a small paged pool: blocks, tables and packed rows, for one rank or several in threads."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from tests.numerics.kernels.paged_cases import unwritten_pool

from weft.models.decoder import Decoder
from weft.models.forward_batch import ForwardBatch, LayerKv


class ThreadedGroup:
    """Ranks as threads of one process; sums in rank order."""

    def __init__(self, rank: int, shared: "SharedExchange") -> None:
        self.rank = rank
        self.world_size = shared.world_size
        self._shared = shared

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._shared.exchange(self.rank, x.clone())).sum(dim=0))

    def all_gather(self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
        parts = self._shared.exchange(self.rank, x.clone())
        assert sizes is None or [part.shape[dim] for part in parts] == list(sizes)
        return torch.cat(parts, dim=dim)

    def close(self) -> None:
        pass


class SharedExchange:
    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._slots: list[torch.Tensor | None] = [None] * world_size

    def exchange(self, rank: int, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[rank] = x
        self._barrier.wait()
        parts = [part for part in self._slots if part is not None]
        self._barrier.wait()
        return parts


@dataclass
class PagedSequence:
    token_ids: list[int]
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0


class PagedDriver:
    """Blocks are handed out in a scrambled order, and the pool starts as NaN: a read of an unwritten place shows."""

    def __init__(
        self,
        decoders: Sequence[Decoder],
        *,
        block_size: int = 16,
        num_blocks: int = 96,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.decoders = decoders
        self.block_size = block_size
        order = torch.randperm(num_blocks - 1, generator=torch.Generator().manual_seed(5)) + 1
        self.free_blocks = order.tolist()
        self.kv = [
            [
                LayerKv(*(unwritten_pool(num_blocks, heads, block_size, size, dtype) for _ in range(2)))
                for heads, size in decoder.kv_shapes
            ]
            for decoder in decoders
        ]

    def start(
        self, token_ids: list[int], *, shared: PagedSequence | None = None, shared_blocks: int = 0
    ) -> PagedSequence:
        """A new sequence, its first blocks taken over, already filled, from another one."""
        blocks = [] if shared is None else shared.blocks[:shared_blocks]
        return PagedSequence(token_ids, list(blocks), shared_blocks * self.block_size)

    def step(self, rows: Sequence[tuple[PagedSequence, int]]) -> list[torch.Tensor]:
        """Compute the next tokens of each sequence; returns the logits `[num, V]` of each row's tokens."""
        for sequence, num_tokens in rows:
            while len(sequence.blocks) * self.block_size < sequence.num_computed + num_tokens:
                sequence.blocks.append(self.free_blocks.pop())
        with ThreadPoolExecutor(len(self.decoders)) as pool:
            every = list(pool.map(lambda rank: self._forward(rank, rows), range(len(self.decoders))))
        for logits in every[1:]:
            assert torch.equal(logits, every[0]), "ranks disagree"
        for sequence, num_tokens in rows:
            sequence.num_computed += num_tokens
        return list(every[0].split([num_tokens for _, num_tokens in rows]))

    def _forward(self, rank: int, rows: Sequence[tuple[PagedSequence, int]]) -> torch.Tensor:
        ids, positions, slots, starts = [], [], [], [0]
        for sequence, num_tokens in rows:
            places = range(sequence.num_computed, sequence.num_computed + num_tokens)
            ids += [sequence.token_ids[p] for p in places]
            positions += places
            slots += [sequence.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in places]
            starts.append(starts[-1] + num_tokens)
        context = [sequence.num_computed + num_tokens for sequence, num_tokens in rows]
        longest = max(len(sequence.blocks) for sequence, _ in rows)
        tables = [sequence.blocks + [0] * (longest - len(sequence.blocks)) for sequence, _ in rows]
        batch = ForwardBatch(
            token_ids=torch.tensor(ids, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
            kv_slots=torch.tensor(slots, dtype=torch.int32),
            query_starts=torch.tensor(starts, dtype=torch.int32),
            context_lens=torch.tensor(context, dtype=torch.int32),
            block_tables=torch.tensor(tables, dtype=torch.int32),
            logit_rows=torch.arange(len(ids), dtype=torch.int32),
            kv=self.kv[rank],
            max_context_len=max(context),
            max_query_len=max(num_tokens for _, num_tokens in rows),
        )
        return self.decoders[rank].forward(batch)
