"""Every operation in plain PyTorch: the oracle that fast implementations are judged by, and the fallback.

Works on any device and any floating dtype. Arithmetic is float32 inside, rounded once to the output dtype.
Shapes and meanings stand in `ops.py`; functions here have the same names and arguments.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F

from weft.kernels import kv_layout
from weft.kernels.packed import PackedLinear
from weft.kernels.philox import token_words

MAX_SCORE_ELEMENTS = 1 << 24
"""Attention scores held at a time: 64 MiB in float32."""

Activation = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """The weight as it is."""
    return PackedLinear(
        layout="rows",
        data=weight,
        bias=bias,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=weight.dtype,
    )


def linear(
    x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`x Wᵀ + b (+ residual)`, summed in float32."""
    out_dtype = out_dtype or x.dtype
    if out_dtype == x.dtype and residual is None:
        return F.linear(x, packed.data, packed.bias)
    bias = None if packed.bias is None else packed.bias.float()
    y = F.linear(x.float(), packed.data.float(), bias)
    if residual is not None:
        y = y + residual.float()
    return y.to(out_dtype)


def embedding(token_ids: torch.Tensor, packed: PackedLinear, scale: float = 1.0) -> torch.Tensor:
    """Rows of the weight, multiplied where there is a factor."""
    rows = F.embedding(token_ids, packed.data)
    return rows if scale == 1.0 else rows * scale


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Copies of the rows."""
    return x[rows]


def softcap(x: torch.Tensor, cap: float) -> None:
    """`cap · tanh(x / cap)`, in place."""
    x.div_(cap).tanh_().mul_(cap)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · (weight + weight_offset)` over the last dimension."""
    x32 = x.float()
    inverse = torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + eps)
    return (x32 * inverse * (weight.float() + weight_offset)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded sum is what is normalized, so that both results belong to the same hidden state."""
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps, weight_offset), total


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
    """Rotates q in place; writes rotated k, and v, to the pool."""
    angles = cos_sin[positions.long()][:, None, :]
    q.copy_(_rotate(q, angles))
    kept = kv_slots >= 0
    slots = kv_slots[kept].long()
    kv_layout.write_keys(keys, slots, _rotate(k, angles)[kept])
    kv_layout.write_values(values, slots, v[kept])


def _rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    half = angles.shape[-1] // 2
    cos, sin = angles[..., :half].float(), angles[..., half:].float()
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


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
    """Softmax attention of packed rows over paged keys and values.

    Sequences with one row are computed together, padded to the longest context; each longer one by itself.
    """
    del max_query_len, max_context_len  # kernels size their grids by them
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    starts = query_starts.tolist()
    lengths = [end - begin for begin, end in pairwise(starts)]
    single = [index for index, length in enumerate(lengths) if length == 1]
    groups = [single] if single else []
    groups += [[index] for index, length in enumerate(lengths) if length > 1]
    for group in groups:
        sequences = torch.tensor(group, device=q.device)
        length = lengths[group[0]]
        rows = query_starts[sequences].long()[:, None] + torch.arange(length, device=q.device)
        context = context_lens[sequences].long()
        attended = _attend(
            q[rows],
            _gather(kv_layout.read_keys, keys, block_tables[sequences], context, q.shape[2]),
            _gather(kv_layout.read_values, values, block_tables[sequences], context, q.shape[2]),
            context,
            (scale, softcap, window),
        )
        out[rows] = attended.to(q.dtype)
    return out


def _gather(
    read: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    pool: torch.Tensor,
    block_tables: torch.Tensor,
    context: torch.Tensor,
    head_size: int,
) -> torch.Tensor:
    """A pool → `[S, Hkv, C, D]` float32 for the longest context C; places past a context are zero."""
    block_size = pool.shape[2]
    longest = int(context.max())
    num_blocks = (longest + block_size - 1) // block_size
    blocks = read(pool, block_tables[:, :num_blocks].long(), head_size)
    flat = blocks.transpose(1, 2).flatten(2, 3)[:, :, :longest]
    past = torch.arange(longest, device=pool.device)[None, :] >= context[:, None]
    # A fresh pool may hold NaN, and 0 · NaN is NaN.
    return flat.masked_fill(past[:, None, :, None], 0.0)


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    context: torch.Tensor,
    scoring: tuple[float, float, int],
) -> torch.Tensor:
    """Query `[S, Q, Hq, D]`, keys and values `[S, Hkv, C, D]`, context `[S]` → `[S, Q, Hq, D]` float32."""
    num_sequences, query_len, num_heads, head_size = q.shape
    num_kv_heads, longest = keys.shape[1], keys.shape[2]
    group = num_heads // num_kv_heads
    positions = context[:, None] - query_len + torch.arange(query_len, device=q.device)
    folded = q.float().view(num_sequences, query_len, num_kv_heads, group, head_size).permute(0, 2, 1, 3, 4)
    out = torch.empty(num_sequences, num_kv_heads, query_len, group, head_size, device=q.device)
    rows = max(1, MAX_SCORE_ELEMENTS // (num_sequences * num_heads * longest))
    for first in range(0, query_len, rows):
        part = slice(first, min(first + rows, query_len))
        weights = _softmax_weights(folded[:, :, part].flatten(2, 3), keys, positions[:, part], scoring)
        out[:, :, part] = (weights @ values).view(num_sequences, num_kv_heads, -1, group, head_size)
    return out.permute(0, 2, 1, 3, 4).flatten(2, 3)


def _softmax_weights(
    q: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, scoring: tuple[float, float, int]
) -> torch.Tensor:
    """Query `[S, Hkv, Q·G, D]`, positions `[S, Q]` → weights `[S, Hkv, Q·G, C]`."""
    scale, softcap, window = scoring
    scores = q @ keys.transpose(-1, -2) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    group = q.shape[2] // positions.shape[1]
    row = positions.repeat_interleave(group, dim=1)[:, None, :, None]
    column = torch.arange(keys.shape[2], device=q.device)
    hidden = column > row
    if window > 0:
        hidden = hidden | (column <= row - window)
    return torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`activation(gate) · up`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (Activation[kind](gate) * up).to(x.dtype)


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best id, the smallest on ties, and its log-probability; -1 and NaN for a row without meaning."""
    best = logits.amax(dim=-1)
    # `argmax` promises no order among equals.
    ids = (logits == best[:, None]).to(torch.int8).argmax(dim=-1)
    logprobs = token_logprobs(logits, ids)
    broken = ~torch.isfinite(best)
    return ids.masked_fill(broken, -1), logprobs.masked_fill(broken, float("nan"))


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-softmax at the given ids."""
    # Not logsumexp: it splits the sum of a lone row among threads, so that the row's bits would depend on the batch.
    return torch.log_softmax(logits, dim=-1).gather(1, ids.long()[:, None])[:, 0]


def race(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The largest logit - log(q), q exponential; in float64 so that every implementation names the same winner."""
    words = token_words(seeds, positions, logits.shape[1])
    uniform = (words.double() + 0.5) * 2.0**-32
    keys = logits.double() - torch.log(-torch.log1p(-uniform))
    best = keys.amax(dim=-1)
    ids = (keys == best[:, None]).to(torch.int8).argmax(dim=-1)
    return ids.masked_fill(~torch.isfinite(best), -1)


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    is_raw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Temperature, race, log-softmax."""
    tempered = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
    scores = torch.where((temperatures == 1.0)[:, None], logits, tempered)
    ids = race(scores, seeds, positions)
    logprobs = token_logprobs(torch.where(is_raw[:, None], logits, scores), ids.clamp(min=0))
    return ids, logprobs.masked_fill(ids < 0, float("nan"))
