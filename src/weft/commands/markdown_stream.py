"""Markdown on a terminal while it arrives.

Blocks that are finished are printed for good; only the last one, which still grows, is redrawn. So a long answer
scrolls like any text, and the work per token does not grow with the answer.
"""

import re
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_CONTROL = {code: None for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_REDRAWS_PER_SECOND = 10


def without_controls(text: str) -> str:
    """`text` without control characters: what a model writes must not steer the terminal."""
    return text.translate(_CONTROL)


def split_finished(text: str) -> tuple[str, str]:
    """(blocks that more text cannot change, the rest): cut at the last blank line outside a code fence."""
    cut = position = 0
    fence: str | None = None
    for line in text.splitlines(keepends=True):
        position += len(line)
        found = _FENCE.match(line)
        if fence is not None:
            is_closing = found is not None and found[1].startswith(fence) and not line[found.end() :].strip()
            fence = None if is_closing else fence
        elif found is not None:
            fence = found[1]
        elif not line.strip() and line.endswith("\n"):
            cut = position
    return text[:cut], text[cut:]


class MarkdownStream:
    """A context manager: `push` text as it comes; on leaving, everything has been printed for good."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._live = Live(console=console, refresh_per_second=_REDRAWS_PER_SECOND, transient=True)

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._live.start()
        return self

    def push(self, text: str) -> None:
        """Add a piece of the answer."""
        finished, self._tail = split_finished(self._tail + without_controls(text))
        if finished.strip():
            self._console.print(Markdown(finished))
            self._console.print()
        self._live.update(Markdown(self._tail))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Print what is left."""
        self._live.stop()
        if self._tail.strip():
            self._console.print(Markdown(self._tail))
