"""Blocks shared between requests: as soon as they are computed, and never when they should not be."""

import pytest
from tests.unit.scheduler.builders import Crank, make_request, rows, started

from weft.scheduler.prefix import MissReason, PrefixMiss

PROMPT = tuple(range(10))


def first_position(crank: Crank, request_id: int) -> int:
    """Where the request begins to compute in the next plan: that many tokens came from the index."""
    plan = crank.must_plan()
    start = next(start for start in plan.starts if start.request_id == request_id)
    return plan.first_positions[list(plan.slots).index(start.slot)]


@pytest.mark.parametrize(
    ("prompt_tokens", "reused"),
    [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8)],
)
def test_the_same_prompt_again_reuses_full_blocks_but_computes_at_least_one_token(
    prompt_tokens: int, reused: int
) -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT[:prompt_tokens], max_new_tokens=1))
    crank.run()

    crank.add(make_request(1, prompt=PROMPT[:prompt_tokens], max_new_tokens=1))

    assert first_position(crank, 1) == reused
    crank.apply()
    assert crank.tokens_of(1)[0].prompt.num_cached_tokens == reused


def test_blocks_are_shared_while_their_first_owner_still_runs() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=20))
    crank.step()
    crank.add(make_request(1, prompt=PROMPT, max_new_tokens=1))

    plan = crank.must_plan()

    assert list(plan.new_block_ids)[:2] == [0, 1]
    assert crank.scheduler.pool.ref_count(0) == 2


def test_generated_tokens_are_reused_by_the_next_turn_of_a_conversation() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=7))
    crank.run()

    crank.add(make_request(1, prompt=(*PROMPT, *[7] * 7, 50, 51), max_new_tokens=1))

    assert first_position(crank, 1) == 16  # the 17th token was sampled and never computed


def test_a_block_being_computed_is_waited_for_instead_of_computed_twice() -> None:
    crank = Crank()
    crank.add(*(make_request(i, prompt=PROMPT, max_new_tokens=3) for i in range(3)))

    first = crank.must_plan()
    second = crank.must_plan()
    crank.apply()
    third = crank.must_plan()

    assert started(first) == [0]
    assert started(second) == []
    assert started(third) == [1, 2]
    assert [row[1:] for row in rows(third)[-2:]] == [(8, 2, True), (8, 2, True)]
    crank.apply()
    crank.apply()
    crank.run()
    assert crank.scheduler.stats().prefix_hit_tokens == 16


def test_a_different_request_overtakes_one_that_waits_for_a_block() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT), make_request(1, prompt=PROMPT), make_request(2, prompt=5))

    assert started(crank.must_plan()) == [0, 2]


@pytest.mark.parametrize("how", ["abort", "fail"])
def test_nobody_waits_for_a_block_whose_computer_has_left(how: str) -> None:
    crank = Crank(max_batch_prefill_tokens=4)
    crank.add(make_request(0, prompt=PROMPT), make_request(1, prompt=PROMPT))
    crank.must_plan()

    if how == "abort":
        crank.abort(0)
    else:
        crank.fail_step()

    assert started(crank.must_plan()) == [1]


def test_tenants_do_not_share() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=1, tenant="alice"))
    crank.run()

    crank.add(make_request(1, prompt=PROMPT, max_new_tokens=1, tenant="bob"))

    assert first_position(crank, 1) == 0


def test_prompt_logprobs_need_every_position_so_nothing_is_reused() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=1))
    crank.run()

    crank.add(make_request(1, prompt=PROMPT, max_new_tokens=1, prompt_logprobs=True))

    assert first_position(crank, 1) == 0


def test_nothing_is_reused_when_prefix_caching_is_off() -> None:
    crank = Crank(prefix_caching=False)
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=1))
    crank.run()
    crank.add(make_request(1, prompt=PROMPT, max_new_tokens=1))

    assert first_position(crank, 1) == 0
    assert crank.scheduler.stats().prefix_query_tokens == 0


def test_clearing_the_cache_forgets_what_nobody_uses() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=1))
    crank.run()

    assert crank.scheduler.clear_cache() == 2

    crank.add(make_request(1, prompt=PROMPT, max_new_tokens=1))
    assert first_position(crank, 1) == 0


def test_a_miss_is_explained_by_its_first_differing_block() -> None:
    crank = Crank()
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=1))
    crank.run()

    changed = (*PROMPT[:5], 77, *PROMPT[6:])

    assert crank.scheduler.explain_miss(make_request(1, prompt=PROMPT)) is None
    assert crank.scheduler.explain_miss(make_request(1, prompt=changed)) == PrefixMiss(1, MissReason.NEVER_COMPUTED)


def test_a_resumed_request_reports_cached_prompt_tokens_only() -> None:
    crank = Crank()
    emitted = (7, 7, 7, 7, 7, 7)
    crank.add(make_request(0, prompt=PROMPT, max_new_tokens=8))
    crank.run()

    crank.add(make_request(1, prompt=PROMPT, max_new_tokens=8, emitted_token_ids=emitted))

    assert first_position(crank, 1) == 12
    crank.apply()
    assert crank.tokens_of(1)[0].prompt.num_cached_tokens == len(PROMPT)


class TestVectorsOfTgi:
    """TGI 3.3.7's acceptance vectors for its radix allocator, in terms of reuse (its block numbers are its own)."""

    def reused(self, crank: Crank, request_id: int, prompt: list[int], max_new_tokens: int) -> int:
        crank.add(make_request(request_id, prompt=prompt, max_new_tokens=max_new_tokens, ignore_eos=True))
        crank.run()
        return crank.tokens_of(request_id)[0].prompt.num_cached_tokens

    def test_block_two_same_prompt_twice(self) -> None:
        crank = Crank(block_size_tokens=2, num_blocks=11)

        assert self.reused(crank, 0, [0, 1, 2, 3], 5) == 0
        # TGI reports 4 here less the one token that it must compute; whole blocks make it 2.
        assert self.reused(crank, 1, [0, 1, 2, 3], 5) == 2

    def test_block_two_odd_prompt_is_aligned_down(self) -> None:
        crank = Crank(block_size_tokens=2, num_blocks=11)

        assert self.reused(crank, 0, [0, 1, 2], 5) == 0
        assert self.reused(crank, 1, [0, 1, 2], 5) == 2

    def test_block_one_same_prompt_twice(self) -> None:
        crank = Crank(block_size_tokens=1, num_blocks=11)

        assert self.reused(crank, 0, [0, 1, 2, 3], 5) == 0
        assert self.reused(crank, 1, [0, 1, 2, 3], 5) == 3

    def test_the_oldest_prefix_is_evicted_first(self) -> None:
        crank = Crank(block_size_tokens=1, num_blocks=6)
        self.reused(crank, 0, [0, 1, 2, 3], 1)
        self.reused(crank, 1, [4, 5], 1)

        self.reused(crank, 2, [6, 7, 8, 9], 1)

        assert crank.scheduler.explain_miss(make_request(9, prompt=[4, 5])) is None
        assert crank.scheduler.explain_miss(make_request(9, prompt=[0])) == PrefixMiss(0, MissReason.EVICTED)

    def test_two_live_requests_share_and_both_leave_one_prefix_behind(self) -> None:
        crank = Crank(block_size_tokens=1, num_blocks=9)
        crank.add(*(make_request(i, prompt=[0, 1, 2, 3], max_new_tokens=1) for i in range(2)))
        crank.run()

        assert crank.scheduler.stats().cached_blocks == 4
        assert crank.scheduler.pool.num_free == 5
        assert self.reused(crank, 2, [0, 1, 2, 3], 1) == 3

    def test_branches_of_a_common_stem(self) -> None:
        crank = Crank(block_size_tokens=1, num_blocks=19)

        assert self.reused(crank, 0, [0, 1], 1) == 0
        assert self.reused(crank, 1, [0, 1, 2, 3, 4, 5], 1) == 2
        assert self.reused(crank, 2, [0, 1, 2, 3, 6, 7], 1) == 4
        assert self.reused(crank, 3, [0, 1, 2, 3, 4, 5], 1) == 5
        assert self.reused(crank, 4, [0, 1, 2, 3, 6, 7], 1) == 5
