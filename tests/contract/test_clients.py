"""Official clients against a real socket: what they send is understood, what they get is what they expect."""

import warnings
from collections.abc import Iterator

import httpx
import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from tests.contract.house import build_house, say
from tests.contract.live import Live, serve

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its pydantic models are of 2024
    text_generation = pytest.importorskip("text_generation")

TEXT = "Paris, naturally. 🙂"
MESSAGES = [{"role": "user", "content": "Hi"}]
KEY = "sk-test"


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    def make_house():
        return build_house(say(TEXT), settings={"api_key": KEY}, max_total_tokens=256)

    with serve(make_house) as server:
        yield server


class TestOpenAI:
    @pytest.fixture
    def client(self, live: Live) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
            yield client

    def test_chat(self, client: openai.OpenAI):
        completion = client.chat.completions.create(model="test/bytes", messages=MESSAGES)

        assert completion.choices[0].message.content == TEXT
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
        assert completion._request_id

    def test_chat_stream(self, client: openai.OpenAI):
        stream = client.chat.completions.create(
            model="tgi", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )

        chunks = list(stream)

        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
        assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1

    def test_chat_stream_helper(self, client: openai.OpenAI):
        with client.chat.completions.stream(model="tgi", messages=MESSAGES) as stream:
            for _ in stream:
                pass
            completion = stream.get_final_completion()

        assert completion.choices[0].message.content == TEXT

    def test_logprobs(self, client: openai.OpenAI):
        completion = client.chat.completions.create(model="tgi", messages=MESSAGES, logprobs=True, top_logprobs=3)

        entries = completion.choices[0].logprobs.content
        assert bytes(byte for entry in entries for byte in entry.bytes).decode() == TEXT
        assert len(entries[0].top_logprobs) == 3

    def test_several_choices(self, client: openai.OpenAI):
        assert len(client.chat.completions.create(model="tgi", messages=MESSAGES, n=3).choices) == 3

    def test_completions(self, client: openai.OpenAI):
        completion = client.completions.create(model="tgi", prompt=["a", "b"], max_tokens=50, echo=True, logprobs=2)

        assert [choice.text for choice in completion.choices] == ["a" + TEXT, "b" + TEXT]

    def test_completions_stream(self, client: openai.OpenAI):
        stream = client.completions.create(model="tgi", prompt="a", max_tokens=50, stream=True)

        assert "".join(chunk.choices[0].text for chunk in stream) == TEXT

    def test_models(self, client: openai.OpenAI):
        assert [model.id for model in client.models.list()] == ["test/bytes"]
        assert client.models.retrieve("test/bytes").id == "test/bytes"

    @pytest.mark.parametrize(
        ("error", "fields"),
        [
            (openai.BadRequestError, {"temperature": 9}),
            (openai.NotFoundError, {"model": "gpt-4"}),
            (openai.BadRequestError, {"max_tokens": 100_000}),
        ],
    )
    def test_errors_are_the_exceptions_of_the_client(
        self, client: openai.OpenAI, error: type, fields: dict[str, object]
    ):
        with pytest.raises(error) as caught:
            client.chat.completions.create(**{"model": "tgi", "messages": MESSAGES, **fields})

        assert caught.value.type == "invalid_request_error"
        assert caught.value.param == next(iter(fields))
        assert caught.value.request_id

    def test_a_wrong_key(self, live: Live):
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)

        with client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()

        assert caught.value.code == "invalid_api_key"

    async def test_the_asynchronous_client(self, live: Live):
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
            stream = await client.chat.completions.create(model="tgi", messages=MESSAGES, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert text == TEXT


class TestHuggingFaceHub:
    @pytest.fixture
    def client(self, live: Live) -> InferenceClient:
        return InferenceClient(base_url=live.url, api_key=KEY)

    def test_text_generation(self, live: Live):
        client = InferenceClient(model=live.url, token=KEY)

        assert client.text_generation("a", max_new_tokens=50, return_full_text=False) == TEXT
        # The client posts to /, where TGI puts the prompt before the text unless told otherwise.
        assert client.text_generation("a", max_new_tokens=50) == "a" + TEXT

    def test_text_generation_details(self, live: Live):
        client = InferenceClient(model=live.url, token=KEY)

        output = client.text_generation(
            "a", max_new_tokens=50, details=True, decoder_input_details=True, top_n_tokens=2, return_full_text=False
        )

        assert output.generated_text == TEXT
        assert output.details.finish_reason == "eos_token"
        assert len(output.details.prefill) == 2

    def test_text_generation_stream(self, live: Live):
        client = InferenceClient(model=live.url, token=KEY)

        outputs = list(
            client.text_generation("a", max_new_tokens=50, details=True, stream=True, return_full_text=False)
        )

        assert outputs[-1].generated_text == TEXT
        assert "".join(output.token.text for output in outputs if not output.token.special) == TEXT

    def test_chat(self, client: InferenceClient):
        output = client.chat_completion(MESSAGES, max_tokens=50)

        assert output.choices[0].message.content == TEXT

    def test_chat_stream(self, client: InferenceClient):
        chunks = list(client.chat_completion(MESSAGES, max_tokens=50, stream=True))

        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT

    async def test_the_asynchronous_client(self, live: Live):
        async with AsyncInferenceClient(base_url=live.url, api_key=KEY) as client:
            output = await client.chat_completion(MESSAGES, max_tokens=50)

        assert output.choices[0].message.content == TEXT


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client's own use of pydantic
class TestTextGeneration:
    """TGI's own client: every parameter it does not use is null."""

    @pytest.fixture
    def client(self, live: Live):
        return text_generation.Client(live.url, headers={"Authorization": f"Bearer {KEY}"})

    def test_generate(self, client):
        response = client.generate("a", max_new_tokens=50, decoder_input_details=True, top_n_tokens=2)

        assert response.generated_text == TEXT
        assert response.details.finish_reason == "eos_token"
        assert response.details.prefill[0].logprob is None
        assert len(response.details.top_tokens[0]) == 2

    def test_best_of(self, client):
        response = client.generate("a", best_of=2, do_sample=True)

        assert len(response.details.best_of_sequences) == 1

    def test_generate_stream(self, client):
        responses = list(client.generate_stream("a", max_new_tokens=50))

        assert responses[-1].generated_text == TEXT
        assert responses[-1].details.generated_tokens == len(TEXT.encode()) + 1

    def test_chat(self, client):
        response = client.chat(messages=[{"role": "user", "content": "Hi"}])

        assert response.choices[0].message.content == TEXT

    def test_validation_errors(self, client):
        with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
            client.generate("a", max_new_tokens=0)

    async def test_the_asynchronous_client(self, live: Live):
        client = text_generation.AsyncClient(live.url, headers={"Authorization": f"Bearer {KEY}"})

        assert (await client.generate("a", max_new_tokens=50)).generated_text == TEXT


def test_http_clients_see_an_orderly_connection(live: Live):
    with httpx.Client(base_url=live.url, headers={"authorization": f"Bearer {KEY}"}) as client:
        for _ in range(3):
            assert client.get("/info").status_code == 200
        assert client.get("/docs").headers["content-type"].startswith("text/html")
