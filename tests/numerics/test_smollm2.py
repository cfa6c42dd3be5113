"""The default model against numbers that transformers computed from the same file in float32.

The golden file holds the 32 best log-probabilities of each position of a fixed text (`golden/make_smollm2.py`).
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from tests.numerics.paged_driver import PagedDriver

from weft.models.decoder import load_decoder
from weft.models.registry import describe
from weft.parallel.groups import SoloGroup

pytestmark = [pytest.mark.numerics, pytest.mark.slow]

GOLDEN = json.loads(Path(__file__).with_name("golden").joinpath("smollm2.json").read_text())
MAX_MEAN_KL_NATS = 0.0025
"""What rounding to bfloat16 costs this model; a wrong layer costs a hundred times more."""


@cache
def logprobs(path: Path, dtype: torch.dtype) -> torch.Tensor:
    """`[T, V]` of the golden text, computed as a prefill of two chunks."""
    decoder = load_decoder(path, describe(path), dtype=dtype, device=torch.device("cpu"), group=SoloGroup())
    driver = PagedDriver([decoder], block_size=32, num_blocks=12, dtype=dtype)
    sequence = driver.start(GOLDEN["token_ids"])
    size = len(GOLDEN["token_ids"])
    logits = [driver.step([(sequence, part)])[0] for part in (50, size - 50)]
    return torch.cat(logits).log_softmax(dim=-1)


def test_float32_equals_the_golden_log_probabilities(default_model_gguf: Path) -> None:
    ours = logprobs(default_model_gguf, torch.float32).gather(1, torch.tensor(GOLDEN["top_ids"]))

    # The file is rounded to 1e-5; two orders of summation through 30 layers differ by a few times that.
    assert (ours - torch.tensor(GOLDEN["top_logprobs"])).abs().max() < 2e-4


def test_bfloat16_stays_within_its_rounding(default_model_gguf: Path) -> None:
    """The mean decides: single log-probabilities in the tail may be off by 0.4 in an honest bfloat16."""
    golden = torch.tensor(GOLDEN["top_logprobs"])
    ours = logprobs(default_model_gguf, torch.bfloat16).gather(1, torch.tensor(GOLDEN["top_ids"]))

    divergence = divergence_nats(golden, ours)

    assert len(divergence) >= 64
    assert divergence.mean() < MAX_MEAN_KL_NATS


def test_the_capital_of_france_is_paris(default_model_gguf: Path) -> None:
    names = {" Paris": -0.2581, " the": -2.7407, " London": -4.3844}
    ids = {" Paris": 7042, " the": 260, " London": 4528}
    decoder = load_decoder(
        default_model_gguf,
        describe(default_model_gguf),
        dtype=torch.float32,
        device=torch.device("cpu"),
        group=SoloGroup(),
    )
    driver = PagedDriver([decoder], block_size=32, num_blocks=2)
    token_ids = GOLDEN["token_ids"][:5]  # "The capital of France is"

    (logits,) = driver.step([(driver.start(token_ids), 5)])

    found = logits[-1].log_softmax(dim=-1)
    assert {name: round(float(found[ids[name]]), 4) for name in names} == pytest.approx(names, abs=2e-4)


def divergence_nats(golden: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """KL(golden ‖ ours) of each row over its listed tokens and one bucket for all the others."""
    rest = [torch.log1p(-logs.exp().sum(dim=1).clamp(max=1 - 1e-6)) for logs in (golden, ours)]
    p, q = (torch.cat((logs, other[:, None]), dim=1) for logs, other in zip((golden, ours), rest, strict=True))
    return (p.exp() * (p - q)).sum(dim=1)
