"""The clients that people have: openai, huggingface_hub, and TGI's own text_generation."""

import functools
import operator
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest
import text_generation
from huggingface_hub import InferenceClient
from openai.types.chat import ChatCompletionUserMessageParam
from tests.e2e.harness import RunningServer

pytestmark = pytest.mark.e2e

QUESTION: ChatCompletionUserMessageParam = {"role": "user", "content": "What is the capital of France?"}
MODEL = "SmolLM2-135M-Instruct.Q4_1"
PROMPT = "The capital of France is"


@pytest.fixture
def openai_client(running_server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running_server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


class TestOpenAI:
    def test_chat(self, openai_client: openai.OpenAI) -> None:
        answer = openai_client.chat.completions.create(
            model=MODEL, messages=[QUESTION], temperature=0, max_completion_tokens=24
        )

        assert "Paris" in (answer.choices[0].message.content or "")
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer.id.startswith("chatcmpl-")

    def test_chat_stream_with_usage(self, openai_client: openai.OpenAI) -> None:
        stream = openai_client.chat.completions.create(
            model="tgi",
            messages=[QUESTION],
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)

        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert "Paris" in text
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]

    def test_log_probabilities(self, openai_client: openai.OpenAI) -> None:
        answer = openai_client.chat.completions.create(
            model="tgi", messages=[QUESTION], temperature=0, max_tokens=3, logprobs=True, top_logprobs=3
        )

        assert answer.choices[0].logprobs is not None
        content = answer.choices[0].logprobs.content
        assert content is not None
        assert len(content) == 3
        for place in content:
            assert place.logprob <= 0
            assert len(place.top_logprobs) == 3
            assert place.top_logprobs[0].token == place.token, "greedy takes the likeliest token"
            assert bytes(place.bytes or []).decode() == place.token

    def test_what_the_model_said_greedily_is_the_likeliest_when_it_is_scored(
        self, openai_client: openai.OpenAI
    ) -> None:
        """As evaluation harnesses do it: the same number beside the token and among the alternatives, or not greedy."""
        said = openai_client.completions.create(model="tgi", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2)
        completion, told = said.choices[0].text, said.choices[0].logprobs

        scored = openai_client.completions.create(
            model="tgi", prompt=[PROMPT + completion, PROMPT + " banana"], max_tokens=0, echo=True, logprobs=2
        )

        own, other = (choice.logprobs for choice in scored.choices)
        assert told is not None
        assert own is not None
        assert other is not None
        assert (own.tokens or [])[-6:] == told.tokens
        assert (own.token_logprobs or [])[-6:] == pytest.approx(told.token_logprobs, abs=1e-3)
        is_likeliest = [
            logprob == max(top.values())
            for logprob, top in zip((own.token_logprobs or [])[-6:], (own.top_logprobs or [])[-6:], strict=True)
        ]
        assert all(is_likeliest)
        assert (other.token_logprobs or [])[-1] < max((other.top_logprobs or [])[-1].values())
        assert scored.usage is not None
        assert scored.usage.completion_tokens == 0

    def test_usage_is_the_same_in_every_dialect(
        self, openai_client: openai.OpenAI, running_server: RunningServer
    ) -> None:
        question = str(QUESTION["content"])
        base = {"model": "tgi", "temperature": 0}
        url = running_server.base_url

        def counts(path: str, body: dict[str, object], *names: str) -> tuple[int, ...]:
            usage = httpx.post(f"{url}{path}", json=base | body, timeout=60).json()["usage"]
            return tuple(functools.reduce(operator.getitem, name.split("."), usage) for name in names)

        chat_body = {"messages": [QUESTION], "max_tokens": 8}
        chat_names = (
            "prompt_tokens",
            "completion_tokens",
            "prompt_tokens_details.cached_tokens",
            "completion_tokens_details.reasoning_tokens",
        )
        counts("/v1/chat/completions", chat_body, *chat_names)  # from here on the prompt is cached
        chat = counts("/v1/chat/completions", chat_body, *chat_names)
        response = counts(
            "/v1/responses",
            {"input": question, "max_output_tokens": 8},
            "input_tokens",
            "output_tokens",
            "input_tokens_details.cached_tokens",
            "output_tokens_details.reasoning_tokens",
        )
        fresh, completion, cached, thinking = counts(
            "/v1/messages",
            chat_body,
            "input_tokens",
            "output_tokens",
            "cache_read_input_tokens",
            "output_tokens_details.thinking_tokens",
        )
        streamed = list(
            openai_client.chat.completions.create(
                model="tgi",
                messages=[QUESTION],
                temperature=0,
                max_tokens=8,
                stream=True,
                stream_options={"include_usage": True},
            )
        )[-1].usage

        assert chat == response == (fresh + cached, completion, cached, thinking)
        assert streamed is not None
        assert (streamed.prompt_tokens, streamed.completion_tokens) == chat[:2]

    def test_completions_of_several_prompts_keep_their_order(self, openai_client: openai.OpenAI) -> None:
        prompts = [PROMPT, "The opposite of black is", PROMPT]

        answer = openai_client.completions.create(model="tgi", prompt=prompts, temperature=0, max_tokens=4)

        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert answer.choices[0].text == answer.choices[2].text
        assert "Paris" in answer.choices[0].text
        assert "white" in answer.choices[1].text

    def test_completion_stream(self, openai_client: openai.OpenAI) -> None:
        whole = openai_client.completions.create(model="tgi", prompt=PROMPT, temperature=0, max_tokens=6)
        stream = openai_client.completions.create(model="tgi", prompt=PROMPT, temperature=0, max_tokens=6, stream=True)

        chunks = list(stream)

        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
        assert chunks[-1].choices[0].finish_reason == "length"

    def test_a_stop_string_ends_the_answer_and_is_cut_off(self, openai_client: openai.OpenAI) -> None:
        answer = openai_client.completions.create(
            model="tgi", prompt="1, 2, 3, 4, 5,", temperature=0, max_tokens=40, stop=" 9"
        )

        assert answer.choices[0].finish_reason == "stop"
        assert " 8" in answer.choices[0].text
        assert "9" not in answer.choices[0].text

    def test_models(self, openai_client: openai.OpenAI) -> None:
        names = [model.id for model in openai_client.models.list()]

        assert MODEL in names
        assert openai_client.models.retrieve(names[0]).id == names[0]

    def test_an_unknown_model_is_not_found(self, openai_client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            openai_client.chat.completions.create(model="gpt-4o", messages=[QUESTION])

        assert caught.value.code == "model_not_found"

    def test_a_bad_field_is_named(self, openai_client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            openai_client.chat.completions.create(model="tgi", messages=[QUESTION], temperature=3)

        assert caught.value.param == "temperature"


class TestResponses:
    def test_a_conversation_goes_on_where_it_was_left(self, openai_client: openai.OpenAI) -> None:
        text = str(QUESTION["content"])
        first = openai_client.responses.create(model="tgi", input=text, temperature=0, max_output_tokens=24)
        events = list(
            openai_client.responses.create(model="tgi", input=text, temperature=0, max_output_tokens=24, stream=True)
        )
        second = openai_client.responses.create(
            model="tgi", input="And of Italy?", previous_response_id=first.id, temperature=0, max_output_tokens=24
        )

        assert "Paris" in first.output_text
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == first.output_text
        assert events[-1].type == "response.completed"
        assert first.usage is not None
        assert second.usage is not None
        assert second.usage.input_tokens > first.usage.total_tokens
        assert second.usage.input_tokens_details.cached_tokens > 0
        assert openai_client.responses.retrieve(first.id).output_text == first.output_text

    def test_a_background_response_is_finished_without_us(
        self, openai_client: openai.OpenAI, running_server: RunningServer
    ) -> None:
        begun = openai_client.responses.create(
            model="tgi", input="Count to ten.", background=True, max_output_tokens=24
        )

        running_server.wait_until(
            lambda: openai_client.responses.retrieve(begun.id).status in {"completed", "incomplete"}, "it has ended"
        )

        assert openai_client.responses.retrieve(begun.id).output_text


class TestAnthropic:
    def test_a_message_whole_and_streamed(self, running_server: RunningServer) -> None:
        with anthropic.Anthropic(base_url=running_server.base_url, api_key="none", max_retries=0) as client:
            messages: list[anthropic.types.MessageParam] = [{"role": "user", "content": str(QUESTION["content"])}]
            # The client offers no temperature of its own any more; the server still reads it.
            fields = {"temperature": 0}
            whole = client.messages.create(model="tgi", max_tokens=24, messages=messages, extra_body=fields)
            with client.messages.stream(model="tgi", max_tokens=24, messages=messages, extra_body=fields) as stream:
                streamed = "".join(stream.text_stream)
            count = client.messages.count_tokens(model="tgi", messages=messages)
            [model] = list(client.models.list())

        [block] = whole.content
        assert block.type == "text"
        assert "Paris" in block.text
        assert streamed == block.text
        assert count.input_tokens == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
        assert (model.type, model.id) == ("model", MODEL)


class TestHuggingFaceHub:
    def test_text_generation_posts_to_the_root(self, running_server: RunningServer) -> None:
        client = InferenceClient(model=running_server.base_url)

        text = client.text_generation(PROMPT, max_new_tokens=6)

        assert text.startswith(PROMPT), "TGI's default on this route is the full text"
        assert "Paris" in text

    def test_text_generation_details_and_stream(self, running_server: RunningServer) -> None:
        client = InferenceClient(model=running_server.base_url)

        whole = client.text_generation(PROMPT, max_new_tokens=6, details=True, return_full_text=False)
        events = list(
            client.text_generation(PROMPT, max_new_tokens=6, details=True, return_full_text=False, stream=True)
        )

        assert whole.details is not None
        assert whole.details.finish_reason == "length"
        assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
        assert events[-1].generated_text == whole.generated_text

    def test_chat(self, running_server: RunningServer) -> None:
        client = InferenceClient(base_url=running_server.base_url)

        answer = client.chat_completion([{"role": "user", "content": str(QUESTION["content"])}], temperature=0)
        chunks = client.chat_completion(
            [{"role": "user", "content": str(QUESTION["content"])}], temperature=0, stream=True
        )

        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert "Paris" in (answer.choices[0].message.content or "")
        assert text == answer.choices[0].message.content


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client, which nobody maintains
class TestTextGeneration:
    """TGI's own client; it too posts to the root."""

    def test_generate(self, running_server: RunningServer) -> None:
        client = text_generation.Client(running_server.base_url, timeout=60)

        whole = client.generate(PROMPT, max_new_tokens=6, decoder_input_details=True)

        assert "Paris" in whole.generated_text
        assert whole.details.finish_reason == text_generation.types.FinishReason.Length
        assert whole.details.generated_tokens == len(whole.details.tokens) == 6
        assert "".join(token.text for token in whole.details.prefill) == PROMPT
        assert [token.logprob is None for token in whole.details.prefill] == [True, False, False, False, False]

    def test_generate_stream(self, running_server: RunningServer) -> None:
        client = text_generation.Client(running_server.base_url, timeout=60)
        whole = client.generate(PROMPT, max_new_tokens=6)

        events = list(client.generate_stream(PROMPT, max_new_tokens=6))

        assert [event.token.id for event in events] == [token.id for token in whole.details.tokens]
        assert events[-1].generated_text == whole.generated_text
        assert events[-1].details is not None

    def test_seeded_sampling_repeats(self, running_server: RunningServer) -> None:
        client = text_generation.Client(running_server.base_url, timeout=60)

        texts = {
            client.generate(PROMPT, max_new_tokens=12, do_sample=True, temperature=1.0, seed=seed).generated_text
            for seed in (7, 7, 8)
        }

        assert len(texts) == 2

    def test_refusals_are_exceptions_of_the_client(self, running_server: RunningServer) -> None:
        client = text_generation.Client(running_server.base_url, timeout=60)

        with pytest.raises(text_generation.errors.ValidationError, match="truncate"):
            client.generate(PROMPT, max_new_tokens=6, truncate=10**9)

    async def test_the_asynchronous_client(self, running_server: RunningServer) -> None:
        client = text_generation.AsyncClient(running_server.base_url, timeout=60)

        whole = await client.generate(PROMPT, max_new_tokens=6)
        events = [event async for event in client.generate_stream(PROMPT, max_new_tokens=6)]

        assert events[-1].generated_text == whole.generated_text
