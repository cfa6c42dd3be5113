"""The waiting room: bounded, by priority, first come first served within one.

A preempted sequence comes back to the front of its priority and is never refused. Deadlines count only for requests
that have not had a step yet.
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from weft.core.request import RequestId
from weft.core.sequence import Sequence

_MAX_IDLE_DEADLINES = 1024

_MIN_RETRY_AFTER_S = 1.0
_MAX_RETRY_AFTER_S = 60.0
_NS_PER_S = 1_000_000_000


class DepartureRate:
    """How fast requests end while the engine is busy: what a refused client is told about when to come back."""

    def __init__(self) -> None:
        self._mean_gap_ns = 0.0
        self._last_ns: int | None = None

    def observe(self, num_ended: int, now_ns: int, *, is_idle: bool) -> None:
        """Requests ended. `is_idle`: they were the last ones, so the time until the next end means nothing."""
        if self._last_ns is not None:
            gap_ns = (now_ns - self._last_ns) / num_ended
            self._mean_gap_ns = 0.9 * self._mean_gap_ns + 0.1 * gap_ns if self._mean_gap_ns else gap_ns
        self._last_ns = None if is_idle else now_ns

    def retry_after_s(self, num_waiting: int) -> float:
        """When half of those who wait should have gone; between a second and a minute."""
        seconds = num_waiting / 2 * self._mean_gap_ns / _NS_PER_S
        return min(max(seconds, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)


class WaitingQueue:
    """Sequences without a slot, in the order in which they should get one."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._classes: dict[int, OrderedDict[RequestId, Sequence]] = {}
        self._negated_priorities: list[int] = []
        # (deadline, arrival, priority, id): entries of requests that left stay until they come up or are swept.
        self._deadlines: list[tuple[int, int, int, RequestId]] = []
        self._num_waiting = 0
        self._num_preempted = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __contains__(self, sequence: Sequence) -> bool:
        members = self._classes.get(sequence.request.priority)
        return members is not None and members.get(sequence.request.request_id) is sequence

    def __iter__(self) -> Iterator[Sequence]:
        """Most urgent first. Sequences may be removed while iterating."""
        for negated in tuple(self._negated_priorities):
            yield from tuple(self._classes[-negated].values())

    @property
    def oldest_added_ns(self) -> int | None:
        """Arrival of the oldest sequence at the head of a priority; None: nobody waits."""
        return min((next(iter(members.values())).added_ns for members in self._classes.values()), default=None)

    @property
    def is_full(self) -> bool:
        """No request that never ran may come in. Preempted sequences do not take places."""
        return self._num_waiting - self._num_preempted >= self._max_requests

    def append(self, sequence: Sequence) -> None:
        """A new request takes the last place of its priority. The caller has checked `is_full`."""
        self._class_of(sequence)[sequence.request.request_id] = sequence
        self._num_waiting += 1
        request = sequence.request
        if request.deadline_ns is not None:
            heappush(self._deadlines, (request.deadline_ns, sequence.arrival, request.priority, request.request_id))
            self._sweep_deadlines()

    def push_front(self, sequence: Sequence) -> None:
        """A sequence that ran takes the first place of its priority."""
        members = self._class_of(sequence)
        members[sequence.request.request_id] = sequence
        members.move_to_end(sequence.request.request_id, last=False)
        self._num_waiting += 1
        self._num_preempted += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a waiting sequence out: it starts, ended or was aborted."""
        priority = sequence.request.priority
        members = self._classes[priority]
        del members[sequence.request.request_id]
        if not members:
            del self._classes[priority]
            self._negated_priorities.remove(-priority)
        self._num_waiting -= 1
        if sequence.has_started:
            self._num_preempted -= 1

    def take_expired(self, now_ns: int) -> list[Sequence]:
        """Remove and return the requests whose deadline passed before their first step."""
        expired: list[Sequence] = []
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            sequence = self._unstarted(heappop(self._deadlines))
            if sequence is not None:
                self.remove(sequence)
                expired.append(sequence)
        return expired

    def _unstarted(self, entry: tuple[int, int, int, RequestId]) -> Sequence | None:
        _, arrival, priority, request_id = entry
        members = self._classes.get(priority)
        sequence = members.get(request_id) if members else None
        if sequence is None or sequence.arrival != arrival or sequence.has_started:
            return None
        return sequence

    def _sweep_deadlines(self) -> None:
        if len(self._deadlines) > 2 * self._num_waiting + _MAX_IDLE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if self._unstarted(entry) is not None]
            heapify(self._deadlines)

    def _class_of(self, sequence: Sequence) -> OrderedDict[RequestId, Sequence]:
        priority = sequence.request.priority
        members = self._classes.get(priority)
        if members is None:
            members = self._classes[priority] = OrderedDict()
            insort(self._negated_priorities, -priority)
        return members
