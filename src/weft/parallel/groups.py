"""Collectives between the ranks of one tensor-parallel group.

`Group` is all a model knows of its neighbours. `SoloGroup` is a rank alone; `TorchGroup` speaks Gloo on CPU and NCCL
on CUDA through process groups of its own, without touching torch's global one.
"""

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch.distributed import ProcessGroupGloo, Store, TCPStore, Work  # type: ignore[attr-defined]

from weft.errors import DeviceError, EngineFatal


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


class _Backend(Protocol):
    """What torch's Gloo and NCCL groups have in common; their own annotations leave it out."""

    def rank(self) -> int: ...
    def size(self) -> int: ...
    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...
    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work: ...
    def shutdown(self) -> None: ...


class TorchGroup:
    """Ranks in processes of their own, joined through a small key-value store that rank 0 serves."""

    def __init__(self, backend: _Backend, store: TCPStore) -> None:
        self._backend = backend
        # The group's connections are set up lazily through the store: it must live as long.
        self._store = store
        self.rank = backend.rank()
        self.world_size = backend.size()

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place. Raises EngineFatal when a rank is lost or does not answer in time.

        On CPU every element is summed in rank order. Gloo's own sum starts at a rank that depends on the element's
        place in the tensor, so that beyond two ranks a token's last bits would depend on its neighbours in the batch.
        """
        if self.world_size > 2 and x.device.type == "cpu":
            first, *others = self._gather(x, "all_reduce")
            x.copy_(first)
            for part in others:
                x.add_(part)
            return x
        try:
            self._backend.allreduce([x]).wait()
        except RuntimeError as error:
            raise self._lost("all_reduce") from error
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> torch.Tensor:
        """Concatenate in rank order. Raises EngineFatal when a rank is lost or does not answer in time."""
        sizes = sizes or [x.shape[dim]] * self.world_size
        longest = max(sizes)
        # The backends exchange equal shapes only: shorter parts travel padded.
        padded = x.new_zeros([longest if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)])
        padded.narrow(dim, 0, x.shape[dim]).copy_(x)
        parts = self._gather(padded, "all_gather")
        return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)

    def close(self) -> None:
        """Close the connections; ranks waiting for this one fail at once."""
        self._backend.shutdown()

    def _gather(self, x: torch.Tensor, purpose: str) -> list[torch.Tensor]:
        """Every rank's `x`, which has the same shape everywhere, in rank order."""
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        try:
            self._backend.allgather([parts], [x]).wait()
        except RuntimeError as error:
            raise self._lost(purpose) from error
        return parts

    def _lost(self, collective: str) -> EngineFatal:
        return EngineFatal(f"Rank {self.rank} of {self.world_size} lost contact with its group in {collective}.")


def join_group(
    *,
    rank: int,
    world_size: int,
    address: str,
    port: int,
    device: torch.device,
    timeout_s: float,
) -> Group:
    """Meet the other ranks at `address:port`, which rank 0 listens on, and return when the group works.

    Every socket is bound to `address`, an IP literal of this machine, and to nothing else.

    Raises   DeviceError: the port is taken, or a rank did not come within `timeout_s`
    """
    if world_size == 1:
        return SoloGroup()
    timeout = timedelta(seconds=timeout_s)
    listening = _listen(address, port) if rank == 0 else None
    try:
        store = TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening,
        )
        group = TorchGroup(_open_backend(store, rank, world_size, address, device, timeout), store)
        # The first collective opens the connections, and so is the proof that everybody is here.
        group.all_reduce(torch.zeros(1, device=device))
    except (RuntimeError, EngineFatal) as error:
        raise DeviceError(
            f"Rank {rank} of {world_size} could not join its group within {timeout_s:.0f} s. "
            "Check that no other process uses the rendezvous port and that every rank started."
        ) from error
    return group


def _listen(address: str, port: int) -> int:
    """Return the descriptor of a socket that listens on exactly this address; its new owner closes it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address, port))
        except OSError as error:
            raise DeviceError(
                f"The rendezvous port {port} cannot be used: {error.strerror}. Set `--master-port` to a free port."
            ) from None
        listening.listen(128)
        return listening.detach()


def _open_backend(
    store: Store, rank: int, world_size: int, address: str, device: torch.device, timeout: timedelta
) -> _Backend:
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL  # absent from CPU builds

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout  # noqa: SLF001 — the only way to set it without torch's global group
        options.is_high_priority_stream = True
        return cast(_Backend, ProcessGroupNCCL(store, rank, world_size, options))
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001 — public only in newer torch
    options._timeout = timeout  # noqa: SLF001
    # Without a device of its own Gloo listens on whatever the host name resolves to.
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]  # noqa: SLF001
    return cast(_Backend, ProcessGroupGloo(store, rank, world_size, options))
