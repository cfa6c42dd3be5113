"""Requests, configurations and a hand-cranked engine for the scheduler's tests. Sizes are small: blocks of 4 tokens."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from weft.core.events import Event, FailureEvent, TokenEvent
from weft.core.plan import StepPlan, StepResult, TopTokens
from weft.core.request import Request, RequestId, SamplingParams, StopConditions
from weft.scheduler import invariants
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.scheduler import Scheduler

BLOCK = 4
EOS = 99


def make_config(**changes: Any) -> SchedulerConfig:
    fields: dict[str, Any] = {
        "max_num_sequences": 8,
        "num_blocks": 64,
        "block_size_tokens": BLOCK,
        "max_total_tokens": 200,
        "vocab_size": 1000,
        "max_batch_prefill_tokens": 64,
        "prefix_key": b"0123456789abcdef",
    }
    return SchedulerConfig(**(fields | changes))


def make_request(
    request_id: int = 0,
    *,
    prompt: int | Iterable[int] = 6,
    max_new_tokens: int = 4,
    min_new_tokens: int = 0,
    eos: tuple[int, ...] = (EOS,),
    ignore_eos: bool = False,
    prompt_logprobs: bool = False,
    prompt_top_n_tokens: int = 0,
    **changes: Any,
) -> Request:
    """`prompt` is a length (of ids that no other request id shares) or the ids themselves."""
    ids = tuple(100 + 10 * request_id + i % 10 for i in range(prompt)) if isinstance(prompt, int) else tuple(prompt)
    return Request(
        request_id=RequestId(request_id),
        prompt_token_ids=ids,
        sampling=SamplingParams(prompt_logprobs=prompt_logprobs, prompt_top_n_tokens=prompt_top_n_tokens),
        stop=StopConditions(
            max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, eos_token_ids=eos, ignore_eos=ignore_eos
        ),
        **changes,
    )


class Crank:
    """A scheduler with its plans and events, turned by hand. Invariants are checked after every call."""

    def __init__(self, **config: Any) -> None:
        self.scheduler = Scheduler(make_config(**config))
        self.open: deque[StepPlan] = deque()
        self.events: list[Event] = []
        self.now_ns = 0

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request, self.now_ns)
        self._check()

    def abort(self, request_id: int) -> bool:
        found = self.scheduler.abort(RequestId(request_id))
        self._check()
        return found

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan_step(self.now_ns)
        self.events += self.scheduler.take_events()
        self._check()
        if plan is not None:
            invariants.check_plan(plan, self.scheduler.config)
            self.open.append(plan)
        return plan

    def must_plan(self) -> StepPlan:
        plan = self.plan()
        assert plan is not None
        return plan

    def apply(
        self,
        token: int | Callable[[int], int] = 7,
        *,
        elapsed_ns: int = 1000,
        failures: Mapping[int, str] | None = None,
        prompt_logprobs: Mapping[int, tuple[float, ...]] | None = None,
        prompt_top_tokens: Mapping[int, tuple[TopTokens, ...]] | None = None,
    ) -> list[Event]:
        """Apply the oldest open plan. `token` is what every row samples, or a function of the slot."""
        plan = self.open.popleft()
        sampling = [slot for slot, samples in zip(plan.slots, plan.samples, strict=True) if samples]
        token_ids = [token(slot) if callable(token) else token for slot in sampling]
        result = StepResult(
            step_id=plan.step_id,
            elapsed_ns=elapsed_ns,
            token_ids=token_ids,
            logprobs=[-0.5] * len(token_ids),
            prompt_logprobs=dict(prompt_logprobs or {}),
            prompt_top_tokens=dict(prompt_top_tokens or {}),
            failures=dict(failures or {}),
        )
        self.now_ns += elapsed_ns
        events = self.scheduler.apply(plan, result, self.now_ns)
        self.events += events
        self._check()
        return events

    def fail_step(self) -> list[Event]:
        events = self.scheduler.fail_rows(self.open.popleft(), "generation", "The step failed.")
        self.events += events
        self._check()
        return events

    def step(self, token: int | Callable[[int], int] = 7) -> list[Event]:
        """Plan and apply one step, without lookahead."""
        self.must_plan()
        return self.apply(token)

    def run(self, max_steps: int = 500) -> list[Event]:
        """Until nothing is left, with one step of lookahead."""
        for _ in range(max_steps):
            self.plan()
            if len(self.open) == 2 or (self.open and self.plan() is None):
                self.apply()
            elif not self.open:
                break
        assert not self.scheduler.has_work
        return self.events

    def tokens_of(self, request_id: int) -> list[TokenEvent]:
        return [e for e in self.events if isinstance(e, TokenEvent) and e.request_id == request_id]

    def failures_of(self, request_id: int) -> list[FailureEvent]:
        return [e for e in self.events if isinstance(e, FailureEvent) and e.request_id == request_id]

    def _check(self) -> None:
        invariants.check(self.scheduler)


def rows(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    """(slot, first position, tokens, samples) of each row."""
    assert plan is not None
    return list(zip(plan.slots, plan.first_positions, plan.num_tokens, plan.samples, strict=True))


def started(plan: StepPlan | None) -> list[int]:
    """Ids of the requests that take a slot in this plan."""
    assert plan is not None
    return [start.request_id for start in plan.starts]
