"""Official clients against a real socket: what they send is understood, what they get is what they expect."""

import warnings
from collections.abc import Iterator

import anthropic
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


class TestOpenAIResponses:
    @pytest.fixture
    def client(self, live: Live) -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0) as client:
            yield client

    def test_create_and_go_on(self, client: openai.OpenAI):
        first = client.responses.create(model="tgi", input="Hi", instructions="Be brief")
        second = client.responses.create(model="tgi", input=MESSAGES, previous_response_id=first.id)

        assert first.output_text == second.output_text == TEXT
        assert first.status == "completed"
        assert second.usage.total_tokens == second.usage.input_tokens + second.usage.output_tokens
        assert client.responses.retrieve(first.id).output_text == TEXT
        items = client.responses.input_items.list(second.id, order="asc")
        assert [item.content[0].text for item in items] == ["Hi", TEXT, "Hi"]
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)

    def test_stream(self, client: openai.OpenAI):
        events = list(client.responses.create(model="tgi", input="Hi", stream=True))

        assert [type(event).__name__ for event in events[:4]] == [
            "ResponseCreatedEvent",
            "ResponseInProgressEvent",
            "ResponseOutputItemAddedEvent",
            "ResponseContentPartAddedEvent",
        ]
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
        assert events[-1].type == "response.completed"
        assert events[-1].response.output_text == TEXT

    def test_stream_helper(self, client: openai.OpenAI):
        with client.responses.stream(model="tgi", input="Hi") as stream:
            for _ in stream:
                pass
            response = stream.get_final_response()

        assert response.output_text == TEXT

    def test_background(self, client: openai.OpenAI):
        begun = client.responses.create(model="tgi", input="Hi", background=True, stream=True)
        events = list(begun)
        response_id = events[0].response.id

        again = list(client.responses.retrieve(response_id, stream=True, starting_after=3))

        assert [event.sequence_number for event in again] == [event.sequence_number for event in events[4:]]
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(response_id)

    def test_input_tokens(self, client: openai.OpenAI):
        counted = client.responses.input_tokens.count(model="tgi", input="Hi")

        assert counted.input_tokens == client.responses.create(model="tgi", input="Hi").usage.input_tokens


class TestAnthropic:
    @pytest.fixture
    def client(self, live: Live) -> Iterator[anthropic.Anthropic]:
        with anthropic.Anthropic(base_url=live.url, api_key=KEY, max_retries=0) as client:
            yield client

    def test_create(self, client: anthropic.Anthropic):
        message = client.messages.create(model="tgi", max_tokens=99, messages=MESSAGES, system="Be brief")

        assert message.content[0].text == TEXT
        assert message.stop_reason == "end_turn"
        assert message._request_id

    def test_stream(self, client: anthropic.Anthropic):
        with client.messages.stream(model="tgi", max_tokens=99, messages=MESSAGES) as stream:
            text = "".join(stream.text_stream)
            message = stream.get_final_message()

        assert text == message.content[0].text == TEXT
        assert message.usage.output_tokens == len(TEXT.encode()) + 1

    def test_raw_events(self, client: anthropic.Anthropic):
        events = list(client.messages.create(model="tgi", max_tokens=99, messages=MESSAGES, stream=True))

        assert events[0].type == "message_start"
        assert events[-1].type == "message_stop"

    def test_count_tokens(self, client: anthropic.Anthropic):
        count = client.messages.count_tokens(model="tgi", messages=MESSAGES)

        message = client.messages.create(model="tgi", max_tokens=99, messages=MESSAGES)
        assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens

    def test_models(self, client: anthropic.Anthropic):
        [model] = list(client.models.list(limit=1))

        assert (model.type, model.lifecycle, model.created_at.year) == ("model", "active", 2023)
        assert client.models.retrieve(model.id) == model
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("nobody")

    def test_a_bearer_token_is_a_key_too(self, live: Live):
        with anthropic.Anthropic(base_url=live.url, auth_token=KEY, max_retries=0) as client:
            assert client.messages.create(model="tgi", max_tokens=99, messages=MESSAGES).role == "assistant"

    @pytest.mark.parametrize(
        ("error", "fields"),
        [
            (anthropic.BadRequestError, {"tools": [{"name": "f", "input_schema": {"type": "object"}}]}),
            (anthropic.NotFoundError, {"model": "claude"}),
        ],
    )
    def test_errors_are_the_exceptions_of_the_client(self, client: anthropic.Anthropic, error: type, fields: dict):
        with pytest.raises(error) as caught:
            client.messages.create(**{"model": "tgi", "max_tokens": 9, "messages": MESSAGES, **fields})

        assert caught.value.body["type"] == "error"
        assert caught.value.request_id

    async def test_the_asynchronous_client(self, live: Live):
        async with anthropic.AsyncAnthropic(base_url=live.url, api_key=KEY, max_retries=0) as client:
            message = await client.messages.create(model="tgi", max_tokens=99, messages=MESSAGES)

        assert message.content[0].text == TEXT


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
