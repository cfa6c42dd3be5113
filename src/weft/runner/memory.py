"""What fits: how the memory of a device is divided between weights, KV pool and activations.

Sizes are measured where they can be (memory left, weights loaded) and computed where they must be (blocks). Nothing
here allocates. A container's limit counts, not the machine's memory: TGI and most servers look at the latter and are
killed for it.
"""

from dataclasses import dataclass

import torch

from weft.errors import DoesNotFitError
from weft.kernels import kv_layout
from weft.runner import host_memory


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What one rank keeps per token and layer."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int
    dtype: torch.dtype
    """Of the pool."""

    @property
    def block_bytes(self) -> int:
        """Keys and values of one block in all layers."""
        per_head = 2 * kv_layout.bytes_per_position(self.head_dim, self.dtype)
        return self.num_layers * self.num_kv_heads * per_head * self.block_size_tokens


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
    """`host_memory.activation_bytes` for a torch dtype."""
    return host_memory.activation_bytes(
        max_step_tokens=max_step_tokens,
        max_step_rows=max_step_rows,
        hidden_size=hidden_size,
        widest_layer=widest_layer,
        vocab_size=vocab_size,
        element_bytes=dtype.itemsize,
    )


def default_pool_bytes(device: torch.device, available_bytes: int, activation_bytes: int) -> int:
    """Size of the KV pool when the user names none: a bounded share on the CPU, all that is left elsewhere."""
    if device.type == "cpu":
        return host_memory.default_pool_bytes(available_bytes)
    return max(0, available_bytes - activation_bytes)


def available_memory_bytes(device: torch.device, *, num_ranks: int = 1, fraction: float = 1.0) -> int:
    """Memory that a rank may still take on its device.

    On the CPU: the least of what the machine and each enclosing control group leave, shared by the ranks. On a GPU:
    what is free, less the share of the whole that `fraction` leaves to others.
    """
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        return max(0, free_bytes - int((1.0 - fraction) * total_bytes))
    return host_memory.available_bytes() // num_ranks


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
