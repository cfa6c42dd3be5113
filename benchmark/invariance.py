"""What a fixed order of additions costs: our linear layers beside ones that may choose their order by the batch.

    python benchmark/invariance.py [--rounds 30] [--own]

Our bfloat16 kernels add the products of an output in one order at every number of rows M, which is what makes a token
the same alone and in a batch. oneDNN's choose blocking, splitting and order for each shape and M. For every matrix of
SmolLM2-135M both take turns, pass by pass, on one thread, whose own CPU time is counted, and the best turn of each
counts: what else the machine does hardly shows. A kernel without our restriction
could be the faster of the two for each matrix and M: the cost is the time of ours over the time of that choice, less 1.
It is an upper bound, because whatever else oneDNN does better is counted, too.

`--own` lifts the restriction from our own kernel instead: `free_order.cpp` runs it with every sum split into chains of
additions, and sets the best such form over a whole pass against ours. It is compiled for the run, which takes a minute
or two.

The 8- and 4-bit kernels pay nothing in their products, because sums of integers are exact in any order; their groups'
float sums have one order, as here.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from weft.kernels import onednn, registry
from weft.kernels.cpu import operations
from weft.kernels.cpu.build import build_program
from weft.kernels.packed import PackedLinear

NUM_LAYERS = 30
SHAPES = {
    "query, key, value": (576, 960, NUM_LAYERS),
    "attention output": (576, 576, NUM_LAYERS),
    "gate and up": (576, 3072, NUM_LAYERS),
    "down": (1536, 576, NUM_LAYERS),
    "vocabulary (a third)": (576, 16384, 3),
}
"""Kind → inputs, outputs, matrices of a pass. oneDNN takes the vocabulary in parts that it packs."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)

Linear = Callable[[torch.Tensor, PackedLinear], torch.Tensor]


def main() -> int:
    """One row of a Markdown table per M."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="turns of each; default: 30")
    parser.add_argument(
        "--own", action="store_true", help="beside our own kernel with its sums split, instead of oneDNN"
    )
    arguments = parser.parse_args()
    if arguments.own:
        return _compare_own(arguments.rounds)
    if not onednn.is_available() or not registry.is_batch_invariant(torch.bfloat16):
        sys.stderr.write("needs a CPU that computes in bfloat16, and the compiled kernels\n")
        return 1
    registry.set_threads(1)
    torch.set_num_threads(1)
    sys.stdout.write(
        "| M | ours, ms | oneDNN, ms | free choice, ms | cost of the fixed order |\n|" + " --- |" * 5 + "\n"
    )
    matrices = {kind: list(_packed(*shape)) for kind, shape in SHAPES.items()}
    for rows in ROWS:
        times = [_compare(pairs, rows, arguments.rounds) for pairs in matrices.values()]
        ours, theirs = (sum(side) for side in zip(*times, strict=True))
        chosen = sum(map(min, times))
        sys.stdout.write(f"| {rows} | {ours:.2f} | {theirs:.2f} | {chosen:.2f} | {ours / chosen - 1:.1%} |\n")
        sys.stdout.flush()
    return 0


def _compare_own(rounds: int) -> int:
    """Builds and runs `free_order.cpp`; returns its exit status."""
    with tempfile.TemporaryDirectory() as directory:
        program = build_program(Path(__file__).with_name("free_order.cpp"), Path(directory))
        done = subprocess.run([program, str(rounds)], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return done.returncode
    sys.stdout.write(
        "| M | ours, ms | best with sums split, ms | which | cost of the fixed order |\n|" + " --- |" * 5 + "\n"
    )
    for line in done.stdout.splitlines():
        rows, ours, other, form = line.split("\t")
        sys.stdout.write(f"| {rows} | {ours} | {other} | {form} | {float(ours) / float(other) - 1:+.1%} |\n")
    return 0


def _packed(inputs: int, outputs: int, count: int) -> Iterator[tuple[PackedLinear, PackedLinear]]:
    draw = torch.Generator().manual_seed(inputs)
    for _ in range(count):
        weight = (torch.randn(outputs, inputs, generator=draw) / inputs**0.5).to(torch.bfloat16)
        yield operations.pack_linear(weight), onednn.pack_linear(weight)


def _compare(pairs: list[tuple[PackedLinear, PackedLinear]], rows: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a pass over all matrices of a kind: ours, oneDNN's."""
    x = torch.randn(rows, pairs[0][0].in_features).to(torch.bfloat16)
    sides: tuple[Linear, ...] = (operations.linear, onednn.linear)
    best = [float("inf"), float("inf")]
    for _ in range(rounds):
        for side, linear in enumerate(sides):
            begun = time.thread_time()
            for pair in pairs:
                linear(x, pair[side])
            best[side] = min(best[side], time.thread_time() - begun)
    return 1e3 * best[0], 1e3 * best[1]


if __name__ == "__main__":
    sys.exit(main())
