"""What a step's result means for its sequences: tokens, ends, failures, second tries."""

from dataclasses import dataclass

from weft.core.events import EmbeddingEvent, Event, FailureEvent, PromptReport, TokenEvent
from weft.core.plan import StepPlan, StepResult, TopTokens
from weft.core.sequence import Sequence
from weft.errors import GenerationError, InvariantBroken, NumericalError
from weft.scheduler.budget import attended_positions
from weft.scheduler.config import SchedulerConfig
from weft.scheduler.roster import Roster

_MAX_NUMERICAL_RETRIES = 1

_NUMERICAL_MESSAGE = "The model produced values that are not numbers for this request, and again on a second try."
_FAILURE_MESSAGE = "The engine could not go on with this request."
_RANGE_MESSAGE = "The sampler chose a token outside the vocabulary."


@dataclass(slots=True)
class OpenPlan:
    """A plan that was handed out and not applied yet."""

    plan: StepPlan
    sequences: list[Sequence]
    """Of each row."""
    num_decode_rows: int
    num_prefill_tokens: int

    @property
    def num_attended(self) -> float:
        """Positions that the prompt tokens attend to, summed over them."""
        plan, first = self.plan, self.num_decode_rows
        return sum(map(attended_positions, plan.first_positions[first:], plan.num_tokens[first:]))

    def demand_match(self, result: StepResult) -> None:
        """Raise InvariantBroken unless the result belongs to this plan."""
        num_sampled = sum(self.plan.samples)
        counts = (len(result.token_ids), len(result.logprobs))
        if result.step_id != self.plan.step_id or counts != (num_sampled, num_sampled):
            raise InvariantBroken(
                f"the result of step {result.step_id} has {counts[0]} tokens and {counts[1]} log-probabilities;"
                f" step {self.plan.step_id} samples {num_sampled}"
            )


class ResultApplier:
    """Turns results into events and moves sequences accordingly. Ended ones stay in `running` until swept."""

    def __init__(self, config: SchedulerConfig, roster: Roster) -> None:
        self._roster = roster
        self._size = config.block_size_tokens
        self._vocab_size = config.vocab_size

    def apply(self, opened: OpenPlan, result: StepResult, events: list[Event]) -> None:
        """Every row of the plan, in order."""
        samples = opened.plan.samples
        num_sampled = self._apply_decodes(opened, result, events)
        for row in range(opened.num_decode_rows, len(opened.sequences)):
            self._apply_row(opened, row, result, num_sampled if samples[row] else None, events)
            num_sampled += samples[row]

    def fail_all(self, opened: OpenPlan, code: str, message: str, events: list[Event]) -> None:
        """The step raised. A sequence alone in it ends; of several, each must show that it was not the cause."""
        for sequence in opened.sequences:
            sequence.num_open_rows -= 1
            if sequence.num_stale_rows:
                sequence.num_stale_rows -= 1
            elif sequence.is_ended:
                continue
            elif len(opened.sequences) == 1:
                self.fail(sequence, code, message, events)
            else:
                self._roster.suspect(sequence)

    def fail(self, sequence: Sequence, code: str, message: str, events: list[Event]) -> None:
        """End one sequence with a failure."""
        self._roster.end(sequence)
        events.append(FailureEvent(request_id=sequence.request.request_id, code=code, message=message))

    def _apply_decodes(self, opened: OpenPlan, result: StepResult, events: list[Event]) -> int:
        """The leading rows, one token each: `_apply_row` written out for the case that nothing special happens.

        This loop runs for every token. Returns the number of tokens taken.
        """
        positions, size, vocab_size = opened.plan.first_positions, self._size, self._vocab_size
        token_ids, logprobs = result.token_ids, result.logprobs
        special_rows = result.failures.keys() | result.prompt_logprobs.keys() | result.top_tokens.keys()
        for row in range(opened.num_decode_rows):
            sequence = opened.sequences[row]
            token_id = token_ids[row]
            known = sequence.token_ids
            if (
                row in special_rows
                or sequence.is_ended
                or sequence.num_stale_rows
                or sequence.is_suspect
                or not sequence.has_reported_prompt
                or token_id in sequence.eos_token_ids
                or len(known) + 1 >= sequence.max_tokens
                or not 0 <= token_id < vocab_size
            ):
                self._apply_row(opened, row, result, row, events)
                continue
            sequence.num_open_rows -= 1
            if (positions[row] + 1) % size == 0:
                self._roster.share_computed(sequence, positions[row] + 1)
            events.append(
                TokenEvent(
                    request_id=sequence.request.request_id,
                    token_index=len(known) - sequence.num_prompt_tokens,
                    token_id=token_id,
                    logprob=logprobs[row],
                )
            )
            known.append(token_id)
        return opened.num_decode_rows

    def _apply_row(
        self, opened: OpenPlan, row: int, result: StepResult, place: int | None, events: list[Event]
    ) -> None:
        """One row in full. `place` is where its token stands in the result, None for a row that samples nothing."""
        sequence, plan = opened.sequences[row], opened.plan
        sequence.num_open_rows -= 1
        if sequence.num_stale_rows:
            sequence.num_stale_rows -= 1
            return
        if sequence.is_ended:
            return
        if row in result.failures:
            self._fail_row(sequence, result.failures[row], events)
            return
        first_position = plan.first_positions[row]
        self._roster.share_computed(sequence, first_position + plan.num_tokens[row])
        if row in result.prompt_logprobs and sequence.wants_prompt_logprobs:
            sequence.collect_prompt_logprobs(
                first_position, result.prompt_logprobs[row], result.prompt_top_tokens.get(row, ())
            )
        if place is not None:
            if sequence.is_suspect:
                self._roster.clear(sequence)
            if sequence.request.pooling is not None:
                self._emit_embedding(sequence, result.embeddings.get(row), events)
                return
            top = result.top_tokens.get(row)
            self._emit(sequence, result.token_ids[place], result.logprobs[place], top, events)

    def _emit(
        self, sequence: Sequence, token_id: int, logprob: float, top: TopTokens | None, events: list[Event]
    ) -> None:
        if not 0 <= token_id < self._vocab_size:
            self.fail(sequence, GenerationError.code, _RANGE_MESSAGE, events)
            return
        token_index = sequence.num_completion_tokens
        sequence.token_ids.append(token_id)
        reason = sequence.finish_reason(token_id)
        events.append(
            TokenEvent(
                request_id=sequence.request.request_id,
                token_index=token_index,
                token_id=token_id,
                logprob=logprob,
                finish_reason=reason,
                top_tokens=top,
                prompt=None if sequence.has_reported_prompt else _report_prompt(sequence),
            )
        )
        if reason is not None:
            self._roster.end(sequence)

    def _emit_embedding(self, sequence: Sequence, values: bytes | None, events: list[Event]) -> None:
        if values is None:
            raise InvariantBroken("a step brought no vector for a prompt that it finished")
        report = _report_prompt(sequence)
        events.append(EmbeddingEvent(request_id=sequence.request.request_id, values=values, prompt=report))
        self._roster.end(sequence)

    def _fail_row(self, sequence: Sequence, code: str, events: list[Event]) -> None:
        """One row went wrong. Not-a-number gets a second try from scratch, everything else ends the request."""
        if code != NumericalError.code:
            self.fail(sequence, code, _FAILURE_MESSAGE, events)
            return
        # The cause may sit in any block it read, also in shared ones: none of them may be found again.
        self._roster.pool.forget(sequence.block_digests)
        sequence.num_numerical_failures += 1
        if sequence.num_numerical_failures > _MAX_NUMERICAL_RETRIES:
            self.fail(sequence, code, _NUMERICAL_MESSAGE, events)
            return
        sequence.distrust_open_rows()
        sequence.forget_prompt_logprobs()
        if sequence.is_running:
            self._roster.set_back(sequence)


def _report_prompt(sequence: Sequence) -> PromptReport:
    sequence.has_reported_prompt = True
    logprobs = tuple(sequence.prompt_logprobs) if sequence.wants_prompt_logprobs else None
    if logprobs is not None and len(logprobs) != sequence.num_prompt_tokens - 1:
        raise InvariantBroken(
            f"{len(logprobs)} prompt log-probabilities came back for {sequence.num_prompt_tokens} prompt tokens"
        )
    has_tops = logprobs is not None and sequence.request.sampling.prompt_top_n_tokens > 0
    if has_tops and len(sequence.prompt_top_tokens) != sequence.num_prompt_tokens - 1:
        raise InvariantBroken(
            f"alternatives to {len(sequence.prompt_top_tokens)} tokens came back for {sequence.num_prompt_tokens} "
            "prompt tokens"
        )
    tops = tuple(sequence.prompt_top_tokens) if has_tops else None
    # Megabytes for a long prompt, and nobody asks again.
    sequence.prompt_top_tokens.clear()
    return PromptReport(
        num_cached_tokens=sequence.num_cached_tokens,
        queue_ns=sequence.queue_ns,
        prompt_logprobs=logprobs,
        prompt_top_tokens=tops,
    )
