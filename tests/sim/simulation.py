"""One seed, one little world: a real Scheduler, a fake device, and everything that can go wrong in between.

Every choice comes from one `random.Random(seed)`, so a seed replays exactly. What is checked, after every call:
the scheduler's invariants, the plan, the event stream of each request, each read of the device; and at the end:
every finished request has the very tokens, log-probabilities and reports it would have had alone.
"""

import hashlib
from collections import deque
from dataclasses import dataclass, field, replace
from random import Random

from tests.sim.fake_executor import (
    NAN,
    VOCAB_SIZE,
    FakeExecutor,
    StepRaised,
    choose_token,
    mix,
    prompt_logprob,
    top_tokens,
    vector_of,
)

from weft.core.events import EmbeddingEvent, Event, FailureEvent, TokenEvent
from weft.core.plan import StepPlan, StepResult, TopTokens
from weft.core.request import FinishReason, Pooling, Request, RequestId, SamplingParams, StopConditions
from weft.errors import ContextLengthError, OverloadedError
from weft.scheduler import invariants
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.scheduler import MAX_OPEN_PLANS, Scheduler

MAX_RESTARTS = 5
"""More in one world would let a prompt that is computed token by token never finish."""

MAX_STEPS = 4000
"""Far more than any world needs: reaching it means that somebody starves."""


class SimulationFailed(AssertionError):
    """A promise was broken; the text says which one."""


@dataclass(slots=True, kw_only=True)
class World:
    """How hostile one seed is. Probabilities are per opportunity."""

    config: SchedulerConfig
    lookahead: bool
    num_requests: int
    p_arrival: float
    p_abort: float
    p_nan: float
    p_poison: float
    p_raise: float
    p_restart: float
    p_slow: float
    p_deadline: float
    p_clear: float

    @classmethod
    def draw(cls, random: Random) -> "World":
        """A random configuration with random dangers; about half of the worlds are free of device faults."""
        size = random.choice((1, 2, 4, 8))
        max_total = random.randint(16, 96)
        # From "one long sequence just fits" to "everybody fits": most worlds are short of memory.
        num_blocks = int(max_total * random.choice((1.0, 1.2, 1.5, 2.0, 6.0))) // size + 1
        slots = random.choice((1, 2, 4, 8, 8, 12))
        has_faults = random.random() < 0.5
        config = SchedulerConfig(
            max_num_sequences=slots,
            num_blocks=num_blocks,
            block_size_tokens=size,
            max_total_tokens=max_total,
            vocab_size=VOCAB_SIZE,
            max_batch_prefill_tokens=random.choice((1, 8, 16, 64, 256)),
            prefix_key=random.randbytes(32),
            max_batch_total_tokens=random.choice((None, None, None, size * random.randint(3, 40))),
            max_batch_size=random.choice((None, None, None, random.randint(1, 8))),
            max_queue_requests=random.choice((3, 1000, 1000)),
            prefix_caching=random.random() < 0.8,
            growth_reserve_blocks=random.choice((0, 0, 1, 2)),
            inter_token_target_ns=random.choice((None, 3_000, 30_000)),
        )
        return cls(
            config=config,
            lookahead=random.random() < 0.8,
            num_requests=random.randint(5, 30),
            p_arrival=random.choice((0.05, 0.3, 1.0)),
            p_abort=random.choice((0.0, 0.0, 0.005, 0.05)),
            p_nan=random.choice((0.0, 0.01, 0.1)) if has_faults else 0.0,
            p_poison=random.choice((0.0, 0.05)) if has_faults else 0.0,
            p_raise=random.choice((0.0, 0.03)) if has_faults else 0.0,
            p_restart=random.choice((0.0, 0.02)) if has_faults else 0.0,
            p_slow=random.choice((0.0, 0.05)),
            p_deadline=random.choice((0.0, 0.3)),
            p_clear=random.choice((0.0, 0.02)),
        )


@dataclass(slots=True)
class _Client:
    """What the outside knows of one request."""

    request: Request
    tokens: list[TokenEvent] = field(default_factory=list)
    is_resumed: bool = False
    has_raised: bool = False
    """A step that it was alone in raised."""


@dataclass(slots=True)
class Report:
    """What a run amounted to."""

    num_steps: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_aborted: int = 0
    num_refused: int = 0
    num_preemptions: int = 0
    num_hit_tokens: int = 0
    num_restarts: int = 0
    num_tokens_computed: int = 0
    trace: str = ""
    """Digest of every plan and event: equal for equal seeds."""


class Simulation:
    """Drives one world to its end. `run` raises when a promise is broken."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.world = World.draw(self.random)
        self.now_ns = 0
        self.report = Report()
        self._clients: dict[RequestId, _Client] = {}
        self._num_sent = 0
        self._documents = [self._draw_tokens(96) for _ in range(2)]
        self._ledger = invariants.EventLedger()
        self._trace = hashlib.blake2b(digest_size=16)
        self._start_engine()

    def run(self) -> Report:
        """Until every request was sent and has ended."""
        while self._num_sent < self.world.num_requests or self._clients or self._open:
            self._disturb()
            if not self._turn():
                self.now_ns += 1_000  # idle: time passes
            self.report.num_steps += 1
            if self.report.num_steps > MAX_STEPS:
                raise SimulationFailed(f"still going after {MAX_STEPS} turns: {self.scheduler.stats()}")
        self._check_end()
        self._count_engine()
        self.report.trace = self._trace.hexdigest()
        return self.report

    # -- the world happens --------------------------------------------------------------------------------------

    def _disturb(self) -> None:
        random, world = self.random, self.world
        while self._num_sent < world.num_requests and random.random() < world.p_arrival:
            self._send(self._draw_request())
        if self._clients and random.random() < world.p_abort:
            self._abort(random.choice(list(self._clients)))
        if random.random() < world.p_restart and self.report.num_restarts < MAX_RESTARTS:
            self._restart()
        if random.random() < world.p_poison:
            self.executor.poison(random.randrange(world.config.usable_blocks))
        if random.random() < world.p_clear:
            self.scheduler.clear_cache()
            self._check()

    def _turn(self) -> bool:
        """Make a plan or run the oldest one, as the engine might interleave them. False: neither is possible."""
        max_open = MAX_OPEN_PLANS if self.world.lookahead else 1
        wants_plan = len(self._open) < max_open and (not self._open or self.random.random() < 0.7)
        if wants_plan and self._plan():
            return True
        if self._open:
            self._execute()
            return True
        return False

    def _plan(self) -> bool:
        plan = self.scheduler.plan_step(self.now_ns)
        self._record(self.scheduler.take_events())
        if plan is not None:
            invariants.check_plan(plan, self.world.config)
            self._open.append(plan)
            self._trace.update(repr((plan.slots, plan.first_positions, plan.num_tokens, plan.new_block_ids)).encode())
        self._check()
        return plan is not None

    def _execute(self) -> None:
        plan = self._open.popleft()
        random, world = self.random, self.world
        elapsed_ns = 800 + 50 * plan.num_rows + 20 * plan.total_tokens
        if random.random() < world.p_slow:
            elapsed_ns *= 60
        nan_rows = frozenset(row for row in range(plan.num_rows) if random.random() < world.p_nan)
        try:
            result = self.executor.execute(
                plan, elapsed_ns=elapsed_ns, nan_rows=nan_rows, raises=random.random() < world.p_raise
            )
        except StepRaised:
            self._fail_step(plan)
            return
        self.now_ns += elapsed_ns
        self._apply(plan, result)

    def _apply(self, plan: StepPlan, result: StepResult) -> None:
        believed = self._rows_believed(plan, result)
        self._record(self.scheduler.apply(plan, result, self.now_ns))
        next_step_id = plan.step_id + 1 + len(self._open)
        self.executor.condemn(plan, believed, next_step_id)
        self._check()

    def _rows_believed(self, plan: StepPlan, result: StepResult) -> list[int]:
        """Failed rows whose failure the scheduler must take note of: of sequences that still wait for this result."""
        _, sequences = next(iter(self.scheduler.open_rows()))
        return [
            row
            for row in result.failures
            if not sequences[row].is_ended and not sequences[row].num_stale_rows and sequences[row].is_running
        ]

    def _fail_step(self, plan: StepPlan) -> None:
        _, sequences = next(iter(self.scheduler.open_rows()))
        for sequence in sequences:
            client = self._clients.get(sequence.request.request_id)
            if client is not None and len(sequences) == 1:
                client.has_raised = True
        self._record(self.scheduler.fail_rows(plan, "generation", "The step failed."))
        self._check()

    def _abort(self, request_id: RequestId) -> None:
        if not self.scheduler.abort(request_id):
            raise SimulationFailed(f"abort does not know the open request {request_id}")
        if self.scheduler.abort(request_id):
            raise SimulationFailed("a request was aborted twice")
        del self._clients[request_id]
        self._ledger.close(request_id)
        self.report.num_aborted += 1
        self._check()

    def _start_engine(self) -> None:
        config = self.world.config
        self.scheduler = Scheduler(config)
        self.executor = FakeExecutor(config.usable_blocks, config.block_size_tokens)
        self._open: deque[StepPlan] = deque()

    def _restart(self) -> None:
        """The shard dies with everything in it; the router sends its open requests again, with what it has of them."""
        self._count_engine()
        self.report.num_restarts += 1
        clients, self._clients = self._clients, {}
        self._start_engine()
        for request_id, client in clients.items():
            self._ledger.close(request_id)
            emitted = tuple(event.token_id for event in client.tokens)
            again = replace(client.request, emitted_token_ids=emitted, deadline_ns=None)
            self._send(again, client)

    # -- requests -----------------------------------------------------------------------------------------------

    def _draw_tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.random.choices(range(VOCAB_SIZE), k=count))

    def _draw_request(self) -> Request:
        random, config = self.random, self.world.config
        max_prompt = config.max_total_tokens - 1
        num_prompt = min(random.choice((1, *(random.randint(1, n) for n in (12, 24, max_prompt)))), max_prompt)
        document = random.choice(self._documents)
        num_shared = random.choice((0, num_prompt, random.randint(0, num_prompt)))
        prompt = (document[:num_shared] + self._draw_tokens(num_prompt))[:num_prompt]
        max_new = random.randint(1, min(random.choice((4, 30, 90, 90)), config.max_total_tokens - num_prompt))
        request_id = RequestId(self._num_sent)
        self._num_sent += 1
        pooling = random.choice((None, *Pooling)) if random.random() < 0.3 else None
        if pooling is not None:
            return Request(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling=SamplingParams(),
                stop=StopConditions(max_new_tokens=1),
                pooling=pooling,
            )
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                seed=random.choice((7, random.getrandbits(64))),
                top_n_tokens=random.choice((0, 0, 2)),
                prompt_logprobs=(asks := random.random() < 0.2),
                prompt_top_n_tokens=2 * (asks and request_id % 2),
            ),
            stop=StopConditions(
                max_new_tokens=max_new,
                min_new_tokens=random.choice((0, 0, random.randint(0, max_new))),
                eos_token_ids=random.choice(((), (), (1,), (1, 2, 3, 4))),
                ignore_eos=random.random() < 0.2,
            ),
            priority=random.choice((0, 0, 0, 1, -5)),
            deadline_ns=self.now_ns + random.randint(0, 20_000) if random.random() < self.world.p_deadline else None,
            tenant=random.choice(("", "", "other")),
        )

    def _send(self, request: Request, client: _Client | None = None) -> None:
        try:
            self.scheduler.add(request, self.now_ns)
        except ContextLengthError:
            num_tokens = len(request.prompt_token_ids) + request.stop.max_new_tokens
            if num_tokens - 1 <= self.world.config.usable_blocks * self.world.config.block_size_tokens:
                raise SimulationFailed(f"a request of {num_tokens} tokens fits and was refused") from None
            self.report.num_refused += 1
        except OverloadedError as error:
            num_fresh = sum(not sequence.has_started for sequence in self.scheduler.queue)
            if num_fresh != self.world.config.max_queue_requests or not 1 <= (error.retry_after_s or 0) <= 60:
                raise SimulationFailed(f"refused with {num_fresh} in the queue: {error.retry_after_s}") from None
            self.report.num_refused += 1
        else:
            self._ledger.open(request)
            self._clients[request.request_id] = client or _Client(request)
            self._clients[request.request_id].is_resumed = client is not None
        self._check()

    def _record(self, events: list[Event]) -> None:
        for event in events:
            self._ledger.record(event)
            self._trace.update(repr(event).encode())
            client = self._clients[event.request_id]
            if isinstance(event, FailureEvent):
                self._check_failure(client, event)
                del self._clients[event.request_id]
                self.report.num_failed += 1
                continue
            if isinstance(event, EmbeddingEvent):
                check_vector(client.request, event)
                del self._clients[event.request_id]
                self.report.num_finished += 1
                continue
            client.tokens.append(event)
            if event.finish_reason is not None:
                check_answer(client.request, client.tokens, is_resumed=client.is_resumed)
                self._continue_conversation(client)
                del self._clients[event.request_id]
                self.report.num_finished += 1

    def _continue_conversation(self, client: _Client) -> None:
        """Later prompts may begin with this prompt and its answer, as the next turn of a chat does."""
        answer = tuple(event.token_id for event in client.tokens)
        history = client.request.prompt_token_ids + answer
        if len(history) < self.world.config.max_total_tokens - 2:
            self._documents[self.random.randrange(len(self._documents))] = history

    # -- promises -----------------------------------------------------------------------------------------------

    def _check(self) -> None:
        invariants.check(self.scheduler)

    def _check_failure(self, client: _Client, event: FailureEvent) -> None:
        request = client.request
        if event.code == "deadline_exceeded":
            justified = request.deadline_ns is not None and request.deadline_ns <= self.now_ns and not client.tokens
        elif event.code == "numerical_error":
            justified = len(self.executor.nan_incarnations.get(request.request_id, ())) >= 2
        else:
            justified = client.has_raised
        if not justified:
            raise SimulationFailed(f"request {request.request_id} failed without a reason: {event.code}")

    def _check_end(self) -> None:
        scheduler = self.scheduler
        stats = scheduler.stats()
        leftovers = (stats.num_running, stats.num_waiting, stats.used_blocks, scheduler.num_open_plans)
        if any(leftovers) or scheduler.has_work:
            raise SimulationFailed(f"something is left at the end: {stats}")
        scheduler.clear_cache()
        if scheduler.pool.num_free != self.world.config.usable_blocks:
            raise SimulationFailed(f"{scheduler.pool.num_free} blocks are free in an empty pool")

    def _count_engine(self) -> None:
        stats = self.scheduler.stats()
        self.report.num_preemptions += stats.num_preemptions
        self.report.num_hit_tokens += stats.prefix_hit_tokens
        self.report.num_tokens_computed += self.executor.num_tokens_computed


def check_vector(request: Request, event: EmbeddingEvent) -> None:
    """Compare with the vector that the request would get alone."""
    entry = 0
    for token_id in request.prompt_token_ids:
        entry = mix(entry, token_id)
    if request.pooling is None or event.values != vector_of(entry):
        raise SimulationFailed(f"the vector of request {request.request_id} is not its own")


def check_answer(request: Request, events: list[TokenEvent], *, is_resumed: bool) -> None:
    """Compare with the answer the request would get alone, computed without scheduler or blocks."""
    entry = 0
    reports: list[float] = []
    prompt_tops: list[TopTokens] = []
    for position, token_id in enumerate(request.prompt_token_ids):
        if position:
            reports.append(prompt_logprob(entry))
            prompt_tops.append(top_tokens(entry, request.sampling.prompt_top_n_tokens))
        entry = mix(entry, token_id)
    for index, event in enumerate(events):
        token_id, logprob = choose_token(entry, index, request)
        top = top_tokens(entry, request.sampling.top_n_tokens) if request.sampling.top_n_tokens else None
        is_eos = not request.stop.ignore_eos and token_id in request.stop.eos_token_ids
        reason = FinishReason.EOS_TOKEN if is_eos else None
        if reason is None and index + 1 == request.stop.max_new_tokens:
            reason = FinishReason.LENGTH
        found = (event.token_id, event.logprob, event.top_tokens, event.finish_reason)
        if found != (token_id, logprob, top, reason):
            raise SimulationFailed(f"token {index} of request {request.request_id}: {found}, alone {token_id}")
        entry = mix(entry, token_id)
    _check_prompt_report(request, events, reports, is_resumed=is_resumed)
    if request.sampling.prompt_top_n_tokens and events[0].prompt.prompt_top_tokens != tuple(prompt_tops):
        raise SimulationFailed(f"alternatives to prompt tokens of request {request.request_id} differ")
    if NAN in (event.token_id for event in events):
        raise SimulationFailed("a token of a row that is not a number went out")


def _check_prompt_report(
    request: Request, events: list[TokenEvent], expected: list[float], *, is_resumed: bool
) -> None:
    report = events[0].prompt
    if report is None:
        raise SimulationFailed("the first token has no report about the prompt")
    if request.sampling.prompt_logprobs and list(report.prompt_logprobs or ()) != expected:
        raise SimulationFailed(f"prompt log-probabilities of request {request.request_id} differ")
    if report.queue_ns < 0 or not 0 <= report.num_cached_tokens <= len(request.prompt_token_ids):
        raise SimulationFailed(f"impossible report {report}")
    if not is_resumed and any(event.prompt is not None for event in events[1:]):
        raise SimulationFailed("the prompt is reported twice")
