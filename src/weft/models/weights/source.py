"""Reading tensors, or just a rank's slice of them, from a checkpoint. Files are mapped: a slice reads its own pages."""

import mmap
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from weft.errors import ModelNotFoundError
from weft.models.weights.partition import Span
from weft.models.weights.safetensors_file import SafetensorsEntry, read_directory

_NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy has no bfloat16: its bits travel as unsigned integers."""


class WeightSource(Protocol):
    """An open checkpoint. Names are transformers'."""

    def file_name(self, name: str) -> str:
        """The file a tensor stands in, for messages."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelNotFoundError when it is not there."""
        ...

    def read(self, name: str, rows: Span, columns: Span | None, dtype: torch.dtype) -> torch.Tensor:
        """A slice of a tensor; `columns` None for all, or for a vector.

        `dtype` is what the caller will convert to: a packed format may decode into it directly, others return what
        they store. The result shares no memory with the file.
        """
        ...

    def close(self) -> None:
        """Release the files."""
        ...


class SafetensorsSource:
    """The safetensors files of a model directory."""

    def __init__(self, directory: Path) -> None:
        self._entries = read_directory(directory)
        self._maps: dict[Path, mmap.mmap] = {}

    def file_name(self, name: str) -> str:
        """The file a tensor stands in, for messages."""
        return self._entry(name).path.name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelNotFoundError when it is not there."""
        return self._entry(name).shape

    def read(self, name: str, rows: Span, columns: Span | None, dtype: torch.dtype) -> torch.Tensor:
        """A slice of a tensor in its stored dtype. Raises ModelNotFoundError for a dtype that is not supported."""
        del dtype
        entry = self._entry(name)
        if entry.dtype not in _NUMPY_DTYPES:
            raise ModelNotFoundError(
                f"{entry.path.name}: tensor `{name}` is stored as {entry.dtype}; "
                f"supported: {', '.join(sorted(_NUMPY_DTYPES))}."
            )
        number = np.dtype(_NUMPY_DTYPES[entry.dtype])
        stored = np.frombuffer(
            self._map(entry.path), dtype=number, count=entry.num_bytes // number.itemsize, offset=entry.offset
        ).reshape(entry.shape)
        part = stored[rows.start : rows.stop]
        if columns is not None:
            part = part[:, columns.start : columns.stop]
        tensor = torch.from_numpy(np.array(part, order="C"))
        return tensor.view(torch.bfloat16) if entry.dtype == "BF16" else tensor

    def close(self) -> None:
        """Unmap the files."""
        maps, self._maps = self._maps, {}
        for mapped in maps.values():
            mapped.close()

    def _entry(self, name: str) -> SafetensorsEntry:
        entry = self._entries.get(name)
        if entry is None:
            raise missing_tensor(name, "the safetensors files")
        return entry

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[path]


def missing_tensor(name: str, where: str) -> ModelNotFoundError:
    """The error for a tensor that the configuration needs and the checkpoint lacks."""
    return ModelNotFoundError(f"Tensor `{name}` is missing from {where}.")
