"""What the table of settings says about one setting, and how a text becomes its value."""

import re
from collections.abc import Callable
from dataclasses import dataclass

Value = str | int | float | bool | tuple[str, ...] | tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of setting: its name completes "must be …"; `parse` raises ValueError."""

    name: str
    placeholder: str
    parse: Callable[[str], Value]


def _parse_integer(raw: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", raw.strip()):
        raise ValueError(raw)
    return int(raw)


def _parse_number(raw: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?", raw.strip()):
        raise ValueError(raw)
    return float(raw)


def _parse_switch(raw: str) -> bool:
    word = raw.strip().lower()
    if word in {"true", "1", "yes", "on", "y", "t"}:
        return True
    if word in {"false", "0", "no", "off", "n", "f"}:
        return False
    raise ValueError(raw)


def _parse_text(raw: str) -> str:
    if not raw or "\0" in raw:
        raise ValueError(raw)
    return raw


_SIZE_FACTORS = {
    prefix + unit: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
    if prefix or unit in {"", "b"}
}


def _parse_size(raw: str) -> int:
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?) ?([a-zA-Z]{0,3})", raw.strip())
    if found is None or found[2].lower() not in _SIZE_FACTORS:
        raise ValueError(raw)
    return int(float(found[1]) * _SIZE_FACTORS[found[2].lower()])


def _parse_names(raw: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in raw.split(","))
    if not all(parts):
        raise ValueError(raw)
    return parts


def _parse_integers(raw: str) -> tuple[int, ...]:
    return tuple(_parse_integer(part) for part in raw.split(","))


_SAMPLING_PAIR = re.compile(r"(temperature|top_p|min_p|repetition_penalty)=[0-9]{1,3}(\.[0-9]{1,6})?|top_k=[0-9]{1,6}")


def _parse_sampling(raw: str) -> str:
    pairs = [part.strip() for part in raw.split(",")]
    names = [pair.partition("=")[0] for pair in pairs]
    if pairs not in (["auto"], ["none"]) and not (
        all(_SAMPLING_PAIR.fullmatch(pair) for pair in pairs) and len(set(names)) == len(names)
    ):
        raise ValueError(raw)
    return ",".join(pairs)


_COUNT_FACTORS = {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2}


def _parse_tokens(raw: str) -> int:
    """Suffixes as vLLM reads them: small ones are decimal, large ones binary."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)([kKmM])", raw.strip())
    return _parse_integer(raw) if found is None else int(float(found[1]) * _COUNT_FACTORS[found[2]])


def _parse_dtype(raw: str) -> str:
    """Also reads vLLM's words for two of them."""
    return {"half": "float16", "float": "float32"}.get(raw, _parse_text(raw))


def _parse_log_level(raw: str) -> str:
    """Also reads TGI's `info,some_module=debug`: its first bare level is the one that matters here."""
    bare = next((part.strip().lower() for part in raw.split(",") if "=" not in part), raw.lower())
    return {"warning": "warn", "trace": "debug", "critical": "error"}.get(bare, bare)


def _parse_task(raw: str) -> str:
    """Also reads `pooling`, which is what other servers call it."""
    word = raw.strip().lower()
    return {"pooling": "embed", "embedding": "embed"}.get(word, word)


INTEGER = Kind("a whole number", "N", _parse_integer)
TOKENS = Kind("a whole number (8k is 8,000 and 8K is 8,192)", "N", _parse_tokens)
NUMBER = Kind("a number", "X", _parse_number)
SWITCH = Kind("true or false", "", _parse_switch)
TRUTH = Kind("true or false", "true|false", _parse_switch)
TEXT = Kind("a text that is not empty", "TEXT", _parse_text)
PATH = Kind("a path", "PATH", _parse_text)
SIZE = Kind("a size in bytes such as 4GiB or 500MB", "BYTES", _parse_size)
NAMES = Kind("names separated by commas", "NAME,…", _parse_names)
INTEGERS = Kind("whole numbers separated by commas", "N,…", _parse_integers)
SAMPLING = Kind(
    "auto, none, or some of temperature=, top_p=, top_k=, min_p=, repetition_penalty= separated by commas",
    "NAME=X,…",
    _parse_sampling,
)
DTYPE = Kind("a type of numbers", "TYPE", _parse_dtype)
TASK = Kind("a task", "TASK", _parse_task)
LOG_LEVEL = Kind("a log level", "LEVEL", _parse_log_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What the table says about one setting beside its name, type and default.

    is_tgi     TGI has it: read from TGI's environment variable too
    flag       empty: from the field's name; None: no flag (a secret, or set by the launcher)
    env        further variables that are read
    aliases    other spellings of the flag that are read but not shown
    works      the only values that this version can serve; anything else is refused by name
    idle       why the setting changes nothing although it is read; said as a warning to whoever gives it
    """

    kind: Kind
    help: str
    group: str
    is_tgi: bool = False
    flag: str | None = ""
    short: str | None = None
    aliases: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    unit: str = ""
    auto: str = ""
    """What None means, for people."""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    works: tuple[Value, ...] | None = None
    idle: str = ""
    is_common: bool = False
    """Shown by plain `--help`."""
    is_secret: bool = False
    is_internal: bool = False
    """Set by the launcher for its children, never by a user."""
    since: str = "0.1"


def quoted(raw: str) -> str:
    """A user's text, short enough for an error message."""
    return repr(raw if len(raw) <= 80 else raw[:77] + "…")
