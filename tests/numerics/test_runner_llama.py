"""The runner with a real decoder: a tiny random Llama gives the tokens and log-probabilities of transformers."""

from pathlib import Path

import pytest
import torch
from tests.numerics.checkpoints import random_model, reference_logits, save, served
from tests.numerics.families import FAMILIES
from tests.numerics.runner_driver import CPU, RunnerDriver

from weft.core.request import LogprobStyle, SamplingParams
from weft.models.decoder import Decoder, load_decoder
from weft.models.registry import describe
from weft.parallel.groups import SoloGroup

pytestmark = pytest.mark.numerics

ROW = next(row for row in FAMILIES if row.name == "llama")
PROMPT = [7, 3, 90, 41, 41, 12, 65, 8, 2, 77, 30, 5, 19]


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return random_model(ROW)


@pytest.fixture(scope="module")
def decoder(reference: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    directory: Path = save(reference, tmp_path_factory.mktemp("llama"))
    description = served(describe(directory), ROW)
    return load_decoder(directory, description, dtype=torch.float32, device=CPU, group=SoloGroup())


def new_driver(decoder: Decoder) -> RunnerDriver:
    shapes = decoder.kv_shapes
    assert len(set(shapes)) == 1
    return RunnerDriver(
        decoder, vocab_size=decoder.spec.vocab_size, kv_shape=(len(shapes), *shapes[0]), num_blocks=32, block_size=16
    )


@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_greedy_generation_equals_transformers(decoder: Decoder, reference: torch.nn.Module, chunk: int) -> None:
    driver = new_driver(decoder)
    expected = list(PROMPT)
    for _ in range(12):
        expected.append(int(reference_logits(reference, expected)[-1].argmax()))

    completion = driver.generate(driver.start(PROMPT), 12, chunk=chunk)

    assert completion == expected[len(PROMPT) :]


def test_prompt_and_token_logprobs_equal_transformers(decoder: Decoder, reference: torch.nn.Module) -> None:
    driver = new_driver(decoder)
    sampling = SamplingParams(prompt_logprobs=True, temperature=0.7, seed=1, logprob_style=LogprobStyle.RAW)
    sequence = driver.start(PROMPT, sampling)
    driver.generate(sequence, 6, chunk=5)
    expected = reference_logits(reference, sequence.token_ids).log_softmax(-1)
    expected = expected[range(len(sequence.token_ids) - 1), sequence.token_ids[1:]]

    told = torch.tensor(sequence.prompt_logprobs + sequence.logprobs)

    torch.testing.assert_close(told, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_alternatives_to_prompt_tokens_equal_transformers(
    decoder: Decoder, reference: torch.nn.Module, chunk: int
) -> None:
    driver = new_driver(decoder)
    asking = driver.start(PROMPT, SamplingParams(prompt_logprobs=True, prompt_top_n_tokens=3, temperature=0.7))
    silent = driver.start(PROMPT[2:], SamplingParams(prompt_logprobs=True))
    expected = reference_logits(reference, PROMPT).log_softmax(-1)[:-1].topk(3)

    driver.step([(silent, len(PROMPT) - 2), (asking, 1)])
    driver.generate(asking, 1, chunk=chunk)

    assert [list(top.token_ids) for top in asking.prompt_top_tokens] == expected.indices.tolist()
    told = torch.tensor([top.logprobs for top in asking.prompt_top_tokens])
    torch.testing.assert_close(told, expected.values, rtol=1e-4, atol=1e-4)
    assert silent.prompt_top_tokens == []


def test_seeded_tokens_are_the_same_in_any_company_and_any_chunks(decoder: Decoder) -> None:
    sampling = SamplingParams(temperature=1.5, top_p=0.95, repetition_penalty=1.1, seed=99)
    alone = new_driver(decoder)
    expected = alone.generate(alone.start(PROMPT, sampling), 8)
    driver = new_driver(decoder)
    others = [driver.start(PROMPT[n:], SamplingParams(do_sample=True, seed=n)) for n in range(4)]
    sequence = driver.start(PROMPT, sampling)

    driver.step([*((other, len(other.token_ids)) for other in others), (sequence, 6)])
    driver.step([*((other, 1) for other in others), (sequence, len(PROMPT) - 6)])
    for _ in range(7):
        driver.step([(sequence, 1), *((other, 1) for other in others)])

    assert sequence.completion == expected
