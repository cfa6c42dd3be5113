"""Which tokens a sequence already has, and how often: what penalties read.

Kept per sequence and without padding (TGI's flash models see the zero padding of their batch as history, so that
token id 0 is penalised: known-gaps C3). One step costs one update per sequence, not a walk over its history.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY = 256


class TokenCounts:
    """Distinct tokens of one sequence, in order of first appearance, with their counts.

    Two counts per token: over prompt and completion, and over the completion alone.
    """

    def __init__(self, token_ids: Iterable[int], num_prompt_tokens: int) -> None:
        ids = np.fromiter(token_ids, dtype=np.int64)
        distinct, counts = np.unique(ids, return_counts=True)
        self.num_distinct = len(distinct)
        capacity = max(_FIRST_CAPACITY, 2 * len(distinct))
        self._ids = np.zeros(capacity, dtype=np.int64)
        self._counts = np.zeros((2, capacity), dtype=np.int32)
        self._ids[: len(distinct)] = distinct
        self._counts[0, : len(distinct)] = counts
        self._place = {int(token): place for place, token in enumerate(distinct)}
        self.num_tokens = len(ids)
        for token in ids[num_prompt_tokens:].tolist():
            self._counts[1, self._place[token]] += 1

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        """[U] distinct ids."""
        return self._ids[: self.num_distinct]

    @property
    def total_counts(self) -> npt.NDArray[np.int32]:
        """[U] occurrences in prompt and completion."""
        return self._counts[0, : self.num_distinct]

    @property
    def completion_counts(self) -> npt.NDArray[np.int32]:
        """[U] occurrences in the completion."""
        return self._counts[1, : self.num_distinct]

    def append(self, token_id: int) -> None:
        """Count one more completion token."""
        place = self._place.get(token_id)
        if place is None:
            place = self._place[token_id] = self.num_distinct
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)], axis=1)
            self._ids[place] = token_id
            self.num_distinct += 1
        self._counts[:, place] += 1
        self.num_tokens += 1
