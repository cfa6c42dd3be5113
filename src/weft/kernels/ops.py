"""The list of operations: signature, shapes, tolerance. Each call picks an implementation from `registry`.

Shape letters: T tokens in the step · S sequences · N blocks · B tokens per block · Hq Hkv heads · D head size ·
E hidden size · F feed-forward size · V vocabulary · I, O inputs and outputs of a linear layer · R rotated part of D ·
P positions in the rotary table · N' longest block table of the step · W width of the pool, D or more.

Rules for all: the last dimension of every tensor is contiguous; nothing is copied or converted behind the caller's
back, so a tensor of the wrong dtype or layout is a ValueError; floating results are computed in float32 and rounded
once. Tolerances against `reference` are in `TOLERANCES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from weft.kernels import kv_layout, recording
from weft.kernels.packed import PackedLinear, QuantizedFormat
from weft.kernels.registry import Case, find

ACTIVATIONS = ("silu", "gelu_tanh")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far an implementation may be from the exact result; `bound` is the formula.

    rounding      in units of eps(output dtype) · |exact|: the final rounding
    accumulation  in units of 2⁻²⁴ · magnitude: additions in another order, elementary functions
    narrow        in units of eps(dtype) · magnitude, for dtypes below float32: what is rounded on the way
    """

    rounding: float
    accumulation: float
    narrow: float = 0.0

    def bound(self, exact: torch.Tensor, magnitude: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Largest error allowed per element, float64.

        `magnitude` is the sum of the absolute values of the terms that add up to the element.
        """
        eps = torch.finfo(dtype).eps
        narrow = 0.0 if dtype == torch.float32 else self.narrow * eps
        return self.rounding * eps * exact.abs() + (self.accumulation * 2.0**-24 + narrow) * magnitude


TOLERANCES = {
    # One rounding of the result differs by at most one unit in the last place. n additions in another order differ by
    # at most n · 2⁻²⁴ of the magnitude (Higham, "Accuracy and Stability of Numerical Algorithms", section 4.2) and
    # by about √n in practice, which is what is allowed: 64 = √4096.
    "linear": Tolerance(1.0, 64.0),
    # The sum of squares is a sum of positive terms: √n of it, halved by the root.
    "rms_norm": Tolerance(1.0, 16.0),
    # The sum is rounded before it is normalized, half a unit of each element.
    "add_rms_norm": Tolerance(1.0, 16.0, narrow=1.0),
    "rotary_and_store": Tolerance(1.0, 4.0),
    # Softmax weights are rounded to the dtype before they meet the values: half a unit of each.
    "paged_attention": Tolerance(1.0, 64.0, narrow=0.5),
    "gated_activation": Tolerance(1.0, 16.0),
    # Absolute error of a log-probability: magnitude is 1 + |log-probability|.
    "greedy": Tolerance(1.0, 64.0),
    "token_logprobs": Tolerance(1.0, 64.0),
    # Exact: the same bits, the same ids.
    "embedding": Tolerance(0.0, 0.0),
    "take_rows": Tolerance(0.0, 0.0),
    # Far from zero tanh is flat: its own error is absolute.
    "softcap": Tolerance(2.0, 16.0),
    "race": Tolerance(0.0, 0.0),
    # Ids are exact; of the rest as of `token_logprobs`.
    "draw": Tolerance(1.0, 64.0),
}


def pack_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> PackedLinear:
    """Lays out a weight for `linear`. Drop the original afterwards: no second copy is needed.

    Shapes  weight `[O, I]`, bias `[O]` → PackedLinear
    """
    _require(weight.dim() == 2 and weight.stride(1) == 1, "weight", "be [O, I] with contiguous rows", weight)
    if bias is not None:
        _require(bias.shape == (weight.shape[0],), "bias", f"be [{weight.shape[0]}]", bias)
    packed: PackedLinear = _find("pack_linear", weight)(weight, bias)
    return packed


def quantize_linear(
    weight: torch.Tensor,
    form: QuantizedFormat,
    bias: torch.Tensor | None = None,
    *,
    first_column: int = 0,
    in_features: int | None = None,
) -> PackedLinear:
    """Rounds a weight to few bits and lays it out for `linear`, which then also rounds the rows it multiplies.

    A scale per output is max|w| / 127 of the whole row, whatever columns are kept, so that ranks hold
    slices of one matrix. With minima the range of each group of the kept columns is divided evenly.

    Shapes  weight `[O, I]` float32 or bfloat16, bias `[O]` → PackedLinear of columns first_column … + in_features
    """
    size = weight.shape[1] - first_column if in_features is None else in_features
    _require(weight.dim() == 2 and weight.stride(1) == 1, "weight", "be [O, I] with contiguous rows", weight)
    _require(first_column >= 0 and first_column + size <= weight.shape[1], "weight", "have the columns", weight)
    if not (form.is_per_output or form.has_minimum):
        raise ValueError(f"`form` must have one scale per output, or minima. Given: {form}")
    packed: PackedLinear = _find("quantize_linear", weight)(weight, form, bias, first_column, size)
    return packed


def pack_codes(
    codes: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None,
    form: QuantizedFormat,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> PackedLinear:
    """Lays out codes that a file brought, for `linear` of rows in `dtype`.

    Shapes  codes `[O, I]` uint8, scales and minima `[O, G]` float16, bias `[O]` → PackedLinear
    """
    groups = (codes.shape[0], -(-codes.shape[1] // form.group_size))
    _require(codes.dtype == torch.uint8 and codes.is_contiguous(), "codes", "be contiguous [O, I] uint8", codes)
    if form.is_per_output or form.has_minimum != (minima is not None):
        raise ValueError(f"`form` must have scales per group, and minima where they are given. Given: {form}")
    for name, part in (("scales", scales), ("minima", minima)):
        if part is not None:
            is_right = part.shape == groups and part.dtype == torch.float16 and part.is_contiguous()
            _require(is_right, name, f"be contiguous {list(groups)} float16", part)
    case = Case(codes.device.type, dtype)
    function = recording.observed(find("pack_codes", case))
    packed: PackedLinear = function(codes, scales, minima, form, dtype, bias)
    return packed


def linear(
    x: torch.Tensor, packed: PackedLinear, out_dtype: torch.dtype | None = None, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """`x Wᵀ + b`, plus `residual` when given, in `out_dtype` (default: that of x).

    Shapes  x `[T, I]`, residual `[T, O]` → `[T, O]`
    """
    _require(x.dim() == 2 and x.shape[1] == packed.in_features, "x", f"be [T, {packed.in_features}]", x)
    _require(x.dtype == packed.dtype, "x", f"have the weight's dtype {packed.dtype}", x)
    _require_rows("x", x)
    if residual is not None:
        expected = (x.shape[0], packed.out_features)
        _require(residual.shape == expected, "residual", f"be {list(expected)}", residual)
    y: torch.Tensor = _find_reader("linear", packed)(x, packed, out_dtype, residual)
    return y


def embedding(token_ids: torch.Tensor, packed: PackedLinear, scale: float = 1.0) -> torch.Tensor:
    """Rows of a packed weight, which may be the output layer's, times a factor rounded to the dtype.

    Shapes  token_ids `[T]` int32 or int64, weight `[V, E]` → `[T, E]`
    """
    factor = 1.0 if scale == 1.0 else torch.tensor(scale, dtype=packed.dtype).item()
    rows: torch.Tensor = _find_reader("embedding", packed)(token_ids, packed, factor)
    return rows


def take_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of x, in the order given.

    Shapes  x `[T, E]`, rows `[n]` int32, 0 ≤ row < T → `[n, E]`
    """
    _require_rows("x", x)
    _require_index("rows", rows)
    taken: torch.Tensor = _find("take_rows", x)(x, rows)
    return taken


def softcap(x: torch.Tensor, cap: float) -> None:
    """Replaces x by `cap · tanh(x / cap)`.

    Shapes  x `[S, V]` float32
    Source  Gemma Team 2024, arXiv 2408.00118, section 2
    """
    _require_logits(x)
    _find("softcap", x)(x, cap)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """`x / sqrt(mean(x²) + eps) · (weight + weight_offset)` over the last dimension.

    Shapes  x `[T, E]` or `[T, H, E]` (a normalization per head), weight `[E]` → the shape of x
    Source  Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019)
    """
    _require_norm(x, weight)
    y: torch.Tensor = _find("rms_norm", x)(x, weight, eps, weight_offset)
    return y


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm(x + residual)` and the sum, rounded to the dtype before it is normalized.

    Shapes  x, residual `[T, E]`, weight `[E]` → (normed `[T, E]`, sum `[T, E]`)
    """
    _require_norm(x, weight)
    _require(residual.shape == x.shape and residual.dtype == x.dtype, "residual", "match x", residual)
    both: tuple[torch.Tensor, torch.Tensor] = _find("add_rms_norm", x)(x, residual, weight, eps, weight_offset)
    return both


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
    """Rotates q in place, writes rotated k, and v, to the pool at `kv_slots` (block · B + offset; negative: nowhere).

    Dimension i < R/2 pairs with i + R/2 (half-split layout); dimensions from R on pass through.

    Shapes  q `[T, Hq, D]`, k and v `[T, Hkv, D]` (rows may be views into a wider tensor), cos_sin `[P, R]` float32
            (R/2 cosines, then R/2 sines), positions and kv_slots `[T]` int32, keys and values `[N, Hkv, B, W]`, see
            `kv_layout`; the compiled kernels want B to be a multiple of 16
    Source  Su et al., "RoFormer" (2021); layout of transformers' `rotate_half`
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _require(x.dim() == 3 and x.stride(1) == x.shape[2], name, "be [T, H, D] with contiguous heads", x)
        _require_rows(name, x)
    _require(cos_sin.dtype == torch.float32 and cos_sin.is_contiguous(), "cos_sin", "be contiguous float32", cos_sin)
    _require(cos_sin.shape[1] % 2 == 0 and cos_sin.shape[1] <= q.shape[2], "cos_sin", "be [P, R], R even, ≤ D", cos_sin)
    _require_index("positions", positions)
    _require_index("kv_slots", kv_slots)
    _require_pool(q, keys, values)
    _find("rotary_and_store", q, keys)(q, k, v, cos_sin, positions, kv_slots, keys, values)


def paged_attention(  # noqa: PLR0913, PLR0917 - one attention operation for every phase
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
    """Causal attention of packed rows over paged keys and values: prefill, chunk and decode alike.

    The rows of sequence s stand at positions context_lens[s] - length … context_lens[s] - 1; a row sees positions up
    to its own, and only the newest `window` of them when window > 0. Scores are `scale · q·k`, then
    `softcap · tanh(score / softcap)` when softcap > 0.

    Shapes  q `[T, Hq, D]`, keys and values `[N, Hkv, B, W]` as `rotary_and_store` writes them, block_tables `[S, N']`
            int32, query_starts `[S+1]` int32, context_lens `[S]` int32 → `[T, Hq, D]`; query head h reads key head
            h div (Hq/Hkv)
    Source  online softmax: Milakov, Gimelshein (2018); paging: Kwon et al., "PagedAttention" (2023)
    """
    _require(q.dim() == 3 and q.stride(1) == q.shape[2], "q", "be [T, Hq, D] with contiguous heads", q)
    _require_rows("q", q)
    _require_pool(q, keys, values)
    _require(q.shape[1] % keys.shape[1] == 0, "q", f"have a multiple of {keys.shape[1]} heads", q)
    # Scores are compared before they are scaled, and a cap divides.
    for option, number, is_right in (("scale", scale, scale > 0.0), ("softcap", softcap, softcap >= 0.0)):
        if not (is_right and math.isfinite(number)):
            raise ValueError(f"`{option}` must be finite and {'>' if option == 'scale' else '>='} 0. Given: {number}")
    if window < 0:
        raise ValueError(f"`window` must be >= 0; 0 sees all positions. Given: {window}")
    _require_index("block_tables", block_tables)
    _require_index("query_starts", query_starts)
    _require_index("context_lens", context_lens)
    attended: torch.Tensor = _find("paged_attention", q, keys)(
        q,
        keys,
        values,
        block_tables,
        query_starts,
        context_lens,
        scale,
        softcap,
        window,
        max_query_len=max_query_len,
        max_context_len=max_context_len,
    )
    return attended


def gated_activation(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`activation(gate) · up` of a fused projection, gate first.

    Shapes  x `[T, 2F]` → `[T, F]`; kind `silu` or `gelu_tanh`
    Source  Shazeer, "GLU Variants Improve Transformer" (2020)
    """
    _require(x.dim() == 2 and x.shape[1] % 2 == 0, "x", "be [T, 2F]", x)
    _require_rows("x", x)
    if kind not in ACTIVATIONS:
        raise ValueError(f"`kind` must be one of {', '.join(ACTIVATIONS)}. Given: {kind}")
    y: torch.Tensor = _find("gated_activation", x)(x, kind)
    return y


def greedy(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The best id per row (the smallest on ties) and its log-probability in the softmax of the row.

    A row with a NaN, an infinity above, or nothing but -inf gives id -1 and log-probability NaN.

    Shapes  logits `[S, V]` float32 → `[S]` int64, `[S]` float32
    """
    _require_logits(logits)
    both: tuple[torch.Tensor, torch.Tensor] = _find("greedy", logits)(logits)
    return both


def token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Log-softmax of each row at one id.

    Shapes  logits `[S, V]` float32, ids `[S]` int64, 0 ≤ id < V → `[S]` float32
    """
    _require_logits(logits)
    _require(ids.shape == logits.shape[:1] and ids.dtype == torch.int64, "ids", "be [S] int64", ids)
    logprobs: torch.Tensor = _find("token_logprobs", logits)(logits, ids)
    return logprobs


def race(logits: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """A sample from the softmax of each row: the id with the smallest q / p, q exponential by (seed, position, id).

    Defined on real numbers, so that every device and implementation names the same id: with w the random word of
    `philox.token_words` (0 … 2³²-1), `q = -log1p(-(w + ½) / 2³²)` and the winner is the largest `logit - log(q)`,
    the smallest id on ties. Logits of -inf never win; a row with a NaN, +inf, or nothing but -inf gives -1.

    Shapes  logits `[S, V]` float32, seeds `[S]` int64 (bits of an unsigned 64-bit seed), positions `[S]` int64, the
            absolute position the token will stand at → `[S]` int64
    """
    _require_logits(logits)
    for name, x in (("seeds", seeds), ("positions", positions)):
        _require(x.shape == logits.shape[:1] and x.dtype == torch.int64, name, "be [S] int64", x)
    ids: torch.Tensor = _find("race", logits)(logits, seeds, positions)
    return ids


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    is_raw: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sample of each row at its temperature, and its log-probability: in the row itself, or at that temperature.

    The same bits as, one after the other, subtracting a row's best logit and dividing by the temperature (a row of
    temperature 1 stays as it is), `race`, and `token_logprobs`. A row that `race` gives -1 has log-probability NaN.

    Shapes  logits `[S, V]` float32, temperatures `[S]` float32 > 0, seeds and positions as for `race`, is_raw `[S]`
            bool: the log-probability before the temperature → `[S]` int64, `[S]` float32
    """
    _require_logits(logits)
    for name, x, dtype in (
        ("temperatures", temperatures, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
        ("is_raw", is_raw, torch.bool),
    ):
        _require(x.shape == logits.shape[:1] and x.dtype == dtype and x.is_contiguous(), name, f"be [S] {dtype}", x)
    both: tuple[torch.Tensor, torch.Tensor] = _find("draw", logits)(logits, temperatures, seeds, positions, is_raw)
    return both


def _find(operation: str, x: torch.Tensor, pool: torch.Tensor | None = None) -> Callable[..., Any]:
    if pool is None:
        return recording.observed(find(operation, Case(x.device.type, x.dtype)))
    case = Case(x.device.type, x.dtype, head_size=x.shape[2], block_size=pool.shape[2], kv_dtype=pool.dtype)
    return recording.observed(find(operation, case))


def _find_reader(operation: str, packed: PackedLinear) -> Callable[..., Any]:
    case = Case(packed.data.device.type, packed.dtype, layout=packed.layout)
    return recording.observed(find(operation, case))


def _require(condition: bool, name: str, rule: str, given: torch.Tensor) -> None:  # noqa: FBT001
    if not condition:
        raise ValueError(
            f"`{name}` must {rule}. Given: shape {list(given.shape)}, strides {list(given.stride())}, {given.dtype}"
        )


def _require_rows(name: str, x: torch.Tensor) -> None:
    _require(x.stride(-1) == 1 or x.shape[-1] == 1, name, "be contiguous in the last dimension", x)


def _require_norm(x: torch.Tensor, weight: torch.Tensor) -> None:
    _require_rows("x", x)
    _require(weight.shape == x.shape[-1:] and weight.is_contiguous(), "weight", f"be [{x.shape[-1]}]", weight)


def _require_index(name: str, x: torch.Tensor) -> None:
    _require(x.dtype == torch.int32 and x.is_contiguous(), name, "be contiguous int32", x)


def _require_pool(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    for name, pool in (("keys", keys), ("values", values)):
        _require(pool.dim() == 4 and pool.is_contiguous(), name, "be contiguous [N, Hkv, B, W]", pool)
        width = kv_layout.pool_width(q.shape[2], pool.dtype)
        _require(pool.shape[3] == width, name, f"be {width} wide for the head size {q.shape[2]} of q", pool)
    is_alike = values.shape == keys.shape and values.dtype == keys.dtype
    _require(is_alike, "values", f"be {list(keys.shape)} {keys.dtype}, as keys are", values)


def _require_logits(logits: torch.Tensor) -> None:
    _require(logits.dim() == 2 and logits.dtype == torch.float32, "logits", "be [S, V] float32", logits)
    _require_rows("logits", logits)
