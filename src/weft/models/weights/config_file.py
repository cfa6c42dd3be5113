"""Model configuration files as data: bounded, checked field by field, never executed.

A `ModelConfig` answers only typed questions, so that a hostile or damaged `config.json` ends in one line that names
the file, the field, the value and the allowed range. JSON null means absent, as in transformers.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from weft.errors import ModelNotFoundError
from weft.limits import LIMITS

MAX_DIMENSION = 2**24
"""Largest number of rows, columns or positions believed of a configuration; the largest vocabularies have 2**19."""


def read_json_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file of at most `LIMITS.max_config_file_bytes`.

    Raises   ModelNotFoundError: missing, unreadable, too large, too deep, not JSON, or not an object
    """
    document = _read_json(path)
    if not isinstance(document, dict):
        raise ModelNotFoundError(f"{path.name} must hold a JSON object.")
    return document


def read_json_objects(path: Path) -> list[dict[str, object]]:
    """Return the list of objects in a JSON file. Raises as `read_json_object`."""
    document = _read_json(path)
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise ModelNotFoundError(f"{path.name} must hold a JSON array of objects.")
    return document


def _read_json(path: Path) -> object:
    name = path.name
    try:
        size = path.stat().st_size
        if size > LIMITS.max_config_file_bytes:
            raise ModelNotFoundError(f"{name} has {size} bytes; at most {LIMITS.max_config_file_bytes} are read.")
        document: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelNotFoundError(f"{name} is missing from the model directory.") from None
    except OSError as error:
        raise ModelNotFoundError(f"{name} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise ModelNotFoundError(f"{name} is not valid JSON; download the model again.") from None
    return document


class ModelConfig:
    """Typed access to the fields of one configuration file.

    Every reader raises ModelNotFoundError when a field has the wrong type or range, or is absent without a default.
    """

    def __init__(self, values: Mapping[str, object], file_name: str) -> None:
        self._values = values
        self._file_name = file_name

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_DIMENSION) -> int:
        """An integer from `minimum` to `maximum`."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.fault(name, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(self, name: str, *, minimum: int = 1, maximum: int = MAX_DIMENSION) -> int | None:
        """As `integer`; None when absent."""
        return self.integer(name, minimum=minimum, maximum=maximum) if self.has(name) else None

    def number(self, name: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        """A finite number of at least `minimum`."""
        value = self._required(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fault(name, f"a number >= {minimum}")
        if not math.isfinite(value) or value < minimum:
            raise self.fault(name, f"a number >= {minimum}")
        return float(value)

    def optional_number(self, name: str, *, minimum: float = 0.0) -> float | None:
        """As `number`; None when absent."""
        return self.number(name, minimum=minimum) if self.has(name) else None

    def boolean(self, name: str, default: bool) -> bool:  # noqa: FBT001 — a default, not a switch
        """True or false."""
        value = self._required(name, default)
        if not isinstance(value, bool):
            raise self.fault(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string of at most 256 characters."""
        value = self._required(name, default)
        if not isinstance(value, str) or len(value) > 256:
            raise self.fault(name, "a string of at most 256 characters")
        return value

    def choice(self, name: str, choices: Mapping[str, str], default: str) -> str:
        """The meaning (`choices[value]`) of a string from a fixed set."""
        value = self.text(name, default)
        if value not in choices:
            raise self.fault(name, f"one of {', '.join(sorted(choices))}")
        return choices[value]

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive finite numbers."""
        value = self._required(name, None)
        if not isinstance(value, list) or len(value) != length:
            raise self.fault(name, f"a list of {length} numbers", show=False)
        numbers = tuple(float(item) for item in value if isinstance(item, int | float) and not isinstance(item, bool))
        if len(numbers) != length or not all(math.isfinite(item) and item > 0 for item in numbers):
            raise self.fault(name, f"a list of {length} positive numbers", show=False)
        return numbers

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty when absent."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.fault(name, "a list of strings", show=False)
        return tuple(value)

    def sizes(self, name: str) -> tuple[int, ...]:
        """A list of positive integers; empty when absent."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(
            isinstance(item, int) and not isinstance(item, bool) and 1 <= item <= MAX_DIMENSION for item in value
        ):
            raise self.fault(name, f"a list of integers from 1 to {MAX_DIMENSION}", show=False)
        return tuple(value)

    def section(self, name: str) -> "ModelConfig | None":
        """A nested object; None when absent."""
        value = self._values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fault(name, "an object", show=False)
        return ModelConfig(value, self._file_name)

    def fault(self, name: str, allowed: str, *, show: bool = True) -> ModelNotFoundError:
        """The error for a field whose value is not allowed."""
        value = self._values.get(name)
        given = f" Given: {str(value)[:60]}." if show and isinstance(value, str | int | float) else ""
        return ModelNotFoundError(f"{self._file_name}: `{name}` must be {allowed}.{given}")

    def _required(self, name: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelNotFoundError(f"{self._file_name}: `{name}` is missing.")
        return value
