"""The GGUF container: metadata and tensor directory, read by offset with every offset checked. Torch-free.

Nothing is allocated by a number found in the file before that number is known to fit into the file. Arrays (token
lists of 10⁵ strings) are stepped over and decoded only when asked for, so that opening a file takes milliseconds.

Source   GGUF v2 and v3: github.com/ggml-org/ggml, docs/gguf.md
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from weft.errors import ModelNotFoundError
from weft.models.weights.mapped_file import MappedFile

MAX_ENTRIES = 1 << 20
"""Metadata entries or tensors believed of a file; real ones have hundreds, mixtures of experts thousands."""

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 16
DEFAULT_ALIGNMENT = 32

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Value type → struct code."""
_STRING, _ARRAY = 8, 9


class GgmlType(IntEnum):
    """Storage of a tensor's numbers; the ones this server reads."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30


BLOCK_LAYOUT: dict[GgmlType, tuple[int, int]] = {
    GgmlType.F32: (1, 4),
    GgmlType.F16: (1, 2),
    GgmlType.BF16: (1, 2),
    GgmlType.Q4_0: (32, 18),
    GgmlType.Q4_1: (32, 20),
    GgmlType.Q5_0: (32, 22),
    GgmlType.Q5_1: (32, 24),
    GgmlType.Q8_0: (32, 34),
    GgmlType.Q2_K: (256, 84),
    GgmlType.Q3_K: (256, 110),
    GgmlType.Q4_K: (256, 144),
    GgmlType.Q5_K: (256, 176),
    GgmlType.Q6_K: (256, 210),
}
"""Type → (numbers per block, bytes per block)."""


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Directory entry of one tensor."""

    name: str
    shape: tuple[int, ...]
    """Rows first, as torch counts; the file stores the reverse."""
    ggml_type: GgmlType
    offset: int
    """From the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Array:
    """An array stepped over: where its items begin."""

    item_type: int
    length: int
    offset: int


MetadataValue = int | float | bool | str


class GgufFile:
    """An open GGUF file. Raises ModelNotFoundError for anything that is not one, naming file and fault."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._mapped = MappedFile(path)
        except (OSError, ValueError):
            raise ModelNotFoundError(f"{self.name} cannot be opened, or is empty.") from None
        self.data = self._mapped.data
        self._arrays: dict[str, _Array] = {}
        self.metadata: dict[str, MetadataValue] = {}
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, IndexError, OverflowError):
            self.close()
            raise ModelNotFoundError(f"{self.name} is truncated or damaged; download it again.") from None
        except ModelNotFoundError:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the file."""
        self._mapped.close()

    def forget(self, tensor: GgufTensor) -> None:
        """Let go of the memory of a tensor that has been read."""
        self._mapped.forget(tensor.offset, tensor.num_bytes)

    def array_length(self, key: str) -> int | None:
        """Number of items of a metadata array; None when it is absent."""
        array = self._arrays.get(key)
        return None if array is None else array.length

    def strings(self, key: str) -> Iterator[bytes]:
        """Items of a metadata array of strings, undecoded; none when it is absent or holds something else."""
        array = self._arrays.get(key)
        if array is None or array.item_type != _STRING:
            return
        position = array.offset
        for _ in range(array.length):
            (length,) = struct.unpack_from("<Q", self.data, position)
            position += 8
            yield self.data[position : position + length]
            position += length

    def numbers(self, key: str) -> tuple[float, ...]:
        """Items of a metadata array of numbers; empty when it is absent or holds something else."""
        array = self._arrays.get(key)
        if array is None or array.item_type not in _SCALARS:
            return ()
        return struct.unpack_from(f"<{array.length}{_SCALARS[array.item_type]}", self.data, array.offset)

    def _read(self) -> None:
        magic, version = struct.unpack_from("<4sI", self.data, 0)
        if magic != b"GGUF":
            raise ModelNotFoundError(f"{self.name} is not a GGUF file.")
        if version not in (2, 3):
            raise self._fault(f"has GGUF version {version}; versions 2 and 3 are read")
        num_tensors, num_entries = struct.unpack_from("<QQ", self.data, 8)
        if num_tensors > MAX_ENTRIES or num_entries > MAX_ENTRIES:
            raise self._fault(f"claims {num_tensors} tensors and {num_entries} metadata entries")
        position = 24
        for _ in range(num_entries):
            position = self._read_entry(position)
        directory: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            position, entry = self._read_tensor_entry(position)
            directory.append(entry)
        self.tensors = self._place_tensors(directory, position)

    def _read_entry(self, position: int) -> int:
        position, key = self._read_text(position)
        (value_type,) = struct.unpack_from("<I", self.data, position)
        position += 4
        if value_type == _ARRAY:
            return self._step_over_array(key, position)
        if value_type == _STRING:
            position, self.metadata[key] = self._read_text(position, max_bytes=len(self.data))
            return position
        code = self._scalar_code(value_type)
        (self.metadata[key],) = struct.unpack_from("<" + code, self.data, position)
        return position + struct.calcsize("<" + code)

    def _step_over_array(self, key: str, position: int) -> int:
        item_type, length = struct.unpack_from("<IQ", self.data, position)
        position += 12
        self._arrays[key] = _Array(item_type, length, position)
        if item_type != _STRING:
            position += length * struct.calcsize("<" + self._scalar_code(item_type))
            self._check_end(position)
            return position
        unpack, data, size = struct.Struct("<Q").unpack_from, self.data, len(self.data)
        if length * 8 > size:
            raise self._fault(f"claims {length} strings in `{key[:80]}`")
        for _ in range(length):
            position += 8 + unpack(data, position)[0]
        self._check_end(position)
        return position

    def _read_tensor_entry(self, position: int) -> tuple[int, tuple[str, tuple[int, ...], int, int]]:
        position, name = self._read_text(position)
        (num_dimensions,) = struct.unpack_from("<I", self.data, position)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._fault(f"tensor `{name[:80]}` has {num_dimensions} dimensions")
        position += 4
        shape = struct.unpack_from(f"<{num_dimensions}Q", self.data, position)
        position += 8 * num_dimensions
        ggml_type, offset = struct.unpack_from("<IQ", self.data, position)
        return position + 12, (name, tuple(reversed(shape)), ggml_type, offset)

    def _place_tensors(
        self, directory: list[tuple[str, tuple[int, ...], int, int]], end_of_directory: int
    ) -> dict[str, GgufTensor]:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
            raise self._fault("has an alignment that is no multiple of 8")
        data_start = -(-end_of_directory // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, type_number, offset in directory:
            if type_number not in set(GgmlType):
                raise self._fault(
                    f"tensor `{name[:80]}` has quantization type {type_number}; "
                    f"supported: {', '.join(kind.name for kind in GgmlType)}"
                )
            tensor = self._checked_tensor(name, shape, GgmlType(type_number), data_start + offset)
            if name in tensors:
                raise self._fault(f"holds tensor `{name[:80]}` twice")
            tensors[name] = tensor
        return tensors

    def _checked_tensor(self, name: str, shape: tuple[int, ...], ggml_type: GgmlType, offset: int) -> GgufTensor:
        block_numbers, block_bytes = BLOCK_LAYOUT[ggml_type]
        count = 1
        for dimension in shape:
            count *= dimension
        if shape[-1] % block_numbers:
            raise self._fault(f"tensor `{name[:80]}` has rows of {shape[-1]}, no multiple of {block_numbers}")
        num_bytes = count // block_numbers * block_bytes
        if offset + num_bytes > len(self.data):
            raise self._fault(f"tensor `{name[:80]}` ends beyond the file; the download is incomplete")
        return GgufTensor(name, shape, ggml_type, offset, num_bytes)

    def _read_text(self, position: int, max_bytes: int = MAX_NAME_BYTES) -> tuple[int, str]:
        (length,) = struct.unpack_from("<Q", self.data, position)
        position += 8
        if length > max_bytes:
            raise self._fault(f"holds a name of {length} bytes")
        self._check_end(position + length)
        return position + length, self.data[position : position + length].decode("utf-8")

    def _scalar_code(self, value_type: int) -> str:
        if value_type not in _SCALARS:
            raise self._fault(f"holds a metadata value of unknown type {value_type}")
        return _SCALARS[value_type]

    def _check_end(self, position: int) -> None:
        if position > len(self.data):
            raise self._fault("is truncated; download it again")

    def _fault(self, what: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"{self.name} {what}.")
