"""The front process: finds the checkpoint, starts the engine, and puts service and dialects on top."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import uvicorn
import uvloop

from gyrfalcon.config import Settings
from gyrfalcon.engine.interface import Engine, WatermarkParams
from gyrfalcon.engine.process import ProcessEngine
from gyrfalcon.errors import EngineDead
from gyrfalcon.http.app import create_app
from gyrfalcon.http.settings import HttpSettings
from gyrfalcon.hub import Checkpoint, locate_checkpoint
from gyrfalcon.launch.child import CoreRecipe
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.chat import load_chat_template
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.service.interface import ModelInfo, TextService
from gyrfalcon.service.models import ModelTable, ServedModel
from gyrfalcon.service.tokenizer import load_tokenizer
from gyrfalcon.service.validation import resolve_limits
from gyrfalcon.tracing import Tracer, start_tracer

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int], None]


def serve(
    settings: Settings, *, listener: socket.socket, on_progress: OnProgress, on_ready: Callable[[ModelInfo], None]
) -> None:
    """Serve over HTTP until a signal ends it.

    listener: a bound socket; it begins to listen, and on_ready is called, once the model is loaded. The first SIGINT
    or SIGTERM lets running requests finish within the grace period, the second ends at once. Raises OperatorError
    when the model cannot be served, EngineDead when its engine keeps dying.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(settings, listener, on_progress, on_ready))


@asynccontextmanager
async def open_text_service(settings: Settings, *, on_progress: OnProgress) -> AsyncIterator[TextService]:
    """The text service over the engine that the settings describe; leaving closes both.

    on_progress: receives (bytes done, bytes total) while weights are read.
    """
    async with _open(settings, on_progress, on_give_up=lambda: None) as (service, _):
        yield service


@asynccontextmanager
async def _open(
    settings: Settings, on_progress: OnProgress, on_give_up: Callable[[], None]
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
        checkpoint.folder, tokenizer, settings.chat_template or settings.tokenizer_config_path
    )
    metrics = Metrics()
    async with AsyncExitStack() as stack:
        tracer = _start_tracer(settings, stack)
        engine = await _start_engine(settings, checkpoint, metrics, on_progress, on_give_up)
        stack.push_async_callback(engine.close)
        limits = resolve_limits(
            engine.facts,
            max_total_tokens=settings.max_total_tokens,
            max_input_tokens=settings.max_input_tokens,
            max_concurrent_requests=settings.max_concurrent_requests,
            max_best_of=settings.max_best_of,
            max_stop_sequences=settings.max_stop_sequences,
            max_top_n_tokens=settings.max_top_n_tokens,
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
            tracer=tracer,
        )
        metrics.watch_engines(service.stats)
        watching = asyncio.create_task(metrics.watch_event_loop(), name="event-loop-watch")
        stack.callback(watching.cancel)
        yield service, metrics


async def _start_engine(
    settings: Settings,
    checkpoint: Checkpoint,
    metrics: Metrics,
    on_progress: OnProgress,
    on_give_up: Callable[[], None],
) -> Engine:
    recipe = CoreRecipe(settings, checkpoint.folder)
    if settings.engine == "process":
        return await ProcessEngine.start(
            recipe, on_progress=on_progress, on_step=metrics.step_ended, on_give_up=on_give_up
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
    settings: Settings, listener: socket.socket, on_progress: OnProgress, on_ready: Callable[[ModelInfo], None]
) -> None:
    servers: list[_Server] = []
    has_given_up = False

    def give_up() -> None:
        nonlocal has_given_up
        has_given_up = True
        for server in servers:
            server.should_exit = True

    async with _open(settings, on_progress, on_give_up=give_up) as (service, metrics):
        server = _Server(settings, service, metrics, lambda: on_ready(service.models[0]))
        servers.append(server)
        with _ending_by_signal(server):
            await server.serve(sockets=[listener])
    if has_given_up:
        raise EngineDead("the engine died too often and was given up; the log says how it ended")


class _Server(uvicorn.Server):
    """Uvicorn with signals left to us, and a word when it listens."""

    def __init__(
        self, settings: Settings, service: TextService, metrics: Metrics, on_ready: Callable[[], None]
    ) -> None:
        http_settings = HttpSettings(
            api_keys=settings.api_key,
            cors_allow_origins=settings.cors_allow_origin,
            payload_limit=settings.payload_limit,
            compute_type=settings.compute_type,
            predict_path=settings.aip_predict_route,
            health_path=settings.aip_health_route,
            kaito_pipeline=settings.kaito_pipeline,
        )
        config = uvicorn.Config(
            create_app(service, http_settings, metrics),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=round(settings.graceful_termination_timeout),
        )
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn raises a captured signal again when it has stopped, which would end the process before the engine.
        yield


@contextmanager
def _ending_by_signal(server: uvicorn.Server) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def end(signal_number: signal.Signals) -> None:
        if server.should_exit:
            server.force_exit = True
        else:
            logger.info("%s: finishing what runs", signal_number.name)
            server.should_exit = True

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signal_number, end, signal_number)
    try:
        yield
    finally:
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(signal_number)
