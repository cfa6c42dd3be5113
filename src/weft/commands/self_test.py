"""Every operation of every kernel set of this machine against its reference, on small shapes.

`weft doctor` runs this (`python -m weft.commands.self_test`) as a process of its own, because it needs torch and
because kernels that do not suit the processor end theirs with a signal. Prints one JSON object.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch

from weft.kernels import ops, reference, registry
from weft.kernels.packed import PackedLinear

_DTYPES = (torch.float32, torch.bfloat16)
_SHIFT = 1e-6
"""Keeps the relative error of numbers near zero finite."""
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest |got - expected| / (|expected| + mean |expected|) allowed: far above rounding (2⁻²⁴ and 2⁻⁸ per operation),
far below what a wrong kernel does. The tests of the project judge by tighter, derived bounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationReport:
    """One operation of one kernel set in one dtype."""

    kernel_set: str
    operation: str
    dtype: str
    implementation: str
    error: float | None
    """Largest relative error; None when results are no numbers, or differ where they must be equal."""
    limit: float

    @property
    def is_good(self) -> bool:
        """Whether the error is within the limit."""
        return self.error is not None and self.error <= self.limit


Tensors = tuple[torch.Tensor, ...]


def run() -> list[OperationReport]:
    """Compare every operation of every kernel set in every dtype it takes."""
    reports = []
    compiled: list[str | None] = [name for name in registry.kernel_sets() if name != "reference"]
    # Without compiled kernels some operations still run in a library's instead of the reference.
    for kernel_set in compiled or [None]:
        with registry.force(kernel_set):
            torch.manual_seed(0)
            reports += [
                _report(kernel_set or "auto", operation, case, dtype)
                for operation, case in _CASES.items()
                for dtype in (_DTYPES if case.takes_dtypes else (torch.float32,))
            ]
    return reports


def _report(kernel_set: str, operation: str, case: "_Case", dtype: torch.dtype) -> OperationReport:
    got, expected = case.run(dtype)
    return OperationReport(
        kernel_set=kernel_set,
        operation=operation,
        dtype=str(dtype).removeprefix("torch."),
        implementation=_implementation(operation, dtype, has_pool=case.has_pool),
        error=_error(got, expected),
        limit=0.0 if case.is_exact else LIMITS[dtype],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    run: Callable[[torch.dtype], tuple[Tensors, Tensors]]
    takes_dtypes: bool = True
    has_pool: bool = False
    is_exact: bool = False


def _error(got: Tensors, expected: Tensors) -> float | None:
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        if not one.is_floating_point():
            if not torch.equal(one.long(), other.long()):
                return None
            continue
        wanted = other.double()
        scale = wanted.abs() + wanted.abs().mean() + _SHIFT
        error = float(((one.double() - wanted).abs() / scale).max())
        if not math.isfinite(error):
            return None
        worst = max(worst, error)
    return worst


def _implementation(operation: str, dtype: torch.dtype, *, has_pool: bool) -> str:
    case = registry.Case("cpu", dtype, _HEAD_SIZE if has_pool else 0, _BLOCK_SIZE if has_pool else 0)
    return registry.find(operation, case).name


_HEAD_SIZE, _BLOCK_SIZE, _NUM_BLOCKS = 64, 32, 6
_NUM_HEADS, _NUM_KV_HEADS = 6, 2
_LENGTHS = (1, 40, 3)
"""New tokens of three sequences: a decode, a prefill over a block's border, a chunk."""
_CONTEXTS = (50, 40, 35)


def _draw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def _linear(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    x, weight, bias = _draw(dtype, 5, 64), _draw(dtype, 96, 64), _draw(dtype, 96)
    return (ops.linear(x, ops.pack_linear(weight, bias)),), (reference.linear(x, _rows(weight, bias)),)


def _embedding(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    weight, ids = _draw(dtype, 96, 64), torch.tensor([0, 95, 7])
    return (ops.embedding(ids, ops.pack_linear(weight)),), (reference.embedding(ids, _rows(weight, None)),)


def _rows(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear:
    return reference.pack_linear(weight, bias)


def _take_rows(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    x, rows = _draw(dtype, 5, 96), torch.tensor([4, 0, 4], dtype=torch.int32)
    return (ops.take_rows(x, rows),), (reference.take_rows(x, rows),)


def _softcap(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    got = 40 * _draw(dtype, 4, 1000)
    expected = got.clone()
    ops.softcap(got, 30.0)
    reference.softcap(expected, 30.0)
    return (got,), (expected,)


def _rms_norm(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    x, weight = _draw(dtype, 5, 96), _draw(dtype, 96)
    return (ops.rms_norm(x, weight, 1e-5),), (reference.rms_norm(x, weight, 1e-5),)


def _add_rms_norm(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    x, residual, weight = _draw(dtype, 5, 96), _draw(dtype, 5, 96), _draw(dtype, 96)
    return ops.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5), reference.add_rms_norm(
        x, residual, weight, 1e-5
    )


def _rotary_and_store(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    num_tokens = 9
    q = _draw(dtype, num_tokens, _NUM_HEADS, _HEAD_SIZE)
    k, v = (_draw(dtype, num_tokens, _NUM_KV_HEADS, _HEAD_SIZE) for _ in range(2))
    angles = torch.rand(64, _HEAD_SIZE // 2) * 6
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).contiguous()
    positions = torch.arange(3, 3 + num_tokens, dtype=torch.int32)
    kv_slots = torch.arange(28, 28 + num_tokens, dtype=torch.int32)
    results = []
    for rotate in (ops.rotary_and_store, reference.rotary_and_store):
        rotated, (keys, values) = q.clone(), _pool(dtype, fill=False)
        rotate(rotated, k.clone(), v.clone(), cos_sin, positions, kv_slots, keys, values)
        results.append((rotated, keys, values))
    return results[0], results[1]


def _pool(dtype: torch.dtype, *, fill: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (_NUM_BLOCKS, _NUM_KV_HEADS, _BLOCK_SIZE, _HEAD_SIZE)
    keys, values = (_draw(dtype, *shape) if fill else torch.zeros(shape, dtype=dtype) for _ in range(2))
    return keys, values


def _paged_attention(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    q = _draw(dtype, sum(_LENGTHS), _NUM_HEADS, _HEAD_SIZE)
    keys, values = _pool(dtype, fill=True)
    tables = torch.tensor([[0, 1], [4, 5], [3, 2]], dtype=torch.int32)
    starts = torch.tensor([0, 1, 41, 44], dtype=torch.int32)
    contexts = torch.tensor(_CONTEXTS, dtype=torch.int32)
    got, expected = (
        attend(
            q,
            keys,
            values,
            tables,
            starts,
            contexts,
            _HEAD_SIZE**-0.5,
            max_query_len=max(_LENGTHS),
            max_context_len=max(_CONTEXTS),
        )
        for attend in (ops.paged_attention, reference.paged_attention)
    )
    return (got,), (expected,)


def _gated_activation(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    x = _draw(dtype, 5, 192)
    return (
        tuple(ops.gated_activation(x, kind) for kind in ops.ACTIVATIONS),
        tuple(reference.gated_activation(x, kind) for kind in ops.ACTIVATIONS),
    )


def _greedy(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    logits = _draw(dtype, 4, 1000)
    return ops.greedy(logits), reference.greedy(logits)


def _token_logprobs(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    logits, ids = _draw(dtype, 4, 1000), torch.tensor([0, 999, 5, 77])
    return (ops.token_logprobs(logits, ids),), (reference.token_logprobs(logits, ids),)


def _race(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    logits, seeds, positions = _draw(dtype, 4, 1000), torch.tensor([1, 2, 3, -4]), torch.tensor([0, 9, 5, 77])
    return (ops.race(logits, seeds, positions),), (reference.race(logits, seeds, positions),)


def _drawn(dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    logits, seeds, positions = _draw(dtype, 4, 1000), torch.tensor([1, 2, 3, -4]), torch.tensor([0, 9, 5, 77])
    asked = torch.tensor([0.5, 1.0, 2.0, 0.7]), seeds, positions, torch.tensor([True, True, False, False])
    return ops.draw(logits, *asked), reference.draw(logits, *asked)


_CASES = {
    "linear": _Case(run=_linear),
    "embedding": _Case(run=_embedding),
    "take_rows": _Case(run=_take_rows),
    "softcap": _Case(run=_softcap, takes_dtypes=False),
    "rms_norm": _Case(run=_rms_norm),
    "add_rms_norm": _Case(run=_add_rms_norm),
    "rotary_and_store": _Case(run=_rotary_and_store, has_pool=True),
    "paged_attention": _Case(run=_paged_attention, has_pool=True),
    "gated_activation": _Case(run=_gated_activation),
    "greedy": _Case(run=_greedy, takes_dtypes=False),
    "token_logprobs": _Case(run=_token_logprobs, takes_dtypes=False),
    "race": _Case(run=_race, takes_dtypes=False, is_exact=True),
    "draw": _Case(run=_drawn, takes_dtypes=False),
}


def _facts() -> Iterator[tuple[str, object]]:
    yield "torch", torch.__version__
    yield "kernel_set", registry.kernel_set()
    yield "kernel_sets", list(registry.kernel_sets())
    yield "notice", registry.notice()
    yield "gpus", [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def main() -> int:
    """Run as a program. Returns 1 when an operation is wrong."""
    reports = run()
    operations = [{**asdict(report), "is_good": report.is_good} for report in reports]
    sys.stdout.write(json.dumps({**dict(_facts()), "operations": operations}) + "\n")
    return 0 if all(report.is_good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
