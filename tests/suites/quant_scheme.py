"""What every `QuantScheme` must do, whatever it rounds to."""

from typing import ClassVar

import torch

from weft.kernels import ops
from weft.kernels.packed import PackedLinear
from weft.models.quant.scheme import Matrix, QuantScheme
from weft.models.weights.partition import Span


class QuantSchemeSuite:
    """Subclass it, name the scheme and the largest error as a share of the largest weight of a row."""

    scheme: ClassVar[QuantScheme]
    max_error: ClassVar[float]

    def pack(self, weight: torch.Tensor, columns: Span | None = None, *, is_vocabulary: bool = False) -> PackedLinear:
        """The wanted columns, of whole rows or cut before as the scheme asks."""
        wanted = columns or Span(0, weight.shape[1])
        if not self.scheme.needs_whole_rows:
            weight, wanted = weight[:, wanted.start : wanted.stop].contiguous(), Span(0, wanted.size)
        return self.scheme.pack(Matrix(weight=weight, bias=None, columns=wanted, is_vocabulary=is_vocabulary))

    def values(self, packed: PackedLinear) -> torch.Tensor:
        """The weight that a packed one stands for: products with the unit vectors would round those."""
        return ops.embedding(torch.arange(packed.out_features), packed)

    def test_the_shape_is_that_of_the_matrix(self) -> None:
        for out_features, in_features in ((1, 32), (33, 576), (70, 200)):
            packed = self.pack(torch.randn(out_features, in_features))

            assert (packed.out_features, packed.in_features) == (out_features, in_features)
            assert ops.linear(torch.randn(3, in_features), packed).shape == (3, out_features)

    def test_values_are_near_those_of_the_matrix(self) -> None:
        weight = torch.randn(64, 256)

        error = (self.values(self.pack(weight)) - weight).abs()

        assert bool((error <= self.max_error * weight.abs().amax(dim=1, keepdim=True)).all())

    def test_two_ranks_hold_the_halves_of_the_whole(self) -> None:
        weight = torch.randn(64, 256)
        whole = self.values(self.pack(weight))

        rows = [self.values(self.pack(half.contiguous())) for half in weight.chunk(2)]
        columns = [self.values(self.pack(weight, span)) for span in (Span(0, 128), Span(128, 256))]

        assert torch.equal(torch.cat(rows), whole)
        assert torch.equal(torch.cat(columns, dim=1), whole)

    def test_nothing_of_the_matrix_is_kept_unless_it_is_the_matrix_itself(self) -> None:
        weight = torch.randn(64, 256)
        packed = self.pack(weight)
        if packed.data.data_ptr() == weight.data_ptr():
            return  # the reader copies it
        before = self.values(packed)

        weight.zero_()

        assert torch.equal(self.values(packed), before)

    def test_the_vocabulary_can_be_looked_up_and_multiplied_by(self) -> None:
        packed = self.pack(torch.randn(70, 64), is_vocabulary=True)

        assert self.values(packed).shape == (70, 64)
        assert ops.linear(torch.randn(2, 64), packed, torch.float32).shape == (2, 70)
