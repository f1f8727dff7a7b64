"""The front process: finds the checkpoint, starts the engine, and puts service and dialects on top."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import uvloop

from gyrfalcon.config import Settings
from gyrfalcon.engine.interface import Engine, WatermarkParams
from gyrfalcon.engine.process import EngineChild, ProcessEngine
from gyrfalcon.errors import EngineDead, SettingsError
from gyrfalcon.http.admin import create_admin_app
from gyrfalcon.http.app import create_app
from gyrfalcon.http.connections import ConnectionLimits
from gyrfalcon.http.drain import Drain
from gyrfalcon.http.keys import KeyLimits, KeyStore
from gyrfalcon.http.server import Server, load_tls, reload_tls
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.hub import Checkpoint, locate_checkpoint
from gyrfalcon.launch.child import CoreRecipe
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.chat import load_chat_template
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.service.interface import ModelInfo, TextService
from gyrfalcon.service.models import ModelTable, ServedModel
from gyrfalcon.service.template_worker import TemplateWorkers
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.service.validation import resolve_limits
from gyrfalcon.tracing import Tracer, start_tracer

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]

ADMIN_HOST = "127.0.0.1"
KEY_FILE_POLL_S = 1.0
# Files and sockets that the server needs besides its connections.
SPARE_FILES = 200


def serve(
    settings: Settings,
    *,
    listener: socket.socket,
    child: EngineChild | None,
    on_progress: OnProgress,
    on_ready: Callable[[ModelInfo], None],
) -> None:
    """Serve over HTTP until a signal ends it.

    listener: a bound socket; it begins to listen, and on_ready is called, once the model is loaded. child: for the
    engine, if one was started ahead. The first SIGINT or SIGTERM lets running requests finish within the grace period,
    the second ends at once. Raises OperatorError when the model cannot be served, EngineDead when its engine keeps
    dying.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, listener, child, on_progress, on_ready))


@asynccontextmanager
async def open_text_service(settings: Settings, *, on_progress: OnProgress) -> AsyncIterator[TextService]:
    """The text service over the engine that the settings describe; leaving closes both.

    on_progress: receives (bytes done, bytes total) while weights are read.
    """
    async with _open(settings, None, on_progress, on_give_up=lambda: None) as (service, _):
        yield service


@asynccontextmanager
async def _open(
    settings: Settings, child: EngineChild | None, on_progress: OnProgress, on_give_up: Callable[[], None]
) -> AsyncIterator[tuple[TextService, Metrics]]:
    """The service and its metrics. on_give_up: called when the engine died so often that it stays down."""
    logger.info("settings", extra=settings.shown())
    checkpoint = await asyncio.to_thread(
        locate_checkpoint,
        settings.model,
        revision=settings.revision,
        cache_dir=settings.huggingface_hub_cache,
        offline=settings.offline,
    )
    # The text side is read first: what is missing there is known in a moment, the weights may take minutes.
    tokenizer = load_tokenizer(checkpoint.folder)
    chat_template = load_chat_template(
        checkpoint.folder,
        tokenizer,
        settings.chat_template or settings.tokenizer_config_path,
        max_chars=settings.template_output_limit,
    )
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        tracer = _start_tracer(settings, stack)
        engine = await _start_engine(settings, checkpoint, child, metrics, on_progress, on_give_up)
        stack.push_async_callback(engine.close)
        renderer = TemplateWorkers(timeout_s=settings.template_timeout)
        stack.push_async_callback(renderer.close)
        limits = resolve_limits(
            engine.facts,
            max_total_tokens=settings.max_total_tokens,
            max_input_tokens=settings.max_input_tokens,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_best_of=settings.max_best_of,
            max_return_sequences=settings.max_return_sequences,
            max_stop_sequences=settings.max_stop_sequences,
            max_stop_length=settings.max_stop_length,
            max_top_n_tokens=settings.max_top_n_tokens,
            max_messages=settings.max_messages,
            max_biased_phrases=settings.max_biased_phrases,
            max_bad_words=settings.max_bad_words,
            max_characters_per_token=settings.max_characters_per_token,
            default_max_new_tokens=settings.default_max_new_tokens,
            max_batch_size=settings.max_batch_size,
            block_size=settings.block_size,
        )
        model = ServedModel(
            name=settings.served_model_name or checkpoint.name,
            revision=checkpoint.revision,
            engine=engine,
            tokenizer=tokenizer,
            chat_template=chat_template,
            limits=limits,
            watermark=WatermarkParams(
                gamma=settings.watermark_gamma,
                delta=settings.watermark_delta,
                key=settings.watermark_key,
                context_width=settings.watermark_context_width,
            ),
        )
        metrics.limits_known(
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            cache_tokens=engine.facts.cache_tokens,
        )
        service = GenerationService(
            ModelTable([model], strict_names=settings.strict_model_names),
            metrics,
            max_concurrent_requests=settings.max_concurrent_requests,
            queue_timeout_s=settings.queue_timeout,
            max_queued_tokens=settings.max_queued_tokens,
            renderer=renderer,
            tracer=tracer,
            logs_prompts=settings.log_prompts,
        )
        metrics.watch_engines(service.stats)
        watching = asyncio.create_task(metrics.watch_event_loop(), name="event-loop-watch")
        stack.callback(watching.cancel)
        yield service, metrics


async def _start_engine(
    settings: Settings,
    checkpoint: Checkpoint,
    child: EngineChild | None,
    metrics: Metrics,
    on_progress: OnProgress,
    on_give_up: Callable[[], None],
) -> Engine:
    recipe = CoreRecipe(settings, checkpoint.folder)
    if settings.engine == "process":
        return await ProcessEngine.start(
            recipe, child=child, on_progress=on_progress, on_step=metrics.step_ended, on_give_up=on_give_up
        )
    # Only here, as the engine in this process brings torch along.
    from gyrfalcon.engine.local import LocalEngine

    return LocalEngine(await asyncio.to_thread(recipe, on_progress), on_step=metrics.step_ended)


def _start_tracer(settings: Settings, stack: AsyncExitStack) -> Tracer | None:
    """The tracer that the settings ask for; what it still holds is exported when the stack is left."""
    if settings.otlp_endpoint is None:
        return None
    tracer = start_tracer(settings.otlp_endpoint, settings.otlp_service_name)
    stack.push_async_callback(asyncio.to_thread, tracer.close)
    return tracer


async def _serve(
    settings: Settings,
    listener: socket.socket,
    child: EngineChild | None,
    on_progress: OnProgress,
    on_ready: Callable[[ModelInfo], None],
) -> None:
    # What can be wrong with files and ports is known at once; the weights may take minutes.
    keys = _load_keys(settings)
    tls = load_tls(settings.tls_certificate, settings.tls_key)
    drain = Drain()
    servers: list[Server] = []
    has_given_up = False

    def end() -> None:
        for server in servers:
            server.should_exit = True

    def give_up() -> None:
        nonlocal has_given_up
        has_given_up = True
        end()

    _allow_files(settings.max_connections + SPARE_FILES)
    async with AsyncExitStack() as stack:
        admin_listener = _claim_admin(settings, stack)
        service, metrics = await stack.enter_async_context(_open(settings, child, on_progress, on_give_up=give_up))

        def reload_keys() -> None:
            _reload_keys(keys, metrics)

        def reload_all() -> None:
            with _logged("keys"):
                reload_keys()
            if tls is not None and settings.tls_certificate is not None:
                with _logged("certificate"):
                    reload_tls(tls, settings.tls_certificate, settings.tls_key)

        app = create_app(service, _http_settings(settings), metrics, keys=keys, drain=drain)
        server = Server(
            app,
            metrics,
            _connection_limits(settings),
            grace_s=settings.graceful_termination_timeout,
            tls=tls,
            on_ready=lambda: on_ready(service.models[0]),
        )
        servers.append(server)
        if admin_listener is not None:
            admin = create_admin_app(service, keys, drain, reload_keys=reload_keys)
            # Its connections are none of those that the metrics are about.
            admin_server = Server(admin, Metrics(), ConnectionLimits(max_connections=50), grace_s=1)
            servers.append(admin_server)
            serving_admin = asyncio.create_task(admin_server.serve(sockets=[admin_listener]), name="admin")
            stack.push_async_callback(lambda: serving_admin)
        if keys.file is not None:
            watching = asyncio.create_task(_watch_file(keys.file, reload_keys), name="key-file-watch")
            stack.callback(watching.cancel)
        with _heeding_signals(servers, drain, settings.drain_delay, reload_all):
            await server.serve(sockets=[listener])
        end()
    if has_given_up:
        raise EngineDead("the engine died too often and was given up; the log says how it ended")


def _http_settings(settings: Settings) -> HttpSettings:
    return HttpSettings(
        open_metrics=settings.open_metrics,
        cors_allow_origins=settings.cors_allow_origin,
        payload_limit=settings.payload_limit,
        body_timeout_s=settings.body_timeout,
        max_json_depth=settings.max_json_depth,
        max_json_digits=settings.max_json_digits,
        max_prompts=settings.max_prompts,
        max_header_bytes=settings.max_header_bytes,
        max_header_fields=settings.max_header_fields,
        ping_s=settings.ping_interval,
        stall_s=settings.stall_timeout,
        compute_type=settings.compute_type,
        predict_path=settings.aip_predict_route,
        health_path=settings.aip_health_route,
        kaito_pipeline=settings.kaito_pipeline,
    )


def _connection_limits(settings: Settings) -> ConnectionLimits:
    return ConnectionLimits(
        max_connections=settings.max_connections,
        max_per_address=settings.max_connections_per_address,
        max_header_bytes=settings.max_header_bytes,
        header_timeout_s=settings.header_timeout,
        body_timeout_s=settings.body_timeout,
        idle_timeout_s=settings.idle_timeout,
        stall_timeout_s=settings.stall_timeout,
    )


def _load_keys(settings: Settings) -> KeyStore:
    limits = KeyLimits(
        max_concurrent_requests=settings.key_max_concurrent_requests,
        requests_per_minute=settings.key_requests_per_minute,
        max_queued_tokens=settings.key_max_queued_tokens,
    )
    return KeyStore(settings.api_key, file=settings.api_key_file, limits=limits)


def _reload_keys(keys: KeyStore, metrics: Metrics) -> None:
    try:
        keys.reload()
    except SettingsError:
        metrics.keys_reloaded(succeeded=False)
        raise
    metrics.keys_reloaded(succeeded=True)
    logger.info("API keys read again: %d", len(keys))


async def _watch_file(path: Path, on_change: Callable[[], None]) -> None:
    """Call `on_change` whenever the file is another one or has another content, for ever."""
    seen = await asyncio.to_thread(_state_of, path)
    while True:
        await asyncio.sleep(KEY_FILE_POLL_S)
        state = await asyncio.to_thread(_state_of, path)
        if state != seen:
            seen = state
            with _logged("keys"):
                on_change()


def _state_of(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


@contextmanager
def _logged(what: str) -> Iterator[None]:
    """Log what is wrong with what is read again; the old goes on to be used."""
    try:
        yield
    except SettingsError as error:
        logger.error("the %s in use stay as they were: %s", what, error)


def _claim_admin(settings: Settings, stack: AsyncExitStack) -> socket.socket | None:
    """The bound socket of the admin port, if there is to be one."""
    if settings.admin_port is None:
        return None
    listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADMIN_HOST, settings.admin_port))
    except OSError as error:
        raise SettingsError(
            "--admin-port", f"{settings.admin_port} cannot be used: {error.strerror or os.strerror(error.errno or 0)}"
        ) from error
    return listener


def _allow_files(number: int) -> None:
    """Let the process open this many files, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    possible = number if hard == resource.RLIM_INFINITY else min(number, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (possible, hard))
    if possible < number:
        logger.warning("the system allows %d open files; --max-connections would need %d", possible, number)


@contextmanager
def _heeding_signals(
    servers: list[Server], drain: Drain, drain_delay_s: float, reload: Callable[[], None]
) -> Iterator[None]:
    """The first SIGTERM or SIGINT ends the servers in good order, the second at once; SIGHUP reads files again."""
    loop = asyncio.get_running_loop()
    is_ending = False

    def finish() -> None:
        drain.begin()
        for server in servers:
            server.should_exit = True

    def end(signal_number: signal.Signals) -> None:
        nonlocal is_ending
        if is_ending:
            finish()
            for server in servers:
                server.force_exit = True
            return
        is_ending = True
        drain.announce()
        # Whoever sits at a terminal does not want to wait for a load balancer.
        delay_s = drain_delay_s if signal_number is signal.SIGTERM else 0
        logger.info("%s: finishing what runs", signal_number.name, extra={"drain_delay_s": delay_s})
        loop.call_later(delay_s, finish)

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGINT: lambda: end(signal.SIGINT),
        signal.SIGTERM: lambda: end(signal.SIGTERM),
        signal.SIGHUP: reload,
    }
    for signal_number, handler in handlers.items():
        loop.add_signal_handler(signal_number, handler)
    try:
        yield
    finally:
        for signal_number in handlers:
            loop.remove_signal_handler(signal_number)
