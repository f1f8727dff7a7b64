"""The HTTP server: uvicorn with our limits on connections, TLS, and signals left to the caller."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp

from gyrfalcon.errors import SettingsError
from gyrfalcon.http.connections import ConnectionLimits, ConnectionWatch, WatchedConnection
from gyrfalcon.metrics import Metrics


class Server(uvicorn.Server):
    """Serves one application on sockets that the caller has bound."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        limits: ConnectionLimits,
        *,
        grace_s: int | None = None,
        tls: ssl.SSLContext | None = None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        """grace_s: what running requests have to finish when the server ends, None for as long as they take.
        on_ready: called when it listens.
        """
        self._watch = ConnectionWatch(limits, metrics)
        self._tls = tls
        self._on_ready = on_ready
        self._watching: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            app,
            http=cast(type[asyncio.Protocol], self._connection),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            # Ours ends idle connections; this one only must not be earlier.
            timeout_keep_alive=int(limits.idle_timeout_s) + 2,
            timeout_graceful_shutdown=grace_s,
        )
        super().__init__(config)

    @property
    def num_connections(self) -> int:
        return len(self._watch)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()
        handshake_s = self._watch.limits.header_timeout_s if self._tls else None

        def connection() -> asyncio.Protocol:
            return self._connection(self.config, self.server_state, self.lifespan.state, loop)

        self.servers = [
            await loop.create_server(
                connection,
                sock=listener,
                ssl=self._tls,
                backlog=self.config.backlog,
                ssl_handshake_timeout=handshake_s,
            )
            for listener in sockets or ()
        ]
        self._watching = asyncio.create_task(self._watch.run(), name="connection-watch")
        self.started = True
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn raises a captured signal again when it has stopped, which would end the process before the engine.
        yield

    def _connection(self, *arguments: Any, **named: Any) -> WatchedConnection:
        return WatchedConnection(*arguments, watch=self._watch, **named)


def load_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The context to serve HTTPS with, None without a certificate. Raises SettingsError naming the file at fault."""
    if certificate is None:
        if key is not None:
            raise SettingsError("--tls-key", "has no effect without --tls-certificate; give both")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    reload_tls(context, certificate, key)
    return context


def reload_tls(context: ssl.SSLContext, certificate: Path, key: Path | None) -> None:
    """Read the files into the context, for the connections to come. Raises SettingsError."""
    for setting, path in (("--tls-certificate", certificate), ("--tls-key", key)):
        try:
            if path is not None:
                path.open("rb").close()
        except OSError as error:
            raise SettingsError(setting, f"`{path}` cannot be read: {error.strerror or error}") from error
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        files = f"`{certificate}`" if key is None else f"`{certificate}` with the key `{key}`"
        raise SettingsError("--tls-certificate", f"{files} cannot be used: {reason}") from error


def _no_password() -> str:
    """Asked for where a key is encrypted; nobody is there to type one."""
    raise ValueError("the key is encrypted; give one that is not")
