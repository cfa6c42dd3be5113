"""What a request brings along besides its body: deadline, tenant, trace."""

import hashlib

from weft.limits import LIMITS
from weft.router.context import RouterContext
from weft.router.exchange import Exchange
from weft.router.validate import NS_PER_S, Origin
from weft.telemetry.tracing import sane_trace_parent


def origin_of(context: RouterContext, exchange: Exchange) -> Origin:
    """Read the headers that matter beyond HTTP. A malformed traceparent is no trace, as W3C asks."""
    return Origin(
        deadline_ns=context.clock.now_ns() + int(LIMITS.queue_timeout_s * NS_PER_S),
        tenant=_tenant(context, exchange),
        trace_parent=_trace_parent(exchange),
    )


def _trace_parent(exchange: Exchange) -> str:
    """Our own span where there is one; else whoever asked, for engines that trace by themselves."""
    if exchange.span is not None:
        return exchange.span.trace_parent
    return sane_trace_parent(exchange.header(b"traceparent"))


def _tenant(context: RouterContext, exchange: Exchange) -> str:
    """Prefix blocks are shared within a tenant only. Hashed: the value may be long, or a secret."""
    name = context.settings.tenant_header
    value = exchange.header(name.lower().encode("latin-1")) if name else None
    return hashlib.sha256(value.encode("latin-1")).hexdigest()[:32] if value else ""
