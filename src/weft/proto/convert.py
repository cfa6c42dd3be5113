"""Core values ⇄ wire messages, both ways. The only module that touches protobuf fields.

A message from the wire is untrusted: every value is checked by `Request.check` in the engine; here only what cannot
be represented is refused. Round trips are tested for every field.
"""

from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, islice

from weft.core.events import EmbeddingEvent, Event, FailureEvent, PromptReport, TokenEvent
from weft.core.info import EngineInfo, EngineStats, QualityReceipt
from weft.core.plan import TopTokens
from weft.core.request import (
    FinishReason,
    LogprobStyle,
    PenaltyStyle,
    Pooling,
    Request,
    RequestId,
    SamplingParams,
    StopConditions,
)
from weft.errors import ValidationError
from weft.proto.v1 import generate_pb2 as pb

_FINISH_TO_WIRE = {
    None: pb.FINISH_REASON_NONE,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.EOS_TOKEN: pb.FINISH_REASON_EOS_TOKEN,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}
_PENALTY_TO_WIRE = {PenaltyStyle.TGI: pb.PENALTY_STYLE_TGI, PenaltyStyle.OPENAI: pb.PENALTY_STYLE_OPENAI}
_PENALTY_FROM_WIRE = {wire: style for style, wire in _PENALTY_TO_WIRE.items()}
_LOGPROB_TO_WIRE = {LogprobStyle.PROCESSED: pb.LOGPROB_STYLE_PROCESSED, LogprobStyle.RAW: pb.LOGPROB_STYLE_RAW}
_LOGPROB_FROM_WIRE = {wire: style for style, wire in _LOGPROB_TO_WIRE.items()}
_POOLING_TO_WIRE = {
    None: pb.POOLING_NONE,
    Pooling.LAST: pb.POOLING_LAST,
    Pooling.MEAN: pb.POOLING_MEAN,
    Pooling.CLS: pb.POOLING_CLS,
}
_POOLING_FROM_WIRE = {wire: pooling for pooling, wire in _POOLING_TO_WIRE.items()}

_STATS_FIELDS = EngineStats.__struct_fields__
_INFO_FIELDS = tuple(name for name in EngineInfo.__dataclass_fields__ if name not in {"phases", "quality"})
_QUALITY_FIELDS = tuple(QualityReceipt.__dataclass_fields__)


def request_to_wire(request: Request, now_ns: int) -> pb.Request:
    """Pack a request. Its deadline becomes a duration: the two ends share no clock."""
    sampling = request.sampling
    remaining_ns = 0 if request.deadline_ns is None else max(request.deadline_ns - now_ns, 1)
    return pb.Request(
        request_id=request.request_id,
        prompt_token_ids=request.prompt_token_ids,
        emitted_token_ids=request.emitted_token_ids,
        sampling=pb.Sampling(
            do_sample=sampling.do_sample,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            penalty_style=_PENALTY_TO_WIRE[sampling.penalty_style],
            logit_bias_ids=[token_id for token_id, _ in sampling.logit_bias],
            logit_bias_values=[bias for _, bias in sampling.logit_bias],
            watermark=sampling.watermark,
            logprob_style=_LOGPROB_TO_WIRE[sampling.logprob_style],
            top_n_tokens=sampling.top_n_tokens,
            prompt_logprobs=sampling.prompt_logprobs,
            prompt_top_n_tokens=sampling.prompt_top_n_tokens,
        ),
        stop=pb.Stop(
            max_new_tokens=request.stop.max_new_tokens,
            min_new_tokens=request.stop.min_new_tokens,
            eos_token_ids=request.stop.eos_token_ids,
            ignore_eos=request.stop.ignore_eos,
        ),
        priority=request.priority,
        deadline_in_ns=remaining_ns,
        tenant=request.tenant,
        pooling=_POOLING_TO_WIRE[request.pooling],
        trace_parent=request.trace_parent,
    )


def request_from_wire(message: pb.Request, now_ns: int) -> Request:
    """Unpack a request. Raises ValidationError when a column is shorter than its partner or an enum is unknown."""
    sampling, stop = message.sampling, message.stop
    if len(sampling.logit_bias_ids) != len(sampling.logit_bias_values):
        raise ValidationError("`logit_bias` must have one value per token id", field="logit_bias")
    if sampling.penalty_style not in _PENALTY_FROM_WIRE or sampling.logprob_style not in _LOGPROB_FROM_WIRE:
        raise ValidationError("`penalty_style` or `logprob_style` is not known to this shard", field="sampling")
    if message.pooling not in _POOLING_FROM_WIRE:
        raise ValidationError("`pooling` is not known to this shard", field="pooling")
    return Request(
        request_id=RequestId(message.request_id),
        prompt_token_ids=tuple(message.prompt_token_ids),
        emitted_token_ids=tuple(message.emitted_token_ids),
        sampling=SamplingParams(
            do_sample=sampling.do_sample,
            seed=sampling.seed,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            typical_p=sampling.typical_p,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            penalty_style=_PENALTY_FROM_WIRE[sampling.penalty_style],
            logit_bias=tuple(zip(sampling.logit_bias_ids, sampling.logit_bias_values, strict=True)),
            watermark=sampling.watermark,
            logprob_style=_LOGPROB_FROM_WIRE[sampling.logprob_style],
            top_n_tokens=sampling.top_n_tokens,
            prompt_logprobs=sampling.prompt_logprobs,
            prompt_top_n_tokens=sampling.prompt_top_n_tokens,
        ),
        stop=StopConditions(
            max_new_tokens=stop.max_new_tokens,
            min_new_tokens=stop.min_new_tokens,
            eos_token_ids=tuple(stop.eos_token_ids),
            ignore_eos=stop.ignore_eos,
        ),
        priority=message.priority,
        deadline_ns=now_ns + message.deadline_in_ns if message.deadline_in_ns else None,
        tenant=message.tenant,
        pooling=_POOLING_FROM_WIRE[message.pooling],
        trace_parent=message.trace_parent,
    )


def frame_from_events(events: Iterable[Event], stats: EngineStats | None = None) -> pb.ServerFrame:
    """Pack the events of one step by columns. About a microsecond per token."""
    tokens: list[TokenEvent] = []
    details: list[pb.TokenDetail] = []
    failures: list[pb.Failure] = []
    embeddings: list[pb.Embedding] = []
    for event in events:
        if isinstance(event, EmbeddingEvent):
            prompt = _prompt_report_to_wire(event.prompt)
            embeddings.append(pb.Embedding(request_id=event.request_id, values=event.values, prompt=prompt))
            continue
        if isinstance(event, FailureEvent):
            failures.append(pb.Failure(request_id=event.request_id, code=event.code, message=event.message))
            continue
        if event.top_tokens is not None or event.prompt is not None:
            details.append(_detail_to_wire(len(tokens), event))
        tokens.append(event)
    return pb.ServerFrame(
        request_ids=[token.request_id for token in tokens],
        token_indices=[token.token_index for token in tokens],
        token_ids=[token.token_id for token in tokens],
        logprobs=[token.logprob for token in tokens],
        finish_reasons=[_FINISH_TO_WIRE[token.finish_reason] for token in tokens],
        details=details,
        failures=failures,
        embeddings=embeddings,
        stats=None if stats is None else stats_to_wire(stats),
    )


def events_from_frame(frame: pb.ServerFrame) -> list[Event]:
    """Unpack a frame: token events in order, then vectors, then failures."""
    details = {detail.entry: detail for detail in frame.details}
    events: list[Event] = []
    columns = zip(
        frame.request_ids, frame.token_indices, frame.token_ids, frame.logprobs, frame.finish_reasons, strict=True
    )
    for entry, (request_id, token_index, token_id, logprob, finish_reason) in enumerate(columns):
        detail = details.get(entry)
        events.append(
            TokenEvent(
                request_id=RequestId(request_id),
                token_index=token_index,
                token_id=token_id,
                logprob=logprob,
                finish_reason=_FINISH_FROM_WIRE[finish_reason],
                top_tokens=None if detail is None else _top_tokens_from_wire(detail),
                prompt=_prompt_report_from_wire(detail.prompt) if detail and detail.HasField("prompt") else None,
            )
        )
    events.extend(
        EmbeddingEvent(
            request_id=RequestId(embedding.request_id),
            values=embedding.values,
            prompt=_prompt_report_from_wire(embedding.prompt),
        )
        for embedding in frame.embeddings
    )
    events.extend(
        FailureEvent(request_id=RequestId(failure.request_id), code=failure.code, message=failure.message)
        for failure in frame.failures
    )
    return events


def _detail_to_wire(entry: int, event: TokenEvent) -> pb.TokenDetail:
    detail = pb.TokenDetail(entry=entry)
    if event.top_tokens is not None:
        detail.top_token_ids.extend(event.top_tokens.token_ids)
        detail.top_logprobs.extend(event.top_tokens.logprobs)
    if event.prompt is not None:
        detail.prompt.CopyFrom(_prompt_report_to_wire(event.prompt))
    return detail


def _prompt_report_to_wire(report: PromptReport) -> pb.PromptReport:
    logprobs, tops = report.prompt_logprobs, report.prompt_top_tokens
    return pb.PromptReport(
        num_cached_tokens=report.num_cached_tokens,
        queue_ns=report.queue_ns,
        has_prompt_logprobs=logprobs is not None,
        prompt_logprobs=logprobs or (),
        has_prompt_top_tokens=tops is not None,
        prompt_top_counts=[len(top.token_ids) for top in tops or ()],
        prompt_top_token_ids=chain.from_iterable(top.token_ids for top in tops or ()),
        prompt_top_logprobs=chain.from_iterable(top.logprobs for top in tops or ()),
    )


def _top_tokens_from_wire(detail: pb.TokenDetail) -> TopTokens | None:
    if not detail.top_token_ids:
        return None
    return TopTokens(tuple(detail.top_token_ids), tuple(detail.top_logprobs))


def _prompt_report_from_wire(report: pb.PromptReport) -> PromptReport:
    return PromptReport(
        num_cached_tokens=report.num_cached_tokens,
        queue_ns=report.queue_ns,
        prompt_logprobs=tuple(report.prompt_logprobs) if report.has_prompt_logprobs else None,
        prompt_top_tokens=_prompt_top_tokens_from_wire(report) if report.has_prompt_top_tokens else None,
    )


def _prompt_top_tokens_from_wire(report: pb.PromptReport) -> tuple[TopTokens, ...]:
    token_ids, logprobs = iter(report.prompt_top_token_ids), iter(report.prompt_top_logprobs)
    return tuple(
        TopTokens(tuple(islice(token_ids, count)), tuple(islice(logprobs, count))) for count in report.prompt_top_counts
    )


def stats_to_wire(stats: EngineStats) -> pb.EngineStats:
    """Field by field; the names are the same on both sides."""
    return pb.EngineStats(**{name: getattr(stats, name) for name in _STATS_FIELDS})


def stats_from_wire(message: pb.EngineStats) -> EngineStats:
    """Field by field; the names are the same on both sides."""
    return EngineStats(**{name: getattr(message, name) for name in _STATS_FIELDS})


def info_to_wire(info: EngineInfo) -> pb.InfoResponse:
    """Field by field; the names are the same on both sides."""
    message = pb.InfoResponse(**{name: getattr(info, name) for name in _INFO_FIELDS})
    message.phases.extend(pb.PhaseTime(name=name, seconds=seconds) for name, seconds in info.phases)
    if info.quality is not None:
        message.quality.CopyFrom(pb.QualityReceipt(**asdict(info.quality)))
    return message


def info_from_wire(message: pb.InfoResponse) -> EngineInfo:
    """Field by field; the names are the same on both sides."""
    values = {name: getattr(message, name) for name in _INFO_FIELDS}
    values["embedding_dimensions"] = tuple(message.embedding_dimensions)
    quality: QualityReceipt | None = None
    if message.HasField("quality"):
        quality = QualityReceipt(**{name: getattr(message.quality, name) for name in _QUALITY_FIELDS})
    return EngineInfo(**values, phases=tuple((phase.name, phase.seconds) for phase in message.phases), quality=quality)
