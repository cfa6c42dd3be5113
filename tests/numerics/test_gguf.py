"""GGUF: decoded numbers bit-equal to the `gguf` package, logits of whole files equal to transformers' in float32."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tests.numerics.checkpoints import random_model, reference_logits
from tests.numerics.families import FAMILIES, FamilyRow
from tests.numerics.gguf_files import K_TYPES, QUANTIZABLE, SCALE_OFFSETS, random_blocks, write_gguf
from tests.numerics.paged_driver import PagedDriver, SharedExchange, ThreadedGroup

from weft.models.decoder import load_decoder
from weft.models.quant.gguf_blocks import dequantize_into
from weft.models.quant.gguf_source import GgufSource
from weft.models.registry import describe
from weft.models.weights.gguf_file import GgmlType
from weft.models.weights.partition import Span
from weft.parallel.groups import SoloGroup

pytestmark = pytest.mark.numerics

FLOATS = ("F32", "F16", "BF16")
WIDE = FamilyRow(
    "llama-wide",
    "LlamaConfig",
    {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 2},
)
"""Rows of 256 numbers and more, which the K types need."""

ARCHITECTURES = [
    "llama",
    "llama-tied-biased",
    "llama-linear",
    "llama-3",
    "llama-yarn",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "phi3-partial-rotary",
    "phi3-long",
]


def drivers(path: Path, world_size: int = 1) -> PagedDriver:
    exchange = SharedExchange(world_size)
    groups = [SoloGroup()] if world_size == 1 else [ThreadedGroup(rank, exchange) for rank in range(world_size)]
    description = describe(path)
    return PagedDriver(
        [
            load_decoder(path, description, dtype=torch.float32, device=torch.device("cpu"), group=group)
            for group in groups
        ]
    )


def logits_of(driver: PagedDriver, token_ids: list[int]) -> torch.Tensor:
    return driver.step([(driver.start(token_ids), len(token_ids))])[0]


def assert_file_equals(path: Path, model: torch.nn.Module, held: dict[str, torch.Tensor], world_size: int = 1) -> None:
    model.load_state_dict(held)
    token_ids = torch.randint(0, model.config.vocab_size, (30,), generator=torch.Generator().manual_seed(3)).tolist()
    expected = reference_logits(model, token_ids)

    logits = logits_of(drivers(path, world_size), token_ids)

    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", SCALE_OFFSETS)
def test_every_bit_pattern_decodes_to_the_reference_numbers(kind: str) -> None:
    raw = random_blocks(kind, rows=24, columns=512, seed=1)

    decoded = decode(raw, kind, torch.float32)

    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    assert decoded.numpy().view(np.uint32).tolist() == expected.view(np.uint32).tolist()


@pytest.mark.parametrize("kind", SCALE_OFFSETS)
def test_decoding_into_bfloat16_rounds_the_float32_numbers_once(kind: str) -> None:
    raw = random_blocks(kind, rows=4, columns=512, seed=2)

    decoded = decode(raw, kind, torch.bfloat16)

    assert torch.equal(decoded, decode(raw, kind, torch.float32).to(torch.bfloat16))


def decode(raw: np.ndarray, kind: str, dtype: torch.dtype) -> torch.Tensor:
    decoded = torch.empty(len(raw), 512, dtype=dtype)
    dequantize_into(decoded, torch.from_numpy(raw), GgmlType[kind])
    return decoded


@pytest.mark.parametrize("kind", [*FLOATS, *QUANTIZABLE, *K_TYPES])
def test_a_file_of_each_type_gives_the_logits_of_its_numbers(kind: str, tmp_path: Path) -> None:
    model = random_model(WIDE)
    held = write_gguf(tmp_path / "model.gguf", model, kind=kind)

    assert describe(tmp_path / "model.gguf").stored_dtype == kind
    assert_file_equals(tmp_path / "model.gguf", model, held)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K"])
def test_ranks_cut_through_blocks_without_a_difference(kind: str, tmp_path: Path) -> None:
    """Two of eight 32-wide heads' columns are less than one block of 256."""
    model = random_model(WIDE)
    held = write_gguf(tmp_path / "model.gguf", model, kind=kind)

    assert_file_equals(tmp_path / "model.gguf", model, held, world_size=4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_reads_like_its_transformers_checkpoint(name: str, tmp_path: Path) -> None:
    row = next(row for row in FAMILIES if row.name == name)
    # The file cannot say how scores are scaled: readers derive it from the head size.
    changes = {"query_pre_attn_scalar": 16} if "Gemma" in row.config_class else {}
    changes |= {"sliding_window": None} if name == "phi3" else {}
    changes |= {"mlp_bias": False} if name == "llama-tied-biased" else {}
    model = random_model(dataclasses.replace(row, changes=row.changes | changes))
    held = write_gguf(tmp_path / "model.gguf", model)

    assert_file_equals(tmp_path / "model.gguf", model, held)


def test_a_slice_reads_the_same_numbers_as_the_whole(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", random_model(WIDE), kind="Q5_1")
    source = GgufSource(tmp_path / "model.gguf")
    name = "model.layers.1.mlp.down_proj.weight"
    whole, part = torch.empty(256, 512), torch.empty(12, 91)
    source.read_into(whole, name, Span(0, 256), None)

    source.read_into(part, name, Span(5, 17), Span(40, 131))

    source.close()
    assert torch.equal(part, whole[5:17, 40:131])
