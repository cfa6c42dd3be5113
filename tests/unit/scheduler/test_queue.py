import pytest
from tests.unit.scheduler.builders import make_request

from weft.core.sequence import Sequence
from weft.scheduler.queue import DepartureRate, WaitingQueue


def make_sequence(arrival: int, *, priority: int = 0, deadline_ns: int | None = None) -> Sequence:
    request = make_request(arrival, priority=priority, deadline_ns=deadline_ns)
    return Sequence.of(request, arrival=arrival, now_ns=0)


def order(queue: WaitingQueue) -> list[int]:
    return [sequence.arrival for sequence in queue]


def test_an_empty_queue_has_nothing() -> None:
    queue = WaitingQueue(4)

    assert (len(queue), order(queue), queue.take_expired(10**18)) == (0, [], [])


def test_higher_priority_first_then_arrival() -> None:
    queue = WaitingQueue(9)
    for arrival, priority in enumerate((0, 5, -1, 0, 5)):
        queue.append(make_sequence(arrival, priority=priority))

    assert order(queue) == [1, 4, 0, 3, 2]


def test_a_preempted_sequence_goes_to_the_front_of_its_own_priority() -> None:
    queue = WaitingQueue(9)
    for arrival, priority in enumerate((0, 1)):
        queue.append(make_sequence(arrival, priority=priority))
    preempted = make_sequence(7)
    preempted.has_started = True

    queue.push_front(preempted)

    assert order(queue) == [1, 7, 0]


@pytest.mark.parametrize("places", [0, 1, 3])
def test_the_queue_is_full_at_its_bound(places: int) -> None:
    queue = WaitingQueue(places)
    for arrival in range(places):
        assert not queue.is_full
        queue.append(make_sequence(arrival))

    assert queue.is_full


def test_preempted_sequences_take_no_place() -> None:
    queue = WaitingQueue(1)
    preempted = make_sequence(0)
    preempted.has_started = True
    queue.push_front(preempted)

    assert not queue.is_full
    queue.append(make_sequence(1))
    assert queue.is_full
    queue.remove(preempted)
    assert queue.is_full


def test_removing_while_iterating_is_allowed() -> None:
    queue = WaitingQueue(9)
    for arrival in range(4):
        queue.append(make_sequence(arrival, priority=arrival % 2))

    for sequence in queue:
        queue.remove(sequence)

    assert len(queue) == 0


def test_membership_is_by_sequence_and_not_by_id() -> None:
    queue = WaitingQueue(9)
    first, again = make_sequence(0), make_sequence(0)
    queue.append(first)

    assert first in queue
    assert again not in queue


def test_a_deadline_passes_at_its_own_nanosecond() -> None:
    queue = WaitingQueue(9)
    queue.append(make_sequence(0, deadline_ns=100))

    assert queue.take_expired(99) == []
    assert [sequence.arrival for sequence in queue.take_expired(100)] == [0]
    assert len(queue) == 0


def test_a_sequence_that_ran_has_no_deadline_any_more() -> None:
    queue = WaitingQueue(9)
    sequence = make_sequence(0, deadline_ns=100)
    queue.append(sequence)
    queue.remove(sequence)
    sequence.has_started = True
    queue.push_front(sequence)

    assert queue.take_expired(1000) == []
    assert sequence in queue


def test_deadlines_of_requests_that_left_do_not_pile_up() -> None:
    queue = WaitingQueue(9)
    for arrival in range(5000):
        sequence = make_sequence(arrival, deadline_ns=10**18)
        queue.append(sequence)
        queue.remove(sequence)

    assert len(queue._deadlines) < 1100


def test_nobody_is_told_to_come_back_in_less_than_a_second_or_more_than_a_minute() -> None:
    rate = DepartureRate()

    assert rate.retry_after_s(1000) == 1.0
    rate.observe(1, 0, is_idle=False)
    rate.observe(1, 2_000_000_000, is_idle=False)
    assert rate.retry_after_s(20) == pytest.approx(20.0)
    assert rate.retry_after_s(10_000) == 60.0


def test_an_idle_night_does_not_count_as_slowness() -> None:
    rate = DepartureRate()
    rate.observe(1, 0, is_idle=False)
    rate.observe(1, 1_000_000_000, is_idle=True)
    rate.observe(1, 9_000_000_000_000, is_idle=False)
    rate.observe(1, 9_001_000_000_000, is_idle=False)

    assert rate.retry_after_s(10) == pytest.approx(5.0)


def test_the_age_of_the_queue_is_that_of_its_oldest_head() -> None:
    queue = WaitingQueue(8)
    assert queue.oldest_added_ns is None

    for arrival, priority in enumerate((0, 1, 0)):
        queue.append(Sequence.of(make_request(arrival, priority=priority), arrival=arrival, now_ns=100 * (arrival + 1)))

    assert queue.oldest_added_ns == 100
