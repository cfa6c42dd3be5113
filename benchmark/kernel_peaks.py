"""Operations per second that our own kernels reach at best here, as JSON: what loads are held against.

    python benchmark/kernel_peaks.py        # {"bf16": 1.02e12, "int8": 1.9e12}

One matrix that stays in the cache and many rows on one thread, the best of many rounds since others only ever add time;
times the number of cores, which share nothing that such a product needs.
"""

import argparse
import json
import os
import time

import torch

from weft.kernels import ops, registry
from weft.models.quant.rounded import INT8

ROWS, INPUTS, OUTPUTS = 240, 1024, 2048


def operations_per_s(quantized: bool, seconds: float) -> float:  # noqa: FBT001
    weight = torch.randn(OUTPUTS, INPUTS).to(torch.bfloat16)
    packed = ops.quantize_linear(weight, INT8) if quantized else ops.pack_linear(weight)
    x = torch.randn(ROWS, INPUTS).to(torch.bfloat16)
    best = float("inf")
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        begin = time.perf_counter()
        ops.linear(x, packed)
        best = min(best, time.perf_counter() - begin)
    return 2.0 * ROWS * INPUTS * OUTPUTS / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0)
    arguments = parser.parse_args()
    registry.set_threads(1)
    names = {"bf16": False, "int8": True}
    peaks = {
        name: arguments.cores * operations_per_s(quantized, arguments.seconds) for name, quantized in names.items()
    }
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
