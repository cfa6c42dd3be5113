"""Speed of the CPU kernels beside torch, and beside the machine's limits.

    python benchmark/kernels.py [linear attention rows logits] [--threads 2] [--kernels avx2] [--seconds 1.0]

Linear layers are timed as in decoding: all of a model's matrices one after another, so that weights come from memory
and not from a cache. Every figure is the best of the rounds that fit into `--seconds` (a shared machine only ever adds
time) with the median behind it. Rates of memory stand beside a read probe taken just before.
"""

import argparse
import ctypes
import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from weft.kernels import onednn, ops, reference, registry
from weft.kernels.packed import PackedLinear
from weft.runner.pages import lazy_zeros

BLOCK_SIZE = 32
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """What matters of a model: sizes and number of layers."""

    name: str
    num_layers: int
    hidden: int
    feed_forward: int
    query_heads: int
    kv_heads: int
    head_size: int
    vocabulary: int

    def linears(self) -> Iterator[tuple[int, int]]:
        """(inputs, outputs) of every matrix of a pass."""
        query, kv = self.query_heads * self.head_size, self.kv_heads * self.head_size
        for _ in range(self.num_layers):
            yield self.hidden, query + 2 * kv
            yield query, self.hidden
            yield self.hidden, 2 * self.feed_forward
            yield self.feed_forward, self.hidden
        yield self.hidden, self.vocabulary


SMOLLM2 = Shape("SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152)
LLAMA_1B = Shape("Llama-shaped 1.07B", 22, 2048, 5632, 32, 4, 64, 49152)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a round."""

    best: float
    median: float


class Bench:
    """Times functions for a while and prints rows of a Markdown table."""

    def __init__(self, seconds: float, threads: int) -> None:
        self._seconds = seconds
        self.threads = threads

    def time(self, function: Callable[[], object]) -> Timing:
        """At least three rounds after a first one that is not counted."""
        function()
        rounds: list[float] = []
        while len(rounds) < 3 or (sum(rounds) < self._seconds and len(rounds) < 2000):
            before = time.perf_counter()
            function()
            rounds.append(time.perf_counter() - before)
        return Timing(min(rounds), statistics.median(rounds))

    def read_bandwidth(self) -> float:
        """Bytes per second that this many threads read from memory, by searching a byte that is not there."""
        share = 256 << 20
        memory = lazy_zeros((self.threads, share), torch.uint8, torch.device("cpu"))
        memory.fill_(1)
        search = ctypes.CDLL(None).memchr
        search.argtypes, search.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p

        def read_all() -> None:
            readers = [threading.Thread(target=search, args=(row.data_ptr(), 0, share)) for row in memory]
            for reader in readers:
                reader.start()
            for reader in readers:
                reader.join()

        return memory.nbytes / self.time(read_all).best


def row(*cells: object) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def header(title: str, *cells: str) -> None:
    print(f"\n### {title}\n")
    row(*cells)
    row(*["---"] * len(cells))


def milliseconds(timing: Timing) -> str:
    return f"{timing.best * 1e3:.2f} ({timing.median * 1e3:.2f})"


Packing = Callable[[torch.Tensor], PackedLinear]
Product = Callable[[torch.Tensor, PackedLinear], torch.Tensor]


def bench_linears(bench: Bench, shape: Shape, batches: tuple[int, ...], dtype: torch.dtype) -> None:
    """One pass over all linear layers, by implementation and number of rows."""
    probe = bench.read_bandwidth()
    title = f"All linear layers of {shape.name}, {dtype}, {bench.threads} threads, memory read {probe / 1e9:.0f} GB/s"
    header(title, "rows", "kernel", "ms per pass, best (median)", "GB/s of weights", "GFLOP/s")
    forms: list[tuple[str, Packing, Product]] = [
        (registry.kernel_set(), ops.pack_linear, ops.linear),
        ("torch F.linear", reference.pack_linear, reference.linear),
    ]
    if dtype == BFLOAT16 and onednn.is_available():
        forms.insert(1, ("oneDNN packed", onednn.pack_linear, onednn.linear))
    for name, pack, multiply in forms:
        torch.set_num_threads(1 if name.startswith("cpu: avx") else bench.threads)
        weights = [pack(torch.randn(outputs, inputs).to(dtype)) for inputs, outputs in shape.linears()]
        numbers = sum(weight.in_features * weight.out_features for weight in weights)
        for rows in batches:
            inputs = {size: torch.randn(rows, size).to(dtype) for size in {weight.in_features for weight in weights}}

            def one_pass(
                weights: list[PackedLinear] = weights,
                inputs: dict[int, torch.Tensor] = inputs,
                multiply: Product = multiply,
            ) -> None:
                for weight in weights:
                    multiply(inputs[weight.in_features], weight)

            timing = bench.time(one_pass)
            bandwidth = numbers * dtype.itemsize / timing.best / 1e9
            operations = 2 * rows * numbers / timing.best / 1e9
            row(rows, name, milliseconds(timing), f"{bandwidth:.1f}", f"{operations:.0f}")
        del weights


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of equal length in one layer's pool."""

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor

    def attend(self) -> torch.Tensor:
        """The operation under test."""
        return ops.paged_attention(
            self.q,
            self.keys,
            self.values,
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.q.shape[2] ** -0.5,
            max_query_len=int(self.query_starts[1]),
            max_context_len=int(self.context_lens[0]),
        )


def make_batches(shape: Shape, layers: int, sequences: int, context: int, queries: int) -> list[Batch]:
    """One batch per layer, each with a pool of its own and shuffled blocks."""
    blocks_each = -(-context // BLOCK_SIZE)
    pool = (layers, 2, sequences * blocks_each, shape.kv_heads, BLOCK_SIZE, shape.head_size)
    memory = lazy_zeros(pool, BFLOAT16, torch.device("cpu"))
    memory.view(torch.int16).random_(0x3C00, 0x3E00)
    tables = torch.randperm(sequences * blocks_each).int().view(sequences, blocks_each)
    rows = sequences * queries
    return [
        Batch(
            q=torch.randn(rows, shape.query_heads, shape.head_size).to(BFLOAT16),
            keys=memory[layer, 0],
            values=memory[layer, 1],
            block_tables=tables,
            query_starts=torch.arange(0, rows + 1, queries, dtype=torch.int32),
            context_lens=torch.full((sequences,), context, dtype=torch.int32),
        )
        for layer in range(layers)
    ]


def folded_attention(shape: Shape, sequences: int, context: int, queries: int) -> Callable[[], object]:
    """Torch's attention on keys that lie ready for it: unpaged, the query group folded where it is decoding."""
    heads, group = shape.kv_heads, shape.query_heads // shape.kv_heads
    keys, values = (torch.randn(sequences, heads, context, shape.head_size).to(BFLOAT16) for _ in range(2))
    if queries == 1:
        q = torch.randn(sequences, heads, group, shape.head_size).to(BFLOAT16)
        return lambda: F.scaled_dot_product_attention(q, keys, values)
    wide = torch.randn(sequences, heads * group, queries, shape.head_size).to(BFLOAT16)
    return lambda: F.scaled_dot_product_attention(wide, keys, values, is_causal=queries == context, enable_gqa=True)


def bench_attention(bench: Bench) -> None:
    """Decoding and prefill cases of both shapes."""
    probe = bench.read_bandwidth()
    header(
        f"Paged attention, bfloat16, {bench.threads} threads, memory read {probe / 1e9:.0f} GB/s",
        *("case", "ms per layer, best (median)", "GB/s of keys and values", "of the probe", "GFLOP/s", "torch, ms"),
    )
    decode = [(SMOLLM2, 1, 192), (SMOLLM2, 16, 192), (SMOLLM2, 64, 192), (SMOLLM2, 4, 4000), (SMOLLM2, 8, 3560)]
    cases = [(*case, 1) for case in (*decode, (LLAMA_1B, 16, 512))]
    cases += [(SMOLLM2, 1, 128, 128), (SMOLLM2, 1, 4000, 4000), (SMOLLM2, 1, 4000, 256), (LLAMA_1B, 1, 2048, 2048)]
    for shape, sequences, context, queries in cases:
        layer_bytes = 4 * sequences * context * shape.kv_heads * shape.head_size
        layers = max(1, min(shape.num_layers, (256 << 20) // layer_bytes)) if queries == 1 else 1
        batches = make_batches(shape, layers, sequences, context, queries)
        torch.set_num_threads(1)
        timing = bench.time(lambda batches=batches: [batch.attend() for batch in batches])
        torch.set_num_threads(bench.threads)
        torch_timing = bench.time(folded_attention(shape, sequences, context, queries))
        seen = sum(range(context - queries + 1, context + 1))
        operations = 4 * sequences * seen * shape.query_heads * shape.head_size * layers
        bandwidth = layer_bytes * layers / timing.best
        row(
            f"{shape.name}: {sequences} × {queries} of {context}",
            milliseconds(Timing(timing.best / layers, timing.median / layers)),
            f"{bandwidth / 1e9:.1f}" if queries == 1 else "",
            f"{bandwidth / probe:.0%}" if queries == 1 else "",
            f"{operations / timing.best / 1e9:.0f}",
            f"{torch_timing.best * 1e3:.2f}",
        )


def bench_rows(bench: Bench) -> None:
    """Operations that run row by row, in microseconds."""
    header(f"Row operations of SmolLM2, bfloat16, {bench.threads} threads", "rows", "operation", "µs", "reference, µs")
    shape = SMOLLM2
    for rows in (1, 16, 64, 512):
        x, weight = torch.randn(rows, shape.hidden).to(BFLOAT16), torch.randn(shape.hidden).to(BFLOAT16)
        gates = torch.randn(rows, 2 * shape.feed_forward).to(BFLOAT16)
        fused = torch.randn(rows, shape.query_heads + 2 * shape.kv_heads, shape.head_size).to(BFLOAT16)
        q, k, v = fused.split([shape.query_heads, shape.kv_heads, shape.kv_heads], dim=1)
        pool = torch.zeros(2, rows // BLOCK_SIZE + 1, shape.kv_heads, BLOCK_SIZE, shape.head_size, dtype=BFLOAT16)
        table = torch.randn(rows, shape.head_size)
        places = torch.arange(rows, dtype=torch.int32)
        cases: dict[str, Callable[[], object]] = {
            "rms_norm": lambda x=x, weight=weight: ops.rms_norm(x, weight, 1e-5),
            "add_rms_norm": lambda x=x, weight=weight: ops.add_rms_norm(x, x, weight, 1e-5),
            "gated_activation": lambda gates=gates: ops.gated_activation(gates, "silu"),
            "rotary_and_store": lambda q=q, k=k, v=v, pool=pool, table=table, places=places: ops.rotary_and_store(
                q, k, v, table, places, places, pool[0], pool[1]
            ),
        }
        compare(bench, rows, cases)


def bench_logits(bench: Bench) -> None:
    """The sampler's hot parts on a vocabulary of 49,152."""
    header(f"Logits, vocabulary 49,152, {bench.threads} threads", "rows", "operation", "µs", "reference, µs")
    for rows in (1, 16, 64):
        logits = torch.randn(rows, SMOLLM2.vocabulary)
        numbers = torch.arange(rows)
        cases: dict[str, Callable[[], object]] = {
            "greedy": lambda logits=logits: ops.greedy(logits),
            "token_logprobs": lambda logits=logits, numbers=numbers: ops.token_logprobs(logits, numbers),
            "race": lambda logits=logits, numbers=numbers: ops.race(logits, numbers, numbers),
            "draw": lambda logits=logits, numbers=numbers: ops.draw(
                logits, torch.full((len(numbers),), 0.8), numbers, numbers, numbers >= 0
            ),
        }
        compare(bench, rows, cases)


def compare(bench: Bench, rows: int, cases: dict[str, Callable[[], object]]) -> None:
    """Each case with the kernels in use and with the reference."""
    for name, function in cases.items():
        torch.set_num_threads(1)
        ours = bench.time(function)
        torch.set_num_threads(bench.threads)
        with registry.force("reference"):
            plain = bench.time(function)
        row(rows, name, f"{ours.best * 1e6:.1f}", f"{plain.best * 1e6:.1f}")


def main() -> None:
    """Run the groups that the command line names, all by default."""
    groups = ("linear", "attention", "rows", "logits")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=groups, help=f"any of {', '.join(groups)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernels", default=None, help=f"one of {', '.join(registry.kernel_sets())}")
    parser.add_argument("--seconds", type=float, default=1.0, help="per figure")
    arguments = parser.parse_args()
    registry.force(arguments.kernels)
    registry.set_threads(arguments.threads)
    bench = Bench(arguments.seconds, arguments.threads)
    print(f"Kernels: {registry.kernel_set()}; torch {torch.__version__}")
    if "linear" in arguments.groups:
        for shape, dtype in itertools.product((SMOLLM2, LLAMA_1B), (BFLOAT16, torch.float32)):
            if (shape, dtype) != (LLAMA_1B, torch.float32):
                bench_linears(bench, shape, (1, 4, 16, 64, 256) if shape == SMOLLM2 else (1, 16, 64), dtype)
    if "attention" in arguments.groups:
        bench_attention(bench)
    if "rows" in arguments.groups:
        bench_rows(bench)
    if "logits" in arguments.groups:
        bench_logits(bench)


if __name__ == "__main__":
    main()
