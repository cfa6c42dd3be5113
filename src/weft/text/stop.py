"""Find stop strings in text that arrives in pieces, before any part of one is shown.

The leftmost match wins, the longest one at the same place: the answer depends on the text alone, never on how it was
cut into pieces. Text that could still begin a match is held back, nothing else. Each character costs a bounded
amount of work (Aho-Corasick), so no text and no set of stop strings makes matching slow.

Source: Aho and Corasick 1975, "Efficient string matching: an aid to bibliographic search", CACM 18(6)
"""

import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class StopResult:
    """What one piece of text led to."""

    text: str
    """Text that may be shown now. After a match there is no more."""
    matched: str | None = None
    """The stop string that ended the text; None while the text goes on."""
    overrun_chars: int = 0
    """Characters pushed behind the end of the match: text that should not have been generated."""


@dataclass(slots=True)
class _State:
    """The longest suffix of the text that begins a stop string."""

    depth: int
    """Its length."""
    children: dict[str, "_State"] = field(default_factory=dict)
    fallback: "_State | None" = None
    """The next shorter such suffix; None at the root."""
    match: str | None = None
    """The longest stop string that ends here."""


class StopMatcher:
    """Scans one completion. `includes_match` keeps the stop string itself in the text (TGI's native routes do)."""

    def __init__(self, stop_strings: Sequence[str], *, includes_match: bool = False) -> None:
        if "" in stop_strings:
            raise ValueError("a stop string must not be empty")
        self._root = _build_automaton(stop_strings)
        self._state = self._root
        self._includes_match = includes_match
        # Nothing but these characters leaves the root; a regular expression of one class skips to them at C speed.
        first_characters = "".join(map(re.escape, self._root.children))
        self._find_first_character = re.compile(f"[{first_characters}]" if first_characters else r"(?!)").search
        self._held = ""
        self._match_start = 0
        self._match: str | None = None
        self._is_decided = False

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text, None when none did. Final after `flush`."""
        return self._match if self._is_decided else None

    def push(self, text: str) -> StopResult:
        """Take the next piece of text and return what may be shown."""
        if self._is_decided:
            return StopResult("", self._match, len(text))
        scanned = len(self._held)
        self._held += text
        self._scan(scanned)
        if self._match is not None and self._is_decided:
            return self._end_at(self._match)
        keep_from = len(self._held) - self._state.depth
        if self._match is not None:
            keep_from = min(keep_from, self._match_start)
        shown, self._held = self._held[:keep_from], self._held[keep_from:]
        self._match_start -= keep_from
        return StopResult(shown)

    def flush(self) -> str:
        """End the text: returns what was held back, cut at a match that was waiting for a longer one (`matched`)."""
        if self._is_decided:
            return ""
        if self._match is not None:
            self._is_decided = True
            return self._end_at(self._match).text
        shown, self._held = self._held, ""
        self._state = self._root
        return shown

    def _scan(self, position: int) -> None:
        """Reads the held text from `position` on, until it is read or a match is certain."""
        text, state = self._held, self._state
        while position < len(text):
            if state is self._root and self._match is None:
                first = self._find_first_character(text, position)
                if first is None:
                    break
                position = first.start()
            state = _next_state(state, text[position])
            position += 1
            if state.match is not None:
                self._prefer_leftmost(position - len(state.match), state.match)
            # A suffix that begins at or before the match could still become a match to the left, or a longer one;
            # not when no stop string goes on behind it.
            is_certain = not state.children or position - state.depth > self._match_start
            if self._match is not None and is_certain:
                self._is_decided = True
                break
        self._state = state

    def _prefer_leftmost(self, start: int, match: str) -> None:
        is_better = self._match is None or start <= self._match_start
        if is_better:
            self._match_start, self._match = start, match

    def _end_at(self, match: str) -> StopResult:
        match_end = self._match_start + len(match)
        shown = self._held[: match_end if self._includes_match else self._match_start]
        overrun_chars = len(self._held) - match_end
        self._held = ""
        return StopResult(shown, match, overrun_chars)


def _next_state(state: _State, character: str) -> _State:
    while character not in state.children:
        if state.fallback is None:
            return state
        state = state.fallback
    return state.children[character]


def _build_automaton(stop_strings: Iterable[str]) -> _State:
    """Returns the root. Time and memory are linear in the total length of the stop strings."""
    root = _State(depth=0)
    for stop_string in stop_strings:
        state = root
        for character in stop_string:
            state = state.children.setdefault(character, _State(depth=state.depth + 1))
        state.match = stop_string
    # Breadth first, so that the fallback of a state, which is shorter, is complete before it is needed.
    pending = deque([root])
    while pending:
        state = pending.popleft()
        for character, child in state.children.items():
            child.fallback = root if state.fallback is None else _next_state(state.fallback, character)
            child.match = child.match or child.fallback.match
            pending.append(child)
    return root
