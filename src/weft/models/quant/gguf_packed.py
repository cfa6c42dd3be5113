"""GGUF matrices multiplied by as they are stored: `--gguf-compute packed`. See ADR-0016."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear
from weft.models.quant.gguf_codes import stack
from weft.models.quant.gguf_source import GgufSource
from weft.models.quant.scheme import Matrix, StoredPart, Unquantized
from weft.models.weights.source import WeightSource


@dataclass(frozen=True, slots=True)
class GgufPacked:
    """The file's own codes; matrices it stores as floats, or whose slices cut a group, stay in the dtype."""

    name: str
    needs_whole_rows: bool = False

    def pack_stored(
        self, source: WeightSource, parts: Sequence[StoredPart], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """See `QuantScheme.pack_stored`."""
        if not isinstance(source, GgufSource):
            return None
        read = []
        for part in parts:
            codes = source.read_codes(part.name, part.rows, part.columns)
            if codes is None:
                return None
            read.append(codes)
        stacked = stack(read)
        if stacked is None:
            return None
        return ops.pack_codes(stacked.codes, stacked.scales, stacked.minima, stacked.form, dtype, bias)

    def pack(self, matrix: Matrix) -> PackedLinear:
        """See `QuantScheme.pack`."""
        return Unquantized().pack(matrix)
