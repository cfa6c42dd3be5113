"""Seeds of the simulator as tests, and canaries: scheduler bugs that the simulator must find.

`WEFT_SIM_SEEDS=A-B` runs other seeds (nightly: many more); `make sim SEED=…` replays one.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
from tests.sim.fake_executor import WrongRead
from tests.sim.simulation import Simulation, SimulationFailed

from weft.core.sequence import Sequence
from weft.errors import InvariantBroken
from weft.scheduler.blocks import BlockPool
from weft.scheduler.planner import Draft, Planner
from weft.scheduler.prefix import PrefixIndex
from weft.scheduler.queue import WaitingQueue
from weft.scheduler.scheduler import Scheduler

SEEDS_PER_TEST = 25
MAX_CANARY_SEEDS = 200
FOUND = (SimulationFailed, WrongRead, InvariantBroken, KeyError, IndexError)


def seed_ranges() -> list[range]:
    first, _, last = os.environ.get("WEFT_SIM_SEEDS", "0-499").partition("-")
    stop = int(last or first) + 1
    return [range(start, min(start + SEEDS_PER_TEST, stop)) for start in range(int(first), stop, SEEDS_PER_TEST)]


@pytest.mark.parametrize("seeds", seed_ranges(), ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_every_request_gets_the_tokens_it_would_get_alone(seeds: range) -> None:
    for seed in seeds:
        try:
            Simulation(seed).run()
        except Exception as error:
            error.add_note(f"seed {seed}: replay with `make sim SEED={seed}`")
            raise


def test_a_seed_replays_exactly() -> None:
    first, second = Simulation(12).run(), Simulation(12).run()

    assert first == second
    assert first.trace


def test_worlds_are_hostile_enough_to_mean_something() -> None:
    reports = [Simulation(seed).run() for seed in range(60)]

    assert sum(report.num_preemptions for report in reports) > 20
    assert sum(report.num_hit_tokens for report in reports) > 100
    assert sum(report.num_aborted for report in reports) > 20
    assert sum(report.num_restarts for report in reports) > 20
    assert sum(report.num_failed for report in reports) > 50
    assert sum(report.num_finished for report in reports) > 300


def forget_the_token_in_flight_of_a_preempted_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Sequence.rewind

    def rewind(self: Sequence) -> None:
        original(self)
        self.num_expected = len(self.token_ids)

    monkeypatch.setattr(Sequence, "rewind", rewind)


def free_shared_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    def release(self: BlockPool, block_ids: list[Any]) -> None:
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] = 0
            if self._index.holds(block_id) and not self._index.is_evictable(block_id):
                self._index.retire(block_id)
            elif block_id not in self._free:
                self._free.append(block_id)

    monkeypatch.setattr(BlockPool, "release", release)


def leak_a_block_of_aborted_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Scheduler.abort

    def abort(self: Scheduler, request_id: Any) -> bool:
        sequence = self._roster.live.get(request_id)
        if sequence is not None and sequence.block_ids:
            sequence.block_ids.pop()
        return original(self, request_id)

    monkeypatch.setattr(Scheduler, "abort", abort)


def ignore_the_tokens_before_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrefixIndex.extend_digests

    def extend_digests(self: PrefixIndex, digests: list[bytes], tenant: str, token_ids: Any, num_blocks: int) -> None:
        size = self.block_size_tokens
        for block in range(len(digests), num_blocks):
            own: list[bytes] = []
            original(self, own, tenant, token_ids[block * size : (block + 1) * size], 1)
            digests.append(own[0])

    monkeypatch.setattr(PrefixIndex, "extend_digests", extend_digests)


def keep_blocks_of_failed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockPool, "forget", lambda self, digests: None)


def share_blocks_before_their_step_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Planner.draft

    def draft(self: Planner, now_ns: int) -> Draft:
        rows = original(self, now_ns)
        for sequence in rows.sequences[rows.num_decode_rows :]:
            self._roster.share_computed(sequence, sequence.num_planned)
        return rows

    monkeypatch.setattr(Planner, "draft", draft)


def share_the_block_that_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Planner._match

    def match(self: Planner, sequence: Sequence) -> Any:
        hits = original(self, sequence)
        if hits is None or not self._roster.may_reuse(sequence):
            return hits
        num_full = len(sequence.token_ids) // self._size
        return self._roster.index.match(self._roster.digests(sequence, num_full))

    monkeypatch.setattr(Planner, "_match", match)


def let_results_of_ended_sequences_through(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Sequence.finish_reason
    monkeypatch.setattr(Sequence, "finish_reason", lambda self, token_id: original(self, token_id + 1))


def trust_results_planned_before_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequence, "distrust_open_rows", lambda self: None)


def lose_preempted_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WaitingQueue, "push_front", lambda self, sequence: None)


def never_start_a_second_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Planner, "_match", lambda self, sequence: None if sequence.arrival else [])


CANARIES: list[Callable[[pytest.MonkeyPatch], None]] = [
    forget_the_token_in_flight_of_a_preempted_sequence,
    free_shared_blocks,
    leak_a_block_of_aborted_requests,
    ignore_the_tokens_before_a_block,
    keep_blocks_of_failed_rows,
    share_blocks_before_their_step_has_run,
    share_the_block_that_is_computed_again,
    let_results_of_ended_sequences_through,
    trust_results_planned_before_a_failure,
    lose_preempted_sequences,
    never_start_a_second_sequence,
]


@pytest.mark.parametrize("break_scheduler", CANARIES, ids=lambda canary: canary.__name__)
def test_a_planted_bug_is_found_within_200_seeds(
    break_scheduler: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    break_scheduler(monkeypatch)

    for seed in range(MAX_CANARY_SEEDS):
        try:
            Simulation(seed).run()
        except FOUND:
            return
    pytest.fail(f"{break_scheduler.__name__} survived {MAX_CANARY_SEEDS} seeds")
