import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.unit.models.model_files import (
    LLAMA_CONFIG,
    float32,
    gguf_bytes,
    llama_gguf,
    string,
    strings,
    uint32,
    write_model,
)

from weft.errors import ModelNotFoundError
from weft.models.registry import describe, load_family, supported_model_types
from weft.models.spec import WeightFormat

FAMILIES = {"gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"}


def test_a_directory_is_described_by_its_configuration(tmp_path: Path) -> None:
    found = describe(write_model(tmp_path, LLAMA_CONFIG | {"num_key_value_heads": 1, "tie_word_embeddings": True}))

    assert (found.model_type, found.weight_format, found.stored_dtype) == (
        "llama",
        WeightFormat.SAFETENSORS,
        "bfloat16",
    )
    assert (found.num_layers, found.num_heads, found.num_kv_heads, found.head_dim) == (1, 2, 1, 4)
    assert (found.hidden_size, found.vocab_size, found.max_positions) == (8, 32, 64)
    assert found.tied_embeddings
    assert found.sliding_window is None
    # 32·8 embedding; q 8·8, k and v 4·8 each, o 8·8; three times 16·8; three norms of 8.
    assert found.num_parameters == 256 + 64 + 2 * 32 + 64 + 3 * 128 + 3 * 8
    assert found.weights_bytes("bfloat16") == 2 * found.num_parameters
    # A position costs 8 multiply-adds with the query and 8 with the weights; linear layers as above.
    assert found.spec.attention_cost == (8 + 8) / (64 + 2 * 32 + 64 + 3 * 128)
    assert found.kv_bytes_per_token("float32") == 2 * 1 * 4 * 4


def test_a_gguf_file_is_described_by_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(llama_gguf())

    found = describe(path)

    assert (found.model_type, found.weight_format, found.stored_dtype) == ("llama", WeightFormat.GGUF, "Q8_0")
    assert (found.num_heads, found.num_kv_heads, found.head_dim, found.vocab_size) == (4, 2, 8, 16)
    assert found.tied_embeddings


def test_an_unknown_model_type_lists_the_known_ones_and_runs_nothing(tmp_path: Path) -> None:
    directory = write_model(
        tmp_path, {"model_type": "evil", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.M"}}
    )
    (directory / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(ModelNotFoundError, match=r"Model type `evil` is not supported. Supported: gemma2, gemma3_text"):
        describe(directory)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("model_type", ["__init__", "../registry", "families.llama", "", "LLAMA"])
def test_a_model_type_is_never_a_path(model_type: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"is not supported"):
        load_family(model_type)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"hidden_size": 9}, "`hidden_size` must be a multiple of num_attention_heads = 2"),
        ({"num_key_value_heads": 3}, "`num_key_value_heads` must be an integer from 1 to 2"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must be a divisor of num_attention_heads = 4"),
        ({"head_dim": 3}, "`head_dim` must be even"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers` must be an integer from 1 to 4096"),
        ({"vocab_size": None}, "`vocab_size` is missing"),
        ({"hidden_act": "relu"}, "`hidden_act` must be one of"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "`rope_type` must be one of default, dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "`factor` is missing"),
        ({"rope_parameters": {"partial_rotary_factor": 0.1}}, "an even part of head_dim = 4"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "must be one that generates text: LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "`architectures` must be a list of strings"),
        ({"quantization_config": {"quant_method": "gptq"}}, "`quantization_config` names a packed format"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object], fault: str
) -> None:
    with pytest.raises(ModelNotFoundError, match=fault):
        describe(write_model(tmp_path, LLAMA_CONFIG | changes))


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\x80\x04")
    (tmp_path / "text.txt").write_bytes(b"hello, hello, hello, hello")

    with pytest.raises(ModelNotFoundError, match=r"config.json is missing"):
        describe(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"gone: no such file or directory"):
        describe(tmp_path / "gone")
    with pytest.raises(ModelNotFoundError, match=r"weights.bin is a pickled checkpoint"):
        describe(tmp_path / "weights.bin")
    with pytest.raises(ModelNotFoundError, match=r"text.txt cannot be read as a GGUF file: it does not begin"):
        describe(tmp_path / "text.txt")


def test_an_unknown_gguf_architecture_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": string("rwkv7")}, [], b""))

    with pytest.raises(ModelNotFoundError, match=r"architecture `rwkv7` is not supported. Supported: gemma2, gemma3,"):
        describe(path)


def test_a_mixture_of_experts_is_refused_before_its_tensors_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": string("llama"), "llama.expert_count": uint32(8)}, [], b""))

    with pytest.raises(ModelNotFoundError, match=r"mixtures of experts \(`llama.expert_count`\) are not supported"):
        describe(path)


@pytest.mark.parametrize("types", [["full_attention"], ["full_attention", "chunked_attention"]])
def test_layer_types_that_are_not_windows_or_of_another_number_are_refused(tmp_path: Path, types: list[str]) -> None:
    gemma = LLAMA_CONFIG | {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 2}

    with pytest.raises(ModelNotFoundError, match=r"`layer_types` must be a list of 2 times full_attention or sliding"):
        describe(write_model(tmp_path, gemma | {"layer_types": types}))


def test_yarn_stretches_the_context_that_the_file_left_unstretched(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

    assert describe(write_model(tmp_path, LLAMA_CONFIG | {"rope_scaling": scaling})).max_positions == 256


def test_every_family_is_found_by_its_file_name() -> None:
    assert set(supported_model_types()) == FAMILIES
    for model_type in FAMILIES:
        assert load_family(model_type).ARCHITECTURES


def test_describing_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    write_model(tmp_path)
    code = (
        "import sys; from pathlib import Path; from weft.models.registry import describe;"
        f"describe(Path({str(tmp_path)!r}));"
        "print([name for name in ('torch', 'transformers', 'numpy', 'gguf') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


def test_a_vocabulary_of_a_quarter_million_is_stepped_over_in_time(tmp_path: Path) -> None:
    """Describing stays far below the second that a start may take to report every fault."""

    metadata = {
        "general.architecture": string("llama"),
        "llama.block_count": uint32(1),
        "llama.context_length": uint32(64),
        "llama.embedding_length": uint32(32),
        "llama.feed_forward_length": uint32(64),
        "llama.attention.head_count": uint32(4),
        "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
        "tokenizer.ggml.tokens": strings(["token"] * 250_000),
        "tokenizer.ggml.merges": strings(["a b"] * 250_000),
    }
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes(metadata, [("token_embd.weight", (32, 16), 8, 0)], bytes(16 * 34)))

    started = time.process_time()
    describe(path)

    assert time.process_time() - started < 1.0
