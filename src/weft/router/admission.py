"""Who may come in: a fixed number of places for sequences, running and waiting together. Nobody waits for a place.

A place is held for the whole generation, and a request takes one per sequence (`n`, `best_of`, several prompts), as
in TGI. Whoever finds too few is told when to come back.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from weft.errors import OverloadedError, ValidationError

MAX_RETRY_AFTER_S = 30.0
_SMOOTHING = 0.1


class Admission:
    """Places for `max_concurrent_requests` sequences."""

    def __init__(self, max_concurrent_requests: int) -> None:
        self.capacity = max_concurrent_requests
        self.used = 0
        self._mean_duration_s = 1.0

    def check(self, count: int) -> None:
        """Raises OverloadedError when `count` places are not free; takes none. For use before costly work.

        Raises ValidationError for more places than there are: coming back would not help.
        """
        if count > self.capacity:
            raise ValidationError(
                f"This request has {count} sequences, and the server generates {self.capacity} at a time "
                "(--max-concurrent-requests). Ask for fewer"
            )
        if self.used + count > self.capacity:
            raise OverloadedError("Model is overloaded", retry_after_s=self.retry_after_s)

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold `count` places. Raises OverloadedError at once when they are not free."""
        self.check(count)
        self.used += count
        try:
            yield
        finally:
            self.used -= count

    def observe_duration(self, seconds: float) -> None:
        """Learn how long a place is held."""
        self._mean_duration_s += _SMOOTHING * (seconds - self._mean_duration_s)

    @property
    def retry_after_s(self) -> float:
        """When a place is likely to be free: places are given back at capacity / mean duration."""
        return min(max(self._mean_duration_s / max(self.capacity, 1), 1.0), MAX_RETRY_AFTER_S)
