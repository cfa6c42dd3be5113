"""Time as a value that is passed in.

Nothing in `core` or `scheduler` reads a clock: callers at the edge read a `Clock` and pass nanoseconds
down. Only differences of two readings of one clock mean anything (wall-clock jumps must not matter).
"""

from typing import Protocol


class Clock(Protocol):
    """A monotonic clock. The real one lives at the process edge, `FakeClock` in the tests."""

    def now_ns(self) -> int:
        """Nanoseconds since an arbitrary fixed moment; never decreases."""
        ...
