"""Random requests in three dialects, for servers that record."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.e2e.harness import RunningServer

STORY = (
    "Once upon a time a fisherman lived with his wife in a small hut by the sea. Every day he went out to fish, and "
    "he fished and fished. One day his line went deep down into the clear water, and when he pulled it up he had "
    "caught a large flounder. The flounder said to him: listen, fisherman, I beg you, let me live, for I am no real "
    "flounder but an enchanted prince. What good would it do you to kill me? I would not taste good. Put me back into "
    "the water and let me swim. The fisherman answered that he"
)
WORDS = STORY.split()


def send_random_requests(server: RunningServer, count: int, seed: int, max_new_tokens: int = 32) -> int:
    """Send requests, 1 to 64 at once; returns how many sequences they ask for. Every one must be answered."""
    rng = random.Random(seed)
    requests = [_request(rng, max_new_tokens) for _ in range(count)]
    with ThreadPoolExecutor(64) as pool:
        num_sent = 0
        while num_sent < count:
            burst = requests[num_sent : num_sent + rng.randint(1, 64)]
            for answer in pool.map(lambda request: server.http.post(request[0], json=request[1]), burst):
                assert answer.status_code == 200, answer.text
            num_sent += len(burst)
    return sum(body.get("n", 1) for _, body in requests)


def _request(rng: random.Random, max_new_tokens: int) -> tuple[str, dict[str, Any]]:
    text = " ".join(WORDS[: rng.randint(1, len(WORDS))]) if rng.random() < 0.5 else " ".join(rng.choices(WORDS, k=12))
    length = rng.randint(1, max_new_tokens)
    chances: dict[str, Any] = {} if rng.random() < 0.4 else {"temperature": rng.choice((0.5, 1.0, 1.5)), "top_p": 0.9}
    if rng.random() < 0.3:
        chances |= {"frequency_penalty": 0.5}
    match rng.randrange(3):
        case 0:
            native = {"repetition_penalty": 1.1, "typical_p": 0.9} if rng.random() < 0.3 else {}
            parameters = {**chances, **native, "max_new_tokens": length, "stop": [" the"] if length > 20 else []}
            return "/generate", {"inputs": text, "parameters": parameters}
        case 1:
            many = {"n": rng.choice((1, 1, 2)), "logprobs": 3, "min_p": 0.02} if chances else {}
            return "/v1/completions", {"prompt": text, "max_tokens": length, **chances, **many}
        case _:
            messages = [{"role": "user", "content": text}]
            return "/v1/chat/completions", {"messages": messages, "max_tokens": length, "temperature": 0, **chances}
