"""Real Gloo groups, their ranks in threads: no group is torch's global one, so one process can hold several."""

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil
import pytest
import torch

from weft.errors import DeviceError, EngineFatal
from weft.parallel.groups import Group, SoloGroup, join_group

Result = TypeVar("Result")

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening_addresses() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections(kind="inet")
    return {(item.laddr.ip, item.laddr.port) for item in connections if item.status == psutil.CONN_LISTEN}


def on_every_rank(world_size: int, act: Callable[[Group], Result]) -> list[Result]:
    port = free_port()

    def run(rank: int) -> Result:
        group = join_group(rank=rank, world_size=world_size, address="127.0.0.1", port=port, device=CPU, timeout_s=20.0)
        try:
            return act(group)
        finally:
            group.close()

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(run, range(world_size)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_all_reduce_sums_in_place_on_every_rank(dtype: torch.dtype) -> None:
    def act(group: Group) -> list[float]:
        x = torch.full((3,), group.rank + 1, dtype=dtype)
        group.all_reduce(x)
        return x.tolist()

    assert on_every_rank(3, act) == [[6, 6, 6]] * 3


def test_sums_are_taken_in_rank_order_wherever_an_element_stands() -> None:
    """10⁸ + 1 - 10⁸ is 0 in float32 in this order, and 1 in another."""

    def act(group: Group) -> torch.Tensor:
        return group.all_reduce(torch.full((5000,), (1e8, 1.0, -1e8)[group.rank]))

    assert all(torch.equal(x, torch.zeros(5000)) for x in on_every_rank(3, act))


def test_ranks_listen_on_the_given_address_only() -> None:
    before = listening_addresses()

    def act(group: Group) -> set[tuple[str, int]]:
        group.all_reduce(torch.ones(1))
        found = listening_addresses()
        group.all_reduce(torch.ones(1))
        return found

    opened = set.union(*on_every_rank(2, act)) - before
    assert opened
    assert {address for address, _ in opened} == {"127.0.0.1"}


@pytest.mark.parametrize("dim", [0, -1])
def test_all_gather_joins_parts_of_different_lengths_in_rank_order(dim: int) -> None:
    whole = torch.arange(35.0).view(5, 7)
    sizes = [3, 2] if dim == 0 else [4, 3]

    def act(group: Group) -> torch.Tensor:
        part = whole.split(sizes, dim=dim)[group.rank].contiguous()
        return group.all_gather(part, dim=dim, sizes=sizes)

    assert all(torch.equal(joined, whole) for joined in on_every_rank(2, act))


def test_all_gather_of_equal_parts_needs_no_sizes() -> None:
    def act(group: Group) -> list[int]:
        return group.all_gather(torch.tensor([group.rank, group.rank])).tolist()

    assert on_every_rank(2, act) == [[0, 0, 1, 1]] * 2


def test_a_rank_alone_has_nothing_to_exchange() -> None:
    group = join_group(rank=0, world_size=1, address="127.0.0.1", port=1, device=CPU, timeout_s=1.0)
    x = torch.ones(2)

    assert isinstance(group, SoloGroup)
    assert group.all_reduce(x) is x
    assert group.all_gather(x) is x


def test_a_lost_rank_is_fatal_for_the_others_at_once() -> None:
    together = threading.Barrier(2)

    def act(group: Group) -> str:
        together.wait(20)
        if group.rank == 1:
            return "left"
        with pytest.raises(EngineFatal, match=r"Rank 0 of 2 lost contact with its group in all_reduce"):
            group.all_reduce(torch.ones(4))
        return "noticed"

    assert on_every_rank(2, act) == ["noticed", "left"]


def test_a_taken_port_is_an_error_that_names_the_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        with pytest.raises(DeviceError, match=r"cannot be used: Address already in use. Set `--master-port`"):
            join_group(
                rank=0,
                world_size=2,
                address="127.0.0.1",
                port=taken.getsockname()[1],
                device=CPU,
                timeout_s=1.0,
            )


def test_a_rank_that_never_comes_is_an_error_within_the_time_given() -> None:
    with pytest.raises(DeviceError, match=r"Rank 0 of 2 could not join its group within 1 s"):
        join_group(rank=0, world_size=2, address="127.0.0.1", port=free_port(), device=CPU, timeout_s=1.0)
