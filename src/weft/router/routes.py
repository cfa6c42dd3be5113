"""The route table: method, path, who may call, what it reads and answers. An undeclared route does not exist.

Documentation, authentication, metrics labels and the OpenAPI document are all read from here.
"""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import msgspec
from starlette.routing import compile_path

from weft.errors import MethodNotAllowedError, NotFoundError
from weft.router.context import RouterContext
from weft.router.exchange import Exchange
from weft.router.json_values import JsonValue

Handler = Callable[[RouterContext, Exchange], Awaitable[None]]


class Access(StrEnum):
    """Who may call a route."""

    HEALTH_PROBE = "health probe"
    """Anybody, unless --protect-health."""
    METRICS_PROBE = "metrics probe"
    """Anybody, unless --protect-metrics."""
    USER = "user"
    """Whoever has the API key, when there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row of the table."""

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    tag: str
    body: type[msgspec.Struct] | tuple[type[msgspec.Struct], ...] | None = None
    """What a POST reads. A tuple here and below: any of these."""
    answer: object | None = None
    """Type of the JSON that status 200 carries; None: nothing, or no JSON."""
    answer_type: str = "application/json"
    event: type[msgspec.Struct] | tuple[type[msgspec.Struct], ...] | None = None
    """What each event carries when the answer may be a stream."""
    query: type[msgspec.Struct] | None = None
    """What a GET reads from its query."""
    generates: bool = False
    """Counts in the request metrics and waits for a place."""
    embeds: bool = False
    """As `generates`, on servers whose model makes vectors."""
    example: Mapping[str, JsonValue] | None = None
    is_hidden: bool = False
    """Not in the documentation: an alias."""
    speaks_like: str = ""
    """Path whose dialect errors are said in; empty: the route's own."""


class RouteTable:
    """Finds the route of a request."""

    def __init__(self, routes: Iterable[Route]) -> None:
        """Raises ValueError for two routes of one method and path, or one without an access class."""
        self.routes = tuple(routes)
        self._exact: dict[str, dict[str, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        for route in self.routes:
            if not isinstance(route.access, Access):
                raise ValueError(f"{route.method} {route.path} does not declare who may call it")  # noqa: TRY004
            methods = self._methods_at(route.path)
            if route.method in methods:
                raise ValueError(f"{route.method} {route.path} stands twice in the route table")
            methods[route.method] = route

    def find(self, exchange: Exchange) -> Route:
        """The route of a request; sets its path parameters. Raises NotFoundError, MethodNotAllowedError."""
        path, method = exchange.scope["path"], exchange.scope["method"]
        methods = self._exact.get(path) or self._matching(path, exchange)
        if not methods:
            raise NotFoundError(f"There is nothing at {path[:200]!r}. See /docs for what there is")
        # HEAD is GET without the body; the server leaves the body out.
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            error = MethodNotAllowedError(f"{method[:16]} is not allowed here. Use {' or '.join(sorted(methods))}")
            error.allowed = tuple(sorted(methods))
            raise error
        return route

    def _methods_at(self, path: str) -> dict[str, Route]:
        if "{" not in path:
            return self._exact.setdefault(path, {})
        pattern = compile_path(path)[0]
        for known, methods in self._patterns:
            if known == pattern:
                return methods
        self._patterns.append((pattern, {}))
        return self._patterns[-1][1]

    def _matching(self, path: str, exchange: Exchange) -> dict[str, Route] | None:
        for pattern, methods in self._patterns:
            if match := pattern.match(path):
                exchange.path_params = match.groupdict()
                return methods
        return None
