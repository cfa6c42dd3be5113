import pytest

from weft.errors import OverloadedError, ValidationError
from weft.router.admission import MAX_RETRY_AFTER_S, Admission


def test_places_are_taken_and_given_back():
    admission = Admission(3)

    with admission.admit(2):
        assert admission.used == 2
        with pytest.raises(OverloadedError), admission.admit(2):
            pass
        with admission.admit(1):
            assert admission.used == 3
    assert admission.used == 0


def test_places_are_given_back_when_the_request_fails():
    admission = Admission(1)

    with pytest.raises(ZeroDivisionError), admission.admit(1):
        _ = 1 / 0

    assert admission.used == 0


def test_checking_takes_nothing():
    admission = Admission(2)

    admission.check(2)
    with admission.admit(1), pytest.raises(OverloadedError):
        admission.check(2)
    assert admission.used == 0


def test_more_places_than_there_are_is_the_requests_fault():
    """Who came back for them would come back for ever."""
    with pytest.raises(ValidationError, match=r"has 3 sequences, and the server generates 2 at a time"):
        Admission(2).check(3)


def test_retry_after_follows_how_long_places_are_held():
    admission = Admission(2)
    assert admission.retry_after_s == 1.0

    for _ in range(100):
        admission.observe_duration(20.0)
    assert admission.retry_after_s == pytest.approx(10.0, rel=0.01)

    for _ in range(100):
        admission.observe_duration(1e6)
    assert admission.retry_after_s == MAX_RETRY_AFTER_S
