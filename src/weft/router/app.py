"""The HTTP application: every route, and the three layers around them.

    Edge       request id, one log line, HTTP metrics         (exchange.py)
    CORS       what browsers may do                           (Starlette)
    Dispatch   route, key, body, client watch, errors         (here)

Handlers raise RequestError; Dispatch says it in the dialect of the route, as a status while nothing has been sent and
as the last event of a stream afterwards.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import structlog
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from weft.config import Settings
from weft.core.request import FinishReason
from weft.errors import ClientGoneError, InternalError, RequestError, UnauthorizedError
from weft.router import anthropic, cloud, embeddings, health, models, native, openai, openapi, responses
from weft.router.body import discard_body, read_body, require_json
from weft.router.context import RouterContext
from weft.router.embedding_inputs import require_generation
from weft.router.error_replies import body_of, dialect_for, headers_of, status_of
from weft.router.exchange import SCOPE_KEY, Edge, Exchange
from weft.router.json_values import Anything, JsonValue
from weft.router.recording import REPLAY_PATH, system_fingerprint
from weft.router.replay import (
    DetokenizeAnswer,
    DetokenizeRequest,
    ReplayAnswer,
    ReplayRequest,
    detokenize,
    replay,
)
from weft.router.request_trace import end_span, start_span
from weft.router.routes import Access, Route, RouteTable
from weft.router.schemas_anthropic import (
    AnthropicAnswer,
    AnthropicModel,
    AnthropicModelList,
    AnthropicModelsQuery,
    CountTokensRequest,
    MessagesRequest,
    MessageStreamEvent,
    TokensCount,
)
from weft.router.schemas_cloud import (
    InferRequest,
    InferResponse,
    LiveResponse,
    ModelMetadata,
    ServerMetadata,
    VertexRequest,
    VertexResponse,
)
from weft.router.schemas_embeddings import EmbeddingList, EmbeddingsRequest, EmbedRequest
from weft.router.schemas_native import (
    ChatTokenizeResponse,
    CompatGenerateRequest,
    GenerateRequest,
    GenerateResponse,
    Info,
    StreamResponse,
    TokenizeToken,
)
from weft.router.schemas_openai import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
)
from weft.router.schemas_responses import (
    ContentPartEvent,
    InputItemsQuery,
    InputTokens,
    InputTokensRequest,
    ItemList,
    OutputItemEvent,
    Response,
    ResponseDeleted,
    ResponseEvent,
    ResponseQuery,
    ResponsesRequest,
    TextDeltaEvent,
    TextDoneEvent,
)
from weft.router.stream import ClientWatch

log = structlog.get_logger("weft.http")

_GENERATE_EXAMPLE: Mapping[str, JsonValue] = {"inputs": "What is deep learning?", "parameters": {"max_new_tokens": 32}}
_CHAT_EXAMPLE: Mapping[str, JsonValue] = {
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 32,
}
_REPLAY_EXAMPLE: Mapping[str, JsonValue] = {
    "prompt_token_ids": [57, 102, 86, 203, 119],
    "sampling": {"temperature": 0.8, "seed": 7},
    "stop": {"max_new_tokens": 8},
}
_INFER_EXAMPLE: Mapping[str, JsonValue] = {
    "inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["What is deep learning?"]}],
    "parameters": {"max_new_tokens": 32},
}
_MESSAGES_EXAMPLE: Mapping[str, JsonValue] = {**_CHAT_EXAMPLE, "model": "tgi"}
_RESPONSE_EXAMPLE: Mapping[str, JsonValue] = {"input": "What is the capital of France?"}
_COMPLETION_EXAMPLE: Mapping[str, JsonValue] = {"prompt": "The capital of France is", "max_tokens": 8}

ROUTES: tuple[Route, ...] = (
    Route(
        method="POST", path="/v1/chat/completions", handler=openai.chat_completions, access=Access.USER,
        summary="Answer a conversation", tag="OpenAI", body=ChatRequest, answer=ChatCompletion,
        event=ChatCompletionChunk, generates=True, example=_CHAT_EXAMPLE,
    ),
    Route(
        method="POST", path="/v1/completions", handler=openai.completions, access=Access.USER,
        summary="Continue one or several texts", tag="OpenAI", body=CompletionRequest, answer=Completion,
        event=Completion, generates=True, example=_COMPLETION_EXAMPLE,
    ),
    Route(
        method="POST", path="/v1/responses", handler=responses.create, access=Access.USER,
        summary="Answer a conversation that goes on behind an earlier response", tag="OpenAI", body=ResponsesRequest,
        answer=Response, event=(ResponseEvent, OutputItemEvent, ContentPartEvent, TextDeltaEvent, TextDoneEvent),
        generates=True, example=_RESPONSE_EXAMPLE,
    ),
    Route(
        method="POST", path="/v1/responses/input_tokens", handler=responses.count_input_tokens, access=Access.USER,
        summary="Tokens that a response's input would have", tag="OpenAI", body=InputTokensRequest,
        answer=InputTokens, example=_RESPONSE_EXAMPLE,
    ),
    Route(
        method="GET", path="/v1/responses/{response_id}", handler=responses.retrieve, access=Access.USER,
        summary="A stored response; `stream` repeats the events of a background stream", tag="OpenAI",
        query=ResponseQuery, answer=Response,
        event=(ResponseEvent, OutputItemEvent, ContentPartEvent, TextDeltaEvent, TextDoneEvent),
    ),
    Route(
        method="DELETE", path="/v1/responses/{response_id}", handler=responses.delete, access=Access.USER,
        summary="Forget a response", tag="OpenAI", answer=ResponseDeleted,
    ),
    Route(
        method="POST", path="/v1/responses/{response_id}/cancel", handler=responses.cancel, access=Access.USER,
        summary="Stop a background response", tag="OpenAI", answer=Response,
    ),
    Route(
        method="GET", path="/v1/responses/{response_id}/input_items", handler=responses.input_items,
        access=Access.USER, summary="What stood before a response's answer", tag="OpenAI", query=InputItemsQuery,
        answer=ItemList,
    ),
    Route(
        method="POST", path="/v1/messages", handler=anthropic.messages, access=Access.USER,
        summary="Answer a conversation", tag="Anthropic", body=MessagesRequest, answer=AnthropicAnswer,
        event=MessageStreamEvent, generates=True, example=_MESSAGES_EXAMPLE,
    ),
    Route(
        method="POST", path="/v1/messages/count_tokens", handler=anthropic.count_message_tokens, access=Access.USER,
        summary="Tokens that a conversation has", tag="Anthropic", body=CountTokensRequest, answer=TokensCount,
        example=_MESSAGES_EXAMPLE,
    ),
    Route(
        method="POST", path="/v1/embeddings", handler=embeddings.embeddings, access=Access.USER,
        summary="Vectors of texts, from a server with an embedding model", tag="OpenAI", body=EmbeddingsRequest,
        answer=EmbeddingList, embeds=True, example={"input": "What is deep learning?"},
    ),
    Route(
        method="POST", path="/embed", handler=embeddings.embed, access=Access.USER,
        summary="Vectors of texts, as Text Embeddings Inference", tag="TGI", body=EmbedRequest,
        answer=list[list[float]], embeds=True, example={"inputs": "What is deep learning?"},
    ),
    Route(
        method="GET", path="/v1/models", handler=models.list_models, access=Access.USER,
        summary="Names of the model served; in Anthropic's form to clients that send `anthropic-version`",
        tag="OpenAI", query=AnthropicModelsQuery, answer=(ModelList, AnthropicModelList),
    ),
    Route(
        method="GET", path="/v1/models/{model_id:path}", handler=models.model_by_id, access=Access.USER,
        summary="One name of the model served", tag="OpenAI", answer=(Model, AnthropicModel),
    ),
    Route(
        method="POST", path="/generate", handler=native.generate, access=Access.USER,
        summary="Generate text", tag="TGI", body=GenerateRequest, answer=GenerateResponse, generates=True,
        example=_GENERATE_EXAMPLE,
    ),
    Route(
        method="POST", path="/generate_stream", handler=native.generate_stream, access=Access.USER,
        summary="Generate text as a stream of tokens", tag="TGI", body=GenerateRequest,
        answer_type="text/event-stream", event=StreamResponse, generates=True, example=_GENERATE_EXAMPLE,
    ),
    Route(
        method="POST", path="/", handler=native.compat_generate, access=Access.USER,
        summary="Generate text; `stream` in the body chooses the form", tag="TGI", body=CompatGenerateRequest,
        answer=list[GenerateResponse], event=StreamResponse, generates=True, example=_GENERATE_EXAMPLE,
    ),
    Route(
        method="POST", path="/tokenize", handler=native.tokenize, access=Access.USER,
        summary="Tokens of a text", tag="TGI", body=GenerateRequest, answer=list[TokenizeToken],
        example={"inputs": "What is deep learning?"},
    ),
    Route(
        method="POST", path="/chat_tokenize", handler=native.chat_tokenize, access=Access.USER,
        summary="Prompt and tokens of a conversation", tag="TGI", body=ChatRequest, answer=ChatTokenizeResponse,
        example=_CHAT_EXAMPLE,
    ),
    Route(
        method="POST", path=REPLAY_PATH, handler=replay, access=Access.USER,
        summary="Token ids in, token ids and every bit of their log-probabilities out: what `weft verify` asks",
        tag="Operations", body=ReplayRequest, answer=ReplayAnswer, generates=True, example=_REPLAY_EXAMPLE,
    ),
    Route(
        method="POST", path="/detokenize", handler=detokenize, access=Access.USER, summary="Text of token ids",
        tag="Operations", body=DetokenizeRequest, answer=DetokenizeAnswer, example={"tokens": [57, 102, 86]},
    ),
    Route(
        method="GET", path="/info", handler=native.info, access=Access.USER,
        summary="Model, limits and memory", tag="TGI", answer=Info,
    ),
    Route(
        method="GET", path="/model_info", handler=native.info, access=Access.USER,
        summary="As /info", tag="TGI", answer=Info, is_hidden=True,
    ),
    Route(
        method="POST", path="/invocations", handler=cloud.invocations, access=Access.USER,
        summary="SageMaker: the body's shape chooses between /, /v1/chat/completions and /v1/completions",
        tag="Clouds", body=(CompatGenerateRequest, ChatRequest, CompletionRequest),
        answer=(list[GenerateResponse], ChatCompletion, Completion),
        event=(StreamResponse, ChatCompletionChunk, Completion), generates=True, example=_GENERATE_EXAMPLE,
    ),
    Route(
        method="POST", path="/vertex", handler=cloud.vertex, access=Access.USER,
        summary="Vertex AI: predictions for several instances", tag="Clouds", body=VertexRequest,
        answer=VertexResponse, generates=True, example={"instances": [_GENERATE_EXAMPLE]},
    ),
    Route(
        method="POST", path="/v2/models/{name}/versions/{version}/infer", handler=cloud.infer, access=Access.USER,
        summary="KServe: generate a text per input", tag="Clouds", body=InferRequest, answer=InferResponse,
        generates=True, example=_INFER_EXAMPLE,
    ),
    Route(
        method="POST", path="/v2/models/{name}/infer", handler=cloud.infer, access=Access.USER,
        summary="KServe: generate a text per input", tag="Clouds", body=InferRequest, answer=InferResponse,
        generates=True, example=_INFER_EXAMPLE,
    ),
    Route(
        method="GET", path="/v2", handler=cloud.server_metadata, access=Access.USER,
        summary="KServe: what this server is", tag="Clouds", answer=ServerMetadata,
    ),
    Route(
        method="GET", path="/v2/models/{name}/versions/{version}", handler=cloud.model_metadata, access=Access.USER,
        summary="KServe: what the model is", tag="Clouds", answer=ModelMetadata,
    ),
    Route(
        method="GET", path="/v2/models/{name}", handler=cloud.model_metadata, access=Access.USER,
        summary="KServe: what the model is", tag="Clouds", answer=ModelMetadata,
    ),
    Route(
        method="GET", path="/v2/health/live", handler=cloud.live, access=Access.HEALTH_PROBE,
        summary="KServe: whether the process answers", tag="Clouds", answer=LiveResponse,
    ),
    Route(
        method="GET", path="/v2/health/ready", handler=cloud.ready, access=Access.HEALTH_PROBE,
        summary="KServe: whether a generation would be served now", tag="Clouds", answer=LiveResponse,
    ),
    Route(
        method="GET", path="/v2/models/{name}/versions/{version}/ready", handler=cloud.ready,
        access=Access.HEALTH_PROBE, summary="KServe: as /v2/health/ready", tag="Clouds", answer=LiveResponse,
    ),
    Route(
        method="GET", path="/v2/models/{name}/ready", handler=cloud.ready, access=Access.HEALTH_PROBE,
        summary="KServe: as /v2/health/ready", tag="Clouds", answer=LiveResponse,
    ),
    Route(
        method="GET", path="/", handler=health.root, access=Access.HEALTH_PROBE,
        summary="Health; a page for browsers", tag="Operations", answer_type="",
    ),
    Route(
        method="GET", path="/health", handler=health.health, access=Access.HEALTH_PROBE,
        summary="Whether a generation would be served now", tag="Operations", answer_type="",
    ),
    Route(
        method="GET", path="/health/live", handler=health.live, access=Access.HEALTH_PROBE,
        summary="Whether the process answers", tag="Operations", answer_type="",
    ),
    Route(
        method="GET", path="/health/ready", handler=health.health, access=Access.HEALTH_PROBE,
        summary="As /health; 503 from the first moment of a shutdown", tag="Operations", answer_type="",
    ),
    Route(
        method="GET", path="/ping", handler=health.health, access=Access.HEALTH_PROBE,
        summary="As /health, SageMaker's spelling", tag="Operations", answer_type="",
    ),
    Route(
        method="GET", path="/metrics", handler=health.metrics, access=Access.METRICS_PROBE,
        summary="Prometheus metrics", tag="Operations", answer_type="text/plain",
    ),
    Route(
        method="GET", path="/docs", handler=openapi.docs, access=Access.USER,
        summary="This documentation", tag="Operations", answer_type="text/html",
    ),
    Route(
        method="GET", path="/docs/{name}", handler=openapi.docs_file, access=Access.USER,
        summary="Files of the documentation", tag="Operations", answer_type="", is_hidden=True,
    ),
    Route(
        method="GET", path="/openapi.json", handler=openapi.document, access=Access.USER,
        summary="This API as OpenAPI 3.1", tag="Operations", answer=dict[str, Anything],
    ),
    Route(
        method="GET", path="/api-doc/openapi.json", handler=openapi.document, access=Access.USER,
        summary="As /openapi.json, TGI's spelling", tag="Operations", answer=dict[str, Anything], is_hidden=True,
    ),
)  # fmt: skip


def build_app(context: RouterContext) -> ASGIApp:
    """The application of one router process."""
    table = RouteTable(_with_vertex_names(ROUTES, context.settings))
    # Made when first asked for: most servers are never asked.
    context.openapi = cache(lambda: openapi.build_document(table.routes, context.version))
    context.metrics.model_name = context.settings.shown_model_name
    context.metrics.before_exposition(lambda: health.collect_gauges(context))
    cors = CORSMiddleware(
        Dispatch(context, table),
        allow_origins=context.settings.cors_allow_origin or ("*",),
        allow_methods=("GET", "POST", "DELETE", "OPTIONS"),
        # Mirrors what the browser asks for: clients send Authorization and headers of their own.
        allow_headers=("*",),
        expose_headers=("x-request-id", "request-id", "x-system-fingerprint", "retry-after"),
    )
    return Edge(cors, context.clock, context.metrics)


def _with_vertex_names(routes: Sequence[Route], settings: Settings) -> list[Route]:
    """The table, with prediction and health also where Vertex AI wants them; its names win over ours."""
    own = {(route.method, route.path): route for route in routes}
    if settings.aip_predict_route is not None:
        route = replace(own["POST", "/vertex"], path=settings.aip_predict_route, speaks_like="/vertex", is_hidden=True)
        own["POST", route.path] = route
    if settings.aip_health_route is not None:
        route = replace(own["GET", "/health"], path=settings.aip_health_route, speaks_like="/health", is_hidden=True)
        own["GET", route.path] = route
    return list(own.values())


class Dispatch:
    """Calls the handler of a route, and turns whatever it raises into an answer."""

    def __init__(self, context: RouterContext, table: RouteTable) -> None:
        self._context = context
        self._table = table
        self._auth = KeyCheck(context)
        self._accounts = GenerationAccounts(context)
        context.account = self._account_later

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        exchange: Exchange = scope[SCOPE_KEY]
        exchange.receive, exchange.send = receive, send
        route: Route | None = None
        try:
            route = self._table.find(exchange)
            exchange.route, exchange.speaks_like = route.path, route.speaks_like
            if route.body is not None:
                start_span(self._context, exchange)
            self._auth.check(route, exchange)
            await self._handle(route, exchange)
        except RequestError as error:
            await self._fail(exchange, error)
        except Exception:  # a border: whatever a handler raises, the client gets an answer and the server lives
            log.exception("request.bug", request_id=exchange.request_id, route=exchange.route)
            await self._fail(exchange, InternalError("The server made a mistake with this request; it is logged"))
        finally:
            if not exchange.generates_later:
                end_span(self._context, exchange)
        if route is not None and (route.generates or route.embeds) and not exchange.generates_later:
            self._accounts.add(exchange)

    def _account_later(self, exchange: Exchange) -> None:
        """What was answered before it was generated is over now."""
        end_span(self._context, exchange)
        self._accounts.add(exchange)

    async def _handle(self, route: Route, exchange: Exchange) -> None:
        if route.body is None:
            await route.handler(self._context, exchange)
            return
        self._context.lifecycle.require_ready()
        if self._context.model is not None and (route.generates or route.embeds):
            exchange.system_fingerprint = system_fingerprint(self._context.model.info, self._context.version)
        if route.generates:
            require_generation(self._context.require_model(), self._context.settings)
        require_json(exchange)
        exchange.stage = "body"
        exchange.body = await read_body(exchange, self._context.settings.payload_limit)
        exchange.stage = "validate"
        async with ClientWatch(exchange):
            await route.handler(self._context, exchange)

    async def _fail(self, exchange: Exchange, error: RequestError) -> None:
        exchange.error = error
        if isinstance(error, ClientGoneError):
            self._context.metrics.counter("weft_request_cancelled").add(1, exchange.stage)
            exchange.abort_connection()
            await asyncio.sleep(0)  # lets the connection notice, so that the server does not wait for an answer
            return
        if exchange.end_stream is not None:
            await exchange.end_stream(error)
            return
        if exchange.is_answering:
            exchange.abort_connection()
            return
        dialect = dialect_for(exchange)
        body = body_of(error, dialect, self._context.lifecycle.progress, exchange.request_id)
        headers = headers_of(error)
        if exchange.stage not in ("headers", "body"):
            await exchange.reply(status_of(error, dialect), body, headers=headers)
            return
        # The body may not have been read to its end; what is left of it must not be taken for a request.
        headers.append((b"connection", b"close"))
        async with exchange.lingering_reply(status_of(error, dialect), body, headers):
            await discard_body(exchange)


class KeyCheck:
    """The API key: exact, compared on digests in constant time."""

    def __init__(self, context: RouterContext) -> None:
        settings = context.settings
        self._digests = [_digest(key) for key in (settings.api_key,) if key]
        self._public: set[Access] = set()
        if not settings.protect_health:
            self._public.add(Access.HEALTH_PROBE)
        if not settings.protect_metrics:
            self._public.add(Access.METRICS_PROBE)

    def check(self, route: Route, exchange: Exchange) -> None:
        """Raises UnauthorizedError."""
        if not self._digests or route.access in self._public:
            return
        digests = [_digest(key) for key in _keys_of(exchange)]
        matches = [hmac.compare_digest(digest, known) for digest in digests for known in self._digests]
        if not any(matches):
            raise UnauthorizedError(
                "The API key is missing or wrong. Send `Authorization: Bearer <key>` or `x-api-key: <key>`"
            )


class GenerationAccounts:
    """The `tgi_request_*` family: each HTTP request once, whatever its dialect, choices and end."""

    def __init__(self, context: RouterContext) -> None:
        metrics = context.metrics
        self._clock = context.clock
        self._count = metrics.counter("tgi_request_count")
        self._success = metrics.counter("tgi_request_success")
        self._success_by_reason = metrics.counter("vllm:request_success_total")
        self._model_name = context.settings.shown_model_name
        self._failure = metrics.counter("tgi_request_failure")
        self._prompt_tokens = metrics.counter("weft_prompt_tokens")
        self._cached_tokens = metrics.counter("weft_cached_prompt_tokens")
        self._completion_tokens = metrics.counter("weft_completion_tokens")
        self._duration = metrics.histogram("tgi_request_duration")
        self._validation = metrics.histogram("tgi_request_validation_duration")
        self._queue = metrics.histogram("tgi_request_queue_duration")
        self._inference = metrics.histogram("tgi_request_inference_duration")
        self._per_token = metrics.histogram("tgi_request_mean_time_per_token_duration")
        self._generated = metrics.histogram("tgi_request_generated_tokens")
        self._input_length = metrics.histogram("tgi_request_input_length")
        self._max_new_tokens = metrics.histogram("tgi_request_max_new_tokens")

    def add(self, exchange: Exchange) -> None:
        """Note a request that is over."""
        self._count.add()
        timings = exchange.timings
        if timings.queued_ns:
            self._input_length.observe(exchange.num_prompt_tokens)
            if not exchange.counts_vectors:
                self._max_new_tokens.observe(exchange.max_new_tokens)
            self._prompt_tokens.add(exchange.num_prompt_tokens)
            self._cached_tokens.add(exchange.num_cached_tokens)
            self._completion_tokens.add(exchange.num_completion_tokens)
        if exchange.error is not None:
            self._failure.add(1, exchange.error.metric_label)
            return
        self._success.add()
        reason = "length" if exchange.finish_reason == FinishReason.LENGTH else "stop"
        self._success_by_reason.add(1, self._model_name, reason)
        self._duration.observe((self._clock.now_ns() - timings.started_ns) / 1e9)
        self._validation.observe(timings.validation_ns / 1e9)
        self._queue.observe(timings.queue_ns / 1e9)
        self._inference.observe(timings.inference_ns / 1e9)
        if exchange.counts_vectors:
            return
        self._per_token.observe(timings.inference_ns / 1e9 / max(exchange.num_completion_tokens, 1))
        self._generated.observe(exchange.num_completion_tokens)


def _keys_of(exchange: Exchange) -> list[str]:
    """The bearer token, and `x-api-key` as Anthropic's clients send it; a header that is repeated is no key."""
    bearers, plain = exchange.headers(b"authorization"), exchange.headers(b"x-api-key")
    keys = [plain[0].strip()] if len(plain) == 1 else []
    scheme, _, key = bearers[0].partition(" ") if len(bearers) == 1 else ("", "", "")
    return [*keys, key.strip()] if scheme.lower() == "bearer" else keys


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", errors="replace")).digest()
