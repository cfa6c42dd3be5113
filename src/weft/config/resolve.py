"""From flags, environment and file to `Settings`: read everything, complain once.

A flag beats the environment, which beats the file, which beats the default. Nothing is loaded or downloaded here,
so that a wrong setting costs a second and not a download.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import cast

from weft.config.contradictions import (
    addresses_of_host,
    contradictions,
    is_ip_address,
    settings_without_effect,
    variables_without_effect,
)
from weft.config.file import FileFault, read_file
from weft.config.options import NAMES, SWITCH, Option, Value, quoted
from weft.config.settings import Settings, options
from weft.errors import UsageError

ENVIRONMENT_PREFIX = "WEFT_"


@dataclass(frozen=True, slots=True)
class Resolution:
    """Settings and, for each, where its value comes from."""

    settings: Settings
    origins: dict[str, str]
    """Field name → `--flag`, `$VARIABLE`, a file's name, or `default`."""
    notes: tuple[str, ...]
    """What a user may want to know, such as our name for another server's flag."""
    warnings: tuple[str, ...]
    """What a user should know: settings that were given and change nothing."""
    beaten: dict[str, tuple[str, ...]]
    """Field name → origins whose value for it was not taken, the stronger ones first."""


@dataclass(frozen=True, slots=True)
class _Given:
    """One value that somebody wrote down, and where."""

    name: str
    raw: str
    origin: str
    spelling: str


def resolve(
    argv: Sequence[str], environ: Mapping[str, str], *, addresses_of: Callable[[str], list[str]] | None = None
) -> Settings:
    """Settings from flags, environment and file. Raises UsageError with every fault found."""
    return resolve_with_origins(argv, environ, addresses_of=addresses_of).settings


def resolve_with_origins(
    argv: Sequence[str], environ: Mapping[str, str], *, addresses_of: Callable[[str], list[str]] | None = None
) -> Resolution:
    """As `resolve`, with the reason for every value. `addresses_of` looks up a host name (for tests)."""
    faults: list[str] = []
    notes: list[str] = []
    from_flags = list(_read_flags(argv, faults, notes))
    from_environment = list(_read_environment(environ, faults))
    file_name = next((given.raw for given in [*from_flags, *from_environment] if given.name == "config"), None)
    from_file = list(_read_file(file_name, faults)) if file_name else []
    values, origins, beaten = _merge((from_flags, from_environment, from_file), faults)
    if "cache_dir" not in values:
        home = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".cache")
        values["cache_dir"] = str(Path(home) / "weft")
    settings = Settings(**values)  # type: ignore[arg-type]  # kinds and field types agree: tests/unit/test_config.py
    faults.extend(contradictions(settings, addresses_of or addresses_of_host))
    if faults:
        raise UsageError(_fault_list(faults))
    return Resolution(
        settings,
        {name: origins.get(name, "default") for name in options()},
        tuple(notes),
        (
            *_idle_settings(values),
            *settings_without_effect(settings, origins),
            *variables_without_effect(environ),
        ),
        {name: tuple(others) for name, others in beaten.items()},
    )


def _idle_settings(values: Mapping[str, Value]) -> Iterator[str]:
    """Settings that were given and change nothing, those with one reason together. Saying no to them is no news."""
    flags_of_reason: dict[str, list[str]] = {}
    for name, option in options().items():
        if option.idle and name in values and values[name] is not False and values[name] != "off":
            flags_of_reason.setdefault(option.idle, []).append(option.flag or name)
    for reason, flags in flags_of_reason.items():
        yield f"{' and '.join(flags)} {'has' if len(flags) == 1 else 'have'} no effect: {reason}."


def _fault_list(faults: list[str]) -> str:
    head = "1 setting is wrong:" if len(faults) == 1 else f"{len(faults)} settings are wrong:"
    return "\n".join([head, *(f"  {fault}" for fault in faults), "All settings: weft serve --help-all"])


@cache
def _flag_names() -> dict[str, str]:
    """Every spelling of every flag → field name."""
    names: dict[str, str] = {}
    for name, option in options().items():
        if option.flag is not None:
            spellings = (option.flag, *option.aliases, *((option.short,) if option.short else ()))
            names.update(dict.fromkeys(spellings, name))
            if option.kind is SWITCH:
                names["--no-" + option.flag.removeprefix("--")] = name
                names.update({"--no-" + alias.removeprefix("--"): name for alias in option.aliases})
    return names


def setting_named(word: str) -> str | None:
    """The setting that a flag's name without its dashes stands for, another server's names included; None: none."""
    return _flag_names().get("--" + word.replace("_", "-")) if not word.startswith("no_") else None


def _read_flags(argv: Sequence[str], faults: list[str], notes: list[str]) -> Iterator[_Given]:
    """The values on a command line; a plain argument is the model."""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            yield _Given("model_id", word, word, word)
            continue
        flag, equals, raw = _split_flag(word)
        name = _flag_names().get(flag)
        if name is None:
            faults.append(f"{flag}: no such flag.{_suggestion(flag, _flag_names())}")
            # Its value, if it has one, must not be taken for the model.
            if not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)
            continue
        option = options()[name]
        if flag in option.aliases and not flag.startswith("--max-input"):
            notes.append(f"{flag} is {option.flag} here.")
        if option.kind is SWITCH:
            raw = _switch_value(flag, option, raw if equals else "true")
        elif not equals:
            if not rest or rest[0].startswith("--") or rest[0] in _flag_names():
                faults.append(f"{flag}: needs a value ({option.kind.name}).")
                continue
            raw = rest.pop(0)
        yield _Given(name, raw, flag, flag)


def _split_flag(word: str) -> tuple[str, str, str]:
    """`--flag=value`, `-p3000` and `-p=3000` → (flag, "=" if a value follows, value)."""
    if word.startswith("--") or "=" in word or word in _flag_names() or word[:2] not in _flag_names():
        return word.partition("=")
    return word[:2], "=", word[2:]


def _switch_value(flag: str, option: Option, raw: str) -> str:
    is_negated = flag.startswith("--no-") and flag != option.flag
    return {"true": "false", "false": "true"}.get(raw.lower(), raw) if is_negated else raw


def _suggestion(word: str, known: Mapping[str, object] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""


# Kubernetes describes every service of a namespace to every container in variables of these forms. A service named
# `weft-…` must not look like a misspelt setting.
_SERVICE_VARIABLE = re.compile(r".*(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)$")
_SERVICE_VALUE = re.compile(r"(tcp|udp|sctp)://")


@cache
def _variable_names() -> dict[str, str]:
    """Every environment variable that is read → field name; the prefixed one first, because it wins."""
    names: dict[str, str] = {}
    for name, option in options().items():
        names.update(dict.fromkeys(option.env, name))
    return names


def _read_environment(environ: Mapping[str, str], faults: list[str]) -> Iterator[_Given]:
    """The values in the environment; an empty variable counts as absent."""
    for variable, name in _variable_names().items():
        raw = environ.get(variable, "")
        is_pod_name = variable == "HOSTNAME" and not is_ip_address(raw)
        if raw and not is_pod_name and not (name == "port" and _SERVICE_VALUE.match(raw)):
            yield _Given(name, raw, f"${variable}", variable)
    for variable, raw in environ.items():
        is_service = _SERVICE_VARIABLE.match(variable) or _SERVICE_VALUE.match(raw)
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in _variable_names() and not is_service:
            faults.append(f"${variable}: no such variable.{_suggestion(variable, _variable_names())}")


def _read_file(file_name: str, faults: list[str]) -> Iterator[_Given]:
    """The values in a file; dashes and underscores in names are the same."""
    allowed = {name: option for name, option in options().items() if not option.is_internal and name != "config"}
    try:
        pairs = list(read_file(file_name))
    except FileFault as fault:
        faults.append(f"--config: {fault}.")
        return
    for key, raw in pairs:
        name = key.replace("-", "_")
        if name not in allowed:
            faults.append(f"{key} in {file_name}: no such setting.{_suggestion(name, allowed)}")
        elif raw is None:
            faults.append(f"{key} in {file_name}: must be {allowed[name].kind.name}, not a table.")
        else:
            yield _Given(name, raw, file_name, key)


def _merge(
    sources: Sequence[list[_Given]], faults: list[str]
) -> tuple[dict[str, Value], dict[str, str], dict[str, list[str]]]:
    """The winning value of each setting that anybody set, and who lost. Values that lose are checked all the same."""
    values: dict[str, Value] = {}
    origins: dict[str, str] = {}
    beaten: dict[str, list[str]] = {}
    faults.extend(_two_names_for_one_limit(sources))
    for source in sources:
        seen: dict[str, _Given] = {}
        for given in source:
            option = options()[given.name]
            value = _parse(given, option, faults)
            earlier = seen.get(given.name)
            if earlier is None:
                seen[given.name] = given
                if given.name in values:
                    beaten.setdefault(given.name, []).append(given.origin)
                elif value is not _INVALID:
                    values[given.name] = cast("Value", value)
                    origins[given.name] = given.origin
            elif given.origin.startswith("$"):
                beaten.setdefault(given.name, []).append(given.origin)  # the more specific variable has spoken
            elif option.kind is NAMES and isinstance(value, tuple):
                values[given.name] = cast("tuple[str, ...]", (*cast("tuple[str, ...]", values[given.name]), *value))
            elif given.spelling == earlier.spelling or not _is_legacy_name(given, earlier):
                faults.append(f"{given.spelling}: {_twice(given, earlier)}.")
    return values, origins, beaten


def _two_names_for_one_limit(sources: Sequence[list[_Given]]) -> Iterator[str]:
    """TGI refuses its old and its new name for the longest prompt together, wherever they stand."""
    names = {given.spelling for source in sources for given in source if given.name == "max_input_tokens"}
    old = sorted(name for name in names if "LENGTH" in name.upper())
    new = sorted(names.difference(old))
    if old and new:
        yield f"{old[0]} and {new[0]} are one setting: give only one of them."


def _is_legacy_name(given: _Given, earlier: _Given) -> bool:
    return any("LENGTH" in name.spelling.upper() for name in (given, earlier))


def _twice(given: _Given, earlier: _Given) -> str:
    if given.name == "model_id":
        return f"only one model can be served, {quoted(earlier.raw)} was given before"
    return "given twice" if given.spelling == earlier.spelling else f"given before as {earlier.spelling}"


_INVALID = object()


def _parse(given: _Given, option: Option, faults: list[str]) -> object:
    """The value, or _INVALID after noting why it is none."""
    place = "" if given.origin.startswith("-") or given.origin == given.raw else f" (from {given.origin})"
    label = (option.flag or given.spelling) + place
    shown = "a secret" if option.is_secret else quoted(given.raw)
    try:
        value = option.kind.parse(given.raw)
    except ValueError:
        faults.append(f"{label}: must be {_allowed(option)}. Given: {shown}.")
        return _INVALID
    if not _is_in_range(value, option):
        near = _suggestion(str(value), option.choices) if option.choices else ""
        faults.append(f"{label}: must be {_allowed(option)}. Given: {shown}.{near}")
        return _INVALID
    if option.works is not None and value not in option.works:
        remedy = " or ".join(map(_spelled, (choice for choice in option.works if choice not in (None, ()))))
        remedy = f"leave it out or use {remedy}" if remedy else "leave it out"
        faults.append(f"{label}: {shown} is not supported yet; {remedy}.")
        return _INVALID
    return value


def _spelled(value: Value) -> str:
    """A value as it would be given."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _is_in_range(value: Value, option: Option) -> bool:
    if option.choices:
        return value in option.choices
    numbers = value if isinstance(value, tuple) else (value,)
    return all(
        (option.minimum is None or number >= option.minimum) and (option.maximum is None or number <= option.maximum)
        for number in numbers
        if isinstance(number, int | float)
    )


def _allowed(option: Option) -> str:
    """Completes "must be …"."""
    if option.choices:
        return "one of " + ", ".join(option.choices)
    low, high = option.minimum, option.maximum
    if low is not None and high is not None:
        return f"{option.kind.name} from {low:,} to {high:,}"
    return f"{option.kind.name} of at least {low:,}" if low is not None else option.kind.name
