"""An embedding model behind the real launcher: OpenAI's client, neighbours, two ranks, clients that leave."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
from tests.e2e.harness import RawClient, RunningServer, serving
from tests.numerics.embedding_models import reference_vector, write_embedding_model

from weft.core.request import Pooling

pytestmark = pytest.mark.e2e

FLAGS = ("--dtype", "float32", "--kv-pool-bytes", "8MiB", "--block-size-tokens", "16", "--served-model-name", "tiny")
DRAW = random.Random(7)
TEXTS = [[DRAW.randrange(2, 200) for _ in range(length)] for length in (1, 5, 8, 40, 130, 256)]


def client_of(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def num_sequences(server: RunningServer) -> float:
    """Running and waiting in the engine."""
    metrics = server.metrics()
    return metrics.value("tgi_batch_current_size") + metrics.value("tgi_queue_size")


@pytest.mark.parametrize("mode", [Pooling.LAST, Pooling.MEAN])
def test_vectors_over_http_are_those_of_transformers(tmp_path: Path, mode: Pooling) -> None:
    reference = write_embedding_model(tmp_path, mode=mode)
    with serving(tmp_path, *FLAGS, "--max-batch-prefill-tokens", "64") as server:
        client = client_of(server)

        answer = client.embeddings.create(model="tiny", input=TEXTS)
        with ThreadPoolExecutor(4) as pool:
            alone = list(pool.map(lambda text: client.embeddings.create(model="tiny", input=[text]).data[0], TEXTS))

        assert f"embeddings ({mode} pooling)" in server.output
        assert "/v1/embeddings" in server.output
        with pytest.raises(openai.BadRequestError, match="turns texts into vectors"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.BadRequestError, match="at most 256 tokens"):
            client.embeddings.create(model="tiny", input=[list(range(2, 202)) + [3] * 57])
        metrics = server.metrics()

    assert (answer.model, answer.usage.prompt_tokens) == ("tiny", sum(map(len, TEXTS)))
    assert [datum.embedding for datum in answer.data] == [datum.embedding for datum in alone], "neighbours show"
    for text, datum in zip(TEXTS, answer.data, strict=True):
        expected = torch.nn.functional.normalize(reference_vector(reference, text, mode), dim=0)
        torch.testing.assert_close(torch.tensor(datum.embedding), expected, rtol=1e-4, atol=1e-5)
    assert metrics.value("tgi_request_success") == 1 + len(TEXTS)


def test_two_ranks_make_the_same_vectors(tmp_path: Path) -> None:
    reference = write_embedding_model(tmp_path, config_class="LlamaConfig", mode=Pooling.MEAN)
    with serving(tmp_path, *FLAGS, "--num-shard", "2") as server:
        answer = client_of(server).embeddings.create(model="tiny", input=TEXTS)

    for text, datum in zip(TEXTS, answer.data, strict=True):
        expected = torch.nn.functional.normalize(reference_vector(reference, text, Pooling.MEAN), dim=0)
        torch.testing.assert_close(torch.tensor(datum.embedding), expected, rtol=1e-4, atol=1e-5)


def test_clients_that_leave_free_everything(tmp_path: Path) -> None:
    write_embedding_model(tmp_path)
    with serving(tmp_path, *FLAGS, "--max-batch-prefill-tokens", "16") as server:
        for _ in range(3):
            client = RawClient(server.port).send("/v1/embeddings", {"input": [TEXTS[4]] * 2000})
            server.wait_until(lambda: num_sequences(server) > 0, "sequences run")
            client.leave()
            server.wait_until(lambda: num_sequences(server) == 0, "no sequence runs or waits")
        assert server.metrics().value("weft_request_cancelled", stage="decode") >= 1

        after = httpx.post(f"{server.base_url}/embed", json={"inputs": ["hello", "world"]}, timeout=60)

    assert after.status_code == 200
    assert [len(vector) for vector in after.json()] == [48, 48]
