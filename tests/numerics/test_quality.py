"""Quality receipts: what they measure, the kept ones, and the floor."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.numerics.checkpoints import random_model, save
from tests.numerics.families import FAMILIES
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from weft.config import Settings
from weft.core.info import QualityReceipt
from weft.errors import StartupError, UsageError
from weft.models.decoder import Decoder, load_decoder
from weft.models.quant.rounded import int4, int8
from weft.models.quant.scheme import QuantScheme, Unquantized
from weft.models.registry import describe
from weft.parallel.groups import SoloGroup
from weft.runner.kv_pool import KvPool
from weft.server import quality
from weft.server.fingerprint import NumericConfiguration, digest_of_weights
from weft.server.startup import measure_quality

pytestmark = pytest.mark.numerics

PIECE_TOKENS = 256
"""All the positions that the small model has."""
INT8 = NumericConfiguration(
    dtype="bfloat16",
    weights="int8",
    kv_cache="bfloat16",
    block_size_tokens=32,
    world_size=1,
    is_long_context=False,
    watermark=(0.5, 2.0),
)
RECEIPT = QualityReceipt(reference="bfloat16", top1_agreement=0.8, kl_nats=0.1, num_tokens=2_538)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    row = next(row for row in FAMILIES if row.name == "llama")
    return save(random_model(row), tmp_path_factory.mktemp("llama"))


def subject(path: Path, scheme: QuantScheme) -> quality.Subject:
    device = torch.device("cpu")
    decoder: Decoder = load_decoder(
        path, describe(path), dtype=torch.float32, device=device, group=SoloGroup(), scheme=scheme
    )
    (num_kv_heads, head_dim), *_ = decoder.kv_shapes
    pool = KvPool(
        num_layers=len(decoder.kv_shapes),
        num_blocks=PIECE_TOKENS // 32,
        num_kv_heads=num_kv_heads,
        block_size_tokens=32,
        head_dim=head_dim,
        dtype=torch.float32,
        device=device,
    )
    return quality.Subject(decoder, pool)


def some_ids(path: Path, count: int) -> list[int]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(describe(path).vocab_size, (count,), generator=draw).tolist()


def save_tokenizer(directory: Path, vocabulary: dict[str, int]) -> Path:
    """One token per word; words that are in no vocabulary are number 0."""
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, **vocabulary}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def test_a_text_of_tokens_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    first_word = quality.quality_text().split()[0]
    directory = save_tokenizer(tmp_path, {first_word: 211})

    # The text has fewer words than a receipt needs tokens.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "MIN_TOKENS", 10)
        assert 211 in quality.text_token_ids(directory, tmp_path, 212)
        with pytest.raises(UsageError, match=r"makes token 211 of the text, and the model has 211\. Leave it out"):
            quality.text_token_ids(directory, tmp_path, 211)


def test_a_tokenizer_that_makes_too_few_tokens_is_refused(tmp_path: Path) -> None:
    num_words = len(quality.quality_text().split())

    with pytest.raises(UsageError, match=rf"makes {num_words:,} tokens of the text, and 2,000 are needed"):
        quality.text_token_ids(save_tokenizer(tmp_path, {}), tmp_path, 211)


def test_a_model_is_as_good_as_itself_and_worse_with_fewer_bits(checkpoint: Path) -> None:
    token_ids = some_ids(checkpoint, quality.MIN_TOKENS)
    exact = subject(checkpoint, Unquantized())

    same, eight, four = (
        quality.measure(exact, subject(checkpoint, scheme), token_ids, "float32", PIECE_TOKENS)
        for scheme in (Unquantized(), int8(), int4())
    )

    assert (same.top1_agreement, same.kl_nats, same.num_tokens) == (1.0, 0.0, 2_000)
    assert 1.0 > eight.top1_agreement > four.top1_agreement
    assert 0.0 < eight.kl_nats < four.kl_nats


def test_a_text_that_is_too_short_is_refused(checkpoint: Path) -> None:
    exact = subject(checkpoint, Unquantized())

    with pytest.raises(ValueError, match="at least 2,000"):
        quality.measure(exact, exact, some_ids(checkpoint, 1_999), "float32")


def test_the_floor_lets_through_what_is_not_below_it() -> None:
    quality.require_quality(RECEIPT, INT8, 0.8)

    with pytest.raises(StartupError) as refusal:
        quality.require_quality(RECEIPT, INT8, 0.81)

    for part in ("--quality-floor", "int8", "80.0%", "2,538 tokens", "81.0%", "lower --quality-floor"):
        assert part in refusal.value.message


@pytest.mark.parametrize("broken", [{"top1_agreement": float("nan")}, {"kl_nats": float("nan")}])
def test_what_is_no_number_is_below_every_floor(broken: dict[str, float]) -> None:
    with pytest.raises(StartupError):
        quality.require_quality(replace(RECEIPT, **broken), INT8, 0.0)


def test_the_name_says_everything_that_is_rounded() -> None:
    assert quality.name_of(INT8) == "int8"
    assert quality.name_of(replace(INT8, kv_cache="int8")) == "int8 + int8 KV cache"
    assert quality.name_of(replace(INT8, weights="", kv_cache="int8")) == "bfloat16 + int8 KV cache"


def test_a_receipt_is_kept_for_these_very_weights_and_roundings_only(default_model_gguf: Path) -> None:
    digest = digest_of_weights(default_model_gguf)

    kept = quality.kept_receipt(digest, INT8)

    assert kept is not None
    assert kept.num_tokens >= quality.MIN_TOKENS
    assert quality.kept_receipt("0" * 64, INT8) is None
    for name, other in (("weights", "int2"), ("kv_cache", "int2"), ("dtype", "float16")):
        assert quality.kept_receipt(digest, replace(INT8, **{name: other})) is None
    # What rounds nothing changes no receipt.
    assert quality.kept_receipt(digest, replace(INT8, block_size_tokens=16, watermark=(0.1, 1.0))) == kept


def test_every_rounding_of_the_default_model_has_one_receipt() -> None:
    entries = json.loads(Path(quality.__file__).with_name("quality_receipts.json").read_text())
    keys = [(entry["weights_digest"], entry["weights"], entry["kv_cache"], entry["dtype"]) for entry in entries]

    assert len(set(keys)) == len(keys)
    for scheme in ("int8", "int4 (groups of 32)", "int4 (groups of 64)", "int4 (groups of 128)", "Q4_1 (packed)"):
        assert sum(weights == scheme and dtype == "bfloat16" for _, weights, _, dtype in keys) >= 1
    for scheme in ("", "int8", "int4 (groups of 32)", "Q4_1 (packed)"):
        assert sum((weights, cache) == (scheme, "int8") for _, weights, cache, _ in keys) >= 1


@pytest.mark.slow
def test_the_kept_receipts_are_what_the_default_model_measures(default_model_gguf: Path, tmp_path: Path) -> None:
    """One of them, to five digits: the kernels give the same bits on every machine that computes in bfloat16."""
    digest, configuration, measured = measure_quality(
        Settings(
            model_path=str(default_model_gguf),
            cache_dir=str(tmp_path),
            dtype="bfloat16",
            quantize="int8",
            max_total_tokens=2048,
        )
    )

    kept = quality.kept_receipt(digest, configuration)

    assert kept is not None
    assert measured.top1_agreement == pytest.approx(kept.top1_agreement, abs=0.005)
    assert measured.kl_nats == pytest.approx(kept.kl_nats, rel=0.05)
