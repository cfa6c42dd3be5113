"""Read the key-value part of a GGUF file: bounded, without torch, fast on long string arrays.

The file is hostile data: every length is checked against what is left of the file before anything is built from it.
The `gguf` package makes a NumPy view per array element and needs 1.6 s for a vocabulary of 49 thousand tokens; this
reader needs less than a tenth of that. Tensors are none of its business: `models/weights` reads them.

Source: ggml `docs/gguf.md`, versions 2 and 3, little endian.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from weft.errors import ModelNotFoundError
from weft.limits import LIMITS

GgufArray = list[str] | list[int] | list[float] | list[bool]
GgufValue = str | int | float | bool | GgufArray
Scalar = TypeVar("Scalar", str, int, float, bool)

_MAGIC = b"GGUF"
_SUPPORTED_VERSIONS = (2, 3)
_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBER_TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufMetadata:
    """What a GGUF file says about itself before its tensors."""

    version: int
    num_tensors: int
    values: dict[str, GgufValue]
    end_offset: int
    """Bytes from the start of the file to the first tensor description."""

    def get(self, key: str, kind: type[Scalar]) -> Scalar | None:
        """Returns the value under `key`, None when it is missing. Raises ModelNotFoundError: of another type."""
        value = self.values.get(key)
        if value is None or type(value) is kind:
            return value
        raise _damaged(f"`{key}` should hold one {kind.__name__} but holds a {type(value).__name__}")

    def get_list(self, key: str, kind: type[Scalar]) -> list[Scalar]:
        """Returns the array under `key`, empty when it is missing. Raises ModelNotFoundError: of another type."""
        value = self.values.get(key, [])
        # Elements of a GGUF array share one type, so the first speaks for all.
        if isinstance(value, list) and (not value or type(value[0]) is kind):
            return value  # type: ignore[return-value]
        raise _damaged(f"`{key}` should be a list of {kind.__name__}")


def read_gguf_metadata(path: Path) -> GgufMetadata:
    """Read every key of a GGUF file.

    Raises   ModelNotFoundError: missing, unreadable, not GGUF, of an unknown version, or damaged
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).read()
    except (OSError, ValueError) as error:
        # mmap refuses an empty file with ValueError; text that is no UTF-8 is a ValueError too.
        raise ModelNotFoundError(f"The GGUF file {path.name!r} cannot be read: {error}. Fetch it again.") from error


class _Reader:
    """A position in a mapped file that never passes its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._position = 0

    def read(self) -> GgufMetadata:
        if self._take(4) != _MAGIC:
            raise _damaged("it does not begin with the letters GGUF")
        version = self._u32()
        if version not in _SUPPORTED_VERSIONS:
            raise _damaged(f"version {version} is not supported (2 and 3 in little-endian order are)")
        num_tensors = self._u64()
        num_keys = self._u64()
        if num_keys > LIMITS.max_gguf_keys:
            raise _damaged(f"it claims {num_keys} keys; at most {LIMITS.max_gguf_keys} are read")
        values: dict[str, GgufValue] = {}
        for _ in range(num_keys):
            key = self._string(LIMITS.max_gguf_key_bytes)
            values[key] = self._value(key)
        return GgufMetadata(version, num_tensors, values, self._position)

    def _value(self, key: str) -> GgufValue:
        kind = self._u32()
        if kind == _STRING:
            return self._string(self._size)
        if kind == _ARRAY:
            return self._array(key)
        return self._numbers(key, kind, 1)[0]

    def _array(self, key: str) -> GgufArray:
        kind = self._u32()
        length = self._u64()
        if length > LIMITS.max_gguf_array_length:
            raise _damaged(f"`{key}` claims {length} elements; at most {LIMITS.max_gguf_array_length} are read")
        return self._strings(length) if kind == _STRING else self._numbers(key, kind, length)

    def _numbers(self, key: str, kind: int, length: int) -> list[int] | list[float] | list[bool]:
        dtype = _NUMBER_TYPES.get(kind)
        if dtype is None:
            raise _damaged(f"`{key}` has the unknown value type {kind}")
        numbers: list[int] | list[float] | list[bool]
        numbers = np.frombuffer(self._take(length * dtype.itemsize), dtype).tolist()
        return numbers

    def _strings(self, length: int) -> list[str]:
        # The hot loop of loading a vocabulary: local names instead of self._string, a third of the time.
        data, size, position, unpack = self._data, self._size, self._position, _U64.unpack_from
        strings = []
        for _ in range(length):
            start = position + 8
            if start > size:
                raise _damaged("it ends in the middle of a list of strings")
            position = start + unpack(data, position)[0]
            if position > size:
                raise _damaged("a string is longer than the rest of the file")
            strings.append(data[start:position].decode())
        self._position = position
        return strings

    def _string(self, max_bytes: int) -> str:
        length = self._u64()
        if length > max_bytes:
            raise _damaged(f"a string of {length} bytes is longer than the {max_bytes} allowed")
        return self._take(length).decode()

    def _u32(self) -> int:
        value: int = _U32.unpack(self._take(4))[0]
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack(self._take(8))[0]
        return value

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > self._size:
            raise _damaged(f"it ends after {self._size} bytes, in the middle of a value")
        taken = self._data[self._position : end]
        self._position = end
        return taken


def _damaged(reason: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"The GGUF file cannot be read: {reason}. Fetch it again, or use another file.")
