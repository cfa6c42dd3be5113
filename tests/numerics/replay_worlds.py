"""Real engines in this process, each under its own conditions, that answer the same requests.

A world is a restart: weights are read again, the KV pool is empty, and chunk sizes, memory, threads, prefix cache and
lookahead are others. What comes and goes around a request is drawn from the world's seed.
"""

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import torch
import transformers

from weft.config import Settings
from weft.core.events import Event, FailureEvent, TokenEvent
from weft.core.info import EngineInfo, EngineStats
from weft.core.request import LogprobStyle, PenaltyStyle, Request, RequestId, SamplingParams, StopConditions
from weft.kernels import registry
from weft.scheduler.scheduler import Scheduler
from weft.server.engine import Engine
from weft.server.executor import LocalExecutor
from weft.server.startup import PhaseTimer, start_rank

VOCAB_SIZE = 3_000
MAX_TOTAL_TOKENS = 320
WAIT_S = 120.0

Tokens = tuple[tuple[object, ...], ...]
"""(id, bits of its log-probability, alternatives and prompt tokens with their bits, reason to end) of each token."""


def write_checkpoint(directory: Path) -> Path:
    """A Llama with the widths of SmolLM2-135M, three layers and random weights in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=3,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=MAX_TOTAL_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at the start of a training, so that positions differ and choices are not all a matter of luck.
            parameter.mul_(3.0 if parameter.dim() == 2 else 1.0)
    model.save_pretrained(directory)
    return directory


@dataclass(frozen=True, kw_only=True)
class World:
    """Conditions that may not matter. Numbers of tokens unless said otherwise."""

    seed: int
    threads: int = 1
    max_chunk: int = 4096
    pool: int = 16_384
    growth_reserve_blocks: int = 2
    prefix_caching: bool = True
    lookahead: bool = True
    inter_token_target_ms: float = 80.0
    max_in_flight: int = 64
    num_rounds: int = 1
    """How often every subject is asked."""


ALONE = World(seed=0, prefix_caching=False, lookahead=False, max_in_flight=1)


@dataclass
class Outcome:
    """What a world gave, and how hostile it was."""

    tokens: list[tuple[int, Tokens]] = field(default_factory=list)
    """(number of the subject, its tokens), each time that it was asked."""
    num_preemptions: int = 0
    num_hits: int = 0
    num_chunks: int = 0
    """Steps that computed a part of a prompt beside running sequences."""
    most_rows: int = 0


def subjects(count: int, seed: int = 11) -> list[Request]:
    """Requests of every kind: lengths, shared beginnings, greedy and seeded, penalties, biases, reports."""
    rng = Random(seed)
    beginnings = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (33, 64, 100)]

    def subject(number: int) -> Request:
        shared = rng.choice([[], *beginnings])
        prompt = [*shared, *(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((1, 2, 7, 31, 32, 33, 90))))]
        max_new_tokens = rng.choice((1, 3, 8, 16, 32))
        return Request(
            request_id=RequestId(number + 1),
            prompt_token_ids=tuple(prompt),
            sampling=_sampling(rng),
            stop=StopConditions(
                max_new_tokens=max_new_tokens,
                min_new_tokens=rng.choice((0, min(2, max_new_tokens))),
                eos_token_ids=tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 2, 100)))),
            ),
        )

    return [subject(number) for number in range(count)]


def _sampling(rng: Random) -> SamplingParams:
    style = rng.choice(list(LogprobStyle))
    reports = {
        "logprob_style": style,
        "top_n_tokens": rng.choice((0, 0, 3)),
        "prompt_logprobs": rng.random() < 0.15,
    }
    changes = {
        "penalty_style": rng.choice(list(PenaltyStyle)),
        "repetition_penalty": rng.choice((1.0, 1.0, 1.2)),
        "frequency_penalty": rng.choice((0.0, 0.0, 0.7)),
        "presence_penalty": rng.choice((0.0, 0.0, -0.4)),
        "logit_bias": rng.choice(((), ((5, 3.5), (17, -2.25)))),
        "watermark": rng.random() < 0.1,
    }
    kind = rng.random()
    if kind < 0.35:
        return SamplingParams(**reports)
    if kind < 0.5:
        return SamplingParams(**reports, **changes)
    chances = {
        "temperature": rng.choice((0.7, 1.0, 1.6)),
        "top_k": rng.choice((0, 0, 40)),
        "top_p": rng.choice((1.0, 0.95, 0.5)),
        "min_p": rng.choice((0.0, 0.0, 0.02)),
        "typical_p": rng.choice((1.0, 1.0, 0.8)),
    }
    drawn = SamplingParams(do_sample=True, seed=rng.getrandbits(64), **reports, **chances)
    return replace(drawn, **changes) if rng.random() < 0.5 else drawn


def run_world(world: World, settings: Settings, requests: Sequence[Request]) -> Outcome:
    """Ask every subject as often as the world says, among neighbours that come, go and are aborted."""
    events: queue.SimpleQueue[tuple[Sequence[Event], EngineStats]] = queue.SimpleQueue()
    outcome = Outcome()
    with _engine(world, settings, lambda *delivery: events.put(delivery)) as engine:
        crowd = _Crowd(world, engine, requests, outcome)
        crowd.fill()
        deadline = time.monotonic() + WAIT_S
        while crowd.is_open:
            delivered, stats = events.get(timeout=max(deadline - time.monotonic(), 0.01))
            outcome.num_preemptions, outcome.num_hits = stats.num_preemptions, stats.prefix_hit_tokens
            outcome.num_chunks += bool(stats.step_prefill_rows and stats.step_decode_rows)
            outcome.most_rows = max(outcome.most_rows, stats.step_decode_rows + stats.step_prefill_rows)
            for event in delivered:
                crowd.take(event)
            crowd.fill()
    return outcome


class _Crowd:
    """Who is asked next, and what came back so far."""

    def __init__(self, world: World, engine: Engine, requests: Sequence[Request], outcome: Outcome) -> None:
        self._rng = Random(world.seed)
        self._world = world
        self._engine = engine
        self._requests = requests
        self._outcome = outcome
        self._waiting = [number for _ in range(world.num_rounds) for number in range(len(requests))]
        self._rng.shuffle(self._waiting)
        self._open: dict[RequestId, int | None] = {}
        """Request → subject, or None for a neighbour that nobody compares."""
        self._tokens: dict[RequestId, list[tuple[object, ...]]] = {}
        self._next_id = 1
        self._in_flight = world.max_in_flight

    @property
    def is_open(self) -> bool:
        return bool(self._waiting or self._open)

    def fill(self) -> None:
        """Ask until as many are in flight as there should be now: a number that changes all the time."""
        if self._rng.random() < 0.1:
            self._in_flight = self._rng.randint(1, self._world.max_in_flight)
        while self._waiting and len(self._open) < self._in_flight:
            is_neighbour = self._world.max_in_flight > 1 and self._rng.random() < 0.15
            number = None if is_neighbour else self._waiting.pop()
            self._add(self._neighbour() if number is None else self._requests[number], number)

    def take(self, event: Event) -> None:
        """An event of any of them."""
        if event.request_id not in self._open:
            return
        if isinstance(event, FailureEvent):
            raise AssertionError(f"a request failed: {event.message}")  # noqa: TRY004 - no type is wrong
        if self._open[event.request_id] is None and self._rng.random() < 0.1:
            self._engine.abort(event.request_id)
            del self._open[event.request_id]
            return
        self._tokens[event.request_id].append(_bits(event))
        if event.finish_reason is not None:
            number = self._open.pop(event.request_id)
            if number is not None:
                self._outcome.tokens.append((number, tuple(self._tokens.pop(event.request_id))))

    def _add(self, request: Request, number: int | None) -> None:
        request_id = RequestId(self._next_id)
        self._next_id += 1
        self._open[request_id] = number
        self._tokens[request_id] = []
        self._engine.add(replace(request, request_id=request_id))

    def _neighbour(self) -> Request:
        """A subject with other parameters, another end, or another length."""
        known = self._rng.choice(self._requests)
        cut = self._rng.randint(1, len(known.prompt_token_ids))
        return replace(
            known,
            prompt_token_ids=(*known.prompt_token_ids[:cut], self._rng.randrange(VOCAB_SIZE)),
            sampling=_sampling(self._rng),
            stop=StopConditions(max_new_tokens=self._rng.randint(1, 40)),
        )


def _bits(event: TokenEvent) -> tuple[object, ...]:
    top = event.top_tokens
    alternatives = None if top is None else (tuple(top.token_ids), tuple(value.hex() for value in top.logprobs))
    report = None if event.prompt is None else event.prompt.prompt_logprobs
    prompt = None if report is None else tuple(value.hex() for value in report)
    return event.token_id, event.logprob.hex(), alternatives, prompt, event.finish_reason


@contextmanager
def _engine(world: World, settings: Settings, publish) -> Iterator[Engine]:
    settings = replace(
        settings,
        threads=world.threads,
        max_batch_prefill_tokens=world.max_chunk,
        max_batch_total_tokens=world.pool,
        max_total_tokens=MAX_TOTAL_TOKENS,
        prefix_caching=world.prefix_caching,
        inter_token_target_ms=world.inter_token_target_ms,
        kv_pool_bytes=2**30,
    )
    started = start_rank(settings, rank=0, world_size=1, timer=PhaseTimer())
    fatal: list[Exception] = []
    executor = LocalExecutor(started.runner)
    # Without a reserve, sequences are admitted that the pool cannot hold to their end: they are preempted.
    config = replace(started.scheduler_config, growth_reserve_blocks=world.growth_reserve_blocks)
    engine = Engine(Scheduler(config), executor, _Clock(), publish, fatal.append, lookahead=world.lookahead)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop()
        executor.close()
        registry.set_threads(1)
    assert not fatal


class _Clock:
    def now_ns(self) -> int:
        return time.monotonic_ns()


def engine_info(settings: Settings) -> EngineInfo:
    """What such an engine says about itself."""
    settings = replace(settings, max_total_tokens=MAX_TOTAL_TOKENS, kv_pool_bytes=2**24)
    return start_rank(settings, rank=0, world_size=1, timer=PhaseTimer()).info
