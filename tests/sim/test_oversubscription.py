"""A pool for a quarter of what runs: everybody finishes, in order, and little is computed twice."""

from collections import deque
from random import Random

import pytest
from tests.sim.fake_executor import VOCAB_SIZE, FakeExecutor
from tests.sim.simulation import check_answer

from weft.core.events import TokenEvent
from weft.core.plan import StepPlan
from weft.core.request import Request, RequestId, SamplingParams, StopConditions
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.scheduler import Scheduler

NUM_SEQUENCES = 16
BLOCK = 16


def make_requests(count: int) -> list[Request]:
    random = Random(1)
    return [
        Request(
            request_id=RequestId(i),
            prompt_token_ids=tuple(random.choices(range(VOCAB_SIZE), k=random.randint(16, 128))),
            sampling=SamplingParams(seed=i),
            stop=StopConditions(max_new_tokens=random.randint(32, 192)),
        )
        for i in range(count)
    ]


def run(scheduler: Scheduler, executor: FakeExecutor) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    plans: deque[StepPlan] = deque()
    while scheduler.has_work:
        plan = scheduler.plan_step(0)
        if plan is not None:
            plans.append(plan)
        if plan is None or len(plans) == 2:
            oldest = plans.popleft()
            result = executor.execute(oldest, elapsed_ns=1000, nan_rows=frozenset(), raises=False)
            applied = scheduler.apply(oldest, result, 0)
            events += [event for event in applied if isinstance(event, TokenEvent)]
            assert len(events) >= len(applied)
    return events


@pytest.mark.parametrize(("factor", "max_waste"), [(1.0, 0.0), (2.0, 0.1), (4.0, 0.1)])
def test_little_is_computed_twice_when_memory_is_short(factor: float, max_waste: float) -> None:
    requests = make_requests(2 * NUM_SEQUENCES)
    num_needed = [len(request.prompt_token_ids) + request.stop.max_new_tokens - 1 for request in requests]
    num_blocks = int(NUM_SEQUENCES * sum(num_needed) / len(requests) / factor) // BLOCK
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_sequences=NUM_SEQUENCES,
            num_blocks=num_blocks,
            block_size_tokens=BLOCK,
            max_total_tokens=512,
            vocab_size=VOCAB_SIZE,
            max_batch_prefill_tokens=256,
            prefix_key=bytes(16),
        )
    )
    executor = FakeExecutor(num_blocks, BLOCK)
    for request in requests:
        scheduler.add(request, now_ns=0)

    events = run(scheduler, executor)

    for request in requests:
        check_answer(request, [e for e in events if e.request_id == request.request_id], is_resumed=False)
    assert executor.num_tokens_computed <= sum(num_needed) * (1 + max_waste)
    first_tokens = [event.request_id for event in events if event.token_index == 0]
    assert first_tokens == sorted(first_tokens), "equal priorities start in order of arrival"
    assert (scheduler.stats().num_preemptions > 0) == (factor > 1)
