"""The tokens of a request depend on the request alone: not on company, chunks, prefix hits, preemption or ranks.

Float32, where the linear layers, the attention and the sampler are bound to one order of summation. Every server
here has the same block size, because a block is also the tile that attention sums over.
"""

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.harness import RunningServer, serving

pytestmark = pytest.mark.e2e

FLAGS = ("--dtype", "float32", "--block-size-tokens", "16", "--kv-pool-bytes", "256MiB")

STORY = (
    "Once upon a time a fisherman lived with his wife in a small hut by the sea. Every day he went out to fish, and "
    "he fished and fished. One day his line went deep down into the clear water, and when he pulled it up he had "
    "caught a large flounder. The flounder said to him: listen, fisherman, I beg you, let me live, for I am no real "
    "flounder but an enchanted prince. What good would it do you to kill me? I would not taste good. Put me back into "
    "the water and let me swim. The fisherman answered that he"
)


@dataclass(frozen=True)
class Subject:
    """A request whose tokens must always be the same."""

    name: str
    inputs: str
    parameters: dict[str, Any] = field(default_factory=dict)


SUBJECTS = (
    Subject("greedy, short", "The capital of France is"),
    Subject("greedy, several blocks", STORY),
    Subject("sampled", STORY[:200], {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 1234}),
    Subject(
        "sampled with penalties",
        "My favourite animals are the cat, the dog,",
        {"temperature": 1.3, "top_k": 40, "typical_p": 0.95, "repetition_penalty": 1.1, "seed": 2**64 - 1},
    ),
)
NUM_TOKENS = 32
Tokens = dict[str, list[tuple[int, float]]]
"""Subject's name → (token id, log-probability) of each token."""


def tokens_of(server: RunningServer, subject: Subject, max_new_tokens: int = NUM_TOKENS) -> list[tuple[int, float]]:
    parameters = {**subject.parameters, "max_new_tokens": max_new_tokens, "details": True}
    details = server.generate(subject.inputs, **parameters)["details"]
    return [(token["id"], token["logprob"]) for token in details["tokens"]]


def all_tokens(server: RunningServer) -> Tokens:
    """One subject after the other."""
    return {subject.name: tokens_of(server, subject) for subject in SUBJECTS}


def all_tokens_among_neighbours(server: RunningServer, num_neighbours: int, seed: int) -> Tokens:
    """All subjects at once among random requests that come, go and share parts of their prompts."""
    rng = random.Random(seed)
    words = STORY.split()

    def neighbour() -> Subject:
        start = rng.randrange(len(words))
        text = STORY[: rng.randrange(20, 300)] if rng.random() < 0.3 else " ".join(rng.sample(words, 5 + start % 40))
        parameters = {"do_sample": rng.random() < 0.5, "seed": rng.getrandbits(64)}
        return Subject("neighbour", text, parameters)

    work = [
        *((subject, NUM_TOKENS) for subject in SUBJECTS),
        *((neighbour(), rng.randrange(1, 48)) for _ in range(num_neighbours)),
    ]
    rng.shuffle(work)
    with ThreadPoolExecutor(len(work)) as pool:
        tokens = list(pool.map(lambda item: tokens_of(server, *item), work))
    return {subject.name: got for (subject, _), got in zip(work, tokens, strict=True) if subject.name != "neighbour"}


@dataclass(frozen=True)
class Float32Server:
    """A server and what its first, lone requests gave."""

    server: RunningServer
    alone: Tokens


@pytest.fixture(scope="module")
def float32(default_model_gguf: Path) -> Iterator[Float32Server]:
    with serving(default_model_gguf, *FLAGS) as server:
        yield Float32Server(server, all_tokens(server))


def test_the_first_answers_make_sense(float32: Float32Server) -> None:
    """The other tests compare; this one makes sure that they do not compare nonsense."""
    answer = float32.server.generate("The capital of France is", max_new_tokens=4)

    assert "Paris" in answer["generated_text"]
    assert float32.alone["greedy, short"][0][1] == pytest.approx(-0.2581, abs=0.002)
    assert all(len(tokens) >= 8 for tokens in float32.alone.values())


def test_a_prefix_hit_changes_nothing(float32: Float32Server) -> None:
    before = float32.server.metrics().value("weft_prefix_hit_tokens")

    again = all_tokens(float32.server)

    assert float32.server.metrics().value("weft_prefix_hit_tokens") > before
    assert again == float32.alone


@pytest.mark.parametrize("seed", [1, 2])
def test_neighbours_change_nothing(float32: Float32Server, seed: int) -> None:
    assert all_tokens_among_neighbours(float32.server, 32, seed) == float32.alone


@pytest.mark.parametrize("chunk_tokens", [16, 64, 512])
def test_the_size_of_prefill_chunks_changes_nothing(
    float32: Float32Server, default_model_gguf: Path, chunk_tokens: int
) -> None:
    flags = ("--max-batch-prefill-tokens", str(chunk_tokens), "--no-prefix-caching")
    with serving(default_model_gguf, *FLAGS, *flags) as server:
        assert all_tokens(server) == float32.alone
        assert all_tokens_among_neighbours(server, 12, seed=3) == float32.alone


def test_preemption_changes_nothing(float32: Float32Server, default_model_gguf: Path) -> None:
    """Many long answers in a pool that holds few: most of them lose their blocks and are computed again."""
    num_tokens = 128
    alone = {subject.name: tokens_of(float32.server, subject, num_tokens) for subject in SUBJECTS}

    flags = ("--max-batch-total-tokens", "416", "--max-total-tokens", "320")
    with serving(default_model_gguf, *FLAGS, *flags) as server, ThreadPoolExecutor(12) as pool:
        work = [*SUBJECTS, *SUBJECTS, *SUBJECTS]
        crowded = list(pool.map(lambda subject: tokens_of(server, subject, num_tokens), work))
        num_preemptions = server.metrics().value("weft_engine_preemptions")

    assert num_preemptions > 0, "the pool was not small enough to prove anything"
    for subject, tokens in zip(work, crowded, strict=True):
        assert tokens == alone[subject.name], subject.name


def test_two_shards_give_the_greedy_tokens_of_one(float32: Float32Server, default_model_gguf: Path) -> None:
    with serving(default_model_gguf, *FLAGS, "--num-shard", "2") as server:
        shards = [server.wait_child("shard-0"), server.wait_child("shard-1")]
        two = all_tokens(server)
        together = all_tokens_among_neighbours(server, 8, seed=5)

    assert len({shard.pid for shard in shards}) == 2
    for subject in SUBJECTS[:2]:
        expected = [token_id for token_id, _ in float32.alone[subject.name]]
        assert [token_id for token_id, _ in two[subject.name]] == expected
    # Ranks add up in another order than one process does, so only their own answers can be the same to the bit.
    assert together == two
