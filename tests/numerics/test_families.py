"""Logits of every family equal transformers' in float32, however the work is cut into steps, sequences and ranks.

Tolerance: 2e-5 of the largest logit. Both sides sum a few hundred float32 products in different orders; a wrong
frequency, window, norm or row order is off by 1e-2 and more.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.numerics.checkpoints import random_model, reference_logits, save, served
from tests.numerics.families import FAMILIES, FamilyRow
from tests.numerics.paged_driver import PagedDriver, SharedExchange, ThreadedGroup

from weft.models.decoder import load_decoder
from weft.models.registry import describe, supported_model_types
from weft.parallel.groups import SoloGroup

pytestmark = pytest.mark.numerics

PROMPT_TOKENS = 44
RELATIVE_TOLERANCE = 2e-5


@dataclass
class Checkpoint:
    row: FamilyRow
    model: torch.nn.Module
    directory: Path

    def driver(self, world_size: int = 1) -> PagedDriver:
        exchange = SharedExchange(world_size)
        groups = [SoloGroup()] if world_size == 1 else [ThreadedGroup(rank, exchange) for rank in range(world_size)]
        description = served(describe(self.directory), self.row)
        return PagedDriver(
            [
                load_decoder(self.directory, description, dtype=torch.float32, device=torch.device("cpu"), group=group)
                for group in groups
            ]
        )

    def expected(self, token_ids: list[int]) -> torch.Tensor:
        return reference_logits(self.model, token_ids)


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[FamilyRow], Checkpoint]]:
    @cache
    def make(name: str) -> Checkpoint:
        row = next(row for row in FAMILIES if row.name == name)
        model = random_model(row)
        return Checkpoint(row, model, save(model, tmp_path_factory.mktemp(name)))

    yield lambda row: make(row.name)
    make.cache_clear()


@pytest.fixture(params=FAMILIES, ids=lambda row: row.name)
def checkpoint(request: pytest.FixtureRequest, checkpoint_of: Callable[[FamilyRow], Checkpoint]) -> Checkpoint:
    return checkpoint_of(request.param)


def prompt(seed: int, length: int = PROMPT_TOKENS) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 211, (length,), generator=draw).tolist()


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert logits.dtype == torch.float32
    error = (logits - expected).abs().max() / expected.abs().max()
    assert error < RELATIVE_TOLERANCE, f"relative error {error:.2e}"


def test_a_prompt_in_one_step(checkpoint: Checkpoint) -> None:
    driver, token_ids = checkpoint.driver(), prompt(1)

    (logits,) = driver.step([(driver.start(token_ids), PROMPT_TOKENS)])

    assert_close(logits, checkpoint.expected(token_ids))


def test_a_prompt_in_chunks_and_then_token_by_token(checkpoint: Checkpoint) -> None:
    driver, token_ids = checkpoint.driver(), prompt(2)
    sequence = driver.start(token_ids)

    logits = [driver.step([(sequence, size)])[0] for size in (1, 7, 8, 13, 11, 1, 1, 1, 1)]

    assert_close(torch.cat(logits), checkpoint.expected(token_ids))


def test_sequences_of_a_batch_do_not_see_one_another(checkpoint: Checkpoint) -> None:
    driver = checkpoint.driver()
    prompts = [prompt(3), prompt(4, 31), prompt(5, 40)]
    first, second, third = (driver.start(token_ids) for token_ids in prompts)
    steps = [
        [(first, 40)],
        [(first, 1), (second, 20)],
        [(first, 1), (second, 10), (third, 39)],
        [(first, 1), (second, 1), (third, 1)],
        [(first, 1)],
    ]

    logits: dict[int, list[torch.Tensor]] = {id(first): [], id(second): [], id(third): []}
    for rows in steps:
        for (sequence, _), part in zip(rows, driver.step(rows), strict=True):
            logits[id(sequence)].append(part)

    for sequence, token_ids in zip((first, second, third), prompts, strict=True):
        assert_close(torch.cat(logits[id(sequence)]), checkpoint.expected(token_ids))


def test_blocks_filled_by_another_sequence_are_as_good_as_own_ones(checkpoint: Checkpoint) -> None:
    driver, shared_tokens = checkpoint.driver(), prompt(6)[:32]
    donor = driver.start(shared_tokens + prompt(7, 12))
    driver.step([(donor, PROMPT_TOKENS)])
    token_ids = shared_tokens + prompt(8, 12)
    hit = driver.start(token_ids, shared=donor, shared_blocks=2)

    (logits,) = driver.step([(hit, 12)])

    assert_close(logits, checkpoint.expected(token_ids)[32:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_equal_one_alone(checkpoint: Checkpoint, world_size: int) -> None:
    """Three KV groups on two ranks are split 2 + 1; on four ranks (and with one group on two) they are replicated."""
    driver, token_ids = checkpoint.driver(world_size), prompt(9)
    sequence = driver.start(token_ids)

    logits = [driver.step([(sequence, size)])[0] for size in (30, 13, 1)]

    assert_close(torch.cat(logits), checkpoint.expected(token_ids))


def test_the_spelling_of_transformers_4_means_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Most files on the hub were written before `rope_parameters` and `layer_types` existed."""
    written = describe(checkpoint.directory)
    config = json.loads((checkpoint.directory / "config.json").read_text())
    shutil.copytree(checkpoint.directory, tmp_path, dirs_exist_ok=True)

    (tmp_path / "config.json").write_text(json.dumps(in_old_spelling(config)))

    assert describe(tmp_path).spec == written.spec


def in_old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    old = {key: value for key, value in config.items() if key not in {"layer_types", "rope_parameters"}}
    rope = config["rope_parameters"]
    if "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        scaling = {key: value for key, value in rope.items() if key not in {"rope_theta", "rope_type"}}
        old["rope_scaling"] = {"type": rope["rope_type"], **scaling}
    return old


def test_every_family_file_has_a_row() -> None:
    """A family without a comparison against transformers is not supported."""
    compared = {row.name.split("-")[0] for row in FAMILIES}

    assert compared == set(supported_model_types())
