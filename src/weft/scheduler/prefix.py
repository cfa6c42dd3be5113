"""Which full blocks can be reused: a keyed hash chain over token ids.

Theory of operation
    The digest of block i covers the secret key, the tenant and every token of blocks 0 … i:

        d(-1) = BLAKE2b(key, tenant)        d(i) = BLAKE2b(key, d(i-1) ‖ tokens of block i)

    so one dictionary lookup per block finds the longest shared prefix, and equal digests mean equal tokens under
    one tenant: nobody can search for collisions of 128 bits without the key, which never leaves the process.
    The index lives and dies with one loaded model, so the model needs no place in the key.

    An entry is *in use* while a sequence holds its block and *evictable* otherwise. Evictable blocks are ordered by
    the moment they were given up, a sequence's last block first, so a prefix outlives what was built on it.

    Blocks that a running sequence is about to compute are *announced*: a second request with the same beginning
    waits for them instead of computing them a second time.

The index knows digests and block ids. Reference counts are the pool's (`blocks.py`), which calls `retire` and `reuse`.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from enum import StrEnum
from hashlib import blake2b

from weft.core.request import BlockId
from weft.errors import InvariantBroken

DIGEST_BYTES = 16


class MissReason(StrEnum):
    """Why a block of a prompt is not in the index."""

    NEVER_COMPUTED = "never_computed"
    """No prompt with the same beginning came by: this is the first block whose tokens differ from all others."""
    BEING_COMPUTED = "being_computed"
    EVICTED = "evicted"
    """It was here and had to make room."""


@dataclass(frozen=True, slots=True)
class PrefixMiss:
    """Where the match of a prompt ended."""

    block_index: int
    """First block of the prompt that is not in the index."""
    reason: MissReason


class PrefixIndex:
    """Digest of a full block → the block that holds its keys and values."""

    def __init__(self, key: bytes, block_size_tokens: int, max_remembered_evictions: int = 4096) -> None:
        self.block_size_tokens = block_size_tokens
        self._keyed = blake2b(key=key, digest_size=DIGEST_BYTES)
        self._block_of: dict[bytes, BlockId] = {}
        self._digest_of: dict[BlockId, bytes] = {}
        self._parent_of: dict[bytes, bytes] = {}
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()
        self._announcer_of: dict[bytes, int] = {}
        self._evicted: OrderedDict[bytes, None] = OrderedDict()
        self._max_remembered_evictions = max_remembered_evictions

    def __len__(self) -> int:
        return len(self._block_of)

    @property
    def num_evictable(self) -> int:
        """Indexed blocks that no sequence holds."""
        return len(self._evictable)

    def root(self, tenant: str) -> bytes:
        """Digest before the first block: where a tenant's chains begin."""
        hasher = self._keyed.copy()
        hasher.update(b"tenant\0" + tenant.encode("utf-8", "surrogatepass"))
        return hasher.digest()

    def extend_digests(self, digests: list[bytes], tenant: str, token_ids: Seq[int], num_blocks: int) -> None:
        """Append to `digests` until it covers the first `num_blocks` blocks of `token_ids`."""
        if len(digests) >= num_blocks:
            return
        size = self.block_size_tokens
        parent = digests[-1] if digests else self.root(tenant)
        for start in range(len(digests) * size, num_blocks * size, size):
            hasher = self._keyed.copy()
            hasher.update(parent)
            hasher.update(array("Q", token_ids[start : start + size]))
            parent = hasher.digest()
            digests.append(parent)

    def match(self, digests: Iterable[bytes]) -> list[BlockId]:
        """Blocks of the longest indexed beginning of a chain."""
        found: list[BlockId] = []
        for digest in digests:
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def explain_miss(self, tenant: str, token_ids: Seq[int]) -> PrefixMiss | None:
        """Where and why the match of a prompt ends; None when every full block of it is indexed."""
        digests: list[bytes] = []
        self.extend_digests(digests, tenant, token_ids, len(token_ids) // self.block_size_tokens)
        index = len(self.match(digests))
        if index == len(digests):
            return None
        digest = digests[index]
        if digest in self._announcer_of:
            return PrefixMiss(index, MissReason.BEING_COMPUTED)
        if digest in self._evicted:
            return PrefixMiss(index, MissReason.EVICTED)
        return PrefixMiss(index, MissReason.NEVER_COMPUTED)

    def announce(self, digests: Iterable[bytes], announcer: int) -> None:
        """Say that a running sequence is about to compute these blocks. The first announcer of a block counts."""
        for digest in digests:
            self._announcer_of.setdefault(digest, announcer)

    def withdraw(self, digests: Iterable[bytes], announcer: int) -> None:
        """The sequence will not compute these blocks after all."""
        for digest in digests:
            if self._announcer_of.get(digest) == announcer:
                del self._announcer_of[digest]

    def is_announced(self, digest: bytes) -> bool:
        """A running sequence is computing this block."""
        return digest in self._announcer_of

    def insert(self, digest: bytes, parent: bytes, block_id: BlockId) -> bool:
        """Offer a full block that a sequence in use just computed. False: an equal block is indexed already."""
        self._announcer_of.pop(digest, None)
        if digest in self._block_of:
            return False
        if block_id in self._digest_of:
            raise InvariantBroken(f"block {block_id} is offered to the prefix index under a second digest")
        self._block_of[digest] = block_id
        self._digest_of[block_id] = digest
        self._parent_of[digest] = parent
        self._evicted.pop(digest, None)
        return True

    def holds(self, block_id: BlockId) -> bool:
        """The block is indexed: its content must not change."""
        return block_id in self._digest_of

    def is_evictable(self, block_id: BlockId) -> bool:
        """The block is indexed and no sequence holds it."""
        return block_id in self._evictable

    def retire(self, block_id: BlockId) -> None:
        """No sequence holds this indexed block any more: it becomes the newest evictable one."""
        self._evictable[block_id] = None

    def reuse(self, block_id: BlockId) -> None:
        """A sequence takes this evictable block into its table."""
        del self._evictable[block_id]

    def evict_oldest(self) -> BlockId:
        """Drop the evictable block that was given up longest ago, and return it."""
        block_id, _ = self._evictable.popitem(last=False)
        self._evicted[self._drop(block_id)] = None
        if len(self._evicted) > self._max_remembered_evictions:
            self._evicted.popitem(last=False)
        return block_id

    def forget(self, digests: Iterable[bytes]) -> list[BlockId]:
        """Drop these blocks and all that were built on them, because their content is not to be trusted.

        Returns those that no sequence holds: they are free now. Cost O(entries); meant for failures.
        """
        pending = [digest for digest in digests if digest in self._block_of]
        if not pending:
            return []
        children: dict[bytes, list[bytes]] = {}
        for digest, parent in self._parent_of.items():
            children.setdefault(parent, []).append(digest)
        freed: list[BlockId] = []
        while pending:
            digest = pending.pop()
            block_id = self._block_of.get(digest)
            if block_id is None:
                continue
            pending.extend(children.get(digest, ()))
            self._drop(block_id)
            if block_id in self._evictable:
                del self._evictable[block_id]
                freed.append(block_id)
        return freed

    def clear(self) -> list[BlockId]:
        """Drop every evictable block, and return them."""
        freed = list(self._evictable)
        self._evictable.clear()
        for block_id in freed:
            self._drop(block_id)
        return freed

    def _drop(self, block_id: BlockId) -> bytes:
        digest = self._digest_of.pop(block_id)
        del self._block_of[digest]
        del self._parent_of[digest]
        return digest
