"""What a user reads when the server is ready: at most 15 lines, every number measured."""

import json
from collections.abc import Mapping, Sequence

from weft import __version__
from weft.config import Settings
from weft.launcher.relay import Event

_LABEL_WIDTH = 9


def banner(settings: Settings, ready: Event, phases: Sequence[tuple[str, float]]) -> list[str]:
    """Lines of the banner. `ready` is rank 0's `startup.ready` event, `phases` are (name, seconds) of the start."""
    url = base_url(settings)
    rows = (
        ("model", _model(settings, ready)),
        *_quality(ready),
        ("device", _device(settings, ready)),
        ("memory", _memory(ready)),
        ("limits", _limits(settings, ready)),
        ("features", _features(settings, ready)),
        ("serving", f"{url}  ·  docs {url}/docs  ·  metrics {url}/metrics"),
        ("ready in", _phases(phases)),
    )
    first_request = curl(settings, embeds=bool(ready.get("pooling")))
    return [f"Weft {__version__}", *(f"  {label:{_LABEL_WIDTH}} {text}" for label, text in rows), "", first_request]


def base_url(settings: Settings) -> str:
    """Where a client on this machine finds the server."""
    host = settings.hostname
    if host in {"0.0.0.0", "::", "[::]"}:
        host = "localhost"
    elif ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{settings.port}"


def curl(settings: Settings, *, embeds: bool = False) -> str:
    """A first request, ready to paste; `embeds`: for a model that turns texts into vectors."""
    question = "What is the capital of France?"
    body: dict[str, object] = {"model": settings.shown_model_name}
    body |= {"input": question} if embeds else {"temperature": 0, "messages": [{"role": "user", "content": question}]}
    route = "/v1/embeddings" if embeds else "/v1/chat/completions"
    key = " -H 'Authorization: Bearer YOUR_KEY'" if settings.api_key else ""
    quoted = json.dumps(body).replace("'", "'\\''")
    return f"curl {base_url(settings)}{route} -H 'Content-Type: application/json'{key} -d '{quoted}'"


def all_phases(measured: Sequence[tuple[str, float]], ready: Event, total_s: float) -> list[tuple[str, float]]:
    """(phase, seconds): what the launcher measured, what the shard reports, and the rest, so that the sum is exact."""
    phases = [(name, seconds) for name, seconds in (*measured, *_reported_phases(ready)) if seconds >= 0.05]
    return [*phases, ("other", max(0.0, total_s - sum(seconds for _, seconds in phases)))]


def _reported_phases(ready: Event) -> list[tuple[str, float]]:
    reported = ready.get("phases")
    pairs = list(reported.items()) if isinstance(reported, Mapping) else reported
    if not isinstance(pairs, list | tuple):
        return []
    return [(str(name), float(seconds)) for name, seconds in pairs]


def _number(event: Event, name: str) -> float:
    value = event.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def _model(settings: Settings, ready: Event) -> str:
    parts = [settings.shown_model_name]
    num_parameters = _number(ready, "num_parameters")
    if num_parameters:
        parts.append(_short(num_parameters) + " parameters")
    parts += [str(ready[name]) for name in ("model_type", "dtype", "quantization") if ready.get(name)]
    return " · ".join(parts)


def _quality(ready: Event) -> list[tuple[str, str]]:
    """A row where few bits cost something and somebody has measured how much."""
    receipt = ready.get("quality")
    if not isinstance(receipt, Mapping):
        return []
    text = (
        f"keeps {receipt['top1_agreement']:.1%} of {receipt['reference']}'s most likely tokens, "
        f"KL {receipt['kl_nats']:.4f} nats, on {receipt['num_tokens']:,} tokens"
    )
    return [("quality", text)]


def _device(settings: Settings, ready: Event) -> str:
    parts = [str(ready[name]) for name in ("device_name", "kernel_set") if ready.get(name)]
    ranks = "1 shard" if settings.num_shard == 1 else f"{settings.num_shard} shards"
    threads = "1 thread" if settings.threads == 1 else f"{settings.threads} threads"
    return " · ".join([*(parts or [str(ready.get("device_type", settings.device))]), f"{ranks} × {threads}"])


def _memory(ready: Event) -> str:
    names = (("weights", "weights_bytes"), ("KV pool", "kv_pool_bytes"), ("activations", "activation_bytes"))
    parts = [f"{label} {_bytes(_number(ready, name))}" for label, name in names]
    return " · ".join([*parts, f"free {_bytes(_number(ready, 'free_bytes'))}"])


def _limits(settings: Settings, ready: Event) -> str:
    return (
        f"{_number(ready, 'max_total_tokens'):,.0f} tokens per request · "
        f"{_number(ready, 'max_batch_total_tokens'):,.0f} in the KV pool · "
        f"{_number(ready, 'max_num_sequences'):,.0f} sequences at once · "
        f"{settings.max_concurrent_requests:,} requests"
    )


def _features(settings: Settings, ready: Event) -> str:
    pooling = ready.get("pooling")
    switches = {
        f"embeddings ({pooling} pooling)": bool(pooling),
        "prefix cache": ready.get("prefix_caching", settings.prefix_caching),
        "chunked prefill": True,
        "lookahead": settings.lookahead,
        "batch-invariant": ready.get("batch_invariant", False),
        "API key": settings.api_key is not None,
    }
    return " · ".join(name for name, is_on in switches.items() if is_on)


def _phases(phases: Sequence[tuple[str, float]]) -> str:
    total = sum(seconds for _, seconds in phases)
    return f"{total:.1f} s = " + " + ".join(f"{name} {seconds:.1f}" for name, seconds in phases)


def _short(number: float) -> str:
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.0f}"


def _bytes(number: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number / 1024:.0f} KiB"
