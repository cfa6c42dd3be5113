"""A file with settings, TOML or YAML, as names and the texts that a flag would have."""

import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path

from weft.limits import LIMITS

_YAML_SUFFIXES = {".yaml", ".yml"}

Scalar = str | int | float | bool | date | time


class FileFault(Exception):
    """What is wrong with the file, for a user."""


def read_file(name: str) -> Iterator[tuple[str, str | None]]:
    """(key, text of its value) for every line; no text: the value is a table. Raises FileFault.

    A name that ends in .yaml or .yml is YAML, any other TOML. YAML's null means that the setting is not given. Lists
    become what a flag takes: values with commas between.
    """
    for key, value in _load(name).items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        if all(isinstance(item, Scalar) for item in values):
            yield key, ",".join(str(item).lower() if isinstance(item, bool) else str(item) for item in values)
        else:
            yield key, None


def _load(name: str) -> Mapping[str, object]:
    path = Path(name)
    try:
        if path.stat().st_size > LIMITS.max_config_file_bytes:
            raise FileFault(f"the file is larger than {LIMITS.max_config_file_bytes} bytes")
        text = path.read_bytes().decode()
    except OSError as error:
        raise FileFault(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FileFault(f"{name} is not UTF-8: {error}") from error
    return _from_yaml(name, text) if path.suffix.lower() in _YAML_SUFFIXES else _from_toml(name, text)


def _from_toml(name: str, text: str) -> Mapping[str, object]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FileFault(f"{name} is not TOML: {error} (a file named .yaml or .yml is read as YAML)") from error


def _from_yaml(name: str, text: str) -> Mapping[str, object]:
    import yaml  # late: most servers have no such file

    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = "" if where is None else f" (line {where.line + 1})"
        raise FileFault(f"{name} is not YAML: {getattr(error, 'problem', None) or 'syntax'}{place}") from error
    except (RecursionError, ValueError) as error:
        raise FileFault(f"{name} is not YAML that settings can be read from") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise FileFault(f"{name} must hold names and values, as `max_total_tokens: 4096`")
    return {str(key): value for key, value in loaded.items()}
