import pytest
from tests.unit.scheduler.builders import make_request

from weft.core.sequence import Sequence
from weft.scheduler import policy


def make_sequence(arrival: int, *, priority: int = 0, prompt: int = 5) -> Sequence:
    return Sequence.of(make_request(arrival, priority=priority, prompt=prompt), arrival=arrival, now_ns=0)


def test_rank_is_priority_then_arrival() -> None:
    sequences = [make_sequence(0), make_sequence(1, priority=2), make_sequence(2), make_sequence(3, priority=-1)]

    assert [sequence.arrival for sequence in sorted(sequences, key=policy.rank)] == [1, 0, 2, 3]


def test_the_victim_is_the_least_important() -> None:
    sequences = sorted((make_sequence(i, priority=-(i % 2)) for i in range(4)), key=policy.rank)

    assert policy.choose_victim(sequences).arrival == 3


def test_the_most_important_prompt_is_first_and_then_the_shortest() -> None:
    prompts = [make_sequence(i, prompt=length) for i, length in enumerate((90, 50, 10, 30, 10))]

    assert [sequence.arrival for sequence in policy.prefill_order(prompts)] == [0, 2, 4, 3, 1]


def test_a_higher_priority_goes_before_a_shorter_prompt() -> None:
    prompts = sorted(
        (
            make_sequence(i, priority=priority, prompt=length)
            for i, (priority, length) in enumerate(((1, 90), (1, 80), (0, 5)))
        ),
        key=policy.rank,
    )

    assert [sequence.arrival for sequence in policy.prefill_order(prompts)] == [0, 1, 2]


@pytest.mark.parametrize(("budget", "share"), [(64, 32), (9, 4), (8, 4), (4, 4), (1, 4)])
def test_the_first_prompt_is_sure_of_half_the_budget_and_of_a_block(budget: int, share: int) -> None:
    assert policy.first_share_tokens(budget, 4) == share
