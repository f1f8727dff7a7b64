"""What an operator does to a running server: an application of its own, on a port that only this machine reaches."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gyrfalcon.errors import SettingsError
from gyrfalcon.http.drain import Drain
from gyrfalcon.http.keys import KeyStore
from gyrfalcon.http.wire import json_response
from gyrfalcon.service.interface import TextService

logger = logging.getLogger(__name__)

# Programs of this machine may do what a browser, which pages from anywhere can lead here, must not: the one's requests
# carry this header, the other's name a host that is not this machine, or lack the header.
HEADER = "x-gyrfalcon-admin"
LOCAL_HOSTS = ("127.0.0.1", "localhost")

Handler = Callable[[Request], Awaitable[Response]]


def create_admin_app(
    service: TextService, keys: KeyStore, drain: Drain, *, reload_keys: Callable[[], None]
) -> Starlette:
    """POST /cache/flush, /keys/reload and /drain; GET /status.

    reload_keys: reads the keys again; raises SettingsError and keeps what was where they cannot be used.
    """

    async def flush(request: Request) -> Response:
        service.flush_prefix_cache()
        logger.info("the prefix cache was flushed by an operator")
        return json_response({"flushed": True})

    async def reload(request: Request) -> Response:
        try:
            reload_keys()
        except SettingsError as error:
            return json_response({"error": str(error)}, 409)
        return json_response({"keys": len(keys)})

    async def begin_drain(request: Request) -> Response:
        drain.begin()
        logger.info("draining, by an operator: no new requests")
        return json_response(_status(drain, service))

    async def status(request: Request) -> Response:
        return json_response(_status(drain, service))

    actions = {"/cache/flush": flush, "/keys/reload": reload, "/drain": begin_drain}
    app = Starlette(routes=[Route("/status", status, methods=["GET"])])
    for path, action in actions.items():
        app.add_route(path, _guarded(action), methods=["POST"])
    return app


def _guarded(action: Handler) -> Handler:
    async def guarded(request: Request) -> Response:
        host = request.headers.get("host", "").partition(":")[0]
        if request.headers.get(HEADER) is None or host not in LOCAL_HOSTS:
            return json_response({"error": f"send the header `{HEADER}: 1` to 127.0.0.1"}, 403)
        return await action(request)

    return guarded


def _status(drain: Drain, service: TextService) -> dict[str, object]:
    stats = service.stats()
    return {
        "ready": drain.is_ready,
        "takes_requests": drain.takes_requests,
        "waiting": sum(each.num_waiting for each in stats.values()),
        "running": sum(each.num_running for each in stats.values()),
    }
