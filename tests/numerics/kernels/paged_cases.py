"""Builds batches for paged attention: a pool with shuffled blocks, NaN wherever nobody wrote, and its exact answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from weft.kernels import kv_layout, ops


@dataclass(frozen=True, kw_only=True)
class PagedCase:
    """Sequences in one pool; `lengths` are (rows in this step, context) pairs."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    lengths: tuple[tuple[int, int], ...]
    softcap: float = 0.0
    window: int = 0

    @property
    def scale(self) -> float:
        """As models set it."""
        return self.q.shape[2] ** -0.5

    def run(self) -> torch.Tensor:
        """The operation under test."""
        starts = torch.tensor([0, *[rows for rows, _ in self.lengths]]).cumsum(0).int()
        return ops.paged_attention(
            self.q,
            self.keys,
            self.values,
            self.block_tables,
            starts,
            torch.tensor([context for _, context in self.lengths], dtype=torch.int32),
            self.scale,
            self.softcap,
            self.window,
            max_query_len=max((rows for rows, _ in self.lengths), default=0),
            max_context_len=max((context for _, context in self.lengths), default=0),
        )

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Result and magnitude (weights times absolute values) in float64, by the definition."""
        results, magnitudes, first = [], [], 0
        for sequence, (rows, context) in enumerate(self.lengths):
            q = self.q[first : first + rows].double()
            first += rows
            result, magnitude = self._exact_sequence(q, sequence, context)
            results.append(result)
            magnitudes.append(magnitude)
        return torch.cat(results), torch.cat(magnitudes)

    def _exact_sequence(self, q: torch.Tensor, sequence: int, context: int) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = self.block_tables[sequence].long()
        keys = self._flatten(kv_layout.read_keys(self.keys, blocks, self.q.shape[2]), context)
        values = self._flatten(kv_layout.read_values(self.values, blocks, self.q.shape[2]), context)
        scores = torch.einsum("thd,hcd->htc", q, keys) * self.scale
        if self.softcap:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        positions = torch.arange(context - len(q), context)[:, None]
        columns = torch.arange(context)[None, :]
        hidden = columns > positions
        if self.window:
            hidden |= columns <= positions - self.window
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
        return torch.einsum("htc,hcd->thd", weights, values), torch.einsum("htc,hcd->thd", weights, values.abs())

    def _flatten(self, blocks: torch.Tensor, context: int) -> torch.Tensor:
        flat = blocks.transpose(0, 1).flatten(1, 2)[:, :context].double()
        return flat.repeat_interleave(self.q.shape[1] // self.keys.shape[1], dim=0)

    def part(self, sequence: int, first_position: int, end_position: int) -> "PagedCase":
        """Rows of one sequence alone, as a later or earlier step would compute them."""
        rows, context = self.lengths[sequence]
        before = sum(length for length, _ in self.lengths[:sequence])
        start = before + first_position - (context - rows)
        return replace(
            self,
            q=self.q[start : start + end_position - first_position],
            block_tables=self.block_tables[sequence : sequence + 1],
            lengths=((end_position - first_position, end_position),),
        )


def with_common_blocks(case: PagedCase, shared: Sequence[tuple[int, int]]) -> PagedCase:
    """The same queries where each sequence begins with blocks of another one.

    shared   per sequence (whose, so many leading positions): whole blocks of them; its own from there on
    """
    tables, block_size = case.block_tables.clone(), case.keys.shape[2]
    for sequence, (owner, positions) in enumerate(shared):
        blocks = positions // block_size
        tables[sequence, :blocks] = tables[owner, :blocks].clone()
    return replace(case, block_tables=tables)


def unwritten_pool(num_blocks: int, kv_heads: int, block_size: int, head_size: int, dtype: torch.dtype) -> torch.Tensor:
    """A pool that reads as NaN everywhere."""
    shape = (num_blocks, kv_heads, block_size, kv_layout.pool_width(head_size, dtype))
    # All bits set are a NaN in float32, which the scales of int8 are.
    return torch.full(shape, -1 if dtype == torch.int8 else torch.nan, dtype=dtype)


def make_case(
    lengths: Sequence[tuple[int, int]],
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 64,
    block_size: int = 32,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    softcap: float = 0.0,
    window: int = 0,
    seed: int = 0,
) -> PagedCase:
    """Random queries, keys and values; everything that belongs to no position of a sequence is NaN."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    counts = [-(-context // block_size) for _, context in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(seed)).int()
    tables = torch.zeros(len(lengths), max(counts, default=0) + 1, dtype=torch.int32)
    keys, values = (unwritten_pool(len(order), kv_heads, block_size, head_size, kv_dtype or dtype) for _ in range(2))
    used = 0
    for sequence, (_, context) in enumerate(lengths):
        for start in range(0, context, block_size):
            block = order[used]
            used += 1
            tables[sequence, start // block_size] = block
            # Drawn per position, so that another block size holds the same numbers.
            count = min(block_size, context - start)
            drawn = torch.randn(count, 2, kv_heads, head_size, generator=generator)
            slots = block.long() * block_size + torch.arange(count)
            kv_layout.write_keys(keys, slots, drawn[:, 0])
            kv_layout.write_values(values, slots, drawn[:, 1])
    rows = sum(length for length, _ in lengths)
    q = torch.randn(rows, query_heads, head_size, generator=generator).to(dtype)
    return PagedCase(
        q=q,
        keys=keys,
        values=values,
        block_tables=tables,
        lengths=tuple(lengths),
        softcap=softcap,
        window=window,
    )
