"""Time of one decode step of a model on the CPU: the recorded program beside operations one by one.

    python benchmark/decode_step.py MODEL [--rows 1,16,64] [--context 192] [--shared 0] [--dtype bfloat16]
                                    [--quantize int8|int4] [--operations] [--hog]

Both forms take turns, step by step, so that a change of the machine's mood meets both; the median of their ratios says
more than either time on a shared machine. Beside them stands the share of the machine's limit that the program reaches:
weights and caches at the bandwidth probed just then, operations at the kernels' peak. `--shared` tokens of context are
the same blocks for all rows; `--operations` prints where the program's time goes; `--hog` adds rounds beside a process
that never rests, which must not make a step more than 2.2 times slower.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from kernel_peaks import operations_per_s

from weft.benchmark.host import measure_read_bandwidth
from weft.benchmark.roofline import WEIGHT_FORMATS, Machine, ModelShape, Work, decode_step
from weft.kernels import registry as kernel_registry
from weft.models.decoder import Decoder, load_decoder
from weft.models.forward_batch import ForwardBatch
from weft.models.quant.rounded import DEFAULT_INT4_GROUP_SIZE, rounded_scheme
from weft.models.registry import describe
from weft.parallel.groups import SoloGroup
from weft.runner.graphs import ReplayedDecoder, record_decoder
from weft.runner.kv_pool import KvPool

BLOCK_SIZE = 32


def decode_batch(decoder: Decoder, rows: int, context: int, shared: int, dtype: torch.dtype) -> ForwardBatch:
    """One token for each of `rows` sequences of `context` tokens, whose first `shared` tokens are the same blocks."""
    blocks_each = -(-context // BLOCK_SIZE)
    kv_heads, head_dim = decoder.kv_shapes[0]
    pool = KvPool(
        num_layers=len(decoder.kv_shapes),
        num_blocks=rows * blocks_each,
        num_kv_heads=kv_heads,
        block_size_tokens=BLOCK_SIZE,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    draw = torch.Generator().manual_seed(0)
    for layer in pool.layers:
        layer.keys.normal_(generator=draw)
        layer.values.normal_(generator=draw)
    tables = torch.arange(rows * blocks_each, dtype=torch.int32).view(rows, blocks_each)
    tables[:, : shared // BLOCK_SIZE] = tables[0, : shared // BLOCK_SIZE].clone()
    return ForwardBatch(
        token_ids=torch.randint(0, decoder.spec.vocab_size, (rows,), dtype=torch.int32, generator=draw),
        positions=torch.full((rows,), context - 1, dtype=torch.int32),
        kv_slots=tables[:, -1].contiguous() * BLOCK_SIZE + (context - 1) % BLOCK_SIZE,
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), context, dtype=torch.int32),
        block_tables=tables,
        logit_rows=torch.arange(rows, dtype=torch.int32),
        kv=pool.layers,
        max_context_len=context,
        max_query_len=1,
    )


def milliseconds(step: Callable[[ForwardBatch], torch.Tensor], batch: ForwardBatch) -> float:
    begin = time.perf_counter_ns()
    step(batch)
    return (time.perf_counter_ns() - begin) / 1e6


def spin() -> None:
    """A neighbour that never rests."""
    while True:
        pass


@contextmanager
def neighbour(*, is_there: bool) -> Iterator[None]:
    if not is_there:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=spin, daemon=True)
    process.start()
    time.sleep(1.0)
    try:
        yield
    finally:
        process.kill()
        process.join()


def compare(decoder: Decoder, replayed: ReplayedDecoder, batch: ForwardBatch, steps: int) -> tuple[float, float, float]:
    """(program ms, one by one ms, median of one by one / program)."""
    for _ in range(3):
        replayed.forward(batch)
        decoder.forward(batch)
    pairs = [(milliseconds(replayed.forward, batch), milliseconds(decoder.forward, batch)) for _ in range(steps)]
    program, one_by_one = (statistics.median(column) for column in zip(*pairs, strict=True))
    return program, one_by_one, statistics.median(slow / fast for fast, slow in pairs)


def limit_of(decoder: Decoder, rows: int, context: int, shared: int, weights: str) -> Work:
    """What a step must read and do with weights of a format; shared tokens are read once."""
    layer = decoder.spec.layers[0]
    shape = ModelShape(
        num_layers=len(decoder.spec.layers),
        hidden=decoder.spec.hidden_size,
        feed_forward=layer.ffn.intermediate_size,
        query_heads=layer.mixer.num_heads,
        kv_heads=layer.mixer.num_kv_heads,
        head_size=layer.mixer.head_dim,
        vocabulary=decoder.spec.vocab_size,
    )
    work = decode_step(shape, WEIGHT_FORMATS[weights], rows, context)
    return replace(work, num_bytes=work.num_bytes - (rows - 1) * shared * shape.kv_bytes_per_token)


def share_of_limit(step: Work, spent_ms: float, gb_per_s: float, peaks: dict[str, float]) -> str:
    machine = Machine(bytes_per_s=gb_per_s * 1e9, peaks=peaks)
    return f"{step.seconds(machine) * 1e3 / spent_ms:.0%} of the limit at {gb_per_s:.0f} GB/s"


def print_operations(replayed: ReplayedDecoder, batch: ForwardBatch, steps: int) -> None:
    """Median milliseconds of each kind of operation."""
    rounds = [replayed.time_operations(batch) for _ in range(steps)]
    medians = {label: statistics.median(spent[label] for spent in rounds) / 1e6 for label in rounds[0]}
    total = sum(medians.values())
    for label, duration in medians.items():
        print(f"    {label:24} {duration:8.3f} ms {100 * duration / total:5.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", default="1,16,64")
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--shared", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--quantize", choices=("int8", "int4"), help="round the weights while they are loaded")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--hog", action="store_true")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    device, group = torch.device("cpu"), SoloGroup()
    kernel_registry.set_threads(1)
    peaks = {name: arguments.threads * operations_per_s(name == "int8", 0.3) for name in ("bf16", "int8")}
    kernel_registry.set_threads(arguments.threads)
    description = describe(arguments.model)
    scheme = rounded_scheme(arguments.quantize, DEFAULT_INT4_GROUP_SIZE) if arguments.quantize else None
    decoder = load_decoder(arguments.model, description, dtype=dtype, device=device, group=group, scheme=scheme)
    replayed = record_decoder(decoder, group, block_size_tokens=BLOCK_SIZE, dtype=dtype)
    weights = arguments.quantize or {"bfloat16": "bf16"}.get(arguments.dtype, "")
    print(
        f"{kernel_registry.kernel_set()}, {arguments.threads} threads, {weights or arguments.dtype}, "
        f"context {arguments.context}"
    )
    for rows in map(int, arguments.rows.split(",")):
        batch = decode_batch(decoder, rows, arguments.context, arguments.shared, dtype)
        step = limit_of(decoder, rows, arguments.context, arguments.shared, weights) if weights else None
        alone = 0.0
        for has_hog in (False, True) if arguments.hog else (False,):
            with neighbour(is_there=has_hog):
                program, one_by_one, ratio = compare(decoder, replayed, batch, arguments.steps)
                share = share_of_limit(step, program, measure_read_bandwidth(), peaks) if step else ""
            beside = f"   beside a busy process: {program / alone:.2f} times" if has_hog else ""
            alone = alone or program
            print(
                f"{rows:4} rows: program {program:8.2f} ms   one by one {one_by_one:8.2f} ms   "
                f"ratio {ratio:.2f}   {share}{beside}"
            )
        if arguments.operations:
            print_operations(replayed, batch, arguments.steps)


if __name__ == "__main__":
    main()
