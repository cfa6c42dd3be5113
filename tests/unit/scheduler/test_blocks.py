import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from weft.core.request import BlockId
from weft.errors import InvariantBroken
from weft.scheduler.blocks import BlockPool
from weft.scheduler.prefix import PrefixIndex

KEY = bytes(32)


def make_pool(num_blocks: int) -> tuple[BlockPool, PrefixIndex]:
    index = PrefixIndex(KEY, 2)
    return BlockPool(num_blocks, index), index


def digest(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_a_new_pool_is_all_free() -> None:
    pool, _ = make_pool(3)

    assert (pool.num_free, pool.num_used, pool.num_cached, pool.num_available) == (3, 0, 0, 3)


def test_every_block_is_handed_out_once_and_then_no_more() -> None:
    pool, _ = make_pool(3)

    blocks = [pool.allocate() for _ in range(3)]

    assert sorted(blocks) == [0, 1, 2]
    with pytest.raises(InvariantBroken, match="all 3 blocks are in use"):
        pool.allocate()


def test_a_block_given_back_goes_out_first() -> None:
    pool, _ = make_pool(4)
    first, second = pool.allocate(), pool.allocate()

    pool.release([first, second])

    assert pool.allocate() == first


def test_a_shared_block_is_free_only_when_the_last_holder_lets_go() -> None:
    pool, index = make_pool(2)
    block = pool.allocate()
    index.insert(digest(1), digest(0), block)

    pool.share([block])
    pool.release([block])

    assert pool.num_used == 1
    pool.release([block])
    assert (pool.num_used, pool.num_cached) == (0, 1)


def test_giving_back_twice_is_noticed() -> None:
    pool, _ = make_pool(1)
    block = pool.allocate()
    pool.release([block])

    with pytest.raises(InvariantBroken, match="given back more often"):
        pool.release([block])


def test_cached_blocks_are_evicted_only_when_free_ones_run_out() -> None:
    pool, index = make_pool(2)
    block = pool.allocate()
    index.insert(digest(1), digest(0), block)
    pool.release([block])

    assert pool.allocate() != block
    assert pool.allocate() == block
    assert not index.holds(block)


def test_the_tail_of_a_table_is_evicted_before_its_head() -> None:
    pool, index = make_pool(3)
    table = [pool.allocate() for _ in range(3)]
    for i, block in enumerate(table):
        index.insert(digest(i + 1), digest(i), block)

    pool.release(table)

    assert [pool.allocate() for _ in range(3)] == table[::-1]


def test_forgetting_a_cached_block_frees_it_and_what_was_built_on_it() -> None:
    pool, index = make_pool(4)
    table = [pool.allocate() for _ in range(3)]
    for i, block in enumerate(table):
        index.insert(digest(i + 1), digest(i), block)
    pool.release(table)

    pool.forget([digest(2)])

    assert (pool.num_free, pool.num_cached) == (3, 1)
    assert index.match([digest(1), digest(2), digest(3)]) == table[:1]


def test_forgetting_a_block_in_use_keeps_it_in_use_but_not_shareable() -> None:
    pool, index = make_pool(2)
    block = pool.allocate()
    index.insert(digest(1), digest(0), block)

    pool.forget([digest(1)])

    assert pool.num_used == 1
    assert not index.holds(block)
    pool.release([block])
    assert pool.num_free == 2


def test_clearing_frees_cached_blocks_and_leaves_used_ones() -> None:
    pool, index = make_pool(3)
    used, cached = pool.allocate(), pool.allocate()
    index.insert(digest(1), digest(0), used)
    index.insert(digest(2), digest(0), cached)
    pool.release([cached])

    assert pool.clear_cached() == 1
    assert (pool.num_free, pool.num_used, pool.num_cached) == (2, 1, 0)
    assert index.match([digest(1)]) == [used]


class PoolMachine(RuleBasedStateMachine):
    """Random allocation, sharing, indexing, releasing and forgetting against a model of plain sets."""

    NUM_BLOCKS = 8
    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.index = make_pool(self.NUM_BLOCKS)
        self.held: list[list[BlockId]] = []
        self.next_digest = 1

    @rule(target=tables, count=st.integers(0, 3))
    def allocate(self, count: int) -> int:
        table = [self.pool.allocate() for _ in range(min(count, self.pool.num_available))]
        used = {block for other in self.held for block in other}
        assert not used & set(table)
        self.held.append(table)
        return len(self.held) - 1

    @rule(target=tables, source=tables)
    def share(self, source: int) -> int:
        shared = [block for block in self.held[source] if self.index.holds(block)]
        self.pool.share(shared)
        self.held.append(list(shared))
        return len(self.held) - 1

    @rule(table=tables)
    def index_table(self, table: int) -> None:
        for block in self.held[table]:
            if not self.index.holds(block):
                self.index.insert(digest(self.next_digest), digest(0), block)
                self.next_digest += 1

    @rule(table=consumes(tables))
    def release(self, table: int) -> None:
        self.pool.release(self.held[table])
        self.held[table] = []

    @rule(number=st.integers(1, 20))
    def forget(self, number: int) -> None:
        self.pool.forget([digest(number)])
        assert self.index.match([digest(number)]) == []

    @rule()
    def clear(self) -> None:
        self.pool.clear_cached()
        assert self.pool.num_cached == 0

    @invariant()
    def every_block_is_in_one_state(self) -> None:
        assert self.pool.num_free + self.pool.num_used + self.pool.num_cached == self.NUM_BLOCKS
        for block in map(BlockId, range(self.NUM_BLOCKS)):
            assert self.pool.ref_count(block) == sum(table.count(block) for table in self.held)
        free = self.pool.free_block_ids()
        assert len(set(free)) == len(free)
        assert not any(self.pool.ref_count(block) or self.index.holds(block) for block in free)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
