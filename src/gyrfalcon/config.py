"""Settings: every option of the server, declared once, resolved once, checked, then frozen.

A value comes from the first source that gives one: a flag, an environment variable, a TOML file, the default.
Where Text Generation Inference has an option of the same meaning, its flag and variable names work here too.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from gyrfalcon import options
from gyrfalcon.errors import SettingsError
from gyrfalcon.faults import FAULT_VARIABLE, TESTING_VARIABLE
from gyrfalcon.options import Kind, Option

CONFIG_VARIABLE = "GYRFALCON_CONFIG"
DEBUG_VARIABLE = "GYRFALCON_DEBUG"
CPU_KERNELS_VARIABLE = "GYRFALCON_CPU_KERNELS"
CPU_LIBRARY_VARIABLE = "GYRFALCON_CPU_LIBRARY"
_OTHER_VARIABLES = (
    CONFIG_VARIABLE,
    DEBUG_VARIABLE,
    CPU_KERNELS_VARIABLE,
    CPU_LIBRARY_VARIABLE,
    FAULT_VARIABLE,
    TESTING_VARIABLE,
)
DEFAULT_FILE = Path("gyrfalcon.toml")

MODEL = "Model"
SERVER = "Server"
ACCESS = "Access"
CONNECTIONS = "Connections"
LIMITS = "Limits of a request"
MEMORY = "Batching and memory"
WATERMARK = "Watermark"
LOGS = "Logs and traces"


def _setting(
    default: object,
    kind: Kind,
    group: str,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    variables: tuple[str, ...] = (),
    secret: bool = False,
    positional: str | None = None,
) -> Any:
    """A field of Settings. flags: more than `--field-name`; variables: more than `GYRFALCON_FIELD_NAME`."""

    def declare(name: str) -> Option:
        own_flag, own_variable = f"--{name.replace('_', '-')}", f"GYRFALCON_{name.upper()}"
        return Option(
            name, kind, default, help, group, (own_flag, *flags), (own_variable, *variables), secret, positional
        )

    return field(default=default, repr=not secret, metadata={"declare": declare})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the operator asked for. A value that exists is valid; None means: decided by what start-up finds."""

    model: str = _setting(
        "eyas",
        options.text(),
        MODEL,
        "A local checkpoint folder, a preset's name, or a Hugging Face Hub id.",
        flags=("--model-id",),
        variables=("MODEL_ID", "HF_MODEL_ID"),
        positional="MODEL",
    )
    revision: str | None = _setting(
        None,
        options.optional(options.text()),
        MODEL,
        "Branch, tag or commit of a Hub checkpoint.",
        variables=("REVISION", "HF_MODEL_REVISION"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto",
        options.one_of("auto", "float32", "bfloat16", "float16"),
        MODEL,
        "Precision of weights and cache; auto takes the checkpoint's.",
        variables=("DTYPE",),
    )
    quantize: Literal["int8", "int4", "gptq", "awq", "compressed-tensors"] | None = _setting(
        None,
        options.optional(options.one_of("int8", "int4", "gptq", "awq", "compressed-tensors"), "none"),
        MODEL,
        "Make codes of 8 or 4 bits of the weights; or name how the checkpoint stores its own, which is found anyway.",
        variables=("QUANTIZE",),
    )
    device: Literal["auto", "cpu", "cuda"] = _setting(
        "auto", options.one_of("auto", "cpu", "cuda"), MODEL, "Where the model runs; auto takes a GPU if there is one."
    )
    served_model_name: str | None = _setting(
        None, options.optional(options.text()), MODEL, "The model's name in answers and in the `model` field."
    )
    strict_model_names: bool = _setting(
        False, options.switch(), MODEL, "Refuse a request whose `model` field names another model than the served one."
    )
    tokenizer_config_path: Path | None = _setting(
        None,
        options.optional(options.path()),
        MODEL,
        "A tokenizer_config.json whose chat template replaces the model's.",
        variables=("TOKENIZER_CONFIG_PATH",),
    )
    chat_template: str | Path | None = _setting(
        None,
        options.optional(options.chat_template()),
        MODEL,
        "A chat template, or a file that holds one, in place of the model's.",
    )
    huggingface_hub_cache: Path | None = _setting(
        None,
        options.optional(options.path()),
        MODEL,
        "Folder that keeps downloads; the Hub library's own if absent.",
        variables=("HUGGINGFACE_HUB_CACHE",),
    )
    offline: bool = _setting(
        False, options.switch(), MODEL, "Download nothing: take a Hub checkpoint from the cache or not at all."
    )

    host: str = _setting(
        "127.0.0.1",
        options.host(),
        SERVER,
        "Address to listen on; 0.0.0.0 opens the server to the network.",
        flags=("--hostname",),
        variables=("HOSTNAME",),
    )
    port: int = _setting(
        8080, options.whole(1, 65535), SERVER, "Port to listen on.", flags=("-p",), variables=("PORT",)
    )
    tls_certificate: Path | None = _setting(
        None, options.optional(options.path()), SERVER, "PEM file of the certificate chain; HTTPS instead of HTTP."
    )
    tls_key: Path | None = _setting(
        None, options.optional(options.path()), SERVER, "PEM file of the certificate's key, if not in the same file."
    )
    cors_allow_origin: tuple[str, ...] = _setting(
        (),
        options.listing(),
        SERVER,
        "Origin whose pages may call the server; any if absent.",
        variables=("CORS_ALLOW_ORIGIN",),
    )
    payload_limit: int = _setting(
        2_000_000, options.whole(1), SERVER, "Most bytes of a request's body.", variables=("PAYLOAD_LIMIT",)
    )
    drain_delay: int = _setting(
        0, options.whole(0, 3600), SERVER, "Seconds to go on serving after SIGTERM, not ready, before new work ends."
    )
    graceful_termination_timeout: int = _setting(
        45,
        options.whole(0, 86400),
        SERVER,
        "Seconds that running requests have to finish at shutdown.",
        flags=("-g",),
        variables=("GRACEFUL_TERMINATION_TIMEOUT",),
    )
    compute_type: str | None = _setting(
        None,
        options.optional(options.text()),
        SERVER,
        "Value of the x-compute-type header; made from the device if absent.",
        variables=("COMPUTE_TYPE",),
    )
    aip_predict_route: str | None = _setting(
        None,
        options.optional(options.route()),
        SERVER,
        "Path at which Vertex AI asks for predictions, besides /vertex.",
        variables=("AIP_PREDICT_ROUTE",),
    )
    aip_health_route: str | None = _setting(
        None,
        options.optional(options.route()),
        SERVER,
        "Path at which Vertex AI asks for health, besides /health.",
        variables=("AIP_HEALTH_ROUTE",),
    )
    kaito_pipeline: Literal["text-generation", "conversational"] = _setting(
        "text-generation",
        options.one_of("text-generation", "conversational"),
        SERVER,
        "What /chat continues: a prompt, or messages.",
    )
    engine: Literal["process", "local"] = _setting(
        "process",
        options.one_of("process", "local"),
        SERVER,
        "Run the engine in a supervised process of its own, or in the server's.",
    )

    api_key: tuple[str, ...] = _setting(
        (),
        options.listing(),
        ACCESS,
        "Key that requests must carry as a Bearer token; several may be given.",
        variables=("API_KEY",),
        secret=True,
    )
    api_key_file: Path | None = _setting(
        None,
        options.optional(options.path()),
        ACCESS,
        "File of keys, a line each: name, key or sha256:HEX, its own limits; read again when it changes.",
    )
    key_max_concurrent_requests: int | None = _setting(
        None, options.optional(options.whole(1), "none"), ACCESS, "Most requests of a key at the same time."
    )
    key_requests_per_minute: int | None = _setting(
        None, options.optional(options.whole(1), "none"), ACCESS, "Most requests of a key in a minute."
    )
    key_max_queued_tokens: int | None = _setting(
        None, options.optional(options.whole(1), "none"), ACCESS, "Most prompt tokens of a key's waiting requests."
    )
    open_metrics: bool = _setting(False, options.switch(), ACCESS, "Answer /metrics without a key too.")
    admin_port: int | None = _setting(
        None,
        options.optional(options.whole(1, 65535), "none"),
        ACCESS,
        "Port of 127.0.0.1 for flushing the cache, reading keys again and draining; off if absent.",
    )

    max_connections: int = _setting(
        2000, options.whole(1, 1_000_000), CONNECTIONS, "Most connections at once; beyond it they get a 503."
    )
    max_connections_per_address: int | None = _setting(
        None,
        options.optional(options.whole(1), "none"),
        CONNECTIONS,
        "Most connections of one address; not for use behind a proxy.",
    )
    header_timeout: float = _setting(
        10.0, options.number(0, 3600, above=True), CONNECTIONS, "Seconds for a request's headers to arrive."
    )
    body_timeout: float = _setting(
        30.0, options.number(0, 3600, above=True), CONNECTIONS, "Seconds for a request's body to arrive."
    )
    idle_timeout: float = _setting(
        5.0, options.number(0, 3600, above=True), CONNECTIONS, "Seconds a connection is kept between requests."
    )
    stall_timeout: float = _setting(
        60.0,
        options.number(0, 3600, above=True),
        CONNECTIONS,
        "Seconds after which a client that reads nothing is cut.",
    )
    ping_interval: float = _setting(
        10.0,
        options.number(0, 3600, above=True),
        CONNECTIONS,
        "Seconds of silence after which a stream gets a comment.",
    )
    max_header_bytes: int = _setting(
        32 * 1024, options.whole(1024, 60_000), CONNECTIONS, "Most bytes of a request's headers together."
    )
    max_header_fields: int = _setting(100, options.whole(10, 10_000), CONNECTIONS, "Most header fields of a request.")

    max_concurrent_requests: int = _setting(
        128,
        options.whole(1),
        LIMITS,
        "Sequences in work at once; beyond it requests are refused as overload.",
        variables=("MAX_CONCURRENT_REQUESTS",),
    )
    queue_timeout: float = _setting(
        30.0, options.number(0, 86400, above=True), LIMITS, "Seconds a request may wait before it begins."
    )
    max_queued_tokens: int | None = _setting(
        None,
        options.optional(options.whole(1), "auto"),
        LIMITS,
        "Most prompt tokens of all waiting requests; four times what the KV cache holds if absent.",
    )
    max_json_depth: int = _setting(
        64, options.whole(8, 500), LIMITS, "Most arrays and objects within each other in a body."
    )
    max_json_digits: int = _setting(100, options.whole(20, 4000), LIMITS, "Most digits of a number in a body.")
    max_prompts: int = _setting(32, options.whole(1, 1024), LIMITS, "Most prompts of a request.")
    max_messages: int = _setting(1024, options.whole(1), LIMITS, "Most messages of a conversation.")
    max_characters_per_token: int = _setting(
        16, options.whole(1, 1024), LIMITS, "Characters of a prompt that are tokenised for each token that could fit."
    )
    max_return_sequences: int = _setting(8, options.whole(1), LIMITS, "Most sequences that a request gets back.")
    max_best_of: int = _setting(
        4, options.whole(1), LIMITS, "Largest best_of of a request.", variables=("MAX_BEST_OF",)
    )
    max_stop_sequences: int = _setting(
        8, options.whole(0), LIMITS, "Most stop strings of a request.", variables=("MAX_STOP_SEQUENCES",)
    )
    max_stop_length: int = _setting(256, options.whole(1), LIMITS, "Most characters of a stop string.")
    max_biased_phrases: int = _setting(
        300, options.whole(0, 10_000), LIMITS, "Most entries of a request's sequence_bias."
    )
    max_bad_words: int = _setting(1000, options.whole(0, 10_000), LIMITS, "Most entries of a request's bad_words_ids.")
    max_top_n_tokens: int = _setting(
        20, options.whole(0), LIMITS, "Largest top_n_tokens of a request.", variables=("MAX_TOP_N_TOKENS",)
    )
    max_input_tokens: int | None = _setting(
        None,
        options.optional(options.whole(1), "auto"),
        LIMITS,
        "Most tokens of a prompt; one less than the total if absent.",
        flags=("--max-input-length",),
        variables=("MAX_INPUT_TOKENS", "MAX_INPUT_LENGTH"),
    )
    max_total_tokens: int | None = _setting(
        None,
        options.optional(options.whole(2), "auto"),
        LIMITS,
        "Most tokens of a prompt and its new tokens together; what model and cache allow if absent.",
        variables=("MAX_TOTAL_TOKENS",),
    )
    default_max_new_tokens: int | None = _setting(
        20,
        options.optional(options.whole(1), "fill", "0"),
        LIMITS,
        "New tokens when a request does not say; `fill` uses what room is left.",
    )

    template_timeout: float = _setting(
        1.0, options.number(0, 60, above=True), LIMITS, "Seconds a chat template may take for a conversation."
    )
    template_output_limit: int = _setting(
        2**20, options.whole(1, 2**26), LIMITS, "Most characters a chat template may write for a conversation."
    )

    max_batch_size: int = _setting(
        64, options.whole(1), MEMORY, "Most sequences computed together in a step.", variables=("MAX_BATCH_SIZE",)
    )
    max_batch_prefill_tokens: int | None = _setting(
        None,
        options.optional(options.whole(1), "auto"),
        MEMORY,
        "Most tokens computed in a step; fits the device if absent.",
        variables=("MAX_BATCH_PREFILL_TOKENS",),
    )
    max_batch_total_tokens: int | None = _setting(
        None,
        options.optional(options.whole(2), "auto"),
        MEMORY,
        "Size of the KV cache in tokens.",
        variables=("MAX_BATCH_TOTAL_TOKENS",),
    )
    kv_cache_memory: int | None = _setting(
        None, options.optional(options.size(), "auto"), MEMORY, "Size of the KV cache in bytes, such as 2GiB."
    )
    kv_cache_fraction: float | None = _setting(
        None,
        options.optional(options.number(0, 1, above=True), "auto"),
        MEMORY,
        "Share of the free memory that the KV cache may take; fits the device if absent.",
    )
    block_size: int = _setting(32, options.power_of_two(8, 256), MEMORY, "Tokens in a block of the KV cache.")
    prefix_caching: bool = _setting(
        True,
        options.switch(),
        MEMORY,
        "Reuse the cache of earlier prompts that begin alike.",
        variables=("PREFIX_CACHING",),
    )
    speculate: int = _setting(
        0,
        options.whole(0, 64),
        MEMORY,
        "Most tokens of a sequence run ahead in a step, where its own text suggests them; the text stays the same.",
        variables=("SPECULATE",),
    )
    packed_cache: str = _setting(
        "auto",
        options.text(),
        MEMORY,
        "Folder for weights in the form that the CPU kernels read, or `off`; beside the checkpoint if absent.",
    )
    num_threads: int | None = _setting(
        None, options.optional(options.whole(1, 4096), "auto"), MEMORY, "CPU threads of the model; all cores if absent."
    )

    watermark_gamma: float = _setting(
        0.5,
        options.number(0, 1, above=True, below=True),
        WATERMARK,
        "Share of the vocabulary that is green.",
        variables=("WATERMARK_GAMMA",),
    )
    watermark_delta: float = _setting(
        2.0, options.number(0, 100), WATERMARK, "What a green token's logit gains.", variables=("WATERMARK_DELTA",)
    )
    watermark_context_width: int = _setting(
        1, options.whole(1, 8), WATERMARK, "Tokens before a token that its green list depends on (seeding scheme)."
    )
    watermark_key: int = _setting(
        15485863, options.whole(0, 2**64 - 1), WATERMARK, "Secret that green lists are drawn from.", secret=True
    )

    json_output: bool = _setting(False, options.switch(), LOGS, "Log JSON lines.", variables=("JSON_OUTPUT",))
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info",
        options.one_of("debug", "info", "warning", "error", synonyms={"warn": "warning", "trace": "debug"}),
        LOGS,
        "Least severity that is logged.",
        variables=("LOG_LEVEL",),
    )
    log_prompts: bool = _setting(False, options.switch(), LOGS, "Log each request's prompt with its line.")
    otlp_endpoint: str | None = _setting(
        None,
        options.optional(options.text()),
        LOGS,
        "URL of an OpenTelemetry collector that takes OTLP over HTTP; traces are exported there.",
        variables=("OTLP_ENDPOINT",),
    )
    otlp_service_name: str = _setting(
        "gyrfalcon", options.text(), LOGS, "The server's name in traces.", variables=("OTLP_SERVICE_NAME",)
    )

    def __post_init__(self) -> None:
        for option in OPTIONS:
            value = getattr(self, option.name)
            if option.read(value, "given") != value:  # readable, but of another type or spelling: "8080" for 8080
                raise SettingsError(option.flag, f"{option.quote(value, 'given')} is not {option.kind.allowed}")
        _check_relations(self)

    def shown(self) -> dict[str, object]:
        """The settings by name for logs and pages, with secrets left out of sight."""
        values: dict[str, object] = {}
        for option in OPTIONS:
            value = getattr(self, option.name)
            if option.secret:
                value = "(hidden)" if value else "(none)"
            elif isinstance(value, Path):
                value = str(value)
            values[option.name] = value
        return values


def _declared() -> Iterator[Option]:
    for item in fields(Settings):
        yield cast(Callable[[str], Option], item.metadata["declare"])(item.name)


OPTIONS: tuple[Option, ...] = tuple(_declared())

# Options of other servers that would change what the server may do; refused by name instead of dropped.
REFUSED = {
    "trust_remote_code": "code from a model's repository is never run; supported architectures are built in",
}

# Platforms set these for ends of their own: Docker puts the container's name into HOSTNAME, and Kubernetes writes
# GYRFALCON_PORT=tcp://10.0.0.1:8080 for a Service that is called gyrfalcon.
_NOT_MEANT_FOR_US: dict[str, Callable[[str], bool]] = {
    "HOSTNAME": lambda value: not options.is_ip_address(value),
    "GYRFALCON_PORT": lambda value: value.startswith(("tcp://", "udp://")),
}
_SERVICE_LINK = re.compile(r"GYRFALCON_(SERVICE_|PORT_\d)")


def resolve(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    config_file: Path | None = None,
    defaults: Mapping[str, object] | None = None,
) -> Settings:
    """Settings from flags, environment, file and defaults, in this order of precedence.

    flags: given values by field name; None counts as not given. environ: the process's own if absent.
    config_file: a TOML file; if absent, the one GYRFALCON_CONFIG names, else ./gyrfalcon.toml where there is one.
    defaults: by field name, for a command whose defaults differ from those declared.

    Raises SettingsError that names the setting, the source, the value and what is allowed.
    """
    flags = flags or {}
    environ = os.environ if environ is None else environ
    path = _choose_file(config_file, environ)
    document = _read_file(path) if path is not None else {}
    _check_names(environ)
    _refuse(flags, environ, document, path)

    values: dict[str, Any] = dict(defaults or {})
    for option in OPTIONS:
        found = _in_flags(option, flags) or _in_environment(option, environ) or _in_document(option, document, path)
        if found is not None:
            raw, origin = found
            values[option.name] = option.read(raw, origin)
    return Settings(**values)


def _choose_file(given: Path | None, environ: Mapping[str, str]) -> Path | None:
    if given is None and environ.get(CONFIG_VARIABLE):
        given = Path(environ[CONFIG_VARIABLE])
    if given is not None:
        return given
    return DEFAULT_FILE if DEFAULT_FILE.is_file() else None


def _read_file(path: Path) -> dict[str, object]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError("--config", f"`{path}` cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError("--config", f"`{path}` is not valid TOML: {error}") from error
    known = [option.name for option in OPTIONS] + list(REFUSED)
    for key in document:
        if key not in known:
            raise SettingsError("--config", f"`{path}` has an unknown key `{key}`{_nearest(key, known)}")
    return document


def _check_names(environ: Mapping[str, str]) -> None:
    """Refuse a misspelt GYRFALCON_ variable, which would otherwise be dropped in silence."""
    known = [option.variables[0] for option in OPTIONS] + list(_OTHER_VARIABLES)
    for name in environ:
        if name.startswith("GYRFALCON_") and name not in known and not _SERVICE_LINK.match(name):
            # Cut the prefix that all share, or any two names would look alike.
            near = _nearest(name.removeprefix("GYRFALCON_"), [each.removeprefix("GYRFALCON_") for each in known])
            if near:
                raise SettingsError(name, f"no such environment variable{near.replace('`', '`GYRFALCON_', 1)}")


def _nearest(name: str, known: list[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"; did you mean `{matches[0]}`?" if matches else ""


def _refuse(
    flags: Mapping[str, object], environ: Mapping[str, str], document: Mapping[str, object], path: Path | None
) -> None:
    asks = options.switch()
    for name, reason in REFUSED.items():
        flag = f"--{name.replace('_', '-')}"
        given = (
            (flags.get(name), "flag"),
            (environ.get(name.upper()), f"environment variable {name.upper()}"),
            (document.get(name), f"`{path}`"),
        )
        for raw, origin in given:
            if raw is None or raw == "":
                continue
            try:
                asked = asks.read(raw)
            except ValueError:
                asked = True
            if asked:
                raise SettingsError(flag, f"refused ({origin}): {reason}")


def _in_flags(option: Option, flags: Mapping[str, object]) -> tuple[object, str] | None:
    raw = flags.get(option.name)
    return None if raw is None else (raw, "flag")


def _in_environment(option: Option, environ: Mapping[str, str]) -> tuple[object, str] | None:
    for name in option.variables:
        raw = environ.get(name)
        # An empty variable counts as unset, but an empty secret is a lost one: serving without it would be worse.
        if raw is None or (not raw and not option.secret):
            continue
        if is_platforms_own(name, raw):
            continue
        return raw, f"environment variable {name}"
    return None


def is_platforms_own(variable: str, text: str) -> bool:
    """Whether a variable that we read holds what a platform has put there for an end of its own."""
    return variable in _NOT_MEANT_FOR_US and _NOT_MEANT_FOR_US[variable](text)


def _in_document(option: Option, document: Mapping[str, object], path: Path | None) -> tuple[object, str] | None:
    return (document[option.name], f"`{path}`") if option.name in document else None


def _check_relations(settings: Settings) -> None:
    total, prompt, cache = settings.max_total_tokens, settings.max_input_tokens, settings.max_batch_total_tokens
    if prompt is not None and total is not None and prompt >= total:
        raise SettingsError("--max-input-tokens", f"{prompt} must be below --max-total-tokens ({total})")
    if total is not None and cache is not None and total > cache:
        raise SettingsError("--max-total-tokens", f"{total} exceeds --max-batch-total-tokens ({cache})")
    if settings.chat_template is not None and settings.tokenizer_config_path is not None:
        raise SettingsError("--chat-template", "replaces the chat template, as does --tokenizer-config-path; give one")
    if settings.admin_port == settings.port:
        raise SettingsError("--admin-port", f"{settings.port} is the server's own port; choose another")
    sizes = {
        "--max-batch-total-tokens": settings.max_batch_total_tokens,
        "--kv-cache-memory": settings.kv_cache_memory,
        "--kv-cache-fraction": settings.kv_cache_fraction,
    }
    given = [flag for flag, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise SettingsError(given[0], f"sizes the KV cache, as does {given[1]}; give one of them")
