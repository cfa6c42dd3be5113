"""The OpenAPI 3.1 document, made from the route table and the wire types, and the pages that show it."""

from collections.abc import Iterable, Sequence

import msgspec

from weft.errors import NotFoundError
from weft.router.context import RouterContext
from weft.router.error_replies import Dialect, dialect_of
from weft.router.exchange import Exchange
from weft.router.json_values import JsonValue
from weft.router.pages import static_file
from weft.router.routes import Access, Route
from weft.router.schemas_anthropic import AnthropicError, AnthropicModel, AnthropicModelList
from weft.router.schemas_native import ErrorResponse, NotReadyResponse
from weft.router.schemas_openai import OpenAIError

JsonObject = dict[str, JsonValue]

_REFERENCE = "#/components/schemas/{name}"
_CACHE = [(b"cache-control", b"no-cache")]
_PAGE_HEADERS = [
    *_CACHE,
    (b"content-security-policy", b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"),
    (b"x-content-type-options", b"nosniff"),
]
_CONTENT_TYPES = {"docs.css": b"text/css; charset=utf-8", "docs.js": b"text/javascript; charset=utf-8"}
_EVENT_STREAM = "text/event-stream"

_ERRORS: Sequence[tuple[int, str]] = (
    (400, "The body is no JSON, or a value is not allowed"),
    (401, "The API key is missing or wrong"),
    (404, "There is no such model or thing"),
    (408, "The body came too slowly"),
    (413, "The body is larger than --payload-limit"),
    (415, "The content type is not JSON"),
    (422, "A field has the wrong type or a value that is not allowed"),
    (424, "The engine could not finish this request"),
    (429, "Every place is taken; Retry-After says when to come back"),
    (500, "A bug, or numbers that the model could not compute"),
    (503, "Loading, restarting or shutting down; Retry-After says when to come back"),
)
_ERROR_TYPES = {
    Dialect.NATIVE: ErrorResponse,
    Dialect.OPENAI: OpenAIError,
    Dialect.ANTHROPIC: AnthropicError,
}
_ANTHROPIC_FORMS = frozenset({AnthropicModel, AnthropicModelList})
"""Answers of routes that OpenAI and Anthropic both have; errors come in the form of whoever asks."""
_NATIVE_ONLY = frozenset({422, 424})
_ON_ALL_ROUTES = frozenset({401, 503})
_ON_THINGS = frozenset({400, 404, 500})
"""Of routes without a body whose path names something that may be missing or in the wrong state."""


async def document(context: RouterContext, exchange: Exchange) -> None:
    """GET /openapi.json."""
    await exchange.reply(200, context.openapi(), headers=_CACHE)


async def docs(context: RouterContext, exchange: Exchange) -> None:
    """GET /docs."""
    del context
    await exchange.reply(200, static_file("docs.html"), b"text/html; charset=utf-8", _PAGE_HEADERS)


async def docs_file(context: RouterContext, exchange: Exchange) -> None:
    """GET /docs/{name}: the two files the page needs."""
    del context
    name = exchange.path_params["name"]
    if name not in _CONTENT_TYPES:
        raise NotFoundError("There is no such file. See /docs")
    await exchange.reply(200, static_file(name), _CONTENT_TYPES[name], _PAGE_HEADERS)


def build_document(routes: Iterable[Route], version: str) -> bytes:
    """The document, as JSON."""
    shown = [route for route in routes if not route.is_hidden]
    types: list[object] = [NotReadyResponse, *_ERROR_TYPES.values()]
    for route in shown:
        types += [kind for kinds in (route.body, route.answer, route.event) for kind in _alternatives(kinds)]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    schema_of = {repr(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, JsonObject] = {}
    for route in shown:
        operation = _operation(route, schema_of)
        paths.setdefault(route.path.replace(":path}", "}"), {})[route.method.lower()] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "Weft",
                "version": version,
                "description": "Text generation with the APIs of Text Generation Inference, OpenAI and Anthropic.",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "paths": paths,
            "components": {
                "schemas": components,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "tags": [{"name": name} for name in ("OpenAI", "Anthropic", "TGI", "Clouds", "Operations")],
        }
    )


def _operation(route: Route, schema_of: dict[str, JsonObject]) -> JsonObject:
    operation: JsonObject = {
        "summary": route.summary,
        "tags": [route.tag],
        "operationId": _operation_id(route),
        "responses": _responses(route, schema_of),
        # The empty object: a server without a key asks for none.
        "security": [{}, {"key": []}] if route.access is Access.USER else [{}],
    }
    names = [part.partition("}")[0].partition(":")[0] for part in route.path.split("{")[1:]]
    parameters: list[JsonValue] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
    ]
    if route.query is not None:
        parameters += _query_parameters(route.query)
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        media: JsonObject = {"schema": _any_of(route.body, schema_of)}
        if route.example is not None:
            media["example"] = dict(route.example)
        operation["requestBody"] = {"required": True, "content": {"application/json": media}}
    return operation


def _query_parameters(query: type[msgspec.Struct]) -> list[JsonValue]:
    """Each field as a parameter. A query has no null, so that alternative is left out."""
    components = msgspec.json.schema_components([query], ref_template=_REFERENCE)[1]
    shown: list[JsonValue] = []
    for name, described in components[query.__name__]["properties"].items():
        [schema] = [kind for kind in described["anyOf"] if kind != {"type": "null"}]
        shown.append({"name": name, "in": "query", "description": described.get("description", ""), "schema": schema})
    return shown


def _responses(route: Route, schema_of: dict[str, JsonObject]) -> JsonObject:
    content: JsonObject = {}
    if route.answer is not None:
        content[route.answer_type] = {"schema": _any_of(route.answer, schema_of)}
    elif route.answer_type and route.answer_type != _EVENT_STREAM:
        content[route.answer_type] = {"schema": {"type": "string"}}
    if route.event is not None:
        content[_EVENT_STREAM] = {"schema": _event_schema(route, schema_of)}
    answer: JsonObject = {"description": "Success"}
    if content:
        answer["content"] = content
    responses: JsonObject = {"200": answer}
    dialect = dialect_of(route.path)
    error_schema = _any_of(_error_types(route), schema_of)
    expected = _ON_ALL_ROUTES if route.body is None else frozenset(status for status, _ in _ERRORS)
    if route.body is None and ("{" in route.path or route.query is not None):
        expected |= _ON_THINGS
    for status, text in _ERRORS:
        if status not in expected or (dialect is not Dialect.NATIVE and status in _NATIVE_ONLY):
            continue
        responses[str(status)] = {"description": text, "content": {"application/json": {"schema": error_schema}}}
    return responses


def _error_types(route: Route) -> tuple[object, ...]:
    """How a route says errors: one that reads bodies of several dialects answers in the body's."""
    own = _ERROR_TYPES[dialect_of(route.path)]
    if not _ANTHROPIC_FORMS.isdisjoint(_alternatives(route.answer)):
        return (own, AnthropicError)
    return (ErrorResponse, OpenAIError) if isinstance(route.body, tuple) else (own,)


def _event_schema(route: Route, schema_of: dict[str, JsonObject]) -> JsonObject:
    """One server-sent event: its lines, and the JSON in its data. A stream that fails ends with an error."""
    errors = _error_types(route)
    kinds = (*_alternatives(route.event), *(kind for kind in errors if kind not in _alternatives(route.event)))
    content: JsonObject = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": _any_of(kinds, schema_of),
    }
    data: JsonObject = {"anyOf": [content, {"const": "[DONE]"}]} if OpenAIError in errors else content
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}


def _alternatives(kinds: object) -> tuple[object, ...]:
    """A type, a tuple of types, or nothing, as a tuple."""
    return kinds if isinstance(kinds, tuple) else () if kinds is None else (kinds,)


def _any_of(kinds: object, schema_of: dict[str, JsonObject]) -> JsonObject:
    schemas = [schema_of[repr(kind)] for kind in _alternatives(kinds)]
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def _operation_id(route: Route) -> str:
    words = route.path.replace("{", "").replace("}", "").replace(":path", "").replace(".", "_").strip("/")
    return "_".join((route.method.lower(), *filter(None, words.replace("/", "_").split("_"))))
