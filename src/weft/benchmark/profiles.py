"""The shapes of load that a server is judged by, and prompts of an exact length for them.

Lengths are exact because prompts are made of words that are one token each behind a space; nothing is shared
between two prompts unless the profile says so, and nothing between two runs, as the generator is seeded anew.
"""

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

_SPACED_WORD = re.compile("[\u0120\u2581][a-z]{3,10}")
"""A vocabulary entry that is a lower-case word behind a space, as byte-level BPE (Ġ) and SentencePiece (▁) write it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One workload: who asks how much. Closed loop by `concurrency` unless `rate_per_s` makes it an open one."""

    name: str
    title: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0
    """Tokens that all prompts of all rounds begin with, on top of `prompt_tokens` of their own."""
    rounds: int = 1
    rate_per_s: float | None = None
    newcomer_prompt_tokens: int = 0
    """A prompt of this length arrives while the stream runs, and only the stream's gaps meanwhile are judged."""
    code: str = ""
    """Short name, for tables and command lines."""
    is_large_model: bool = False
    """Run on the large model instead of the default one."""
    quick_requests: int = 0
    """Requests of a quick sitting; 0: all."""
    quick_repeats: int = 1
    """How often a quick sitting measures it."""

    @property
    def quick(self) -> "Profile":
        """The same shape with as few requests as still say something."""
        return replace(self, num_requests=self.quick_requests or self.num_requests)

    def scaled(self, ratio: float) -> "Profile":
        """The same shape with fewer requests, but never fewer than are in flight at once."""
        return replace(self, num_requests=max(self.concurrency, round(self.num_requests * ratio)))


PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="streams-1",
            code="W1",
            title="1 stream",
            concurrency=1,
            num_requests=6,
            prompt_tokens=128,
            output_tokens=128,
            quick_requests=3,
            quick_repeats=2,
        ),
        Profile(
            name="streams-16",
            code="W2",
            quick_requests=32,
            title="16 streams",
            concurrency=16,
            num_requests=64,
            prompt_tokens=128,
            output_tokens=128,
        ),
        Profile(
            name="streams-64",
            code="W3",
            quick_requests=128,
            title="64 streams",
            concurrency=64,
            num_requests=192,
            prompt_tokens=128,
            output_tokens=128,
        ),
        Profile(
            name="long-prompt",
            code="W4",
            quick_requests=4,
            title="4,000-token prompt, 4 streams",
            concurrency=4,
            num_requests=8,
            prompt_tokens=4000,
            output_tokens=32,
        ),
        Profile(
            name="shared-prefix",
            code="W5",
            quick_requests=16,
            title="3,500-token shared prefix, 8 streams",
            concurrency=8,
            num_requests=32,
            prompt_tokens=60,
            output_tokens=32,
            shared_prefix_tokens=3500,
            rounds=2,
        ),
        Profile(
            name="running-stream",
            code="R1",
            title="a stream while a 4,000-token prompt arrives",
            concurrency=1,
            num_requests=1,
            prompt_tokens=128,
            output_tokens=256,
            newcomer_prompt_tokens=4000,
        ),
        Profile(
            name="large-1",
            code="L1",
            title="1.07B, 1 stream",
            concurrency=1,
            num_requests=4,
            prompt_tokens=128,
            output_tokens=64,
            is_large_model=True,
            quick_requests=2,
            quick_repeats=2,
        ),
        Profile(
            name="large-16",
            code="L2",
            title="1.07B, 16 streams",
            concurrency=16,
            num_requests=32,
            prompt_tokens=128,
            output_tokens=64,
            is_large_model=True,
            quick_requests=16,
        ),
        Profile(
            name="first-token",
            code="T1",
            title="lone first token, 128-token prompt",
            concurrency=1,
            num_requests=10,
            prompt_tokens=128,
            output_tokens=2,
        ),
        Profile(
            name="poisson",
            code="P1",
            title="open loop, 4 requests/s",
            concurrency=1,
            num_requests=40,
            prompt_tokens=128,
            output_tokens=64,
            rate_per_s=4.0,
        ),
    )
}
"""Name → profile. The sizes are those of the peers' published comparison that Weft's figures stand beside."""

USUAL_PROFILES = (
    "streams-1",
    "streams-16",
    "streams-64",
    "long-prompt",
    "running-stream",
    "shared-prefix",
    "large-1",
    "large-16",
)
"""What a sitting measures when nobody says otherwise, in this order."""


def find_profiles(names: Iterable[str]) -> list[Profile]:
    """Profiles by name or code. Raises ValueError for one that there is not."""
    known = {key: profile for profile in PROFILES.values() for key in (profile.name, profile.code)}
    chosen = list(names)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no workload is called {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in chosen]


WARM_UP = (
    Profile(name="warm-up-1", title="", concurrency=1, num_requests=1, prompt_tokens=128, output_tokens=16),
    Profile(name="warm-up-4", title="", concurrency=4, num_requests=8, prompt_tokens=128, output_tokens=16),
)
"""Sent before anything is measured: first calls allocate, compile and page in."""


def single_token_words(vocabulary: Iterable[str]) -> list[str]:
    """Words of a tokenizer's vocabulary that are one token each behind a space, sorted.

    Raises ValueError when there are too few of them for prompts that differ.
    """
    words = sorted(entry[1:] for entry in vocabulary if _SPACED_WORD.fullmatch(entry))
    if len(words) < 100:
        raise ValueError(f"the vocabulary has {len(words)} words of one token; at least 100 are needed for prompts")
    return words


class PromptWriter:
    """Writes random prompts of exact token lengths. One seed gives one series of prompts."""

    def __init__(self, words: Sequence[str], seed: int) -> None:
        self._words = words
        self._rng = random.Random(seed)  # noqa: S311 - prompts, not secrets

    def text(self, num_tokens: int) -> str:
        """`num_tokens` words, each behind a space, so that pieces can be joined without changing the count."""
        return "".join(f" {word}" for word in self._rng.choices(self._words, k=num_tokens))

    def rounds(self, profile: Profile) -> list[list[str]]:
        """The prompts of each round of a profile; the shared prefix is the same in all rounds.

        A newcomer's prompt comes last.
        """
        prefix = self.text(profile.shared_prefix_tokens)
        newcomer = [self.text(profile.newcomer_prompt_tokens)] if profile.newcomer_prompt_tokens else []
        return [
            [*(prefix + self.text(profile.prompt_tokens) for _ in range(profile.num_requests)), *newcomer]
            for _ in range(profile.rounds)
        ]


def completion_body(model: str, prompt: str, output_tokens: int) -> dict[str, Any]:
    """A greedy, streamed `/v1/completions` body whose answer has exactly `output_tokens` tokens.

    `ignore_eos` is an extension of OpenAI's API that Weft, vLLM and llama.cpp share.
    """
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
