"""What fits: how the memory of a device is divided between weights, KV pool and activations.

Sizes are measured where they can be (memory left, weights loaded) and computed where they must be (blocks). Nothing
here allocates. A container's limit counts, not the machine's memory: TGI and most servers look at the latter and are
killed for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from weft.errors import DoesNotFitError
from weft.runner.sampling.logprobs import PROMPT_LOGPROB_BYTES

CPU_POOL_BYTES = 4 * 1024**3
CPU_POOL_SHARE = 0.25
"""On the CPU other processes live in the same memory: the pool takes a quarter of what is left, 4 GiB at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What one rank keeps per token and layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers."""
        per_token = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return per_token * self.block_size_tokens * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How the memory of one rank is divided; what the start-up banner shows."""

    num_blocks: int
    block_size_tokens: int
    block_bytes: int
    weights_bytes: int
    activation_bytes: int
    available_bytes: int
    """Left after loading, before pool and activations."""

    @property
    def kv_bytes(self) -> int:
        """Size of the KV pool."""
        return self.num_blocks * self.block_bytes

    @property
    def free_bytes(self) -> int:
        """Left to the system and to other processes when everything above is in use."""
        return self.available_bytes - self.activation_bytes - self.kv_bytes

    @property
    def max_batch_total_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_blocks * self.block_size_tokens


def plan_memory(
    shape: KvShape,
    *,
    device: torch.device,
    available_bytes: int,
    weights_bytes: int,
    activation_bytes: int,
    pool_bytes: int | None,
    required_tokens: int,
    max_batch_total_tokens: int | None = None,
) -> MemoryPlan:
    """Divide what is left after the weights were loaded.

    Units   available_bytes: `available_memory_bytes` after loading; pool_bytes: the user's number, None = by itself;
            required_tokens: the longest sequence, which must fit alone (`--max-total-tokens`; 1 when that follows
            from the plan); max_batch_total_tokens caps the pool, but never below required_tokens
    Raises  DoesNotFitError: the pool asked for, or the longest sequence, does not fit; names the value that would do
    """
    block_bytes, block_size = shape.block_bytes, shape.block_size_tokens
    usable_bytes = available_bytes - activation_bytes
    if pool_bytes is not None and pool_bytes > usable_bytes:
        raise DoesNotFitError(
            f"--kv-pool-bytes: {_mebibytes(pool_bytes)} do not fit. {_situation(available_bytes, weights_bytes)} Use "
            f"--kv-pool-bytes {max(usable_bytes, 0)} or less, or leave it out."
        )
    if pool_bytes is None:
        pool_bytes = default_pool_bytes(device, available_bytes, activation_bytes)
    num_blocks = max(0, min(pool_bytes, usable_bytes)) // block_bytes
    required_blocks = -(-required_tokens // block_size)
    if num_blocks < required_blocks:
        needed_bytes = required_blocks * block_bytes
        raise DoesNotFitError(
            f"A sequence of {required_tokens} tokens needs a KV pool of {_mebibytes(needed_bytes)}, and "
            f"{_mebibytes(num_blocks * block_bytes)} fit. {_situation(available_bytes, weights_bytes)} "
            + _suggestion(needed_bytes, usable_bytes, num_blocks * block_size)
        )
    if max_batch_total_tokens is not None:
        num_blocks = min(num_blocks, max(required_blocks, -(-max_batch_total_tokens // block_size)))
    return MemoryPlan(
        num_blocks=num_blocks,
        block_size_tokens=block_size,
        block_bytes=block_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=activation_bytes,
        available_bytes=available_bytes,
    )


def estimate_activation_bytes(
    *,
    max_step_tokens: int,
    max_step_rows: int,
    hidden_size: int,
    widest_layer: int,
    vocab_size: int,
    dtype: torch.dtype,
) -> int:
    """Most memory that one step takes beside weights and pool, by arithmetic.

    Two residual streams, the widest layer's input and output, and for the rows that sample the logits, the copy that
    processors change and one of work space, all in float32.

    Units   max_step_tokens T, max_step_rows S, widest_layer: largest output of a linear layer (2F, or Hq·D + 2·Hkv·D)
    """
    hidden_bytes = max_step_tokens * (4 * hidden_size + 2 * widest_layer) * dtype.itemsize
    logits_bytes = max(3 * max_step_rows * vocab_size * 4, PROMPT_LOGPROB_BYTES)
    return hidden_bytes + logits_bytes


def default_pool_bytes(device: torch.device, available_bytes: int, activation_bytes: int) -> int:
    """Size of the KV pool when the user names none: a bounded share on the CPU, all that is left elsewhere."""
    if device.type == "cpu":
        return min(CPU_POOL_BYTES, int(CPU_POOL_SHARE * available_bytes))
    return max(0, available_bytes - activation_bytes)


def available_memory_bytes(device: torch.device, *, num_ranks: int = 1, fraction: float = 1.0) -> int:
    """Memory that a rank may still take on its device.

    On the CPU: the least of what the machine and each enclosing control group leave, shared by the ranks. On a GPU:
    what is free, less the share of the whole that `fraction` leaves to others.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return max(0, free_bytes - int((1.0 - fraction) * total_bytes))
    left = [psutil.virtual_memory().available, *control_group_bytes_left()]
    return int(min(left)) // num_ranks


def control_group_bytes_left(root: Path = Path("/")) -> list[int]:
    """What each control group around this process that has a limit still leaves, version 1 and 2.

    The page cache of files counts as used there but is given back on demand, so its inactive part counts as left.

    Source  Linux Documentation/admin-guide/cgroup-v2.rst, "Memory"; cgroup-v1/memory.rst, section 5
    """
    left: list[int] = []
    for directory, names in _memory_control_groups(root):
        limit, used = (_read_integer(directory / name) for name in names[:2])
        if limit is not None and used is not None:
            left.append(max(0, limit - used + _read_statistic(directory / "memory.stat", names[2])))
    return left


_V2_FILES = ("memory.max", "memory.current", "inactive_file")
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _memory_control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """This process' memory control groups, innermost first, with the names of their files.

    Inside a container the path in /proc may be the host's while the mount shows only the container's own group:
    directories that do not exist are skipped, and the top of the mount is always looked at.
    """
    memberships = root / "proc/self/cgroup"
    if not memberships.is_file():
        return
    for line in memberships.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", _V2_FILES
        elif "memory" in controllers.split(","):
            mount, names = root / "sys/fs/cgroup/memory", _V1_FILES
        else:
            continue
        group = mount / path.lstrip("/")
        while group != mount:
            yield group, names
            group = group.parent
        yield mount, names


def _read_integer(path: Path) -> int | None:
    """The number in a control file; None when there is no such file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _read_statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _situation(available_bytes: int, weights_bytes: int) -> str:
    return f"{_mebibytes(available_bytes)} of memory are left after {_mebibytes(weights_bytes)} of weights."


def _suggestion(needed_bytes: int, usable_bytes: int, fitting_tokens: int) -> str:
    if needed_bytes <= usable_bytes:
        return f"Use --kv-pool-bytes {needed_bytes} or more."
    if fitting_tokens > 1:
        return f"Use --max-total-tokens {fitting_tokens} or less."
    return f"Free {_mebibytes(needed_bytes - usable_bytes)}, or use a smaller or quantized model."


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
