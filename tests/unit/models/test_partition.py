from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import DoesNotFitError
from weft.models.weights.partition import HeadShare, Span, even_span, head_share


def test_nine_heads_in_three_groups_on_two_ranks_are_split_two_groups_to_one() -> None:
    assert head_share(9, 3, 0, 2) == HeadShare(Span(0, 6), Span(0, 2))
    assert head_share(9, 3, 1, 2) == HeadShare(Span(6, 9), Span(2, 3))


def test_one_key_head_is_replicated_and_its_query_heads_are_split() -> None:
    assert [head_share(5, 1, rank, 2) for rank in range(2)] == [
        HeadShare(Span(0, 3), Span(0, 1)),
        HeadShare(Span(3, 5), Span(0, 1)),
    ]


def test_two_groups_on_three_ranks_give_one_group_two_ranks() -> None:
    assert [head_share(8, 2, rank, 3) for rank in range(3)] == [
        HeadShare(Span(0, 2), Span(0, 1)),
        HeadShare(Span(2, 4), Span(0, 1)),
        HeadShare(Span(4, 8), Span(1, 2)),
    ]


def test_more_ranks_than_query_heads_is_an_error_that_names_the_flag() -> None:
    with pytest.raises(DoesNotFitError, match=r"`--num-shard` 7 is too many .*Use at most 6"):
        head_share(6, 3, 6, 7)


@given(groups=st.integers(1, 12), group_size=st.integers(1, 8), data=st.data())
def test_every_query_head_has_exactly_one_rank_and_finds_its_key_head_there(
    groups: int, group_size: int, data: st.DataObject
) -> None:
    heads = groups * group_size
    world_size = data.draw(st.integers(1, heads))

    shares = [head_share(heads, groups, rank, world_size) for rank in range(world_size)]

    assert [head for share in shares for head in range(share.query.start, share.query.stop)] == list(range(heads))
    for share in shares:
        assert share.query.size > 0
        for head in range(share.query.start, share.query.stop):
            assert share.key_value.start <= head // group_size < share.key_value.stop
        # The kernels want as many query heads for each key head.
        assert share.query.size % share.key_value.size == 0


@given(total=st.integers(1, 5000), world_size=st.integers(1, 16), multiple=st.sampled_from([1, 32, 64]))
def test_parts_are_contiguous_complete_and_never_empty(total: int, world_size: int, multiple: int) -> None:
    world_size = min(world_size, total)

    spans = [even_span(total, rank, world_size, multiple=multiple) for rank in range(world_size)]

    assert spans[0].start == 0
    assert spans[-1].stop == total
    assert all(left.stop == right.start for left, right in pairwise(spans))
    assert all(span.size > 0 for span in spans)


def test_ranks_own_whole_runs_where_there_are_enough() -> None:
    assert [even_span(200, rank, 3, multiple=64) for rank in range(3)] == [Span(0, 128), Span(128, 192), Span(192, 200)]
