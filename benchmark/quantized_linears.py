"""All linear layers of a model in one pass, by weight format, beside the least time that this machine allows.

    python benchmark/quantized_linears.py [--rows 1,16,64,256] [--large] [--rounds 15] [--threads 2]

Formats: bf16, int8 (a scale per output), int4 (scale and minimum per 32 inputs, as GGUF's Q4_1) and Q4_0 (scale per 32
inputs). They take turns within a round, so that a change of the machine's mood meets all of them; times are medians,
and the ratio to bf16 is the median of the rounds' ratios. The bound is the larger of the packed bytes at the bandwidth
probed beside, and the operations at the peak of the same kernels; rounding the rows to 8 bits is in the time and not in
the bound. Weights are random, laid out as in decoding: one matrix after the other, from memory.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from kernel_peaks import operations_per_s

from weft.benchmark.host import measure_read_bandwidth
from weft.benchmark.report import markdown_table
from weft.benchmark.roofline import ModelShape
from weft.kernels import ops, registry
from weft.kernels.packed import PackedLinear, QuantizedFormat
from weft.models.quant.rounded import INT8

SMALL = ModelShape(
    num_layers=30, hidden=576, feed_forward=1536, query_heads=9, kv_heads=3, head_size=64, vocabulary=49152
)
LARGE = ModelShape(
    num_layers=22, hidden=2048, feed_forward=5632, query_heads=32, kv_heads=4, head_size=64, vocabulary=49152
)
INT4 = QuantizedFormat(bits=4, group_size=32, has_minimum=True)
Q4_0 = QuantizedFormat(bits=4, group_size=32, zero_point=8)

Pack = Callable[[torch.Tensor], PackedLinear]


def pack_q4_0(weight: torch.Tensor) -> PackedLinear:
    """Random codes: how long a product takes does not depend on them."""
    rows, inputs = weight.shape
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8)
    scales = torch.rand(rows, inputs // Q4_0.group_size).half()
    return ops.pack_codes(codes, scales, None, Q4_0, weight.dtype)


def pack_int8(weight: torch.Tensor) -> PackedLinear:
    return ops.quantize_linear(weight, INT8)


def pack_int4(weight: torch.Tensor) -> PackedLinear:
    return ops.quantize_linear(weight, INT4)


LAYERS: dict[str, Pack] = {"bf16": ops.pack_linear, "int8": pack_int8, "int4": pack_int4, "Q4_0": pack_q4_0}


def pack_model(shape: ModelShape, pack: Pack) -> list[PackedLinear]:
    """Every matrix of a pass in order; the output layer of the 4-bit formats has 8 bits, as in the server."""
    query, kv = shape.query_heads * shape.head_size, shape.kv_heads * shape.head_size
    sizes = [(shape.hidden, query + 2 * kv), (query, shape.hidden)]
    sizes += [(shape.hidden, 2 * shape.feed_forward), (shape.feed_forward, shape.hidden)]
    weights = [pack(_random(*size)) for _ in range(shape.num_layers) for size in sizes]
    pack_output = ops.pack_linear if pack is ops.pack_linear else pack_int8
    return [*weights, pack_output(_random(shape.hidden, shape.vocabulary))]


def _random(inputs: int, outputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs).to(torch.bfloat16)


def pass_seconds(weights: list[PackedLinear], rows_by_size: dict[int, torch.Tensor]) -> float:
    begin = time.perf_counter()
    for weight in weights:
        ops.linear(rows_by_size[weight.in_features], weight)
    return time.perf_counter() - begin


def measure(models: dict[str, list[PackedLinear]], rows: int, rounds: int, peaks: dict[str, float]) -> list[list[str]]:
    """One line of the table per format."""
    sizes = {weight.in_features for weights in models.values() for weight in weights}
    rows_by_size = {size: torch.randn(rows, size).to(torch.bfloat16) for size in sizes}
    for weights in models.values():
        pass_seconds(weights, rows_by_size)
    bandwidth = measure_read_bandwidth()
    times = [{name: pass_seconds(weights, rows_by_size) for name, weights in models.items()} for _ in range(rounds)]
    bandwidth = (bandwidth + measure_read_bandwidth()) / 2 * 1e9
    table = []
    for name, weights in models.items():
        spent_s = statistics.median(spent[name] for spent in times)
        num_bytes = sum(weight.num_bytes for weight in weights)
        operations = 2.0 * rows * sum(weight.in_features * weight.out_features for weight in weights)
        by_bytes_s, by_operations_s = num_bytes / bandwidth, operations / peaks["bf16" if name == "bf16" else "int8"]
        bound_s = max(by_bytes_s, by_operations_s)
        ratio = statistics.median(spent["bf16"] / spent[name] for spent in times)
        table.append(
            [
                f"{rows}, {name}",
                f"{spent_s * 1e3:.2f}",
                f"{bound_s * 1e3:.2f}",
                "bytes" if by_bytes_s > by_operations_s else "operations",
                f"{bound_s / spent_s:.0%}",
                f"{num_bytes / spent_s / 1e9:.0f}",
                f"{operations / spent_s / 1e9:,.0f}",
                f"{ratio:.2f}",
                f"{bandwidth / 1e9:.0f}",
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,16,64,256")
    parser.add_argument("--large", action="store_true", help="the 1.07B shape instead of SmolLM2-135M's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    registry.set_threads(1)
    peaks = {name: arguments.threads * operations_per_s(name == "int8", 0.5) for name in ("bf16", "int8")}
    registry.set_threads(arguments.threads)
    print(
        f"{registry.kernel_set()}, {arguments.threads} threads; peaks " + str({k: f"{v:.3g}" for k, v in peaks.items()})
    )
    shape = LARGE if arguments.large else SMALL
    models = {name: pack_model(shape, pack) for name, pack in LAYERS.items()}
    lines = [
        line for rows in map(int, arguments.rows.split(",")) for line in measure(models, rows, arguments.rounds, peaks)
    ]
    header = [
        "rows, format",
        "ms",
        "bound ms",
        "bound by",
        "of the bound",
        "GB/s",
        "Gop/s",
        "bf16 / this",
        "probe GB/s",
    ]
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
