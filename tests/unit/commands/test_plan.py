"""What a server would need, told without torch and without weights."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.e2e.lookalike_hub import LookalikeHub
from tests.unit.models.model_files import LLAMA_CONFIG, write_model

from weft.commands.plan import plan
from weft.commands.plan_memory import Machine, forecast
from weft.config import resolve
from weft.errors import DeviceError, ModelNotFoundError, UsageError
from weft.models.registry import describe
from weft.models.spec import WeightFormat
from weft.runner import host_memory

GIB = 2**30
CPU = Machine(device_type="cpu", available_bytes=8 * GIB)
LARGER = {**LLAMA_CONFIG, "hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 10_000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", LARGER)


def settings(model: Path, *flags: str):
    return resolve(["--model-id", str(model), *flags], {"HOME": str(model.parent)})


def planned(model: Path, *flags: str, machine: Machine = CPU, dtype: str = "float32"):
    return forecast(describe(model), settings(model, *flags), machine, dtype)


def test_memory_is_divided_as_the_start_up_divides_it(model: Path) -> None:
    import torch

    from weft.runner.memory import KvShape, estimate_activation_bytes, plan_memory

    description = describe(model)
    found = planned(model)

    activation_bytes = estimate_activation_bytes(
        max_step_tokens=4096,
        max_step_rows=128,
        hidden_size=512,
        widest_layer=description.widest_layer,
        vocab_size=32,
        dtype=torch.float32,
    )
    expected = plan_memory(
        KvShape(num_layers=1, num_kv_heads=8, head_dim=64, block_size_tokens=32, dtype=torch.float32),
        device=torch.device("cpu"),
        available_bytes=8 * GIB - description.weights_bytes("float32"),
        weights_bytes=description.weights_bytes("float32"),
        activation_bytes=activation_bytes,
        pool_bytes=None,
        required_tokens=32,
    )
    assert found.kv_pool_bytes == expected.kv_bytes
    assert found.pool_tokens == expected.max_batch_total_tokens
    assert (found.activation_bytes, found.missing_bytes) == (activation_bytes, 0)


def test_a_smaller_dtype_doubles_what_the_pool_holds(model: Path) -> None:
    flag = ("--kv-pool-bytes", "64MiB")
    assert planned(model, *flag, dtype="bfloat16").pool_tokens == 2 * planned(model, *flag).pool_tokens


def test_a_cache_of_codes_holds_nearly_twice_the_tokens_of_bfloat16(model: Path) -> None:
    flag = ("--kv-pool-bytes", "64MiB")
    half = planned(model, *flag, dtype="bfloat16")
    codes = planned(model, *flag, "--kv-cache-dtype", "int8", dtype="bfloat16")

    assert codes.kv_bytes_per_token * 128 == half.kv_bytes_per_token * (64 + 4)
    assert codes.pool_tokens > 1.85 * half.pool_tokens


def test_ranks_share_weights_and_heads(model: Path) -> None:
    one, two = planned(model), planned(model, "--num-shard", "2")
    assert two.weights_bytes * 2 == one.weights_bytes
    assert two.kv_bytes_per_token * 2 == one.kv_bytes_per_token


def test_a_context_that_memory_cannot_hold_is_clipped_and_still_fits(model: Path) -> None:
    found = planned(model, "--kv-pool-bytes", "1MiB")
    assert (found.pool_tokens, found.context, found.fits) == (256, 257, True)
    assert found.streams == {257: 1}


def test_streams_are_told_for_usual_lengths_up_to_the_limits(model: Path) -> None:
    found = planned(model, "--kv-pool-bytes", "64MiB", "--max-batch-size", "10")
    assert found.pool_tokens == 16384
    assert found.streams == {1024: 10, 4096: 4, 10_000: 1}


@pytest.mark.parametrize("extra", [0, -1])
def test_what_is_missing_is_exact(model: Path, extra: int) -> None:
    roomy = planned(model)
    pool_bytes = 2 * 2**20
    least = roomy.weights_bytes + roomy.activation_bytes + pool_bytes

    found = planned(model, "--kv-pool-bytes", str(pool_bytes), machine=replace(CPU, available_bytes=least + extra))

    assert (found.fits, found.missing_bytes) == (extra == 0, -extra)


def test_the_page_names_what_matters(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([str(model), "--memory", "8GiB", "--dtype", "float32"], {"HOME": str(model.parent)}) == 0
    shown = capsys.readouterr().out
    for text in ("llama", "8.00 GiB free", "in float32, stored as bfloat16", "10,000 tokens per request", "It fits."):
        assert text in shown


def test_what_does_not_fit_has_the_exit_code_that_serve_would_have(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan([str(model), "--memory", "1MiB", "--json"], {"HOME": str(model.parent)}) == 4
    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize(("flags", "named"), [(["--memory", "much"], "--memory"), (["--dtyp", "x"], "--dtyp")])
def test_wrong_flags_are_named(model: Path, flags: list[str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        plan([str(model), *flags], {"HOME": str(model.parent)})


def test_torch_is_not_loaded(model: Path) -> None:
    code = "import sys; from weft.commands.plan import plan; plan(sys.argv[1:], {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, check=False).returncode == 0


def test_a_hub_model_is_planned_from_its_configuration_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = LookalikeHub({"config.json": json.dumps(LARGER).encode(), "model.safetensors": bytes(20_000)})
    environ = {"HOME": str(tmp_path), "WEFT_HUB_ENDPOINT": hub.url, "WEFT_HUGGINGFACE_HUB_CACHE": str(tmp_path / "hub")}
    try:
        assert plan(["organisation/model", "--json", "--memory", "8GiB"], environ) == 0
    finally:
        hub.close()

    assert json.loads(capsys.readouterr().out)["model_context"] == 10_000
    assert hub.sent["model.safetensors"] == 0


def test_an_embedding_model_of_the_hub_is_planned_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    files = {
        "config.json": {**LARGER, "architectures": ["LlamaModel"]},
        "modules.json": modules,
        "1_Pooling/config.json": {"pooling_mode_mean_tokens": True},
        "sentence_bert_config.json": {"max_seq_length": 512},
    }
    hub = LookalikeHub({name: json.dumps(content).encode() for name, content in files.items()})
    environ = {"HOME": str(tmp_path), "WEFT_HUB_ENDPOINT": hub.url, "WEFT_HUGGINGFACE_HUB_CACHE": str(tmp_path / "hub")}
    try:
        assert plan(["organisation/model", "--memory", "8GiB"], environ) == 0
    finally:
        hub.close()

    shown = capsys.readouterr().out
    assert "embeddings, mean pooling" in shown
    assert "512 tokens per request" in shown


@pytest.mark.parametrize("reference", ["organisation/model", "organisation/model/file.gguf"])
def test_offline_a_model_that_is_not_cached_is_not_found(tmp_path: Path, reference: str) -> None:
    with pytest.raises(ModelNotFoundError):
        plan([reference, "--offline", "--huggingface-hub-cache", str(tmp_path)], {"HOME": str(tmp_path)})


def test_the_memory_of_this_machine_is_less_than_all_of_it() -> None:
    assert 0 < host_memory.available_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("flags", "bits", "kept_as"),
    [
        (("--quantize", "int8"), 8, "int8"),
        (("--quantize", "int4"), 4, "int4 (groups of 32)"),
        (("--quantize", "int4", "--quantize-group-size", "128"), 4, "int4 (groups of 128)"),
    ],
)
def test_rounded_weights_are_planned_with_their_bits(
    model: Path, flags: tuple[str, ...], bits: int, kept_as: str
) -> None:
    whole, found = planned(model), planned(model, *flags)

    assert found.weights_kept_as == kept_as
    assert bits / 32 < found.weights_bytes / whole.weights_bytes < (bits + 3) / 32
    assert found.kv_bytes_per_token == whole.kv_bytes_per_token


def test_a_gguf_file_whose_blocks_are_kept_takes_what_the_file_takes(model: Path) -> None:
    description = replace(describe(model), weight_format=WeightFormat.GGUF, stored_dtype="Q4_1")

    kept = forecast(description, settings(model, "--gguf-compute", "packed"), CPU, "float32", file_bytes=12345)
    decoded = forecast(description, settings(model), CPU, "float32", file_bytes=12345)

    assert (kept.weights_bytes, kept.weights_kept_as) == (12345, "Q4_1 (packed)")
    assert (decoded.weights_bytes, decoded.weights_kept_as) == (description.weights_bytes("float32"), "float32")


def test_few_bits_are_refused_where_serve_would_refuse_them(model: Path) -> None:
    gpu = Machine(device_type="cuda", available_bytes=8 * GIB)

    with pytest.raises(DeviceError, match="--quantize: int8 has kernels for the CPU"):
        planned(model, "--quantize", "int8", machine=gpu)
    with pytest.raises(DeviceError, match="--kv-cache-dtype: int8 beside --dtype float32 has kernels for the CPU"):
        planned(model, "--kv-cache-dtype", "int8", machine=gpu)


def test_a_directory_that_is_no_model_is_named_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ModelNotFoundError, match=f"--model-id {tmp_path}: "):
        plan([str(tmp_path)], {"HOME": str(tmp_path)})
