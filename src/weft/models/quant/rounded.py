"""Weights rounded to few bits while they are loaded, from any checkpoint: `--quantize int8` and `int4`.

Activations are rounded to 8 bits in the step, per token and group of inputs. One scale per token would be simpler and
is not enough: a few inputs of a layer are a hundred times larger than the rest and would leave it no bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear, QuantizedFormat
from weft.models.quant.scheme import Matrix, StoredPart
from weft.models.weights.source import WeightSource

INT8 = QuantizedFormat(bits=8, group_size=64, zero_point=128, is_per_output=True)
INT4_GROUP_SIZES = (32, 64, 128)
DEFAULT_INT4_GROUP_SIZE = 32
"""Divides every hidden size in use, 576 too; 64 and 128 leave a shorter last group where they do not."""


@dataclass(frozen=True, slots=True)
class RoundedScheme:
    """Rounds to nearest. The vocabulary has a format of its own: its rows are embeddings as well."""

    name: str
    layers: QuantizedFormat
    vocabulary: QuantizedFormat
    needs_whole_rows: bool = True

    def pack_stored(
        self, source: WeightSource, parts: Sequence[StoredPart], bias: torch.Tensor | None, dtype: torch.dtype
    ) -> PackedLinear | None:
        """None: rounding needs numbers."""
        del source, parts, bias, dtype
        return None

    def pack(self, matrix: Matrix) -> PackedLinear:
        """See `QuantScheme.pack`."""
        return ops.quantize_linear(
            matrix.weight,
            self.vocabulary if matrix.is_vocabulary else self.layers,
            matrix.bias,
            first_column=matrix.columns.start,
            in_features=matrix.columns.size,
        )


def int8() -> RoundedScheme:
    """A scale per output and 8-bit weights, the vocabulary included."""
    return RoundedScheme("int8", INT8, INT8)


def int4(group_size: int = DEFAULT_INT4_GROUP_SIZE) -> RoundedScheme:
    """A scale and a minimum per group of inputs and 4-bit weights; the vocabulary in 8 bits."""
    layers = QuantizedFormat(bits=4, group_size=group_size, has_minimum=True)
    return RoundedScheme(f"int4 (groups of {group_size})", layers, INT8)


def rounded_scheme(method: str, group_size: int) -> RoundedScheme:
    """The scheme of a `--quantize` method, `int8` or `int4`. Raises ValueError for any other."""
    match method:
        case "int8":
            return int8()
        case "int4":
            return int4(group_size)
    raise ValueError(f"the method must be int8 or int4. Given: {method}")
