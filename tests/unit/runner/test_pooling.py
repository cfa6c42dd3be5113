"""What a prompt's vector is gathered from, whatever its chunks."""

import numpy as np
import pytest

from weft.core.plan import SequenceStart
from weft.core.request import Pooling, RequestId, SamplingParams, Slot, StopConditions
from weft.errors import InvariantBroken
from weft.runner.pooling import pooler_of

HIDDEN = np.random.default_rng(3).normal(size=(23, 8)).astype(np.float32)


def start(pooling: Pooling | None) -> SequenceStart:
    return SequenceStart(
        slot=Slot(0),
        request_id=RequestId(1),
        token_ids=(5,) * len(HIDDEN),
        num_prompt_tokens=len(HIDDEN),
        sampling=SamplingParams(),
        stop=StopConditions(max_new_tokens=1),
        pooling=pooling,
    )


def pooled(pooling: Pooling, ends: list[int], first: int = 0) -> np.ndarray:
    """The vector after chunks that end at these positions."""
    pooler = pooler_of(start(pooling))
    for end in ends:
        span = pooler.wanted(first, end)
        assert first <= span.start <= span.stop <= end
        pooler.add(HIDDEN[span.start : span.stop])
        first = end
    return pooler.vector()


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("ends", [[1, 2, 23], [22, 23], [7, 14, 21, 23], list(range(1, 24))])
def test_chunks_change_no_bit(pooling: Pooling, ends: list[int]) -> None:
    assert np.array_equal(pooled(pooling, ends), pooled(pooling, [23]))


def test_each_pooling_is_what_it_says() -> None:
    assert np.array_equal(pooled(Pooling.LAST, [23]), HIDDEN[-1])
    assert np.array_equal(pooled(Pooling.CLS, [23]), HIDDEN[0])
    np.testing.assert_allclose(pooled(Pooling.MEAN, [23]), HIDDEN.mean(0), rtol=1e-6, atol=1e-7)
    assert pooled(Pooling.MEAN, [23]).dtype == np.float32


def test_the_last_token_needs_nothing_before_it() -> None:
    assert np.array_equal(pooled(Pooling.LAST, [23], first=20), HIDDEN[-1])


@pytest.mark.parametrize("pooling", [Pooling.MEAN, Pooling.CLS])
def test_a_skipped_beginning_is_noticed(pooling: Pooling) -> None:
    with pytest.raises(InvariantBroken):
        pooled(pooling, [23], first=8)


def test_a_sequence_that_generates_is_a_bug() -> None:
    with pytest.raises(InvariantBroken, match="without pooling"):
        pooler_of(start(None))
