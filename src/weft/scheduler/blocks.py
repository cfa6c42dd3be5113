"""Who holds which block of the KV pool.

A block is in exactly one state, and free + used + cached = total at all times:

    free     nobody holds it, its content means nothing
    used     reference count ≥ 1: that many sequences have it in their table
    cached   reference count 0 but in the prefix index: reusable until it is evicted

Only a block with reference count 1 that is not indexed may be written.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from weft.core.request import BlockId
from weft.errors import InvariantBroken
from weft.scheduler.prefix import PrefixIndex


class BlockPool:
    """Allocates, shares and takes back blocks; evicts cached ones when free ones run out."""

    def __init__(self, num_blocks: int, index: PrefixIndex) -> None:
        self._index = index
        self._ref_counts = [0] * num_blocks
        # A stack: a block given back last is warm in the processor's caches and goes out first.
        self._free = [BlockId(block_id) for block_id in range(num_blocks - 1, -1, -1)]

    @property
    def num_blocks(self) -> int:
        """N: all blocks."""
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks with no content of use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that only the prefix index holds."""
        return self._index.num_evictable

    @property
    def num_used(self) -> int:
        """Blocks in the table of at least one sequence."""
        return len(self._ref_counts) - len(self._free) - self._index.num_evictable

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + self._index.num_evictable

    def ref_count(self, block_id: BlockId) -> int:
        """Sequences that have the block in their table."""
        return self._ref_counts[block_id]

    def allocate(self) -> BlockId:
        """One block for writing, evicting the oldest cached one if none is free.

        Raises InvariantBroken when nothing is available: the caller makes room first.
        """
        if self._free:
            block_id = self._free.pop()
        elif self._index.num_evictable:
            block_id = self._index.evict_oldest()
        else:
            raise InvariantBroken(f"all {self.num_blocks} blocks are in use and one more is wanted")
        self._ref_counts[block_id] = 1
        return block_id

    def share(self, block_ids: Iterable[BlockId]) -> None:
        """Take indexed blocks into one more table."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                self._index.reuse(block_id)
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Seq[BlockId]) -> None:
        """A sequence gives up its table. The last block goes first, so that it is also evicted first."""
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            if count < 0:
                raise InvariantBroken(f"block {block_id} is given back more often than it was taken")
            self._ref_counts[block_id] = count
            if count == 0:
                if self._index.holds(block_id):
                    self._index.retire(block_id)
                else:
                    self._free.append(block_id)

    def forget(self, digests: Iterable[bytes]) -> None:
        """Take blocks, and all that were built on them, out of the prefix index: their content is suspect."""
        self._free.extend(self._index.forget(digests))

    def clear_cached(self) -> int:
        """Free every cached block. Returns how many."""
        freed = self._index.clear()
        self._free.extend(freed)
        return len(freed)

    def free_block_ids(self) -> list[BlockId]:
        """A copy of the free list, for checks."""
        return list(self._free)
