"""The operations of `ops.py` on the compiled kernels. Tensors become pointers, sizes and strides here."""

import ctypes

import torch

from weft.errors import InvariantBroken
from weft.kernels.cpu.arena import WeightArena
from weft.kernels.cpu.library import load
from weft.kernels.packed import PackedLinear

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
KV_DTYPE_CODES = {**DTYPE_CODES, torch.int8: 2}
"""What keys and values may be held in."""
ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1}

DTYPES = frozenset(DTYPE_CODES)
"""What the compiled kernels compute with."""

WEIGHTS = WeightArena()
"""Where this process keeps its packed weights."""


def library() -> ctypes.CDLL:
    """The loaded library; the registry offers these operations only when there is one."""
    found = load().library
    if found is None:
        raise InvariantBroken(f"compiled kernels were called but are not loaded: {load().notice}")
    return found


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """Panels of 32 outputs, see `kernels.h`."""
    out_features, in_features = weight.shape
    code = DTYPE_CODES[weight.dtype]
    data = WEIGHTS.take(library().weft_packed_bytes(out_features, in_features, code))
    library().weft_pack_panels(weight.data_ptr(), weight.stride(0), data.data_ptr(), out_features, in_features, code)
    return PackedLinear(
        layout="panels",
        data=data,
        bias=None if bias is None else bias.to(torch.float32).contiguous(),
        out_features=out_features,
        in_features=in_features,
        dtype=weight.dtype,
    )


def linear(
    x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Every element is one sum over the inputs in ascending order, whatever the number of rows."""
    dtype = out_dtype or x.dtype
    rows = x.shape[0]
    out = torch.empty((rows, packed.out_features), dtype=dtype)
    library().weft_linear(
        x.data_ptr(),
        x.stride(0),
        packed.data.data_ptr(),
        None if packed.bias is None else packed.bias.data_ptr(),
        None if residual is None else residual.data_ptr(),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        packed.out_features,
        rows,
        packed.in_features,
        packed.out_features,
        DTYPE_CODES[packed.dtype],
        DTYPE_CODES[dtype],
    )
    return out


def embedding(token_ids: torch.Tensor, packed: PackedLinear, scale: float = 1.0) -> torch.Tensor:
    """Rows of the original weight, collected from the panels."""
    out = torch.empty((token_ids.shape[0], packed.in_features), dtype=packed.dtype)
    bad = library().weft_embedding(
        token_ids.data_ptr(),
        token_ids.element_size(),
        token_ids.shape[0],
        packed.data.data_ptr(),
        packed.in_features,
        packed.out_features,
        DTYPE_CODES[packed.dtype],
        out.data_ptr(),
    )
    finish_embedding(out, token_ids, packed, scale, bad)
    return out


def finish_embedding(out: torch.Tensor, token_ids: torch.Tensor, packed: PackedLinear, scale: float, bad: int) -> None:
    """Multiply the rows in place. Raises InvariantBroken: `bad`, counted from 1, is a row whose id has no weights."""
    if bad:
        raise InvariantBroken(
            f"token id {int(token_ids[bad - 1])} at row {bad - 1} is outside the vocabulary of {packed.out_features}"
        )
    library().weft_scale_rows(out.data_ptr(), DTYPE_CODES[packed.dtype], scale, out.shape[0], packed.in_features)


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copies row by row."""
    out = torch.empty((rows.shape[0], x.shape[1]), dtype=x.dtype)
    bad = library().weft_take_rows(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        rows.data_ptr(),
        rows.shape[0],
        x.shape[1],
        DTYPE_CODES[x.dtype],
        out.data_ptr(),
    )
    if bad:
        raise InvariantBroken(f"row {int(rows[bad - 1])} was asked for of {x.shape[0]}")
    return out


def softcap(x: torch.Tensor, cap: float) -> None:
    """One pass, in runs of 8,192 elements."""
    library().weft_softcap(x.data_ptr(), x.stride(0), x.shape[0], x.shape[1], cap)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """One row after another, each by one thread."""
    out = torch.empty(x.shape, dtype=x.dtype)
    _normalize(x, None, weight, None, out, eps, weight_offset)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum and norm of a row while it is in the cache."""
    out = torch.empty(x.shape, dtype=x.dtype)
    total = torch.empty(x.shape, dtype=x.dtype)
    _normalize(x, residual, weight, total, out, eps, weight_offset)
    return out, total


def _normalize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    total: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    weight_offset: float,
) -> None:
    library().weft_rms_norm(
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        x.shape[1] if x.dim() == 3 else 1,
        None if residual is None else residual.data_ptr(),
        weight.data_ptr(),
        None if total is None else total.data_ptr(),
        out.data_ptr(),
        x.shape[-1],
        eps,
        weight_offset,
        DTYPE_CODES[x.dtype],
    )


def rotary_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    kv_slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Token after token, each by one thread."""
    bad = library().weft_rotary_and_store(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        cos_sin.data_ptr(),
        cos_sin.shape[0],
        cos_sin.shape[1],
        positions.data_ptr(),
        kv_slots.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        keys.shape[0],
        q.shape[0],
        q.shape[1],
        k.shape[1],
        q.shape[2],
        keys.shape[2],
        DTYPE_CODES[q.dtype],
        KV_DTYPE_CODES[keys.dtype],
    )
    if bad:
        token = bad - 1
        raise InvariantBroken(
            f"row {token}: position {int(positions[token])} must be below {cos_sin.shape[0]} and slot "
            f"{int(kv_slots[token])} below {keys.shape[0] * keys.shape[2]}"
        )


def paged_attention(  # noqa: PLR0913, PLR0917 - the signature of `ops.paged_attention`
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    *,
    max_query_len: int,
    max_context_len: int,
) -> torch.Tensor:
    """Online softmax over tiles of 32 absolute positions, merged in parts of 512; see `kernels.h`."""
    del max_query_len, max_context_len  # the kernel reads the true lengths
    out = torch.empty(q.shape, dtype=q.dtype)
    num_blocks, kv_heads, block_size, _ = keys.shape
    bad = library().weft_paged_attention(
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        num_blocks,
        block_tables.data_ptr(),
        block_tables.stride(0),
        block_tables.shape[1],
        query_starts.data_ptr(),
        context_lens.data_ptr(),
        context_lens.shape[0],
        q.shape[0],
        scale,
        softcap,
        window,
        q.shape[1],
        kv_heads,
        q.shape[2],
        block_size,
        DTYPE_CODES[q.dtype],
        KV_DTYPE_CODES[keys.dtype],
    )
    if bad:
        raise InvariantBroken(
            f"sequence {bad - 1}: rows {query_starts[bad - 1 : bad + 1].tolist()}, context {int(context_lens[bad - 1])}"
            f" and its blocks do not fit {q.shape[0]} rows and a pool of {num_blocks} blocks"
        )
    return out


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Gate and up of a row in one pass."""
    rows, width = x.shape[0], x.shape[1] // 2
    out = torch.empty((rows, width), dtype=x.dtype)
    library().weft_gated_activation(
        x.data_ptr(), x.stride(0), out.data_ptr(), rows, width, ACTIVATION_CODES[kind], DTYPE_CODES[x.dtype]
    )
    return out


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass for the maximum and one for the sum, in runs of 8,192 logits that are joined in order."""
    rows, width = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float32)
    library().weft_greedy(logits.data_ptr(), logits.stride(0), rows, width, ids.data_ptr(), logprobs.data_ptr())
    return ids, logprobs


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """As `greedy`, at given ids."""
    rows, width = logits.shape
    logprobs = torch.empty(rows, dtype=torch.float32)
    bad = library().weft_token_logprobs(
        logits.data_ptr(), logits.stride(0), rows, width, ids.data_ptr(), logprobs.data_ptr()
    )
    if bad:
        raise InvariantBroken(f"token id {int(ids[bad - 1])} at row {bad - 1} is outside the vocabulary of {width}")
    return logprobs


def race(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Coarse keys for all ids in float32, exact ones in float64 for the few that may win."""
    rows, width = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    library().weft_race(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        width,
        seeds.data_ptr(),
        positions.data_ptr(),
        ids.data_ptr(),
    )
    return ids


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    is_raw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two passes over the logits: what they sum to, then temperature and race in pieces that stay in the cache."""
    rows, width = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    logprobs = torch.empty(rows, dtype=torch.float32)
    library().weft_draw(
        logits.data_ptr(),
        logits.stride(0),
        rows,
        width,
        temperatures.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        is_raw.data_ptr(),
        ids.data_ptr(),
        logprobs.data_ptr(),
    )
    return ids, logprobs
