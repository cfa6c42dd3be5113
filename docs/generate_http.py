"""Writes the pages of errors, endpoints and metrics from the source: `python docs/generate_http.py`."""

from collections.abc import Callable, Iterator
from pathlib import Path

from weft import errors
from weft.router.app import ROUTES
from weft.router.error_replies import dialect_of
from weft.router.routes import Access, Route
from weft.telemetry.metrics import METRICS, MetricSpec

REFERENCE = Path(__file__).parent / "reference"

ERRORS = """# Errors

<!-- Written by docs/generate_http.py from src/weft/errors.py; edit the source, not this page. -->

A request that fails has one answer. As long as nothing has been sent it is a status with a JSON body; in a stream it
is the last event, and on `/v1` `data: [DONE]` follows. Texts name the field, the value, the allowed range and what to
do.

Native routes: `{{"error": "<text>", "error_type": "<type>"}}`, as in TGI; a server that is not ready adds
`state`, `phase` and `percent`. `/v1`: `{{"error": {{"message", "type", "param", "code"}}}}`, as OpenAI; `param` is
the field. `/v1/messages`: Anthropic's `{{"type": "error", "error": {{"type", "message"}}, "request_id"}}` with the
status of `/v1`; its streams end with the event `error`.
429 and 503 carry `Retry-After` in seconds, 401 `WWW-Authenticate`. Every answer carries `x-request-id`: the client's
own when it is printable and has at most {max_id} characters, else a new one. Answers of routes that generate carry
`x-system-fingerprint`: weights, numeric configuration and kernels of the engine, each as eight digits.

| Code | Native status | `error_type` | `/v1` status | `type` | `code` | Counted in `tgi_request_failure` as | Meaning |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Status 499 is never sent: it marks in the log a client that left before its answer. Limits of a connection (headers of
more than {max_headers} lines or {max_bytes} bytes: 431; headers that take longer than {seconds:g} s: 408; a request
that two servers could read differently: 400) are answered in the same form, and the connection is closed.
"""

ENDPOINTS = """# Endpoints

<!-- Written by docs/generate_http.py from src/weft/router/app.py; edit the source, not this page. -->

`/openapi.json` has every field; `/docs` shows it and lets one try. *Key*: asked for when `--api-key` is set; health is
open unless `--protect-health`, metrics unless `--protect-metrics`. A route that streams does so when the body says
`"stream": true`, `/generate_stream` always.

{tables}
## Where this differs from TGI 3.3.7

* The port is open from the first moment; until the model is ready generation routes answer 503 with phase and percent.
* A failure that is known before the first token has its own status in streams, too. After 15 s without a token a stream
  is opened with a comment, and what fails then is an event.
* `top_p` and `typical_p` accept 1.0. `max_new_tokens` beyond the context is clamped, and the answer says so in
  `x-max-new-tokens-clamped`; on `/v1` it is an error. `best_of` accepts a `seed`, from which the others are derived.
* `decoder_input_details` is honoured whenever it is asked for, as on TGI's CPU; `--enable-prefill-logprobs` is not
  needed.
* An error's text is TGI's sentence, then the value where that lacks it, then what to do. Sentences that say "less than"
  a limit are TGI's, too; what follows says that the limit itself is accepted.
* `top_tokens` leaves out tokens that could not be chosen; TGI shows them with a `logprob` of null.
* A place is taken after validation, so that a wrong request is refused and not told to come back; nor is one that has
  more sequences than there are places.
* `/tokenize` honours `truncate`; `/chat_tokenize` refuses what would change the prompt, as chat does.
* A stop text counts wherever it ends, also inside a token; the text ends with it.
* On `/v1` OpenAI's API is the truth: `presence_penalty`, `stop` as a text, `finish_reason`, error objects, ids.
* Asking for a key covers every route but health and metrics, and keys are compared exactly.
* Vertex AI's and KServe's routes are always there, honour every parameter, and answer failures with their own status;
  KServe takes texts besides bytes, and its `ready` routes say 503 when nothing would be served. An instance of Vertex
  AI samples unless `do_sample` says otherwise, as in TGI; with `details` its prediction is what /generate would answer.
  `AIP_PREDICT_ROUTE` and `AIP_HEALTH_ROUTE` add (or take) those paths.

## Model names on `/v1`

The served names, the full model id, and what TGI's clients send in its place (`tgi`, `dummy`, or nothing). Any other
name is 404 `model_not_found`, unless `--any-model-name`.

## Conversations

The prompt is what the model's chat template makes of `messages`. A conversation that ends with an assistant's message
is continued (TGI's behaviour) unless `add_generation_prompt` is true; `continue_final_message` says it explicitly.
`chat_template_kwargs` sets variables that the template itself reads, and no others.
"""

METRICS_PAGE = """# Metrics

<!-- Written by docs/generate_http.py from src/weft/telemetry/metrics.py; edit the source, not this page. -->

`GET /metrics` on the main port, in Prometheus' text format. Names that begin with `tgi_` are those of TGI 3.3.7,
without a `_total` suffix, so that its dashboards work. One HTTP request counts once, whatever its dialect and number
of choices.
A metric with labels appears with its first sample. A label has at most {max_labels} values; what comes after counts as
`other`.

| Name | Type | Labels | Meaning |
| --- | --- | --- | --- |
{rows}

## Buckets

Durations have TGI's: 0.0001 s · 1.5^k for k = 1 … 35 (0.15 ms to 146 s). Numbers of tokens have powers of two up to
2^20, where TGI's depend on the limits in force. Batch sizes: {batch}.
"""


def errors_page() -> str:
    """Every error that ends a request."""
    kinds = sorted(_request_errors(errors.RequestError), key=lambda kind: (kind.http_status, kind.code))
    limits = errors_limits()
    return ERRORS.format(rows="\n".join(map(_error_row, kinds)), **limits)


def errors_limits() -> dict[str, float]:
    """Numbers in the text around the table."""
    from weft.limits import LIMITS

    return {
        "max_id": LIMITS.max_request_id_chars,
        "max_headers": LIMITS.max_headers,
        "max_bytes": LIMITS.max_header_bytes,
        "seconds": LIMITS.header_timeout_s,
    }


def _request_errors(root: type[errors.RequestError]) -> Iterator[type[errors.RequestError]]:
    for kind in root.__subclasses__():
        yield kind
        yield from _request_errors(kind)


def _error_row(kind: type[errors.RequestError]) -> str:
    meaning = (kind.__doc__ or "").strip().replace("\n", " ")
    native = (kind.http_status, f"`{kind.error_type}`")
    openai = (kind.openai_status, f"`{kind.openai_type}`", f"`{kind.openai_code or kind.code}`")
    cells = (f"`{kind.code}`", *native, *openai, f"`{kind.metric_label}`", " ".join(meaning.split()))
    return "| " + " | ".join(map(str, cells)) + " |"


def endpoints_page() -> str:
    """Every route by tag."""
    tags = dict.fromkeys(route.tag for route in ROUTES)
    return ENDPOINTS.format(tables="\n".join(map(_routes_of, tags)))


def _routes_of(tag: str) -> str:
    head = f"## {tag}\n\n| Route | Key | Streams | What it does |\n| --- | --- | --- | --- |\n"
    return head + "".join(_route_row(route) for route in ROUTES if route.tag == tag)


def _route_row(route: Route) -> str:
    path = route.path.replace(":path}", "}")
    key = "yes" if route.access is Access.USER else "no"
    streams = "yes" if route.event is not None else "–"
    dialect = "" if route.body is None else f" Errors: {dialect_of(route.path)}."
    return f"| `{route.method} {path}` | {key} | {streams} | {route.summary}.{dialect} |\n"


def metrics_page() -> str:
    """Every metric in table order."""
    from weft.limits import LIMITS
    from weft.telemetry.metrics import BATCH_BUCKETS

    return METRICS_PAGE.format(
        rows="\n".join(map(_metric_row, METRICS)),
        max_labels=LIMITS.max_label_values,
        batch=", ".join(f"{bound:g}" for bound in BATCH_BUCKETS),
    )


def _metric_row(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels) or "–"
    return f"| `{spec.name}` | {spec.kind} | {labels} | {spec.help} |"


PAGES: dict[str, Callable[[], str]] = {
    "errors.md": errors_page,
    "endpoints.md": endpoints_page,
    "metrics.md": metrics_page,
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")
