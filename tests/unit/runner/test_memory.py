"""What fits, and what the user is told when it does not."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weft.errors import DoesNotFitError
from weft.runner.host_memory import CPU_POOL_BYTES, control_group_bytes_left
from weft.runner.memory import (
    KvShape,
    MemoryPlan,
    available_memory_bytes,
    default_pool_bytes,
    estimate_activation_bytes,
    plan_memory,
)

CPU = torch.device("cpu")
GIB = 1024**3
SHAPE = KvShape(num_layers=30, num_kv_heads=3, head_dim=64, block_size_tokens=32, dtype=torch.bfloat16)


def plan(**changes: object) -> MemoryPlan:
    arguments = {
        "device": CPU,
        "available_bytes": 8 * GIB,
        "weights_bytes": GIB,
        "activation_bytes": GIB // 4,
        "pool_bytes": None,
        "required_tokens": 8192,
    }
    return plan_memory(SHAPE, **(arguments | changes))


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert SHAPE.block_bytes == 30 * 2 * 3 * 64 * 32 * 2


def test_a_block_of_codes_ends_with_its_scales() -> None:
    assert replace(SHAPE, dtype=torch.int8).block_bytes == 30 * 2 * 3 * 32 * (64 + 4)


def test_the_parts_sum_to_what_was_available() -> None:
    memory = plan()

    assert memory.kv_bytes + memory.activation_bytes + memory.free_bytes == memory.available_bytes
    assert memory.kv_bytes == memory.num_blocks * SHAPE.block_bytes
    assert memory.max_batch_total_tokens == memory.num_blocks * 32


@pytest.mark.parametrize(("available", "expected"), [(4 * GIB, GIB), (16 * GIB, 4 * GIB), (200 * GIB, CPU_POOL_BYTES)])
def test_the_pool_on_a_cpu_is_a_bounded_share(available: int, expected: int) -> None:
    assert default_pool_bytes(CPU, available, GIB) == expected
    assert plan(available_bytes=available).kv_bytes <= expected


def test_the_pool_on_a_gpu_is_all_that_is_left() -> None:
    assert default_pool_bytes(torch.device("cuda", 0), 80 * GIB, 3 * GIB) == 77 * GIB


def test_max_batch_total_tokens_caps_the_pool() -> None:
    assert plan(max_batch_total_tokens=10_000).num_blocks == 313


@pytest.mark.parametrize("tokens", [1, 8191, 8192])
def test_a_small_cap_leaves_room_for_the_longest_sequence_and_never_fails(tokens: int) -> None:
    assert plan(max_batch_total_tokens=tokens).num_blocks == 256


def test_a_cap_beyond_memory_is_no_error() -> None:
    assert plan(max_batch_total_tokens=10**9) == plan()


def test_the_smallest_pool_that_fits_starts() -> None:
    assert plan(pool_bytes=256 * SHAPE.block_bytes).num_blocks == 256


def suggested(message: str, flag: str) -> int:
    match = re.search(rf"Use {flag} (\d+)", message)
    assert match, message
    return int(match[1])


def test_a_pool_chosen_too_small_suggests_one_that_works() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(pool_bytes=256 * SHAPE.block_bytes - 1)

    assert plan(pool_bytes=suggested(caught.value.message, "--kv-pool-bytes")).num_blocks == 256


def test_too_little_memory_suggests_a_length_that_works() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        plan(available_bytes=400 * 2**20)

    tokens = suggested(caught.value.message, "--max-total-tokens")
    assert plan(available_bytes=400 * 2**20, required_tokens=tokens).max_batch_total_tokens >= tokens


def test_a_pool_chosen_too_large_suggests_one_that_works() -> None:
    with pytest.raises(DoesNotFitError, match="--kv-pool-bytes") as caught:
        plan(pool_bytes=9 * GIB)

    assert plan(pool_bytes=suggested(caught.value.message, "--kv-pool-bytes")).free_bytes >= 0


def test_no_memory_at_all_says_how_much_is_missing() -> None:
    with pytest.raises(DoesNotFitError, match=r"Free \d+ MiB"):
        plan(available_bytes=2**20)


def test_activations_grow_with_the_step() -> None:
    small, large = (
        estimate_activation_bytes(
            max_step_tokens=tokens,
            max_step_rows=rows,
            hidden_size=576,
            widest_layer=3072,
            vocab_size=49152,
            dtype=torch.bfloat16,
        )
        for tokens, rows in ((512, 16), (4096, 256))
    )

    assert 64 * 2**20 < small < large < 512 * 2**20


# Control groups, read from a look-alike of the file system


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_version_2_limits_count_at_every_level(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/slice/unit\n",
            "sys/fs/cgroup/slice/unit/memory.max": "max\n",
            "sys/fs/cgroup/slice/unit/memory.current": "900\n",
            "sys/fs/cgroup/slice/memory.max": "5000\n",
            "sys/fs/cgroup/slice/memory.current": "1500\n",
            "sys/fs/cgroup/slice/memory.stat": "anon 7\ninactive_file 300\n",
        },
    )

    assert control_group_bytes_left(root) == [3800]


def test_version_1_limits_count(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n",
            "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "4096\n",
            "sys/fs/cgroup/memory/docker/abc/memory.usage_in_bytes": "1000\n",
            "sys/fs/cgroup/memory/docker/abc/memory.stat": "cache 9\ntotal_inactive_file 4\n",
        },
    )

    assert control_group_bytes_left(root) == [3100]


def test_a_container_sees_its_group_at_the_top_of_the_mount(tmp_path: Path) -> None:
    """The path in /proc is the host's; the mount shows the container's own group."""
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/kubepods/pod1/abc\n",
            "sys/fs/cgroup/memory.max": "2000\n",
            "sys/fs/cgroup/memory.current": "2500\n",
        },
    )

    assert control_group_bytes_left(root) == [0]


def test_without_control_groups_nothing_is_known(tmp_path: Path) -> None:
    assert control_group_bytes_left(tmp_path) == []


def test_ranks_share_the_memory_of_the_machine() -> None:
    alone = available_memory_bytes(CPU)

    assert 0.3 * alone < available_memory_bytes(CPU, num_ranks=2) < 0.7 * alone
