"""JSON values without a fixed type, and the ways in which numbers are shown."""

import math
from collections.abc import Mapping, Sequence

import msgspec

JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]

Anything = msgspec.Raw
"""A field that may hold any JSON value and is looked at later, if at all."""


_MAX_SHOWN_DIGITS = 40


def _absent() -> msgspec.Raw:
    return msgspec.Raw(b"")


ABSENT: Anything = msgspec.field(default_factory=_absent)
"""Default of such a field. A factory, because a schema cannot show a raw value."""


def is_given(value: msgspec.Raw) -> bool:
    """Whether a field of type Anything holds more than null."""
    return bytes(value) not in (b"", b"null")


def shown_logprob(logprob: float) -> float | None:
    """A float32 with the fewest digits that restore it (nine at most); null for what JSON cannot say."""
    return float(f"{logprob:.9g}") if math.isfinite(logprob) else None


def logprob_bytes(logprob: float) -> bytes:
    """`shown_logprob` as JSON."""
    return b"%.9g" % logprob if math.isfinite(logprob) else b"null"


def shortened(number: str) -> str:
    """A number for an error: nobody wants to read its thousandth digit."""
    return number if len(number) <= _MAX_SHOWN_DIGITS else f"{number[:16]}… ({len(number)} characters)"
