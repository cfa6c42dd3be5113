"""Read the key-value part of a GGUF file: bounded, without torch, arrays only when they are asked for.

The file is hostile data: every length is checked against what is left of the file before anything is built from it.
The `gguf` package makes a NumPy view per array element and needs 1.6 s for a vocabulary of 49 thousand tokens; this
reader needs less than a tenth of that. Tensors are none of its business: `models/weights` reads them.

Source: ggml `docs/gguf.md`, versions 2 and 3, little endian.
"""

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import ModelNotFoundError
from weft.limits import LIMITS

GgufScalar = str | int | float | bool
Scalar = TypeVar("Scalar", str, int, float, bool)

_MAGIC = b"GGUF"
_SUPPORTED_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBER_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type → letter of `struct`."""
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class _StoredArray:
    """An array that was stepped over: known to lie in the file, not decoded."""

    kind: int
    length: int
    offset: int


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """What a GGUF file says about itself before its tensors. Arrays are read as long as the file is mapped."""

    version: int
    num_tensors: int
    scalars: dict[str, GgufScalar]
    end_offset: int
    """Bytes from the start of the file to the first tensor description."""
    _name: str
    _arrays: dict[str, _StoredArray]
    _data: mmap.mmap

    def get(self, key: str, kind: type[Scalar]) -> Scalar | None:
        """Returns the value under `key`, None when it is missing. Raises ModelNotFoundError: of another type."""
        value = self.scalars.get(key)
        if type(value) is kind:
            return value
        if value is None and key not in self._arrays:
            return None
        held = "list" if value is None else type(value).__name__
        raise self._damaged(f"`{key}` should hold one {kind.__name__} but holds a {held}")

    def get_list(self, key: str, kind: type[Scalar]) -> list[Scalar]:
        """Returns the array under `key`, empty when it is missing. Raises ModelNotFoundError: of another type."""
        array = self._arrays.get(key)
        items = [] if array is None else self._decode(array)
        # Elements of a GGUF array share one type, so the first speaks for all.
        if key in self.scalars or (items and type(items[0]) is not kind):
            raise self._damaged(f"`{key}` should be a list of {kind.__name__}")
        return items

    def _decode(self, array: _StoredArray) -> list[Any]:
        if array.kind == _STRING:
            return self._strings(array)
        return list(struct.unpack_from(f"<{array.length}{_NUMBER_CODES[array.kind]}", self._data, array.offset))

    def _strings(self, array: _StoredArray) -> list[str]:
        # The hot loop of loading a vocabulary: local names instead of attributes, a third of the time.
        data, end, unpack = self._data, array.offset, _U64.unpack_from
        strings = []
        for _ in range(array.length):
            start = end + 8
            end = start + unpack(data, end)[0]
            strings.append(data[start:end])
        try:
            return [string.decode() for string in strings]
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string of a list is no text: {error}") from None

    def _damaged(self, reason: str) -> ModelNotFoundError:
        return _damaged(self._name, reason)


def read_gguf_metadata(data: mmap.mmap, name: str) -> GgufMetadata:
    """Read every key of a mapped GGUF file, which messages call `name`; arrays are only stepped over.

    Raises   ModelNotFoundError: not GGUF, of an unknown version, or damaged
    """
    return _Reader(data, name).read()


@contextmanager
def open_gguf_metadata(path: Path) -> Iterator[GgufMetadata]:
    """Map a GGUF file for as long as its metadata is used.

    Raises   ModelNotFoundError: missing, unreadable, not GGUF, of an unknown version, or damaged
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        # mmap refuses an empty file with ValueError.
        raise ModelNotFoundError(f"{path.name} cannot be read: {error}. Fetch it again.") from error
    with data:
        yield read_gguf_metadata(data, path.name)


class _Reader:
    """A position in a mapped file that never passes its end."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self._data = data
        self._name = name
        self._size = len(data)
        self._position = 0
        self._scalars: dict[str, GgufScalar] = {}
        self._arrays: dict[str, _StoredArray] = {}

    def read(self) -> GgufMetadata:
        if self._take(4) != _MAGIC:
            raise self._damaged("it does not begin with the letters GGUF")
        version = self._u32()
        if version not in _SUPPORTED_VERSIONS:
            raise self._damaged(f"version {version} is not supported (2 and 3 in little-endian order are)")
        num_tensors = self._u64()
        num_keys = self._u64()
        if num_keys > LIMITS.max_gguf_keys:
            raise self._damaged(f"it claims {num_keys} keys; at most {LIMITS.max_gguf_keys} are read")
        for _ in range(num_keys):
            self._read_entry(self._string(LIMITS.max_gguf_key_bytes))
        return GgufMetadata(version, num_tensors, self._scalars, self._position, self._name, self._arrays, self._data)

    def _read_entry(self, key: str) -> None:
        kind = self._u32()
        if kind == _ARRAY:
            self._arrays[key] = self._step_over_array(key)
        elif kind == _STRING:
            self._scalars[key] = self._string(self._size)
        else:
            number = self._number_format(key, kind)
            (self._scalars[key],) = number.unpack(self._take(number.size))

    def _step_over_array(self, key: str) -> _StoredArray:
        kind = self._u32()
        length = self._u64()
        if length > LIMITS.max_gguf_array_length:
            raise self._damaged(f"`{key}` claims {length} elements; at most {LIMITS.max_gguf_array_length} are read")
        array = _StoredArray(kind, length, self._position)
        if kind == _STRING:
            self._step_over_strings(length)
        else:
            self._step_over(length * self._number_format(key, kind).size)
        return array

    def _step_over_strings(self, length: int) -> None:
        # As hot as decoding them: local names again.
        data, last, position, unpack = self._data, self._size - 8, self._position, _U64.unpack_from
        for _ in range(length):
            if position > last:
                raise self._damaged("it ends in the middle of a list of strings, or a string is longer than the file")
            position += 8 + unpack(data, position)[0]
        self._position = position
        self._step_over(0)

    def _number_format(self, key: str, kind: int) -> struct.Struct:
        code = _NUMBER_CODES.get(kind)
        if code is None:
            raise self._damaged(f"`{key}` has the unknown value type {kind}")
        return struct.Struct("<" + code)

    def _string(self, max_bytes: int) -> str:
        length = self._u64()
        if length > max_bytes:
            raise self._damaged(f"a string of {length} bytes is longer than the {max_bytes} allowed")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"a string is no text: {error}") from None

    def _u32(self) -> int:
        value: int = _U32.unpack(self._take(4))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack(self._take(8))[0]
        return value

    def _take(self, length: int) -> bytes:
        start = self._position
        self._step_over(length)
        return self._data[start : self._position]

    def _step_over(self, num_bytes: int) -> None:
        end = self._position + num_bytes
        if end > self._size:
            raise self._damaged(f"it ends after {self._size} bytes, in the middle of a value")
        self._position = end

    def _damaged(self, reason: str) -> ModelNotFoundError:
        return _damaged(self._name, reason)


def _damaged(name: str, reason: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{name} cannot be read as a GGUF file: {reason}. Fetch it again, or use another file.")
