"""The table of settings, and every way to get a setting wrong."""

import dataclasses
import json
import re
import stat
import typing
from pathlib import Path

import pytest

from weft.commands.help import all_settings
from weft.config import Settings, load_settings, options, resolve, resolve_with_origins, save_settings
from weft.config.options import INTEGER, INTEGERS, NAMES, NUMBER, SIZE, SWITCH, TOKENS, TRUTH
from weft.errors import UsageError

HOME = {"HOME": "/nonexistent"}


def settings_from(*argv: str, **environ: str) -> Settings:
    return resolve(argv, {**HOME, **environ}, addresses_of=lambda host: ["127.0.0.1"] if host == "known" else [])


def faults_of(*argv: str, **environ: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        settings_from(*argv, **environ)
    head, *faults, tail = caught.value.message.splitlines()
    assert head.startswith(str(len(faults)))
    assert "--help-all" in tail
    return [fault.strip() for fault in faults]


# Every flag of TGI 3.3.7's launcher, in the order of its table; None: TGI has no default or derives one.
TGI_DEFAULTS = {
    "revision": None, "sharded": None, "num_shard": None, "quantize": None, "speculate": None, "dtype": "auto",
    "kv_cache_dtype": "auto", "trust_remote_code": False, "lora_adapters": (), "rope_scaling": None,
    "rope_factor": None, "tokenizer_config_path": None, "huggingface_hub_cache": None, "weights_cache_override": None,
    "disable_custom_kernels": False, "cuda_memory_fraction": 1.0,
    "max_concurrent_requests": 128, "max_best_of": 2, "max_stop_sequences": 4, "max_top_n_tokens": 5,
    "max_input_tokens": None, "max_total_tokens": None, "waiting_served_ratio": 0.3, "max_batch_prefill_tokens": None,
    "max_batch_total_tokens": None, "max_waiting_tokens": 20, "max_batch_size": None, "max_client_batch_size": 4,
    "validation_workers": 2, "disable_grammar_support": False, "enable_prefill_logprobs": False,
    "payload_limit": 2_000_000, "max_image_fetch_size": 2**30, "watermark_gamma": 0.5, "watermark_delta": 2.0,
    "hostname": "0.0.0.0", "port": 3000, "prometheus_port": 9000, "shard_uds_path": "/tmp/text-generation-server",
    "master_addr": "localhost", "master_port": None, "api_key": None, "cors_allow_origin": (), "json_output": False,
    "otlp_endpoint": None, "otlp_service_name": "text-generation-inference.router",
    "graceful_termination_timeout": 90.0, "ngrok": False, "ngrok_authtoken": None, "ngrok_edge": None,
    # Other defaults than TGI's: no CUDA graphs exist, and nothing is ever sent home.
    "cuda_graphs": (0,), "usage_stats": "off",
}  # fmt: skip


@pytest.mark.parametrize(("name", "default"), TGI_DEFAULTS.items())
def test_a_setting_of_tgi_has_its_flag_its_variable_and_its_default(name: str, default: object) -> None:
    option = options()[name]

    assert option.flag == "--" + name.replace("_", "-")
    assert name.upper() in option.env
    assert getattr(settings_from(), name) == default


def test_the_other_spellings_of_tgi_are_read() -> None:
    assert settings_from("--model-id", "a").model_id == settings_from(MODEL_ID="a").model_id == "a"
    assert settings_from("--max-input-length", "7").max_input_tokens == 7
    assert settings_from(MAX_INPUT_LENGTH="7").max_input_tokens == 7
    assert settings_from("-p", "1").port == 1
    assert settings_from("-g", "1").graceful_termination_timeout == 1
    assert settings_from("-e").env is settings_from("--env").env is True
    assert settings_from(CORS_ALLOW_ORIGIN="https://a.b").cors_allow_origin == ("https://a.b",)
    assert settings_from(LOG_LEVEL="debug", LOG_COLORIZE="true").log_level == "debug"
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"):
        assert settings_from(**{variable: "hf_x"}).hub_token == "hf_x"
    assert settings_from(HF_HUB_OFFLINE="1").offline is True
    assert settings_from(PREFIX_CACHING="0").prefix_caching is False
    assert settings_from(OMP_NUM_THREADS="3").threads == 3


def test_tgi_has_no_flag_that_is_missing_here() -> None:
    of_tgi = {name for name, option in options().items() if option.is_tgi and option.flag is not None}

    # Read from TGI's variable, without a flag of its own there, or with another default.
    assert of_tgi == {*TGI_DEFAULTS, "model_id", "prefix_caching", "log_level", "log_colorize"}


SOURCE = Path(__file__).parents[2] / "src" / "weft"


def read_fields() -> set[str]:
    """Every setting that any module outside the table reads."""
    found = set()
    for file in SOURCE.rglob("*.py"):
        if file.parent != SOURCE / "config" or file.name == "contradictions.py":
            found |= set(re.findall(r"\b(?:_?settings|settled|s)\.([a-z][a-z0-9_]*)\b", file.read_text()))
    return found


def test_every_setting_is_read_by_somebody_or_refused_or_said_to_be_idle() -> None:
    """A setting that nobody reads would be ignored in silence."""
    read = read_fields() | {"config"}  # where the file is: read while settings are resolved
    for name, option in options().items():
        if option.works is None and not option.idle:
            assert name in read, f"nobody reads {name}: consume it, refuse it (`works`) or say so (`idle`)"


NOT_YET = {
    "quantize": "awq", "cuda_graphs": "1,2", "speculate": "2", "http_workers": "2", "kv_cache_dtype": "fp8_e5m2",
    "max_image_fetch_size": "1MB", "rope_scaling": "dynamic", "rope_factor": "2",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.works is not None])
def test_what_does_not_exist_yet_is_refused_by_its_flag(name: str) -> None:
    (fault,) = faults_of(f"{options()[name].flag}={NOT_YET.get(name, 'true')}")

    assert fault.startswith(f"{options()[name].flag}: ")
    assert "is not supported yet; leave it out" in fault


def test_every_setting_has_a_help_text_a_group_and_a_kind_that_fits_its_type() -> None:
    hints = typing.get_type_hints(Settings)
    by_kind = {INTEGER: int, TOKENS: int, NUMBER: float, SWITCH: bool, TRUTH: bool, SIZE: int, NAMES: tuple[str, ...],
               INTEGERS: tuple[int, ...]}  # fmt: skip

    for name, option in options().items():
        assert option.help, name
        assert not option.help.endswith("."), name
        wanted = by_kind.get(option.kind, str)
        assert hints[name] in (wanted, wanted | None), name


def test_flags_and_variables_are_unique() -> None:
    spellings = [s for o in options().values() for s in (o.flag, o.short, *o.aliases, *o.env) if s]

    assert len(spellings) == len(set(spellings))


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text('port = 1\nmax_best_of = 5\nmax-stop-sequences = 7\nmodel_id = "from-file"\njson_output = true\n')

    resolution = resolve_with_origins(
        ["--config", str(file), "-p", "3"], {**HOME, "PORT": "2", "MAX_BEST_OF": "6", "WEFT_MAX_BEST_OF": "4"}
    )

    s = resolution.settings
    assert (s.port, s.max_best_of, s.max_stop_sequences, s.model_id) == (3, 4, 7, "from-file")
    assert s.json_output is True
    assert resolution.origins["port"] == "-p"
    assert resolution.origins["max_best_of"] == "$WEFT_MAX_BEST_OF"
    assert resolution.origins["max_stop_sequences"] == str(file)
    assert resolution.origins["payload_limit"] == "default"


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["org/model"], "model_id", "org/model"),
        (["-p3001"], "port", 3001),
        (["-p=3001"], "port", 3001),
        (["--port=3001"], "port", 3001),
        (["--json-output"], "json_output", True),
        (["--json-output=false"], "json_output", False),
        (["--no-prefix-caching"], "prefix_caching", False),
        (["--no-enable-prefix-caching"], "prefix_caching", False),
        (["--sharded", "false"], "sharded", False),
        (["--kv-pool-bytes", "4GiB"], "kv_pool_bytes", 4 * 2**30),
        (["--kv-pool-bytes", "1.5 GB"], "kv_pool_bytes", 1_500_000_000),
        (["--kv-pool-bytes", "512Mi"], "kv_pool_bytes", 512 * 2**20),
        (["--cuda-graphs", "0"], "cuda_graphs", (0,)),
        (["--served-model-name", "a,b", "--served-model-name", "c"], "served_model_name", ("a", "b", "c")),
        (["--cors-allow-origin", "https://a.org"], "cors_allow_origin", ("https://a.org",)),
        (["--dtype", "half"], "dtype", "float16"),
        (["--dtype", "float"], "dtype", "float32"),
        (["--max-model-len", "32K"], "max_total_tokens", 32_768),
        (["--max-total-tokens", "1.5k"], "max_total_tokens", 1500),
        (["--max-num-batched-tokens", "2k"], "max_batch_prefill_tokens", 2000),
        (["--max-num-batched-tokens", "1M"], "max_batch_prefill_tokens", 2**20),
        (["--enable-prefix-caching"], "prefix_caching", True),
        (["--served-model-name", "a"], "served_model_name", ("a",)),
        (["--api-key", "k"], "api_key", "k"),
        (["--waiting-served-ratio", ".5"], "waiting_served_ratio", 0.5),
        (["--speculate", "0"], "speculate", 0),
        (["--max-input-length", "7"], "max_input_tokens", 7),
        (["--hostname", "::1"], "hostname", "::1"),
        (["--hostname", "known"], "hostname", "known"),
        (["--usage-stats", "on"], "usage_stats", "on"),
        (["--log-level", "info,tower=debug"], "log_level", "info"),
        (["--log-level", "WARNING"], "log_level", "warn"),
        (["--runner", "pooling"], "task", "embed"),
        (["--task", "embed"], "task", "embed"),
        (["-g", "5"], "graceful_termination_timeout", 5.0),
    ],
)  # fmt: skip
def test_a_flag_is_read(argv: list[str], name: str, value: object) -> None:
    assert getattr(settings_from(*argv), name) == value


@pytest.mark.parametrize(
    ("alias", "value", "name"),
    [
        ("--max-model-len", "4096", "max_total_tokens"),
        ("--tensor-parallel-size", "2", "num_shard"),
        ("-tp", "2", "num_shard"),
        ("--host", "127.0.0.1", "hostname"),
        ("--max-num-seqs", "8", "max_batch_size"),
        ("--model", "m", "model_id"),
        ("--block-size", "16", "block_size_tokens"),
        ("--download-dir", "/x", "huggingface_hub_cache"),
        ("--max-num-batched-tokens", "512", "max_batch_prefill_tokens"),
        ("--gpu-memory-utilization", "0.5", "cuda_memory_fraction"),
        ("--quantization", "int8", "quantize"),
        ("--otlp-traces-endpoint", "localhost:1", "otlp_endpoint"),
        ("--uvicorn-log-level", "debug", "log_level"),
    ],
)
def test_another_servers_flag_works_hidden_and_its_name_here_is_said(alias: str, value: str, name: str) -> None:
    resolution = resolve_with_origins([alias, value], HOME)

    assert f"{alias} " not in all_settings()

    assert str(getattr(resolution.settings, name)) == value
    assert resolution.notes == (f"{alias} is {options()[name].flag} here.",)


MUTANTS = [
    (["--port", "abc"], "--port: must be a whole number from 1 to 65,535. Given: 'abc'."),
    (["--port", "0"], "--port: must be a whole number"),
    (["--port", "65536"], "--port: must be a whole number"),
    (["--port", "-1"], "--port: must be a whole number"),
    (["--port", "3.5"], "--port: must be a whole number"),
    (["--port", ""], "--port: must be a whole number"),
    (["--port"], "--port: needs a value"),
    (["--port", "--json-output"], "--port: needs a value"),
    (["-p", "1", "-p", "2"], "-p: given twice."),
    (["-p", "1", "--port", "2"], "--port: given before as -p."),
    (["--prot", "1"], "--prot: no such flag. Did you mean --port?"),
    (["--quantise", "awq"], "--quantise: no such flag. Did you mean --quantize?"),
    (["-x"], "-x: no such flag."),
    (["a", "b"], "b: only one model can be served, 'a' was given before."),
    (["--dtype", "bf16"], "--dtype: must be one of auto, float32, bfloat16, float16. Given: 'bf16'."),
    (["--dtype", "bfloat61"], "Did you mean bfloat16?"),
    (["--quantize", "awq"], "--quantize: 'awq' is not supported yet; leave it out or use int8 or int4."),
    (["--quantize", "zip"], "--quantize: must be one of int8, int4, awq"),
    (["--speculate", "3"], "--speculate: '3' is not supported yet; leave it out or use 0."),
    (["--kv-cache-dtype", "fp8_e5m2"], "--kv-cache-dtype: 'fp8_e5m2' is not supported yet; leave it out or use auto"),
    (["--lora-adapters", "a"], "--lora-adapters: 'a' is not supported yet"),
    (["--rope-scaling", "linear"], "--rope-scaling: 'linear' is not supported yet"),
    (["--rope-factor", "2"], "--rope-factor: '2' is not supported yet"),
    (["--otlp-endpoint", "udp://x"], "--otlp-endpoint: must be http://HOST:PORT, https://HOST:PORT or HOST:PORT"),
    (["--ngrok"], "--ngrok: 'true' is not supported yet; leave it out or use false."),
    (["--ngrok-edge", "e"], "--ngrok-edge: 'e' is not supported yet"),
    (["--trust-remote-code"], "--trust-remote-code: 'true' is not supported yet"),
    (["--http-workers", "2"], "--http-workers: '2' is not supported yet; leave it out or use 1."),
    (["--max-input-tokens", "8", "--max-total-tokens", "8"], "--max-input-tokens (8) must be less than"),
    (["--max-input-tokens", "9", "--max-total-tokens", "8"], "--max-input-tokens (9) must be less than"),
    (["--max-total-tokens", "9", "--max-batch-total-tokens", "8"], "--max-total-tokens (9) must not exceed"),
    (["--max-batch-prefill-tokens", "9", "--max-batch-total-tokens", "8"], "--max-batch-prefill-tokens (9) must not"),
    (["--max-input-tokens", "8", "--max-input-length", "8"], "--max-input-length and --max-input-tokens are one"),
    (["--max-batch-size", "0"], "--max-batch-size: must be a whole number from 1 to 256"),
    (["--max-batch-size", "257"], "--max-batch-size: must be a whole number from 1 to 256"),
    (["--validation-workers", "0"], "--validation-workers: must be"),
    (["--max-concurrent-requests", "0"], "--max-concurrent-requests: must be"),
    (["--max-best-of", "33"], "--max-best-of: must be"),
    (["--max-stop-sequences", "17"], "--max-stop-sequences: must be"),
    (["--max-top-n-tokens", "21"], "--max-top-n-tokens: must be"),
    (["--payload-limit", "0"], "--payload-limit: must be a size"),
    (["--payload-limit", "2XB"], "--payload-limit: must be a size"),
    (["--sharded"], "--sharded: needs a value"),
    (["--sharded", "maybe"], "--sharded: must be true or false. Given: 'maybe'."),
    (["--sharded", "true", "--num-shard", "1"], "--sharded true needs --num-shard of at least 2"),
    (["--num-shard", "0"], "--num-shard: must be"),
    (["--json-output=perhaps"], "--json-output: must be true or false"),
    (["--hostname", "nowhere.invalid"], "--hostname: 'nowhere.invalid' does not resolve"),
    (["--watermark-gamma", "1.5"], "--watermark-gamma: must be a number from 0 to 1"),
    (["--watermark-gamma", "nan"], "--watermark-gamma: must be a number"),
    (["--waiting-served-ratio", "-0.1"], "--waiting-served-ratio: must be a number of at least 0"),
    (["--cuda-graphs", "1,2"], "--cuda-graphs: '1,2' is not supported yet; leave it out or use 0."),
    (["--max-model-len", "32Q"], "--max-total-tokens: must be a whole number (8k is 8,000 and 8K is 8,192)"),
    (["--max-model-len", "-1"], "--max-total-tokens: must be a whole number"),
    (["--response-store", "/no/such/x.sqlite"], "--response-store: must be a file that can be written"),
    (["--response-store", "/"], "--response-store: must be a file that can be written"),
    (["--cuda-graphs", "1,,2"], "--cuda-graphs: must be whole numbers separated by commas"),
    (["--cuda-graphs=-1"], "--cuda-graphs: must be"),
    (["--cuda-memory-fraction", "1.1"], "--cuda-memory-fraction: must be"),
    (["--kv-pool-bytes", "1KiB"], "--kv-pool-bytes: must be a size"),
    (["--block-size-tokens", "48"], "--block-size-tokens: must be a power of two"),
    (["--inter-token-target-ms", "0"], "--inter-token-target-ms: must be"),
    (["--tenant-header", "x y"], "--tenant-header: must be the name of a header"),
    (["--api-key", "schlüssel"], "--api-key: must be printable ASCII"),
    (["--cors-allow-origin", "a.org"], "--cors-allow-origin: must be * or scheme://host"),
    (["--cors-allow-origin", "https://a.org/path"], "--cors-allow-origin: must be"),
    (["--hub-endpoint", "ftp://x"], "--hub-endpoint: must begin with https://"),
    (["--tokenizer-config-path", "/no/such"], "--tokenizer-config-path: no file '/no/such'."),
    (["--weights-cache-override", "/no/such"], "--weights-cache-override: no directory"),
    (["--shard-uds-path", "/no/such/prefix"], "--shard-uds-path: no directory '/no/such'"),
    (["--shard-uds-path", "/tmp/" + "x" * 80], "--shard-uds-path: is too long"),
    (["--config", "/no/such.toml"], "--config: cannot read /no/such.toml"),
    (["--log-level", "loud"], "--log-level: must be one of debug"),
    (["--usage-stats", "maybe"], "--usage-stats: must be one of on, off, no-stack"),
    (["--model-path", "x"], "--model-path: no such flag"),
    (["--hub-token", "x"], "--hub-token: no such flag"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "fault"), MUTANTS, ids=[" ".join(argv) for argv, _ in MUTANTS])
def test_a_wrong_flag_is_one_fault_that_names_flag_value_and_range(argv: list[str], fault: str) -> None:
    found = faults_of(*argv)

    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("environ", "fault"),
    [
        ({"PORT": "x"}, "--port (from $PORT): must be a whole number"),
        ({"WEFT_PORT": "x"}, "--port (from $WEFT_PORT): must be"),
        ({"WEFT_PROT": "1"}, "$WEFT_PROT: no such variable. Did you mean WEFT_PORT?"),
        ({"WEFT_MODEL_PATH": "x"}, "$WEFT_MODEL_PATH: no such variable."),
        ({"QUANTIZE": "awq"}, "--quantize (from $QUANTIZE): 'awq' is not supported yet"),
        ({"MAX_INPUT_TOKENS": "5", "MAX_INPUT_LENGTH": "5"}, "are one setting"),
        ({"HF_TOKEN": "x\0"}, "HF_TOKEN (from $HF_TOKEN): must be a text that is not empty. Given: a secret."),
        ({"NGROK_AUTHTOKEN": "hush"}, "--ngrok-authtoken (from $NGROK_AUTHTOKEN): a secret is not supported yet"),
    ],
)  # fmt: skip
def test_a_wrong_variable_is_one_fault_that_names_it(environ: dict[str, str], fault: str) -> None:
    found = faults_of(**environ)

    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prot = 1", "prot in FILE: no such setting. Did you mean port?"),
        ("port = 'x'", "--port (from FILE): must be a whole number"),
        ("[port]\nx = 1", "port in FILE: must be a whole number, not a table."),
        ("port =", "FILE is not TOML"),
        ("model_path = 'x'", "model_path in FILE: no such setting."),
        ("config = 'x'", "config in FILE: no such setting."),
    ],
)
def test_a_wrong_line_in_the_file_is_one_fault_that_names_it(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "weft.toml"
    file.write_text(text)

    found = faults_of("--config", str(file))

    assert len(found) == 1
    assert fault.replace("FILE", str(file)) in found[0]


def test_a_file_may_be_yaml(tmp_path: Path) -> None:
    file = tmp_path / "weft.yaml"
    file.write_text(
        "# what we serve\nport: 8080\nmax-best-of: 5\njson_output: yes\ncors_allow_origin:\n- https://a.b\n"
        "- https://c.d\nkv_pool_bytes: 1GiB\nrevision: ~\ninter_token_target_ms: 12.5\n"
    )

    s = settings_from("--config", str(file))

    assert (s.port, s.max_best_of, s.json_output, s.kv_pool_bytes) == (8080, 5, True, 2**30)
    assert s.cors_allow_origin == ("https://a.b", "https://c.d")
    assert (s.revision, s.inter_token_target_ms) == (None, 12.5)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("prot: 1", "prot in FILE: no such setting. Did you mean port?"),
        ("port: x", "--port (from FILE): must be a whole number"),
        ("port: {x: 1}", "port in FILE: must be a whole number, not a table."),
        ("port: [[1]]", "port in FILE: must be a whole number, not a table."),
        ("port: [1", "FILE is not YAML: "),
        ("- port", "FILE must hold names and values"),
        ("port: !!python/object/apply:os.system ['true']", "FILE is not YAML: could not determine a constructor"),
        ("port: 2020-01-31", "--port (from FILE): must be a whole number"),
        ("port: 2020-99-99", "FILE is not YAML that settings can be read from"),
        ("? [a]\n: 1", "FILE is not YAML: found unhashable key"),
        ("[" * 5000, "FILE is not YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "a in FILE: no such setting"),
    ],
)
def test_a_wrong_yaml_file_is_a_fault_that_names_it(tmp_path: Path, text: str, fault: str) -> None:
    file = tmp_path / "weft.yml"
    file.write_text(text)

    assert fault.replace("FILE", str(file)) in faults_of("--config", str(file))[0]


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    for name in ("weft.toml", "weft.yaml"):
        (tmp_path / name).write_text("# nothing\n")
        assert settings_from("--config", str(tmp_path / name)).port == 3000


def test_the_origins_that_lost_are_known(tmp_path: Path) -> None:
    file = tmp_path / "weft.toml"
    file.write_text("port = 1")

    resolution = resolve_with_origins(["--config", str(file), "--port", "3"], {**HOME, "WEFT_PORT": "2", "PORT": "4"})

    assert resolution.origins["port"] == "--port"
    assert resolution.beaten == {"port": ("$WEFT_PORT", "$PORT", str(file))}


def test_a_setting_whose_other_half_is_missing_is_a_warning_too() -> None:
    halves = {
        "--quantize-group-size": ("64", ["--quantize", "int4"], "it belongs to --quantize int4"),
        "--record-max-bytes": ("1MB", ["--record", "/tmp/x"], "it belongs to --record"),
        "--otlp-service-name": ("me", ["--otlp-endpoint", "localhost:1"], "it belongs to --otlp-endpoint"),
        "--protect-health": ("true", ["--api-key", "k"], "there is no --api-key"),
        "--protect-metrics": ("true", ["--api-key", "k"], "there is no --api-key"),
        "--revision": ("main", ["organisation/model"], "the model is no hub model"),
    }
    for flag, (value, other_half, reason) in halves.items():
        (warning,) = resolve_with_origins([f"{flag}={value}"], HOME).warnings
        assert warning.startswith(f"{flag} has no effect: {reason}")
        assert resolve_with_origins([f"{flag}={value}", *other_half], HOME).warnings == ()
    (warning,) = resolve_with_origins(["--response-ttl-s=5", "--response-store=off"], HOME).warnings
    assert warning.startswith("--response-ttl-s has no effect: --response-store is off")


@pytest.mark.parametrize(
    ("argv", "environ", "begins"),
    [
        ([], {}, None),
        (["--waiting-served-ratio", "0.3"], {}, "--waiting-served-ratio has no effect"),
        ([], {"MAX_WAITING_TOKENS": "0"}, "--max-waiting-tokens has no effect"),
        (["--prometheus-port", "9100"], {}, "--prometheus-port has no effect: metrics are at /metrics of --port"),
        ([], {"USAGE_STATS": "on"}, "--usage-stats has no effect: no usage statistics are ever sent."),
        (["--usage-stats", "off", "--no-disable-custom-kernels"], {"ENABLE_PREFILL_LOGPROBS": "false"}, None),
        (["--enable-prefill-logprobs"], {}, "--enable-prefill-logprobs has no effect: clients may always ask"),
        ([], {"ATTENTION": "flashinfer"}, "$ATTENTION has no effect: attention is paged"),
        ([], {"TGI_WIGGLE_ROOM": "0.9", "XPU_MEMORY_FRACTION": "0.8"},
         "$TGI_WIGGLE_ROOM and $XPU_MEMORY_FRACTION have no effect: memory is measured"),
        ([], {"PREFILL_CHUNKING": ""}, None),
        (["--max-waiting-tokens", "1"], {"WAITING_SERVED_RATIO": "1"},
         "--waiting-served-ratio and --max-waiting-tokens have no effect"),
    ],
)  # fmt: skip
def test_settings_that_change_nothing_are_one_warning(
    argv: list[str], environ: dict[str, str], begins: str | None
) -> None:
    warnings = resolve_with_origins(argv, {**HOME, **environ}).warnings

    assert len(warnings) == (0 if begins is None else 1)
    assert begins is None or warnings[0].startswith(begins)


@pytest.mark.parametrize("endpoint", ["localhost", "localhost:4317", "http://a.b:4317", "https://a", "http://[::1]:1/"])
def test_a_collectors_address_is_accepted(endpoint: str) -> None:
    assert settings_from("--otlp-endpoint", endpoint).otlp_endpoint == endpoint


@pytest.mark.parametrize("endpoint", ["http://a:4318/v1/traces", "grpc://a:1", "a b", "http://"])
def test_a_wrong_address_of_a_collector_is_a_fault(endpoint: str) -> None:
    assert "--otlp-endpoint: must be http://HOST:PORT" in faults_of("--otlp-endpoint", endpoint)[0]


def test_vertex_ai_sets_port_and_paths() -> None:
    s = settings_from(AIP_HTTP_PORT="8080", AIP_PREDICT_ROUTE="/v1/endpoints/1:predict", AIP_HEALTH_ROUTE="/ok")

    assert (s.port, s.aip_predict_route, s.aip_health_route) == (8080, "/v1/endpoints/1:predict", "/ok")
    assert "$AIP_HEALTH_ROUTE: must be the path of a route" in faults_of(AIP_HEALTH_ROUTE="{x}")[0]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_tokenizer_config_that_is_none_is_found_before_anything_is_loaded(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_bytes(content)

    (fault,) = faults_of("--tokenizer-config-path", str(file))

    assert fault.startswith("--tokenizer-config-path: must be a JSON file")


def test_a_place_for_responses_may_be_new_or_old_and_must_be_writable(tmp_path: Path) -> None:
    for place in ("memory", "off", str(tmp_path / "new.sqlite")):
        assert settings_from("--response-store", place).response_store == place
    (tmp_path / "old.sqlite").touch()
    assert settings_from("--response-store", str(tmp_path / "old.sqlite"))


def test_all_faults_are_reported_together() -> None:
    found = faults_of("--prot", "1", "--port", "x", "--speculate", "2", WEFT_POTR="1", MAX_BEST_OF="0")

    assert len(found) == 5


def test_a_secret_is_in_no_error_and_in_no_log() -> None:
    assert "hush" not in "".join(faults_of("--api-key", "hush-ä"))

    redacted = settings_from("--api-key", "hush", HF_TOKEN="hush").redacted()

    assert "hush" not in repr(redacted)
    assert redacted["api_key"] == "***"


@pytest.mark.parametrize("name", ["my-pod-7d4f", "localhost", ""])
def test_the_name_that_a_container_has_does_not_become_the_address(name: str) -> None:
    assert settings_from(HOSTNAME=name).hostname == "0.0.0.0"


def test_an_address_in_hostname_counts() -> None:
    assert settings_from(HOSTNAME="127.0.0.1").hostname == "127.0.0.1"


def test_kubernetes_variables_of_a_service_named_weft_are_no_settings() -> None:
    service = {
        "WEFT_SERVICE_HOST": "10.0.0.1", "WEFT_SERVICE_PORT": "80", "WEFT_SERVICE_PORT_HTTP": "80",
        "WEFT_PORT": "tcp://10.0.0.1:80", "WEFT_PORT_80_TCP": "tcp://10.0.0.1:80", "WEFT_PORT_80_TCP_ADDR": "10.0.0.1",
        "WEFT_PORT_80_TCP_PROTO": "tcp", "WEFT_ROUTER_PORT": "tcp://10.0.0.2:80",
    }  # fmt: skip

    assert settings_from(**service).port == 3000


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({"XDG_CACHE_HOME": "/c"}, "/c/weft"), ({}, "/nonexistent/.cache/weft"), ({"WEFT_CACHE_DIR": "/d"}, "/d")],
)
def test_the_cache_follows_the_desktop_convention(environ: dict[str, str], expected: str) -> None:
    assert settings_from(**environ).cache_dir == expected


@pytest.mark.parametrize(
    ("reference", "name"),
    [("org/model", "org/model"), ("/models/x/M.Q4_1.gguf", "M.Q4_1"), ("pypi:a==1/b/M.gguf#sha256=0", "M")],
)
def test_the_shown_name_of_a_gguf_model_is_its_files(reference: str, name: str) -> None:
    assert Settings(model_id=reference).shown_model_name == name


def test_saved_settings_come_back_and_are_private(tmp_path: Path) -> None:
    settings = dataclasses.replace(
        settings_from("--api-key", "hush", "m"), model_path="/m", served_model_name=("a", "b")
    )

    save_settings(tmp_path, settings)
    save_settings(tmp_path, settings)

    assert load_settings(tmp_path) == settings
    assert stat.S_IMODE((tmp_path / "settings.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("text", [None, "{", "[]", '{"port": 1}'])
def test_settings_that_are_not_ours_are_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "settings.json").write_text(text)

    with pytest.raises(UsageError, match="--run-dir"):
        load_settings(tmp_path)


def test_settings_survive_json() -> None:
    assert json.dumps(dataclasses.asdict(settings_from()))
