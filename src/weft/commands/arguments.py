"""Command lines of commands that have flags of their own: argparse, with this program's errors and exit codes.

Commands whose flags are those of `weft serve` and a few more take the few out and leave the rest to the table.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn, TypeVar

from weft.errors import UsageError

_Number = TypeVar("_Number", int, float)


class CommandParser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the process; `--help` still prints and ends it."""

    def __init__(self, command: str, description: str, epilog: str = "") -> None:
        super().__init__(
            prog=command,
            description=description,
            epilog=epilog or None,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise UsageError(f"{self.prog}: {message}. {self.prog} --help shows every flag.")


def is_unicode(text: str) -> bool:
    """False for bytes that the terminal's encoding has no letters for, which Python keeps as halves of pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def unicode_text(raw: str) -> str:
    """An argparse type: a text that can stand in a request."""
    if not is_unicode(raw):
        raise argparse.ArgumentTypeError(f"must be valid Unicode. Given: {raw[:80]!r}")
    return raw


def integer(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from `low` to `high`."""
    return _number(int, "a whole number", low, high)


def number(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number from `low` to `high`."""
    return _number(float, "a number", low, high)


def _number(kind: type[_Number], name: str, low: _Number, high: _Number) -> Callable[[str], _Number]:
    def parse(raw: str) -> _Number:
        try:
            value = kind(raw)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high}. Given: {raw[:80]!r}")
        return value

    return parse


def renamed(argv: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The words with flags of TGI's single processes replaced by the launcher's."""
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        words.append(names.get(flag, flag) + equals + value)
    return words


def take_flag(argv: Sequence[str], flag: str, value_name: str) -> tuple[list[str], str | None]:
    """(the other words, the flag's value). Raises UsageError when the value is missing."""
    kept: list[str] = []
    value: str | None = None
    words = iter(argv)
    for word in words:
        name, equals, given = word.partition("=")
        if name != flag:
            kept.append(word)
            continue
        value = given if equals else next(words, "")
        if not value:
            raise UsageError(f"{flag}: needs {value_name}.")
    return kept, value
