"""A model inside this process: a tiny random Llama whose tokens transformers can tell, too."""

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from structlog.testing import capture_logs
from tests.unit.text.vocabularies import BYTE_LEVEL_TOKENS, byte_level_tokenizer

from weft import LLM, SamplingParams
from weft.errors import (
    ContextLengthError,
    EngineFatal,
    NotReadyError,
    TemplateError,
    UsageError,
    ValidationError,
)
from weft.server.startup import COMPILING_NOTICE

SETTINGS = {"dtype": "float32", "device": "cpu", "kv_pool_bytes": "4MiB"}
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offline") / "llama"
    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=len(BYTE_LEVEL_TOKENS) + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    byte_level_tokenizer()._backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE})
    )
    return directory


@pytest.fixture(scope="module")
def llm(checkpoint: Path):
    with LLM(checkpoint, **SETTINGS) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def expected(checkpoint: Path):
    """Greedy continuation by transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def continue_(prompt: tuple[int, ...], count: int) -> list[int]:
        ids = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    return continue_


def test_importing_weft_loads_neither_torch_nor_the_engine() -> None:
    code = (
        "import sys, weft; print(weft.__version__, sorted({'torch', 'weft.offline', 'weft.config'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split(maxsplit=1)[1] == "[]\n"


def test_the_public_names_are_what_they_say() -> None:
    import weft

    assert {name: getattr(weft, name) is not None for name in weft.__all__} == dict.fromkeys(weft.__all__, True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = weft.nothing


def test_a_text_is_completed_with_the_tokens_of_transformers(llm: LLM, expected) -> None:
    completion = llm.generate("hello there", GREEDY)

    assert list(completion.token_ids) == expected(completion.prompt_token_ids, 8)
    assert completion.finish_reason == "length"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(completion.prompt_token_ids), 8)
    assert completion.logprobs is None


def test_a_list_keeps_its_order_whatever_finishes_first(llm: LLM, expected) -> None:
    prompts = ["a", [5, 6, 7], "hello world", "b"]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in (12, 3, 7, 1)]

    completions = llm.generate(prompts, params)

    assert [len(completion.token_ids) for completion in completions] == [12, 3, 7, 1]
    assert completions[1].prompt_token_ids == (5, 6, 7)
    for completion in completions:
        assert list(completion.token_ids) == expected(completion.prompt_token_ids, len(completion.token_ids))


def test_more_prompts_than_the_engine_queues_are_all_answered(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.offline._MAX_OPEN_REQUESTS", 3)
    completions = llm.generate([[n] for n in range(2, 22)], SamplingParams(max_tokens=2, temperature=0))
    assert [completion.prompt_token_ids for completion in completions] == [(n,) for n in range(2, 22)]


def test_an_empty_list_has_no_completions(llm: LLM) -> None:
    assert llm.generate([]) == []


def test_one_conversation_or_many_go_through_the_template(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]

    one = llm.chat(conversation, GREEDY)
    many = llm.chat([conversation, [*conversation, {"role": "assistant", "content": "x"}, *conversation]], GREEDY)

    tokenizer = byte_level_tokenizer()
    assert list(one.prompt_token_ids) == tokenizer.encode("<|start|>user hi!", add_special_tokens=False)
    assert many[0].token_ids == one.token_ids
    assert len(many) == 2


def test_a_stream_gives_the_same_text_in_pieces(llm: LLM) -> None:
    whole = llm.generate("hello", GREEDY)

    with llm.stream("hello", GREEDY) as stream:
        with pytest.raises(ValidationError, match="read to its end"):
            _ = stream.completion
        pieces = list(stream)

    assert "".join(pieces) == whole.text == stream.completion.text
    assert stream.completion.token_ids == whole.token_ids


def test_a_conversation_can_be_streamed(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "hi"}]
    stream = llm.stream(conversation, GREEDY)
    assert "".join(stream) == llm.chat(conversation, GREEDY).text


def test_a_stream_that_is_left_frees_its_blocks(llm: LLM) -> None:
    long = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    with llm.stream("hello", long) as stream:
        next(iter(stream))

    # A request that went on would still run beside this one, and the engine serves in order of arrival.
    llm.generate("x", GREEDY)
    assert llm._loaded.engine._scheduler.stats().num_running == 0
    assert llm._loaded.engine._scheduler.stats().used_blocks == 0


def test_a_stop_string_ends_the_completion_and_is_cut_off(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    text = llm.generate("hello", params).text
    stop = text[3:5]

    stopped = llm.generate("hello", SamplingParams(max_tokens=None, temperature=0, ignore_eos=True, stop=stop))
    llm.generate("x", SamplingParams(max_tokens=1))

    assert llm._loaded.engine._scheduler.stats().num_running == 0
    assert stopped.text == text[: text.index(stop)]
    assert stopped.finish_reason == "stop"
    assert len(stopped.token_ids) < 30


def test_the_same_seed_gives_the_same_completion_and_no_seed_another(llm: LLM) -> None:
    def sample(seed: int | None) -> tuple[int, ...]:
        return llm.generate(
            "hello", SamplingParams(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
        ).token_ids

    assert sample(3) == sample(3)
    assert sample(None) != sample(None)


def test_logprobs_are_those_of_the_tokens_and_the_likeliest_beside_them(llm: LLM) -> None:
    params = SamplingParams(max_tokens=4, temperature=0, logprobs=2, ignore_eos=True)
    for completion in (llm.generate("hello", params), llm.chat([{"role": "user", "content": "hi"}], params)):
        assert completion.logprobs is not None
        assert completion.top_logprobs is not None
        assert len(completion.logprobs) == 4
        for token_id, logprob, top in zip(
            completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True
        ):
            assert next(iter(top.items())) == (token_id, pytest.approx(logprob, abs=1e-5))
            assert len(top) == 2


@pytest.mark.parametrize("max_tokens", [None, 28, 1000])
def test_the_context_is_the_limit_of_every_completion(llm: LLM, max_tokens: int | None) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    completion = llm.generate([[2] * 100], params)[0]
    assert len(completion.token_ids) == 28
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("params", "field"),
    [
        (SamplingParams(temperature=3), "temperature"),
        (SamplingParams(temperature="hot"), "temperature"),  # type: ignore[arg-type]
        (SamplingParams(top_p=-0.1), "top_p"),
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(stop=["a"] * 9), "stop"),
        (SamplingParams(stop=[""]), "stop"),
        (SamplingParams(logprobs=21), "logprobs"),
        (SamplingParams(logit_bias={999999: 1.0}), "logit_bias"),
    ],
)
def test_a_wrong_parameter_is_named(llm: LLM, params: SamplingParams, field: str) -> None:
    with pytest.raises(ValidationError, match=f"`{field}`") as caught:
        llm.generate("x", params)
    assert caught.value.field == field


def test_a_wrong_prompt_among_many_is_found_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ContextLengthError) as caught:
        llm.generate(["fine", [3] * 500])
    assert caught.value.__notes__ == ["prompt 1 of 2, counted from 0"]


@pytest.mark.parametrize("prompt", ["", [[]], [[10**9]], [[-1]]])
def test_prompts_that_are_no_prompts_are_refused(llm: LLM, prompt) -> None:
    with pytest.raises(ValidationError, match="prompt"):
        llm.generate(prompt)


def test_parameters_must_be_one_or_as_many_as_prompts(llm: LLM) -> None:
    with pytest.raises(ValidationError, match="one for each of 3"):
        llm.generate(["a", "b", "c"], [GREEDY, GREEDY])


def test_messages_of_a_wrong_form_are_refused(llm: LLM) -> None:
    with pytest.raises(ValidationError, match="role"):
        llm.chat([{"content": "hi"}])


def test_threads_share_the_engine(llm: LLM) -> None:
    alone = {n: llm.generate([[n, n]], GREEDY)[0].token_ids for n in range(2, 8)}
    together: dict[int, tuple[int, ...]] = {}

    def generate(n: int) -> None:
        together[n] = llm.generate([[n, n]], GREEDY)[0].token_ids

    threads = [threading.Thread(target=generate, args=(n,)) for n in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert together == alone


async def test_it_works_inside_a_running_event_loop(llm: LLM) -> None:
    assert llm.chat([{"role": "user", "content": "hi"}], GREEDY).usage.completion_tokens == 8


def test_a_model_without_a_template_says_so(checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "tokenizer_config.json":
            (bare / file.name).symlink_to(file)
    with LLM(bare, **SETTINGS) as llm, pytest.raises(TemplateError, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_a_closed_model_says_so_and_a_request_in_flight_ends(checkpoint: Path) -> None:
    llm = LLM(checkpoint, **SETTINGS)
    postbox, steps = llm._loaded.postbox, llm._loaded.engine._executor._thread
    execute = steps._execute

    def execute_slowly(plan, *rest):
        while plan.first_positions[0] > 20 and postbox._fatal is None:
            time.sleep(0.001)
        return execute(plan, *rest)

    steps._execute = execute_slowly
    pieces = iter(llm.stream("hello", SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)))
    next(pieces)

    llm.close()
    llm.close()

    with pytest.raises(NotReadyError, match="closed"):
        llm.generate("x")
    with pytest.raises(EngineFatal):
        list(pieces)


def test_a_forgotten_model_is_freed(checkpoint: Path) -> None:
    others = set(threading.enumerate())
    llm = LLM(checkpoint, **SETTINGS)
    llm.chat([{"role": "user", "content": "hi"}], GREEDY)
    engine = weakref.ref(llm._loaded.engine)
    threads = [thread for thread in threading.enumerate() if thread not in others]
    assert {thread.name for thread in threads} >= {"engine", "executor", "weft-loop"}

    del llm
    gc.collect()

    assert engine() is None
    assert not any(thread.is_alive() for thread in threads if thread.name in {"engine", "executor", "weft-loop"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 80}, "`port` is a setting of a server"),
        ({"dtyp": "float32"}, "no setting `dtyp`"),
        ({"dtype": "float7"}, "--dtype: must be one of"),
        ({"model_id": "x"}, "no setting `model_id`"),
    ],
)
def test_wrong_settings_are_named(settings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LLM("unused", **settings)


def test_nothing_is_written_to_standard_output(checkpoint: Path) -> None:
    code = "import sys, weft; weft.LLM(sys.argv[1], kv_pool_bytes='4MiB').generate('hi')"
    result = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda llm: llm.generate(None), "`prompts` must be a text, or a list"),
        (lambda llm: llm.generate(5), "`prompts` must be"),
        (lambda llm: llm.generate([5]), "`prompt` must be a text or a list of token ids. Given: 5"),
        (lambda llm: llm.generate(["a", None]), "`prompt` must be"),
        (lambda llm: llm.generate([[1, "2"]]), "`prompt` must be"),
        (lambda llm: llm.generate([[1, True]]), "`prompt` must be"),
        (lambda llm: llm.generate("a", "x"), "`params` must be"),
        (lambda llm: llm.generate("a", {"max_tokens": 1}), "`params` must be"),
        (lambda llm: llm.stream("a", "x"), "`params` must be"),
        (lambda llm: llm.stream(None), "`prompt` must be"),
        (lambda llm: llm.chat("hello"), "`messages` must be a conversation"),
        (lambda llm: llm.chat(None), "`messages` must be a conversation"),
        (lambda llm: llm.generate("a", SamplingParams(stop=5)), "stop"),
        (lambda llm: llm.generate("a", SamplingParams(logit_bias=5)), "logit_bias"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(llm: LLM, ask, named: str) -> None:
    with pytest.raises(ValidationError, match=named.replace("(", r"\(")):
        ask(llm)


def test_settings_may_have_the_names_of_other_servers(checkpoint: Path) -> None:
    with LLM(checkpoint, **SETTINGS, max_model_len=16) as llm:
        assert llm.info.max_total_tokens == 16


def test_a_first_start_that_compiles_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.kernels.registry.must_compile", lambda: True)

    with capture_logs() as events, LLM(checkpoint, **SETTINGS):
        pass

    assert [event["note"] for event in events if event["log_level"] == "warning"] == [COMPILING_NOTICE]
