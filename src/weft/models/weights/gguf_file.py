"""The tensor directory of a GGUF file, read by offset with every offset checked. Torch-free.

Nothing is allocated by a number found in the file before that number is known to fit into the file. Keys and values,
which stand before the directory, are read by `weft.gguf`.

Source   GGUF v2 and v3: github.com/ggml-org/ggml, docs/gguf.md
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from weft.errors import ModelNotFoundError
from weft.gguf.metadata import read_gguf_metadata
from weft.models.weights.mapped_file import MappedFile

MAX_TENSORS = 1 << 20
"""Tensors believed of a file; real ones have hundreds, mixtures of experts thousands."""

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 16
DEFAULT_ALIGNMENT = 32


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


class GgufFile:
    """An open GGUF file. Raises ModelNotFoundError for anything that is not one, naming file and fault."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._mapped = MappedFile(path)
        except (OSError, ValueError):
            raise ModelNotFoundError(f"{self.name} cannot be opened, or is empty.") from None
        self.data = self._mapped.data
        try:
            self.metadata = read_gguf_metadata(self.data, self.name)
            self.tensors = self._read_directory()
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

    def _read_directory(self) -> dict[str, GgufTensor]:
        num_tensors, position = self.metadata.num_tensors, self.metadata.end_offset
        if num_tensors > MAX_TENSORS:
            raise self._fault(f"claims {num_tensors} tensors; at most {MAX_TENSORS} are read")
        directory: list[tuple[str, tuple[int, ...], int, int]] = []
        for _ in range(num_tensors):
            position, entry = self._read_tensor_entry(position)
            directory.append(entry)
        return self._place_tensors(directory, position)

    def _read_tensor_entry(self, position: int) -> tuple[int, tuple[str, tuple[int, ...], int, int]]:
        position, name = self._read_name(position)
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
        alignment = self.metadata.scalars.get("general.alignment", DEFAULT_ALIGNMENT)
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

    def _read_name(self, position: int) -> tuple[int, str]:
        (length,) = struct.unpack_from("<Q", self.data, position)
        position += 8
        if length > MAX_NAME_BYTES:
            raise self._fault(f"holds a tensor name of {length} bytes")
        if position + length > len(self.data):
            raise self._fault("is truncated; download it again")
        return position + length, self.data[position : position + length].decode("utf-8")

    def _fault(self, what: str) -> ModelNotFoundError:
        return ModelNotFoundError(f"{self.name} {what}.")
