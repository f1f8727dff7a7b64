"""Access: a request to any path that is not declared open must carry an API key, and is charged to it."""

from __future__ import annotations

from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from gyrfalcon.http.keys import ApiKey, KeyStore
from gyrfalcon.http.quota import Quotas
from gyrfalcon.http.wire import json_response
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.interface import Caller

MISSING = "missing API key: send `Authorization: Bearer KEY`"
WRONG = "wrong API key"
_CALLER = "gyrfalcon.caller"  # where the scope holds on whose behalf a request is made


class ApiKeyMiddleware:
    """Lets through requests to open paths, and those that carry an accepted key; answers 401 to the rest, and 429 to
    those whose key has no room left. All of it before anything of the body is read.

    open_routes: (method, path) pairs, of the path the router will see. Everything else is closed, also paths that
    lead nowhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: KeyStore,
        open_routes: Collection[tuple[str, str]],
        kaito_paths: Collection[str],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._quotas = Quotas()
        self._open_routes = frozenset(open_routes)
        self._kaito_paths = frozenset(kaito_paths)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there is nothing but HTTP here: no answer closes the connection
        presented = _bearer(Headers(scope=scope).get("authorization"))
        key = None if presented is None else self._keys.find(presented)
        if key is None:
            self._metrics.request_rejected("unauthorized")
            message = MISSING if presented is None else WRONG
            # Without an error_type: the hub's client would take an unknown one for the whole story and hide the status.
            await self._refuse(scope, receive, send, message, 401, {"WWW-Authenticate": "Bearer"})
            return
        refusal = self._quotas.begin(key)
        if refusal is not None:
            self._metrics.request_rejected(refusal.cause)
            headers = {"Retry-After": str(refusal.retry_after_s)}
            await self._refuse(scope, receive, send, refusal.message, 429, headers, error_type="overloaded")
            return
        try:
            scope[_CALLER] = _caller(key)
            await self._app(scope, receive, send)
        finally:
            self._quotas.end(key)

    async def _refuse(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        message: str,
        status: int,
        headers: dict[str, str],
        *,
        error_type: str | None = None,
    ) -> None:
        """Answer in the dialect of the path."""
        if routed_path(scope) in self._kaito_paths:
            body = {"detail": message}
        elif error_type is None:
            body = {"error": message}
        else:
            body = {"error": message, "error_type": error_type}
        await json_response(body, status, headers)(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        return scope["type"] == "http" and (scope["method"], routed_path(scope)) in self._open_routes


def caller_of(request: HTTPConnection) -> Caller:
    """On whose behalf the request is made."""
    return caller_of_scope(request.scope)


def caller_of_scope(scope: Scope) -> Caller:
    caller: Caller = scope.get(_CALLER) or Caller()
    return caller


def _caller(key: ApiKey) -> Caller:
    return Caller(name=key.name, cache_salt=key.cache_salt, max_queued_tokens=key.limits.max_queued_tokens)


def _bearer(header: str | None) -> str | None:
    """The key in an Authorization header's value, None where there is none."""
    if header is None:
        return None
    scheme, _, key = header.strip().partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        return None
    try:
        return key.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return key


def routed_path(scope: Scope) -> str:
    """The path that the router matches: without the prefix under which a proxy mounts the server."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path[len(root) :] if root and path.startswith(root + "/") else path
