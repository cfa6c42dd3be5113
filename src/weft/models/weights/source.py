"""Reading tensors, or just a rank's slice of them, from a checkpoint. Files are mapped: a slice reads its own pages."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from weft.errors import ModelNotFoundError
from weft.models.weights.mapped_file import MappedFile
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

    def read_into(self, out: torch.Tensor, name: str, rows: Span, columns: Span | None) -> None:
        """Write a slice of a tensor into `out`, converted to its dtype and device; `columns` None for all.

        Raises ModelNotFoundError when it is stored in a form that is not supported.
        """
        ...

    def close(self) -> None:
        """Release the files."""
        ...


class SafetensorsSource:
    """The safetensors files of a model directory."""

    def __init__(self, directory: Path) -> None:
        self._entries = read_directory(directory)
        self._maps: dict[Path, MappedFile] = {}

    def file_name(self, name: str) -> str:
        """The file a tensor stands in, for messages."""
        return self._entry(name).path.name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelNotFoundError when it is not there."""
        return self._entry(name).shape

    def read_into(self, out: torch.Tensor, name: str, rows: Span, columns: Span | None) -> None:
        """Write a slice of a tensor into `out`. Raises ModelNotFoundError for a dtype that is not supported."""
        entry = self._entry(name)
        if entry.dtype not in _NUMPY_DTYPES:
            raise ModelNotFoundError(
                f"{entry.path.name}: tensor `{name}` is stored as {entry.dtype}; "
                f"supported: {', '.join(sorted(_NUMPY_DTYPES))}."
            )
        mapped = self._map(entry.path)
        number = np.dtype(_NUMPY_DTYPES[entry.dtype])
        stored = np.frombuffer(mapped.data, number, entry.num_bytes // number.itemsize, entry.offset)
        part = torch.from_numpy(stored.reshape(entry.shape))[rows.start : rows.stop]
        if columns is not None:
            part = part[:, columns.start : columns.stop]
        out.copy_(part.view(torch.bfloat16) if entry.dtype == "BF16" else part)
        mapped.forget(entry.offset, entry.num_bytes)

    def close(self) -> None:
        """Unmap the files."""
        maps, self._maps = self._maps, {}
        for mapped in maps.values():
            mapped.close()

    def _entry(self, name: str) -> SafetensorsEntry:
        # Checkpoints of a model without its output layer, as embedding models are, leave the first part of names out.
        entry = self._entries.get(name) or self._entries.get(name.removeprefix("model."))
        if entry is None:
            raise missing_tensor(name, "the safetensors files")
        return entry

    def _map(self, path: Path) -> MappedFile:
        if path not in self._maps:
            self._maps[path] = MappedFile(path)
        return self._maps[path]


def missing_tensor(name: str, where: str) -> ModelNotFoundError:
    """The error for a tensor that the configuration needs and the checkpoint lacks."""
    return ModelNotFoundError(f"Tensor `{name}` is missing from {where}.")
