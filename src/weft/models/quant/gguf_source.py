"""A GGUF file as a `WeightSource`: transformers' names, shapes and row order; blocks decoded while reading."""

from pathlib import Path

import numpy as np
import torch

from weft.errors import ModelNotFoundError
from weft.models.quant.gguf_blocks import dequantize_into
from weft.models.quant.gguf_codes import Codes, group_size, is_unpackable, unpack
from weft.models.weights.gguf_config import SANDWICH_NORMS, architecture
from weft.models.weights.gguf_file import BLOCK_LAYOUT, GgufFile, GgufTensor
from weft.models.weights.names import gguf_name
from weft.models.weights.partition import Span
from weft.models.weights.source import missing_tensor

INTERLEAVED_HEADS = frozenset({"llama"})
"""Architectures whose query and key rows are stored with rotated pairs side by side instead of half a head apart."""


_HEAD_ROWS = tuple(f"self_attn.{part}.{kind}" for part in ("q_proj", "k_proj") for kind in ("weight", "bias"))


class GgufSource:
    """One GGUF file."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self._architecture = architecture(self._file)

    def file_name(self, name: str) -> str:
        """The file a tensor stands in, for messages."""
        del name
        return self._file.name

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor. Raises ModelNotFoundError when it is not there."""
        return self._tensor(name).shape

    def read_into(self, out: torch.Tensor, name: str, rows: Span, columns: Span | None) -> None:
        """Write a slice of a tensor into `out`, decoding it when it is quantized."""
        tensor = self._tensor(name)
        if len(tensor.shape) == 1:
            self._decode_into(out[None], tensor, Span(0, 1), rows)
        else:
            self._decode_into(out, tensor, rows, columns or Span(0, tensor.shape[1]))
        self._file.forget(tensor)
        if self._architecture in INTERLEAVED_HEADS and name.endswith(_HEAD_ROWS):
            out.copy_(self._halves_apart(name, out))
        if self._architecture in SANDWICH_NORMS and name.endswith("norm.weight"):
            # Gemma multiplies by 1 + w; GGUF stores that sum, specs speak of w.
            out.sub_(1.0)

    def read_codes(self, name: str, rows: Span, columns: Span) -> Codes | None:
        """A slice of a matrix by the codes of the file; None where it holds floats or the slice cuts a group."""
        tensor = self._tensor(name)
        if not is_unpackable(tensor.ggml_type):
            return None
        size = group_size(tensor.ggml_type)
        if columns.start % size or (columns.stop % size and columns.stop != tensor.shape[1]):
            return None
        covered = self._covered(tensor, columns)
        codes = unpack(self._raw_blocks(tensor, rows, columns), tensor.ggml_type)
        self._file.forget(tensor)
        if self._architecture in INTERLEAVED_HEADS and name.endswith(_HEAD_ROWS):
            codes = codes.changed(lambda part: self._halves_apart(name, part))
        first = columns.start - covered.start
        return codes.columns(first, first + columns.size)

    def close(self) -> None:
        """Unmap the file."""
        self._file.close()

    def _tensor(self, name: str) -> GgufTensor:
        stored_name = gguf_name(name, sandwich_norms=self._architecture in SANDWICH_NORMS)
        tensor = self._file.tensors.get(stored_name)
        if tensor is None:
            raise missing_tensor(stored_name, self._file.name)
        return tensor

    def _decode_into(self, out: torch.Tensor, tensor: GgufTensor, rows: Span, columns: Span) -> None:
        """Decode the blocks that cover `columns` of `rows`, then cut to the columns."""
        covered = self._covered(tensor, columns)
        raw = self._raw_blocks(tensor, rows, columns)
        if covered == columns:
            dequantize_into(out, raw, tensor.ggml_type)
            return
        whole = torch.empty(rows.size, covered.size, dtype=out.dtype)
        dequantize_into(whole, raw, tensor.ggml_type)
        first = columns.start - covered.start
        out.copy_(whole[:, first : first + columns.size])

    @staticmethod
    def _covered(tensor: GgufTensor, columns: Span) -> Span:
        """The columns of the blocks that `columns` touch."""
        numbers, _ = BLOCK_LAYOUT[tensor.ggml_type]
        return Span(columns.start // numbers, -(-columns.stop // numbers)).scaled(numbers)

    def _raw_blocks(self, tensor: GgufTensor, rows: Span, columns: Span) -> torch.Tensor:
        """The blocks that cover `columns` of `rows`: `[rows, bytes]` uint8."""
        numbers, block_bytes = BLOCK_LAYOUT[tensor.ggml_type]
        covered = self._covered(tensor, columns)
        first, last = covered.start // numbers * block_bytes, covered.stop // numbers * block_bytes
        stored = np.frombuffer(self._file.data, np.uint8, tensor.num_bytes, tensor.offset)
        by_row = stored.reshape(-1, tensor.shape[-1] // numbers * block_bytes)
        # A copy: the file promises no alignment for the numbers inside blocks.
        return torch.from_numpy(np.array(by_row[rows.start : rows.stop, first:last], order="C"))

    def _halves_apart(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """Undo the row order of query and key: `[heads, D/2, 2]` as stored → `[heads, 2, D/2]`, a copy."""
        head_dim = self._head_dim()
        if values.shape[0] % head_dim:
            raise ModelNotFoundError(f"{self._file.name}: tensor `{name}` is not made of heads of {head_dim} rows.")
        pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
        return pairs.transpose(1, 2).reshape(values.shape)

    def _head_dim(self) -> int:
        metadata = self._file.metadata.scalars
        prefix = self._architecture
        key_length = metadata.get(f"{prefix}.attention.key_length")
        if isinstance(key_length, int):
            return key_length
        hidden_size, num_heads = metadata[f"{prefix}.embedding_length"], metadata[f"{prefix}.attention.head_count"]
        return int(hidden_size) // int(num_heads)
