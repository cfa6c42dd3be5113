"""Who is here and what they hold: the one place where slots and blocks change hands.

A live sequence either waits in the queue with nothing, or runs with a slot and a block table. `planner.py` and
`results.py` decide; every change of hands is a method here, so that nothing can be given back halfway.
"""

from bisect import insort

from weft.core.plan import SequenceStart
from weft.core.request import BlockId, Pooling, RequestId, Slot
from weft.core.sequence import Sequence
from weft.scheduler import policy
from weft.scheduler.blocks import BlockPool
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.prefix import PrefixIndex
from weft.scheduler.queue import WaitingQueue


class Roster:
    """Live sequences, their slots and their blocks."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.index = PrefixIndex(config.prefix_key, config.block_size_tokens)
        self.pool = BlockPool(config.usable_blocks, self.index)
        self.queue = WaitingQueue(config.max_queue_requests)
        self.running: list[Sequence] = []
        """Sequences with a slot, sorted by `policy.rank`."""
        self.free_slots = [Slot(slot) for slot in range(config.max_num_sequences - 1, -1, -1)]
        self.live: dict[RequestId, Sequence] = {}
        """Every request that has not ended, in order of arrival."""
        self.suspects: list[Sequence] = []
        """Live sequences that must run alone, in the order in which they will."""
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._size = config.block_size_tokens

    def enter(self, sequence: Sequence) -> None:
        """A new request takes the last place of its priority in the queue."""
        self.live[sequence.request.request_id] = sequence
        self.queue.append(sequence)

    def start(self, sequence: Sequence, hits: list[BlockId], now_ns: int) -> SequenceStart:
        """Move a waiting sequence to a free slot, with `hits` as the beginning of its block table."""
        self.queue.remove(sequence)
        num_cached = len(hits) * self._size
        if not sequence.has_started and self.may_reuse(sequence):
            sequence.num_cached_tokens = min(num_cached, sequence.num_prompt_tokens)
            self.prefix_query_tokens += len(sequence.token_ids)
            self.prefix_hit_tokens += num_cached
        start = sequence.start(self.free_slots.pop(), now_ns)
        self.pool.share(hits)
        sequence.block_ids = list(hits)
        sequence.num_slots_held = sequence.num_planned = num_cached
        sequence.num_indexed_blocks = len(hits)
        if self.config.prefix_caching:
            self._announce(sequence)
        insort(self.running, sequence, key=policy.rank)
        return start

    def take_block(self, sequence: Sequence) -> BlockId:
        """Append one block to the table of a running sequence."""
        block_id = self.pool.allocate()
        sequence.block_ids.append(block_id)
        sequence.num_slots_held += self._size
        return block_id

    def preempt(self, sequence: Sequence) -> None:
        """Back to the front of the queue, because others need the blocks more."""
        self.num_preemptions += 1
        self.set_back(sequence)

    def set_back(self, sequence: Sequence) -> None:
        """A running sequence loses slot and blocks and waits to be computed again."""
        self.running.remove(sequence)
        self._give_back(sequence)
        self.queue.push_front(sequence)

    def suspect(self, sequence: Sequence) -> None:
        """A step with this sequence raised: what is open means nothing, and it starts again, alone."""
        sequence.distrust_open_rows()
        if not sequence.is_suspect:
            sequence.is_suspect = True
            self.suspects.append(sequence)
        if sequence.is_running:
            self.set_back(sequence)

    def clear(self, sequence: Sequence) -> None:
        """A suspect has run alone without harm, or is gone."""
        sequence.is_suspect = False
        self.suspects.remove(sequence)

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out, whatever it is doing. In `running` it stays until `sweep`."""
        sequence.is_ended = True
        if sequence.is_suspect:
            self.clear(sequence)
        del self.live[sequence.request.request_id]
        if sequence.is_running:
            self._give_back(sequence)
        elif sequence in self.queue:
            self.queue.remove(sequence)

    def sweep(self) -> None:
        """Drop ended sequences from `running`, all at once because several may end in one step."""
        self.running = [sequence for sequence in self.running if not sequence.is_ended]

    def share_computed(self, sequence: Sequence, num_computed: int) -> None:
        """The first `num_computed` tokens are in the pool for sure: blocks that they fill become shareable."""
        if not sequence.is_running or not self.config.prefix_caching:
            return
        num_full = num_computed // self._size
        if num_full <= sequence.num_indexed_blocks:
            return
        digests = self.digests(sequence, num_full)
        for i in range(sequence.num_indexed_blocks, num_full):
            parent = digests[i - 1] if i else self.index.root(sequence.request.tenant)
            self.index.insert(digests[i], parent, sequence.block_ids[i])
        sequence.num_indexed_blocks = num_full

    def may_reuse(self, sequence: Sequence) -> bool:
        """Whether keys and values of earlier requests will do, or every position must be computed.

        Prompt log-probabilities and a mean need all of them, a retry after NaN trusts nothing cached.
        """
        if not self.config.prefix_caching or sequence.num_numerical_failures:
            return False
        if sequence.request.pooling not in {None, Pooling.LAST}:
            return False
        lacks_logprobs = len(sequence.prompt_logprobs) < sequence.num_prompt_tokens - 1
        return not (sequence.wants_prompt_logprobs and lacks_logprobs)

    def digests(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """Prefix digests of the leading full blocks, at least `num_blocks` of them."""
        self.index.extend_digests(sequence.block_digests, sequence.request.tenant, sequence.token_ids, num_blocks)
        return sequence.block_digests

    def _announce(self, sequence: Sequence) -> None:
        num_full = len(sequence.token_ids) // self._size
        digests = self.digests(sequence, num_full)
        self.index.announce(digests[sequence.num_indexed_blocks : num_full], sequence.arrival)
        sequence.num_announced_blocks = num_full

    def _give_back(self, sequence: Sequence) -> None:
        self.free_slots.append(sequence.slot)
        if sequence.num_announced_blocks > sequence.num_indexed_blocks:
            announced = sequence.block_digests[sequence.num_indexed_blocks : sequence.num_announced_blocks]
            self.index.withdraw(announced, sequence.arrival)
        self.pool.release(sequence.block_ids)
        sequence.rewind()
