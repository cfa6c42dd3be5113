"""What goes over the wire comes out the same, field by field."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.core.events import EmbeddingEvent, FailureEvent, PromptReport, TokenEvent
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
from weft.proto import convert
from weft.proto.v1 import generate_pb2 as pb

U64 = st.integers(0, 2**64 - 1)
TOKEN = st.integers(0, 2**31 - 1)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)

samplings = st.builds(
    SamplingParams,
    do_sample=st.booleans(),
    seed=U64,
    temperature=FLOAT,
    top_k=TOKEN,
    top_p=FLOAT,
    min_p=FLOAT,
    typical_p=FLOAT,
    repetition_penalty=FLOAT,
    frequency_penalty=FLOAT,
    presence_penalty=FLOAT,
    penalty_style=st.sampled_from(PenaltyStyle),
    logit_bias=st.lists(st.tuples(TOKEN, FLOAT), max_size=4).map(tuple),
    watermark=st.booleans(),
    logprob_style=st.sampled_from(LogprobStyle),
    top_n_tokens=st.integers(0, 20),
    prompt_logprobs=st.booleans(),
    prompt_top_n_tokens=st.integers(0, 20),
)
stops = st.builds(
    StopConditions,
    max_new_tokens=TOKEN,
    min_new_tokens=TOKEN,
    eos_token_ids=st.lists(TOKEN, max_size=4).map(tuple),
    ignore_eos=st.booleans(),
)
requests = st.builds(
    Request,
    request_id=U64,
    prompt_token_ids=st.lists(TOKEN, max_size=8).map(tuple),
    emitted_token_ids=st.lists(TOKEN, max_size=8).map(tuple),
    sampling=samplings,
    stop=stops,
    priority=st.integers(-(2**31), 2**31 - 1),
    pooling=st.none() | st.sampled_from(Pooling),
    deadline_ns=st.none(),
    tenant=st.text(max_size=8),
    trace_parent=st.text(max_size=8),
)
FLOAT32 = st.floats(width=32, allow_nan=False)


def top_tokens(min_size: int) -> st.SearchStrategy[TopTokens]:
    rows = st.lists(st.tuples(TOKEN, FLOAT32), min_size=min_size, max_size=5)
    return rows.map(lambda row: TopTokens(tuple(i for i, _ in row), tuple(p for _, p in row)))


token_events = st.builds(
    TokenEvent,
    request_id=U64,
    token_index=TOKEN,
    token_id=TOKEN,
    logprob=FLOAT32,
    finish_reason=st.none() | st.sampled_from(FinishReason),
    top_tokens=st.none() | top_tokens(min_size=1),
    prompt=st.none()
    | st.builds(
        PromptReport,
        num_cached_tokens=TOKEN,
        queue_ns=U64,
        prompt_logprobs=st.none() | st.lists(FLOAT32, max_size=5).map(tuple),
        prompt_top_tokens=st.none() | st.lists(top_tokens(min_size=0), max_size=5).map(tuple),
    ),
)
embedding_events = st.builds(
    EmbeddingEvent,
    request_id=U64,
    values=st.binary(max_size=16),
    prompt=st.builds(PromptReport, num_cached_tokens=TOKEN, queue_ns=U64),
)
failure_events = st.builds(FailureEvent, request_id=U64, code=st.text(max_size=8), message=st.text(max_size=8))


@given(requests)
def test_a_request_survives_the_wire(request_):
    message = pb.Request.FromString(convert.request_to_wire(request_, now_ns=5).SerializeToString())

    assert convert.request_from_wire(message, now_ns=5) == request_
    assert convert.request_from_wire(message, now_ns=5).trace_parent == request_.trace_parent


@given(st.lists(token_events, max_size=8), st.lists(embedding_events, max_size=3), st.lists(failure_events, max_size=3))
def test_the_events_of_a_step_survive_the_wire(tokens, embeddings, failures):
    events = [*tokens, *embeddings, *failures]

    frame = pb.ServerFrame.FromString(convert.frame_from_events(events).SerializeToString())

    assert convert.events_from_frame(frame) == events


def test_a_deadline_travels_as_the_time_that_is_left():
    """The two ends read different clocks."""
    sent = Request(
        request_id=RequestId(1),
        prompt_token_ids=(1,),
        sampling=SamplingParams(),
        stop=StopConditions(max_new_tokens=1),
        deadline_ns=1_000,
    )

    received = convert.request_from_wire(convert.request_to_wire(sent, now_ns=400), now_ns=70_000)

    assert received.deadline_ns == 70_600


def test_a_deadline_that_has_passed_does_not_become_no_deadline():
    sent = Request(
        request_id=RequestId(1),
        prompt_token_ids=(1,),
        sampling=SamplingParams(),
        stop=StopConditions(max_new_tokens=1),
        deadline_ns=1_000,
    )

    received = convert.request_from_wire(convert.request_to_wire(sent, now_ns=5_000), now_ns=0)

    assert received.deadline_ns == 1


def test_logit_bias_columns_of_different_length_are_refused():
    message = pb.Request(sampling=pb.Sampling(logit_bias_ids=[1, 2], logit_bias_values=[0.5]))

    with pytest.raises(ValidationError, match="logit_bias"):
        convert.request_from_wire(message, now_ns=0)


def test_an_unknown_enum_value_is_refused():
    message = pb.Request(sampling=pb.Sampling(penalty_style=7))  # type: ignore[arg-type]

    with pytest.raises(ValidationError, match="penalty_style"):
        convert.request_from_wire(message, now_ns=0)


def test_a_logprob_that_is_no_number_stays_one():
    event = TokenEvent(request_id=RequestId(1), token_index=0, token_id=3, logprob=math.nan)

    (received,) = convert.events_from_frame(convert.frame_from_events([event]))

    assert isinstance(received, TokenEvent)
    assert math.isnan(received.logprob)


def test_stats_and_info_survive_the_wire():
    """Every field differs from its default, so that a forgotten one shows."""
    stats = EngineStats(**{name: i + 1 for i, name in enumerate(EngineStats.__struct_fields__)})
    info = EngineInfo(
        **{
            name: {int: i + 1, str: f"text {i}", bool: name != "prefix_caching"}[field.type]
            for i, (name, field) in enumerate(EngineInfo.__dataclass_fields__.items())
            if name not in {"phases", "quality", "embedding_dimensions"}
        },
        embedding_dimensions=(64, 256),
        phases=(("load", 1.5), ("warmup", 0.25)),
        quality=QualityReceipt(reference="bfloat16", top1_agreement=0.9, kl_nats=0.01, num_tokens=2_538),
    )

    assert convert.stats_from_wire(convert.stats_to_wire(stats)) == stats
    assert convert.info_from_wire(convert.info_to_wire(info)) == info
    unmeasured = replace(info, quality=None)
    assert convert.info_from_wire(convert.info_to_wire(unmeasured)) == unmeasured
