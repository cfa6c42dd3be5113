"""Checked reading of one rank's weights: shapes against the spec, then the target dtype and device."""

import torch

from weft.errors import ModelNotFoundError
from weft.models.spec import LinearSpec, NormSpec, WeightRef
from weft.models.weights.partition import Span
from weft.models.weights.source import WeightSource


class WeightReader:
    """Reads slices of a checkpoint for the layers.

    Every method raises ModelNotFoundError, naming file and tensor, when a tensor is missing, has another shape than
    the configuration needs, a dtype that is not supported, or (with `check_finite`) values that are not finite.
    """

    def __init__(
        self, source: WeightSource, *, dtype: torch.dtype, device: torch.device, check_finite: bool = False
    ) -> None:
        self.dtype = dtype
        self.device = device
        self._source = source
        self._check_finite = check_finite

    def rows(self, linear: LinearSpec, span: Span) -> torch.Tensor:
        """Output rows `span` of a weight: `[span, I]`."""
        return self._matrix(linear, span, None)

    def columns(self, linear: LinearSpec, span: Span) -> torch.Tensor:
        """Input columns `span` of a weight: `[O, span]`."""
        return self._matrix(linear, Span(0, linear.out_features), span)

    def bias(self, linear: LinearSpec, span: Span) -> torch.Tensor | None:
        """Elements `span` of the bias; None when the layer has none."""
        if linear.bias is None:
            return None
        return self._vector(linear.bias, linear.out_features, span)

    def norm(self, norm: NormSpec) -> torch.Tensor:
        """The whole weight of a norm."""
        return self._vector(WeightRef(norm.name), norm.size, Span(0, norm.size))

    def _matrix(self, linear: LinearSpec, rows: Span, columns: Span | None) -> torch.Tensor:
        ref = linear.weight
        self._check_shape(ref.name, (ref.packed_rows or linear.out_features, linear.in_features))
        return self._load(ref, rows, columns)

    def _vector(self, ref: WeightRef, size: int, span: Span) -> torch.Tensor:
        self._check_shape(ref.name, (ref.packed_rows or size,))
        return self._load(ref, span, None)

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        shape = self._source.shape(name)
        if shape != expected:
            raise ModelNotFoundError(
                f"{self._source.file_name(name)}: tensor `{name}` has shape {list(shape)} "
                f"where the configuration needs {list(expected)}."
            )

    def _load(self, ref: WeightRef, rows: Span, columns: Span | None) -> torch.Tensor:
        stored = self._source.read(ref.name, rows.shifted(ref.first_row), columns, self.dtype)
        tensor = stored.to(device=self.device, dtype=self.dtype)
        if self._check_finite and not bool(torch.isfinite(tensor).all()):
            raise ModelNotFoundError(
                f"{self._source.file_name(ref.name)}: tensor `{ref.name}` holds values that are not finite "
                f"in {self.dtype}."
            )
        return tensor
