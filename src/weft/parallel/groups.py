"""Collectives between the ranks of one tensor-parallel group.

`Group` is all a model knows of its neighbours. `SoloGroup` is a rank alone; `TorchGroup` speaks Gloo on CPU and NCCL
on CUDA through process groups of its own, without touching torch's global one.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class Group(Protocol):
    """The ranks that share one model. Every rank must make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Place of this process, 0 ≤ rank < world_size."""
        ...

    @property
    def world_size(self) -> int:
        """R"""
        ...

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the ranks, in place, and return it."""
        ...

    def all_gather(self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Concatenate every rank's `x` along `dim`, in rank order.

        `sizes` gives each rank's length along `dim` when they differ; None when all are equal.
        """
        ...

    def close(self) -> None:
        """Leave the group. Collectives afterwards are errors."""
        ...


class SoloGroup:
    """A group of one: nothing to exchange."""

    rank = 0
    world_size = 1

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over one rank."""
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """The concatenation of one part."""
        del dim, sizes
        return x

    def close(self) -> None:
        """Nothing is open."""
