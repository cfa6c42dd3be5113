"""Probes, metrics and the page at /. None of them waits for the model, and none needs it.

/health and /ping answer whether a generation would be served now; /health/live whether this process runs at all;
/health/ready as /health, and 503 from the first moment of a shutdown.
"""

import time

from weft.errors import NotReadyError
from weft.limits import LIMITS
from weft.router.context import RouterContext
from weft.router.error_replies import headers_of
from weft.router.exchange import Exchange
from weft.router.lifecycle import ServerState
from weft.router.pages import landing_page
from weft.router.schemas_native import NotReadyResponse
from weft.router.stream import encode_json
from weft.telemetry.metrics import CONTENT_TYPE


async def root(context: RouterContext, exchange: Exchange) -> None:
    """GET /: TGI's health; a page for browsers."""
    if "text/html" in (exchange.header(b"accept") or ""):
        page = landing_page(context)
        await exchange.reply(200, page, b"text/html; charset=utf-8", [(b"cache-control", b"no-store")])
    else:
        await health(context, exchange)


async def health(context: RouterContext, exchange: Exchange) -> None:
    """GET /health /ping: 200 and nothing, or 503 and where the server stands."""
    fault = await find_fault(context)
    if fault is None:
        await exchange.reply(200, b"")
    else:
        await _reply_unhealthy(context, exchange, fault)


async def find_fault(context: RouterContext) -> NotReadyError | None:
    """Why a generation would not be served now; None when it would."""
    if context.lifecycle.state is not ServerState.READY:
        return context.lifecycle.not_ready()
    engine = await context.probe.health()
    timeout_ns = int(context.settings.watchdog_timeout_s * 1e9)
    is_stalled = timeout_ns > 0 and engine.stalled_ns > timeout_ns
    return NotReadyError("unhealthy", retry_after_s=2.0) if is_stalled or not engine.is_ready else None


async def live(context: RouterContext, exchange: Exchange) -> None:
    """GET /health/live: this process answers."""
    del context
    await exchange.reply(200, b"")


async def metrics(context: RouterContext, exchange: Exchange) -> None:
    """GET /metrics."""
    await exchange.reply(200, context.metrics.exposition().encode(), CONTENT_TYPE.encode())


async def _reply_unhealthy(context: RouterContext, exchange: Exchange, error: NotReadyError) -> None:
    progress = context.lifecycle.progress
    body = NotReadyResponse(
        error=error.message,
        error_type=error.error_type,
        state=progress.state,
        phase=progress.phase,
        percent=progress.percent,
    )
    await exchange.reply(error.http_status, encode_json(body), headers=headers_of(error))


def collect_gauges(context: RouterContext) -> None:
    """Before each scrape: gauges that are cheaper to read than to keep."""
    metrics = context.metrics
    metrics.gauge("weft_ready").set(float(context.lifecycle.state is ServerState.READY))
    metrics.gauge("weft_http_connections").set(context.num_connections())
    permits = metrics.gauge("weft_admission_permits")
    permits.set(context.admission.capacity, "total")
    permits.set(context.admission.used, "used")
    if context.tracing is not None:
        counts, spans = context.tracing.counts, metrics.counter("weft_trace_spans")
        for result, count in (("ended", counts.ended), ("delivered", counts.delivered), ("failed", counts.failed)):
            spans.set_to(count, result)
    metrics.gauge("vllm:lora_requests_info").set(time.time(), "0", "", "")
    metrics.gauge("weft_build_info").set(1, context.version, context.settings.shown_model_name)
    for name, value in LIMITS.as_dict().items():
        metrics.gauge("weft_limit").set(value, name)
