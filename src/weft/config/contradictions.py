"""Settings that are right alone and wrong together, or that name something that is not there."""

import ipaddress
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from weft.config.options import quoted
from weft.config.settings import Settings, options

# A socket's path has 104 bytes on the tightest system; what is added here is like "-abcdefgh/shard-63.sock".
_MAX_SOCKET_PREFIX_BYTES = 80

_COLLECTOR = re.compile(r"(https?://)?([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?/?")


def contradictions(settings: Settings, addresses_of: Callable[[str], list[str]]) -> Iterator[str]:
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
    if s.task == "generate" and s.pooling != "auto":
        yield f"--pooling ({s.pooling}) means nothing with --task generate; leave one of them out."
    if s.sharded and s.num_shard == 1:
        yield "--sharded true needs --num-shard of at least 2, or none. Given: 1."
    if s.block_size_tokens is not None and s.block_size_tokens & (s.block_size_tokens - 1):
        yield f"--block-size-tokens: must be a power of two from 16 to 256. Given: {s.block_size_tokens}."
    if s.tenant_header is not None and not re.fullmatch(r"[A-Za-z0-9-]{1,64}", s.tenant_header):
        yield f"--tenant-header: must be the name of a header. Given: {quoted(s.tenant_header)}."
    if s.api_key is not None and not (s.api_key.isascii() and s.api_key.isprintable()):
        yield "--api-key: must be printable ASCII, as HTTP headers are. Given: a secret."
    yield from _address_faults(s)
    yield from (f"--cors-allow-origin: {fault}" for fault in _origin_faults(s.cors_allow_origin))
    yield from _missing_files(s)
    if not is_ip_address(s.hostname) and not addresses_of(s.hostname):
        yield f"--hostname: {quoted(s.hostname)} does not resolve; give an address of this machine or 0.0.0.0."


_WITHOUT: tuple[tuple[str, Callable[[Settings], bool], str], ...] = (
    ("quantize_group_size", lambda s: s.quantize != "int4", "it belongs to --quantize int4"),
    ("record_max_bytes", lambda s: s.record is None, "it belongs to --record"),
    ("response_ttl_s", lambda s: s.response_store == "off", "--response-store is off"),
    ("otlp_service_name", lambda s: s.otlp_endpoint is None, "it belongs to --otlp-endpoint"),
    ("protect_health", lambda s: s.protect_health and s.api_key is None, "there is no --api-key to ask for"),
    ("protect_metrics", lambda s: s.protect_metrics and s.api_key is None, "there is no --api-key to ask for"),
    ("revision", lambda s: _is_on_this_machine(s.model_id), "the model is no hub model"),
)
"""Setting, when it changes nothing, and why."""


_FOREIGN_VARIABLES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("ATTENTION", "USE_FLASH_ATTENTION"), "attention is paged, in the form that the device has kernels for"),
    (("PREFILL_CHUNKING",), "prompts are always computed in chunks"),
    (("TGI_WIGGLE_ROOM", "XPU_MEMORY_FRACTION"), "memory is measured; --kv-pool-bytes sets what the cache gets"),
    (("EXLLAMA_VERSION", "DISABLE_EXLLAMA", "USE_CUTLASS_W8A8"), "those kernels do not exist here; see --quantize"),
    (("ROCM_USE_FLASH_ATTN_V2_TRITON", "ROCM_USE_CUSTOM_PAGED_ATTN", "ROCM_USE_SKINNY_GEMM"), "there is no ROCm here"),
)
"""Variables that TGI reads beside its flags' own, and why they change nothing."""


def variables_without_effect(environ: Mapping[str, str]) -> Iterator[str]:
    """What the environment asks of TGI alone, a sentence per reason."""
    for names, reason in _FOREIGN_VARIABLES:
        found = [f"${name}" for name in names if environ.get(name)]
        if found:
            yield f"{' and '.join(found)} {'has' if len(found) == 1 else 'have'} no effect: {reason}."


def settings_without_effect(settings: Settings, given: Collection[str]) -> Iterator[str]:
    """Settings among those given that change nothing because of what else is or is not given."""
    for name, is_idle, reason in _WITHOUT:
        if name in given and is_idle(settings):
            yield f"{options()[name].flag} has no effect: {reason}."


def _is_on_this_machine(model_id: str) -> bool:
    return model_id.startswith("pypi:") or Path(model_id).expanduser().exists()


def _address_faults(settings: Settings) -> Iterator[str]:
    if settings.otlp_endpoint is not None and not _COLLECTOR.fullmatch(settings.otlp_endpoint):
        yield (
            "--otlp-endpoint: must be http://HOST:PORT, https://HOST:PORT or HOST:PORT, without a path (traces go "
            f"over gRPC). Given: {quoted(settings.otlp_endpoint)}."
        )
    for name in ("aip_predict_route", "aip_health_route"):
        path = getattr(settings, name)
        if path is not None and not re.fullmatch(r"/[A-Za-z0-9._~:/@%+-]*", path):
            yield f"${name.upper()}: must be the path of a route, beginning with /. Given: {quoted(path)}."
    if not settings.hub_endpoint.startswith(("http://", "https://")):
        yield f"--hub-endpoint: must begin with https:// or http://. Given: {quoted(settings.hub_endpoint)}."


def _origin_faults(origins: Sequence[str]) -> Iterator[str]:
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s,]+", origin, re.IGNORECASE):
            yield f"must be * or scheme://host[:port] without a path. Given: {quoted(origin)}."


def _missing_files(settings: Settings) -> Iterator[str]:
    if settings.tokenizer_config_path is not None:
        yield from _tokenizer_config_faults(Path(settings.tokenizer_config_path))
    if settings.response_store not in {None, "memory", "off"}:
        yield from _response_store_faults(Path(str(settings.response_store)))
    if settings.weights_cache_override is not None and not Path(settings.weights_cache_override).is_dir():
        yield f"--weights-cache-override: no directory {quoted(settings.weights_cache_override)}."
    parent = Path(settings.shard_uds_path).parent
    if not parent.is_dir():
        yield f"--shard-uds-path: no directory {quoted(str(parent))} to make the private directory in."
    if len(settings.shard_uds_path.encode()) > _MAX_SOCKET_PREFIX_BYTES:
        yield f"--shard-uds-path: is too long for a socket's name; at most {_MAX_SOCKET_PREFIX_BYTES} bytes."


def _tokenizer_config_faults(path: Path) -> Iterator[str]:
    """A file that is no tokenizer_config.json would otherwise be found out when the model is loaded."""
    if not path.is_file():
        yield f"--tokenizer-config-path: no file {quoted(str(path))}."
        return
    try:
        is_object = isinstance(json.loads(path.read_bytes()), dict)
    except OSError as error:
        yield f"--tokenizer-config-path: cannot read {quoted(str(path))}: {error.strerror}."
        return
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        yield f"--tokenizer-config-path: must be a JSON file as tokenizer_config.json is. Given: {quoted(str(path))}."


def _response_store_faults(path: Path) -> Iterator[str]:
    """Answers are kept much later, where nobody looks for a mistake in a path."""
    place = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        yield (
            "--response-store: must be a file that can be written in a directory that exists, memory, or off. "
            f"Given: {quoted(str(path))}."
        )


def is_ip_address(text: str) -> bool:
    """Whether a text is an IPv4 or IPv6 address, brackets allowed."""
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def addresses_of_host(host: str) -> list[str]:
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
