"""A request's tokens, and every bit of their log-probabilities, are its own: no load and no condition changes them.

Each rounding of the weights answers 120 requests alone, then 1,080 times under six sets of conditions.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.numerics.replay_worlds import ALONE, Outcome, World, engine_info, run_world, subjects, write_checkpoint

from weft.config import Settings

pytestmark = [pytest.mark.numerics, pytest.mark.slow]

NUM_SUBJECTS = 120
FORMS = {
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "int8, int8 cache": {"dtype": "bfloat16", "quantize": "int8", "kv_cache_dtype": "int8"},
}
WORLDS = (
    World(seed=1, threads=2, num_rounds=2),
    World(seed=2, threads=1, max_chunk=32, inter_token_target_ms=1.0, num_rounds=2),
    World(seed=3, threads=2, pool=416, growth_reserve_blocks=0, num_rounds=2),
    World(seed=4, threads=1, prefix_caching=False, lookahead=False),
    World(seed=5, threads=2, max_chunk=64, pool=352, growth_reserve_blocks=0, max_in_flight=24),
    World(seed=6, threads=1, max_in_flight=2, lookahead=False),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("form", FORMS)
def test_more_than_a_thousand_replays_differ_in_no_bit(form: str, checkpoint: Path) -> None:
    settings = replace(Settings(), model_id=str(checkpoint), model_path=str(checkpoint), **FORMS[form])
    if not engine_info(settings).batch_invariant:
        pytest.skip("this machine has no kernels of fixed order")
    requests = subjects(NUM_SUBJECTS)
    alone = dict(run_world(ALONE, settings, requests).tokens)

    outcomes: list[Outcome] = []
    for world in WORLDS:
        outcomes.append(outcome := run_world(world, settings, requests))
        different = [number for number, tokens in outcome.tokens if tokens != alone[number]]
        assert not different, _explained(world, outcome, alone, different[0], len(different))

    assert sum(len(outcome.tokens) for outcome in outcomes) == 9 * NUM_SUBJECTS >= 1_000
    # A quiet world proves nothing.
    assert sum(outcome.num_preemptions for outcome in outcomes) > 10
    assert sum(outcome.num_hits for outcome in outcomes) > 5_000
    assert sum(outcome.num_chunks for outcome in outcomes) > 100
    assert max(outcome.most_rows for outcome in outcomes) > 24
    assert len(set(alone.values())) > 0.9 * NUM_SUBJECTS


def test_the_fingerprint_changes_with_what_changes_bits_and_with_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    settings = replace(Settings(), model_id=str(checkpoint), model_path=str(checkpoint), dtype="bfloat16")
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tuned = shutil.copytree(checkpoint, tmp_path / "tuned")
    with (tuned / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))

    def parts(**changes: Any) -> list[str]:
        return engine_info(replace(settings, **changes)).fingerprint.split("-")

    weights, configuration, kernels = parts()
    for changes in (
        {"threads": 2}, {"max_batch_size": 3}, {"max_batch_prefill_tokens": 64}, {"prefix_caching": False},
        {"lookahead": False}, {"model_id": str(copy), "model_path": str(copy)},
    ):  # fmt: skip
        assert parts(**changes) == [weights, configuration, kernels], changes
    assert parts(model_path=str(tuned))[0] != weights
    assert parts(model_path=str(tuned))[1:] == [configuration, kernels]
    others = [parts(**changes) for changes in (
        {"dtype": "float32"}, {"quantize": "int8"}, {"quantize": "int4"},
        {"quantize": "int4", "quantize_group_size": "64"}, {"block_size_tokens": 64},
        {"kv_cache_dtype": "int8"},
    )]  # fmt: skip
    assert all(other[0] == weights and other[2] == kernels for other in others)
    assert len({configuration, *(other[1] for other in others)}) == 7


def _explained(world: World, outcome: Outcome, alone: dict, number: int, count: int) -> str:
    got = next(tokens for found, tokens in outcome.tokens if found == number and tokens != alone[number])
    pairs = list(zip(alone[number], got, strict=False))
    position = next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))
    return (
        f"{count} answers differ in {world}; the first is subject {number}, token {position}: "
        f"alone {alone[number][position : position + 1]}, here {got[position : position + 1]}"
    )
