import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.core.request import BlockId
from weft.errors import InvariantBroken
from weft.scheduler.prefix import MissReason, PrefixIndex, PrefixMiss

KEY = b"a secret of thirty-two bytes ..."
SIZE = 2


def make_index(key: bytes = KEY, max_remembered_evictions: int = 4096) -> PrefixIndex:
    return PrefixIndex(key, SIZE, max_remembered_evictions)


def chain(index: PrefixIndex, tokens: list[int], tenant: str = "") -> list[bytes]:
    digests: list[bytes] = []
    index.extend_digests(digests, tenant, tokens, len(tokens) // index.block_size_tokens)
    return digests


def store(index: PrefixIndex, tokens: list[int], first_block: int, tenant: str = "") -> list[BlockId]:
    """Index the full blocks of `tokens` as blocks first_block, first_block + 1, … and give them up, tail first."""
    digests = chain(index, tokens, tenant)
    stored = []
    for i, digest in enumerate(digests):
        block = BlockId(first_block + i)
        if index.insert(digest, digests[i - 1] if i else index.root(tenant), block):
            stored.append(block)
    for block in reversed(stored):
        index.retire(block)
    return stored


def find(index: PrefixIndex, tokens: list[int], tenant: str = "") -> list[BlockId]:
    return index.match(chain(index, tokens, tenant))


@pytest.mark.parametrize(
    ("stored", "asked", "num_hits"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], 2),
        ([0, 1, 2], [0, 1, 2], 1),  # a block that is not full is never shared
        ([0], [0], 0),
        ([], [0, 1], 0),
        ([0, 1, 2, 3], [0, 1, 2, 4], 1),
        ([0, 1, 2, 3], [0, 9, 2, 3], 0),  # equal blocks behind different ones are different
        ([0, 1, 2, 3], [0, 1], 1),
        ([0, 1], [0, 1, 2, 3], 1),
        ([0, 1, 0, 1], [0, 1, 0, 1], 2),
    ],
)
def test_the_longest_common_run_of_full_blocks_is_found(stored: list[int], asked: list[int], num_hits: int) -> None:
    index = make_index()
    blocks = store(index, stored, first_block=5)

    assert find(index, asked) == blocks[:num_hits]


def test_a_second_block_with_the_same_content_is_not_indexed() -> None:
    index = make_index()
    first = store(index, [0, 1, 2, 3], first_block=1)

    assert store(index, [0, 1, 2, 3], first_block=8) == []
    assert find(index, [0, 1, 2, 3]) == first


def test_branches_share_their_stem() -> None:
    index = make_index()
    stem = store(index, [0, 1], first_block=0)
    left = store(index, [0, 1, 2, 3], first_block=10)
    right = store(index, [0, 1, 4, 5], first_block=20)

    assert left == [11]
    assert right == [21]
    assert find(index, [0, 1, 2, 3]) == stem + left
    assert find(index, [0, 1, 4, 5]) == stem + right


def test_tenants_never_share() -> None:
    index = make_index()
    store(index, [0, 1, 2, 3], first_block=0, tenant="alice")

    assert find(index, [0, 1, 2, 3], tenant="alice")
    assert find(index, [0, 1, 2, 3], tenant="bob") == []
    assert find(index, [0, 1, 2, 3]) == []


def test_digests_depend_on_the_secret_key() -> None:
    assert chain(make_index(bytes(32)), [0, 1]) != chain(make_index(), [0, 1])


def test_token_ids_cannot_be_confused_with_their_neighbours_bytes() -> None:
    index = make_index()

    assert chain(index, [1, 256]) != chain(index, [256, 1])
    assert chain(index, [0, 2**32 - 1]) != chain(index, [2**32 - 1, 0])


def test_digests_are_extended_in_place_and_never_shrink() -> None:
    index = make_index()
    tokens = [0, 1, 2, 3, 4, 5]
    digests: list[bytes] = []

    index.extend_digests(digests, "", tokens, 1)
    index.extend_digests(digests, "", tokens, 3)
    index.extend_digests(digests, "", tokens, 2)

    assert digests == chain(index, tokens)


def test_the_block_given_up_longest_ago_is_evicted_first() -> None:
    index = make_index()
    store(index, [0, 1], first_block=0)
    store(index, [2, 3], first_block=1)
    store(index, [4, 5], first_block=2)
    index.reuse(BlockId(0))
    index.retire(BlockId(0))

    assert [index.evict_oldest() for _ in range(3)] == [1, 2, 0]
    assert len(index) == 0


def test_a_prefix_outlives_what_was_built_on_it() -> None:
    index = make_index()
    store(index, [0, 1, 2, 3, 4, 5], first_block=0)

    assert [index.evict_oldest() for _ in range(2)] == [2, 1]
    assert find(index, [0, 1, 2, 3, 4, 5]) == [0]


def test_a_block_cannot_have_two_contents() -> None:
    index = make_index()
    store(index, [0, 1], first_block=0)

    with pytest.raises(InvariantBroken, match="second digest"):
        index.insert(chain(index, [2, 3])[0], index.root(""), BlockId(0))


def test_forgetting_drops_descendants_and_spares_the_rest() -> None:
    index = make_index()
    store(index, [0, 1], first_block=0)
    store(index, [0, 1, 2, 3, 4, 5], first_block=10)
    store(index, [0, 1, 6, 7], first_block=20)

    freed = index.forget(chain(index, [0, 1, 2, 3])[1:])

    assert sorted(freed) == [11, 12]
    assert find(index, [0, 1, 2, 3]) == [0]
    assert find(index, [0, 1, 6, 7]) == [0, 21]


def test_forgetting_the_unknown_does_nothing() -> None:
    index = make_index()
    store(index, [0, 1], first_block=0)

    assert index.forget([bytes(16)]) == []
    assert len(index) == 1


def test_a_miss_names_the_first_differing_block() -> None:
    index = make_index()
    store(index, [0, 1, 2, 3, 4, 5], first_block=0)

    assert index.explain_miss("", [0, 1, 2, 3, 4, 5, 6]) is None
    assert index.explain_miss("", [0, 1, 9, 3, 4, 5]) == PrefixMiss(1, MissReason.NEVER_COMPUTED)
    assert index.explain_miss("x", [0, 1]) == PrefixMiss(0, MissReason.NEVER_COMPUTED)


def test_a_miss_says_when_the_block_was_evicted_or_is_on_its_way() -> None:
    index = make_index()
    store(index, [0, 1], first_block=0)
    index.evict_oldest()
    index.announce(chain(index, [2, 3]), announcer=1)

    assert index.explain_miss("", [0, 1]) == PrefixMiss(0, MissReason.EVICTED)
    assert index.explain_miss("", [2, 3]) == PrefixMiss(0, MissReason.BEING_COMPUTED)


def test_the_memory_of_evictions_is_bounded() -> None:
    index = make_index(max_remembered_evictions=1)
    store(index, [0, 1], first_block=0)
    store(index, [2, 3], first_block=1)
    index.evict_oldest()
    index.evict_oldest()

    assert index.explain_miss("", [0, 1]) == PrefixMiss(0, MissReason.NEVER_COMPUTED)
    assert index.explain_miss("", [2, 3]) == PrefixMiss(0, MissReason.EVICTED)


def test_an_announcement_ends_with_the_block_or_with_its_announcer() -> None:
    index = make_index()
    first, second = chain(index, [0, 1, 2, 3])
    index.announce([first, second], announcer=1)
    index.announce([first, second], announcer=2)

    index.insert(first, index.root(""), BlockId(0))
    index.withdraw([first, second], announcer=2)

    assert not index.is_announced(first)
    assert index.is_announced(second)
    index.withdraw([second], announcer=1)
    assert not index.is_announced(second)


SHORT_TOKENS = st.lists(st.integers(0, 2), max_size=9)


@settings(max_examples=150, deadline=None)
@given(st.lists(SHORT_TOKENS, max_size=6), SHORT_TOKENS, st.integers(0, 12))
def test_a_match_is_the_longest_stored_prefix_that_eviction_left(
    prompts: list[list[int]], asked: list[int], num_evictions: int
) -> None:
    index = make_index()
    content: dict[BlockId, tuple[int, ...]] = {}
    for number, prompt in enumerate(prompts):
        for block in store(index, prompt, first_block=10 * number):
            end = (block - 10 * number + 1) * SIZE
            content[block] = tuple(prompt[:end])
    for _ in range(min(num_evictions, index.num_evictable)):
        del content[index.evict_oldest()]

    found = find(index, asked)

    for i, block in enumerate(found):
        assert content[block] == tuple(asked[: (i + 1) * SIZE])
    next_end = (len(found) + 1) * SIZE
    assert next_end > len(asked) or tuple(asked[:next_end]) not in content.values()
