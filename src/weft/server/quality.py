"""What rounding costs a model: its form of few bits against itself in the type of its activations. See ADR-0016.

A receipt is measured at load on request (`--quality-receipt`), with both forms in memory for as long as it takes. For
the default model the package brings receipts, found by the digest of its weights; those cost no time.
"""

import json
import math
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch

from weft.core.info import QualityReceipt
from weft.errors import UsageError
from weft.models.decoder import Decoder
from weft.models.forward_batch import ForwardBatch
from weft.runner.kv_pool import KvPool
from weft.server.fingerprint import NumericConfiguration

MIN_TOKENS = 2_000
"""Fewer positions would let chance decide about the floor: at 80 % their standard error is 0.9 %."""
PIECE_TOKENS = 512
"""Each piece of the text is a sequence of its own; shorter where the model's context is."""
ROWS_OF_LOGITS = 64
"""Rows whose logits are held at a time, of two models."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model as it will serve: its weights, and where its keys and values go."""

    decoder: Decoder
    pool: KvPool


def quality_text() -> str:
    """The fixed text; changing it makes receipts incomparable."""
    return resources.files("weft.server").joinpath("quality_text.txt").read_text(encoding="utf-8")


def text_token_ids(model_path: Path, cache_dir: Path, vocab_size: int) -> list[int]:
    """The fixed text in a model's own tokens.

    Raises   UsageError: the tokenizer makes too few of it, or some that the model does not have
    """
    # Here, because a shard needs no tokenizer for anything else.
    from weft.text.assets import load_text_assets

    tokenizer = load_text_assets(model_path, cache_dir, None).tokenizer
    token_ids = tokenizer.encode(quality_text(), add_special_tokens=False)
    problem = ""
    if len(token_ids) < MIN_TOKENS:
        problem = f"the model's tokenizer makes {len(token_ids):,} tokens of the text, and {MIN_TOKENS:,} are needed"
    elif max(token_ids) >= vocab_size:
        problem = f"the model's tokenizer makes token {max(token_ids)} of the text, and the model has {vocab_size:,}"
    if problem:
        raise UsageError(f"--quality-receipt: {problem}. Leave it out to serve the model without a receipt.")
    return token_ids


def kept_receipt(weights_digest: str, configuration: NumericConfiguration) -> QualityReceipt | None:
    """The receipt that the package brings for these very weights in this numeric configuration."""
    file = resources.files("weft.server").joinpath("quality_receipts.json")
    wanted = {"weights_digest": weights_digest, **receipt_key(configuration)}
    for entry in json.loads(file.read_text(encoding="utf-8")):
        if all(entry[name] == value for name, value in wanted.items()):
            return QualityReceipt(**{name: entry[name] for name in QualityReceipt.__dataclass_fields__})
    return None


def receipt_key(configuration: NumericConfiguration) -> dict[str, str]:
    """What a receipt depends on beside the weights: of the numeric configuration, all that rounds."""
    return {name: getattr(configuration, name) for name in ("weights", "kv_cache", "dtype")}


@torch.inference_mode()
def measure(
    reference: Subject, rounded: Subject, token_ids: list[int], reference_name: str, piece_tokens: int = PIECE_TOKENS
) -> QualityReceipt:
    """Run both over the text in pieces. Raises ValueError for less than 2,000 tokens.

    piece_tokens   at most what the model has positions for and the pools have room for
    """
    count = len(token_ids)
    if count < MIN_TOKENS:
        raise ValueError(f"a receipt needs at least {MIN_TOKENS:,} tokens. Given: {count:,}")
    same, divergence = 0, 0.0
    for first, last in pairwise([*range(0, count, piece_tokens), count]):
        piece = token_ids[first:last]
        expected, got = (side.decoder.hidden_states(_batch(side.pool, piece)) for side in (reference, rounded))
        for row in range(0, len(piece), ROWS_OF_LOGITS):
            rows = slice(row, row + ROWS_OF_LOGITS)
            left = reference.decoder.logits(expected[rows]).log_softmax(dim=-1)
            right = rounded.decoder.logits(got[rows]).log_softmax(dim=-1)
            same += int((left.argmax(dim=-1) == right.argmax(dim=-1)).sum())
            divergence += float((left.exp() * (left - right)).sum())
    return QualityReceipt(
        reference=reference_name, top1_agreement=same / count, kl_nats=divergence / count, num_tokens=count
    )


def require_quality(receipt: QualityReceipt, configuration: NumericConfiguration, floor: float) -> None:
    """Raises UsageError when a model has lost more than the user accepts."""
    # A divergence that is no number means that one side computes nonsense, whatever the most likely tokens say.
    if receipt.top1_agreement >= floor and math.isfinite(receipt.kl_nats):
        return
    raise UsageError(
        f"--quality-floor: {name_of(configuration)} keeps {receipt.top1_agreement:.1%} of {receipt.reference}'s most "
        f"likely tokens on {receipt.num_tokens:,} tokens of text, and the floor is {floor:.1%}. Use --quantize int8, "
        f"or int4 with a smaller --quantize-group-size; or lower --quality-floor to serve it all the same."
    )


def name_of(configuration: NumericConfiguration) -> str:
    """For people: what is rounded."""
    cache = f"{configuration.kv_cache} KV cache" if configuration.kv_cache != configuration.dtype else ""
    return " + ".join(part for part in (configuration.weights or configuration.dtype, cache) if part)


def to_json(receipt: QualityReceipt) -> dict[str, str | float]:
    """The fields as the package keeps them: five digits."""
    return {name: round(value, 5) if isinstance(value, float) else value for name, value in asdict(receipt).items()}


def _batch(pool: KvPool, token_ids: list[int]) -> ForwardBatch:
    """One sequence from its beginning, with logits of every row."""
    count = len(token_ids)
    positions = torch.arange(count, dtype=torch.int32, device=pool.device)
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int32, device=pool.device),
        positions=positions,
        kv_slots=positions,
        query_starts=torch.tensor([0, count], dtype=torch.int32, device=pool.device),
        context_lens=torch.tensor([count], dtype=torch.int32, device=pool.device),
        block_tables=torch.arange(-(-count // pool.block_size_tokens), dtype=torch.int32, device=pool.device)[None],
        logit_rows=positions,
        kv=pool.layers,
        max_context_len=count,
        max_query_len=count,
    )
