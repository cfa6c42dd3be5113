"""Checked reading of one rank's weights: shapes against the spec, target dtype and device, packing."""

import dataclasses
from collections.abc import Sequence

import torch

from weft.errors import ModelNotFoundError
from weft.kernels.packed import PackedLinear
from weft.models.quant.scheme import Matrix, QuantScheme, StoredPart, Unquantized
from weft.models.spec import LinearSpec, NormSpec, WeightRef
from weft.models.weights.partition import Span
from weft.models.weights.source import WeightSource


class WeightReader:
    """Reads slices of a checkpoint for the layers.

    Every method raises ModelNotFoundError, naming file and tensor, when a tensor is missing, has another shape than
    the configuration needs, a dtype that is not supported, or (with `check_finite`) values that are not finite.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        device: torch.device,
        check_finite: bool = False,
        scheme: QuantScheme | None = None,
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._source = source
        self._check_finite = check_finite
        self._scheme = scheme or Unquantized()
        self._staging = torch.empty(0, dtype=dtype, device=device)

    def packed_rows(self, parts: Sequence[tuple[LinearSpec, Span]], *, is_vocabulary: bool = False) -> PackedLinear:
        """Rows of several matrices, stacked in order into one and packed. Either all have a bias or none."""
        biases = [self._vector(linear.bias, linear.out_features, span) for linear, span in parts if linear.bias]
        bias = torch.cat(biases) if biases else None
        columns = Span(0, parts[0][0].in_features)
        stored = self._pack_stored(parts, columns, bias)
        if stored is not None:
            return stored
        weight = self._stage(sum(span.size for _, span in parts), columns.size)
        first = 0
        for linear, span in parts:
            self._matrix(weight[first : first + span.size], linear, span, None)
            first += span.size
        return self._pack(weight, bias, columns, is_vocabulary=is_vocabulary)

    def packed_columns(self, linear: LinearSpec, span: Span, *, with_bias: bool) -> PackedLinear:
        """Input columns `span` of a matrix, packed; its bias, where it has one, only when asked for."""
        all_rows = Span(0, linear.out_features)
        bias = None
        if with_bias and linear.bias is not None:
            bias = self._vector(linear.bias, linear.out_features, all_rows)
        stored = self._pack_stored([(linear, all_rows)], span, bias)
        if stored is not None:
            return stored
        columns = Span(0, linear.in_features) if self._scheme.needs_whole_rows else span
        weight = self._stage(linear.out_features, columns.size)
        self._matrix(weight, linear, all_rows, columns)
        return self._pack(weight, bias, span.shifted(-columns.start))

    def rows(self, linear: LinearSpec, span: Span) -> torch.Tensor:
        """Output rows `span` of a matrix as they are: `[span, I]`."""
        weight = torch.empty(span.size, linear.in_features, dtype=self.dtype, device=self.device)
        self._matrix(weight, linear, span, None)
        return weight

    def norm(self, norm: NormSpec) -> torch.Tensor:
        """The whole weight of a norm."""
        return self._vector(WeightRef(norm.name), norm.size, Span(0, norm.size))

    def _matrix(self, out: torch.Tensor, linear: LinearSpec, rows: Span, columns: Span | None) -> None:
        ref = linear.weight
        self._check_shape(ref.name, (ref.packed_rows or linear.out_features, linear.in_features))
        self._read(out, ref, rows, columns)

    def _vector(self, ref: WeightRef, size: int, span: Span) -> torch.Tensor:
        self._check_shape(ref.name, (ref.packed_rows or size,))
        out = torch.empty(span.size, dtype=self.dtype, device=self.device)
        self._read(out, ref, span, None)
        return out

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        shape = self._source.shape(name)
        if shape != expected:
            raise ModelNotFoundError(
                f"{self._source.file_name(name)}: tensor `{name}` has shape {list(shape)} "
                f"where the configuration needs {list(expected)}."
            )

    def _read(self, out: torch.Tensor, ref: WeightRef, rows: Span, columns: Span | None) -> None:
        self._source.read_into(out, ref.name, rows.shifted(ref.first_row), columns)
        if self._check_finite and not bool(torch.isfinite(out).all()):
            raise ModelNotFoundError(
                f"{self._source.file_name(ref.name)}: tensor `{ref.name}` holds values that are not finite "
                f"in {self.dtype}."
            )

    def _stage(self, rows: int, columns: int) -> torch.Tensor:
        """Memory for a matrix on its way to be packed, valid until the next one: fresh pages cost more than copying."""
        if self._staging.numel() < rows * columns:
            self._staging = torch.empty(rows * columns, dtype=self.dtype, device=self.device)
        return self._staging[: rows * columns].view(rows, columns)

    def _pack_stored(
        self, parts: Sequence[tuple[LinearSpec, Span]], columns: Span, bias: torch.Tensor | None
    ) -> PackedLinear | None:
        """By what the file holds, where the scheme can."""
        stored = []
        for linear, rows in parts:
            ref = linear.weight
            self._check_shape(ref.name, (ref.packed_rows or linear.out_features, linear.in_features))
            stored.append(StoredPart(name=ref.name, rows=rows.shifted(ref.first_row), columns=columns))
        return self._scheme.pack_stored(self._source, stored, bias, self.dtype)

    def _pack(
        self, weight: torch.Tensor, bias: torch.Tensor | None, columns: Span, *, is_vocabulary: bool = False
    ) -> PackedLinear:
        packed = self._scheme.pack(Matrix(weight=weight, bias=bias, columns=columns, is_vocabulary=is_vocabulary))
        if packed.data.data_ptr() == weight.data_ptr():  # an implementation that takes the weight as it is
            packed = dataclasses.replace(packed, data=packed.data.clone())
        return packed
