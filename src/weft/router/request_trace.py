"""The span of an HTTP request: begun before its body is read, ended behind the last byte, with its parts as children.

Source: OpenTelemetry semantic conventions for HTTP servers and generative AI; vLLM's names for latencies
"""

from collections.abc import Sequence

from weft.core.request import Request
from weft.router.context import RouterContext
from weft.router.exchange import Exchange
from weft.telemetry.tracing import Attribute, sane_trace_parent

_PROVIDER = "weft"
_CONVERSATIONS = ("/chat", "/messages", "/responses")


def start_span(context: RouterContext, exchange: Exchange) -> None:
    """Begin the span of a request whose route is known. Does nothing without a collector."""
    if context.tracing is None:
        return
    method = exchange.scope["method"]
    exchange.span = context.tracing.start(
        f"{method} {exchange.route}",
        started_ns=exchange.timings.started_ns,
        trace_parent=sane_trace_parent(exchange.header(b"traceparent")),
        trace_state=exchange.header(b"tracestate") or "",
        attributes={
            "http.request.method": method,
            "http.route": exchange.route,
            "url.path": exchange.scope["path"],
            "weft.request_id": exchange.request_id,
        },
    )


def note_requests(context: RouterContext, exchange: Exchange, requests: Sequence[Request]) -> None:
    """What the engine is asked for; the parameters of the first sequence stand for all."""
    span = exchange.span
    if span is None or not span.is_sampled:
        return
    sampling = requests[0].sampling
    if requests[0].pooling is not None:
        _note_embeddings(context, exchange)
        return
    model = context.settings.shown_model_name
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": "chat"
        if any(part in exchange.route for part in _CONVERSATIONS)
        else "text_completion",
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.system": _PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.choice.count": len(requests),
        "gen_ai.request.max_tokens": requests[0].stop.max_new_tokens,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if not sampling.is_greedy:
        attributes |= {
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            # Attributes are signed 64 bits; a seed may have the last one.
            "gen_ai.request.seed": str(sampling.seed),
        }
    span.note(attributes)


def _note_embeddings(context: RouterContext, exchange: Exchange) -> None:
    if exchange.span is not None:
        model = context.settings.shown_model_name
        exchange.span.note(
            {
                "gen_ai.operation.name": "embeddings",
                "gen_ai.provider.name": _PROVIDER,
                "gen_ai.system": _PROVIDER,
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
            }
        )


def end_span(context: RouterContext, exchange: Exchange) -> None:
    """End the span as the exchange ended, with a child for each part of its way."""
    span = exchange.span
    if span is None:
        return
    timings, now_ns = exchange.timings, context.clock.now_ns()
    if exchange.status:
        span.note({"http.response.status_code": exchange.status})
    if timings.queued_ns and span.is_sampled:
        span.child("validate", timings.started_ns, timings.queued_ns)
        first_step_ns = timings.queued_ns + timings.queue_ns
        if timings.first_token_ns:
            span.child("queue", timings.queued_ns, first_step_ns)
            span.child("inference", first_step_ns, timings.finished_ns)
            span.event("first_token", timings.first_token_ns)
            span.note(
                {
                    "gen_ai.latency.time_to_first_token": (timings.first_token_ns - timings.started_ns) / 1e9,
                    "gen_ai.latency.time_in_queue": timings.queue_ns / 1e9,
                    "gen_ai.latency.e2e": timings.total_ns / 1e9,
                }
            )
        span.note(
            {
                "gen_ai.usage.input_tokens": exchange.num_prompt_tokens,
                "gen_ai.usage.output_tokens": exchange.num_completion_tokens,
                "gen_ai.usage.cache_read.input_tokens": exchange.num_cached_tokens,
            }
        )
        if exchange.finish_reason:
            span.note({"gen_ai.response.finish_reasons": [str(exchange.finish_reason)]})
    span.end(now_ns, error="" if exchange.error is None else exchange.error.code)
