"""What each flag and variable of text-generation-launcher means to us: honoured, without effect, or refused.

The one table behind `gyrfalcon launcher`, the lines that `serve` writes about variables it does not heed, and
docs/tgi-launcher.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from gyrfalcon import config, options
from gyrfalcon.errors import SettingsError
from gyrfalcon.options import Kind, Option


class Fate(Enum):
    """What becomes of an option; the values are headings of --help."""

    HONOURED = "Honoured"
    NO_EFFECT = "Without effect: a line at start says why"
    REFUSED = "Refused: the server does not start"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherOption:
    """One flag of text-generation-launcher with its variables, or a variable that has no flag.

    option: its spelling and kind; `default` is the launcher's where that differs from what `serve` does. field: the
    setting it gives, None where something else reads it. quiet: values that ask for nothing that is not so anyway;
    they pass without a line, or unrefused. remedy: what to do instead; for a refused one.
    """

    option: Option
    fate: Fate
    field: str | None = None
    quiet: tuple[object, ...] = ()
    remedy: str = ""

    @property
    def name(self) -> str:
        return self.option.name

    @property
    def reason(self) -> str:
        """Why it has no effect or is refused; what is particular about one that is honoured."""
        return self.option.help


@dataclass(frozen=True, slots=True)
class Given:
    """An option that was given: its text, where that came from, and what it spells."""

    row: LauncherOption
    raw: object = dataclasses.field(repr=False)  # may be a secret
    origin: str
    value: object = dataclasses.field(repr=False)

    @property
    def is_flag(self) -> bool:
        return self.origin == FLAG

    @property
    def is_quiet(self) -> bool:
        return self.value in self.row.quiet

    def no_effect(self, reason: str = "") -> str:
        """The line that says so; the row's own reason if none is given."""
        quoted = self.row.option.quote(self.raw, self.origin)
        return f"{self.row.option.label}: {quoted} has no effect and can be left out: {reason or self.row.reason}"

    def refusal(self) -> SettingsError:
        quoted = self.row.option.quote(self.raw, self.origin)
        return SettingsError(self.row.option.label, f"{quoted} is refused: {self.row.reason}; {self.row.remedy}")


FLAG = "flag"


def find_given(flags: Mapping[str, object], environ: Mapping[str, str]) -> dict[str, Given]:
    """The options that were given, by name; the command line wins over the environment.

    flags: texts from the command line by option name; None counts as not given. An empty variable counts as unset,
    unless it is a secret that would be honoured. Raises SettingsError for a value that the option may not hold.
    """
    found = {}
    for row in LAUNCHER_OPTIONS:
        for raw, origin in _sources(row, flags, environ):
            found[row.name] = Given(row, raw, origin, row.option.read(raw, origin))
            break
    return found


def unheeded_by_serve(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable by which the launcher would be asked for what this server does not do.

    `serve` has other options of its own and is not stopped by these: a variable may be meant for another program.
    Variables that would change nothing get no line.
    """
    lines = []
    for row in LAUNCHER_OPTIONS:
        if row.fate is not Fate.REFUSED:
            continue
        for raw, origin in _sources(row, {}, environ):
            try:
                value = row.option.kind.read(raw)
            except (ValueError, OverflowError):
                value = raw
            if value not in row.quiet:
                lines.append(f"{row.option.label}: {row.option.quote(raw, origin)} is not heeded: {row.reason}")
    return lines


def _sources(
    row: LauncherOption, flags: Mapping[str, object], environ: Mapping[str, str]
) -> Iterator[tuple[object, str]]:
    if row.fate is Fate.HONOURED and row.field is None:  # not read by us: --env, or the Hub library's variables
        return
    given = flags.get(row.name)
    if given is not None:
        yield given, FLAG
    for variable in row.option.variables:
        raw = environ.get(variable)
        # Serving without a key because it was lost on the way would be worse than not serving.
        is_lost_secret = raw == "" and row.option.secret and row.fate is Fate.HONOURED
        if raw is not None and (raw or is_lost_secret) and not config.is_platforms_own(variable, raw):
            yield raw, f"environment variable {variable}"


def _row(
    spelling: str,
    fate: Fate,
    kind: Kind,
    help: str,
    *,
    field: str | None = None,
    default: object = None,
    quiet: tuple[object, ...] = (),
    remedy: str = "",
    platform: tuple[str, ...] = (),
    secret: bool = False,
    has_variable: bool = True,
) -> LauncherOption:
    """A row from its flags ("--port -p") or, for a variable without a flag, that variable's name.

    platform: variables by which a platform gives it; they win over the plain one, as in the images for it.
    """
    flags = tuple(spelling.split()) if spelling.startswith("-") else ()
    variable = flags[0].removeprefix("--").replace("-", "_").upper() if flags else spelling
    variables = (*platform, variable) if has_variable else ()
    option = Option(variable.lower(), kind, default, help, fate.value, flags, variables, secret)
    return LauncherOption(option=option, fate=fate, field=field, quiet=quiet, remedy=remedy)


_SETTINGS = {option.name: option for option in config.OPTIONS}


def _honoured(
    spelling: str,
    field: str,
    *,
    note: str = "",
    default: object = None,
    kind: Kind | None = None,
    quiet: tuple[object, ...] = (),
    platform: tuple[str, ...] = (),
) -> LauncherOption:
    """A row that gives a setting, and takes kind, help and default from it where it has none of its own."""
    setting = _SETTINGS[field]
    return _row(
        spelling,
        Fate.HONOURED,
        kind or setting.kind,
        note or setting.help,
        field=field,
        default=setting.default if default is None else default,
        quiet=quiet,
        platform=platform,
        secret=setting.secret,
    )


def _read_elsewhere(variable: str, help: str, *, secret: bool = False) -> LauncherOption:
    return _row(variable, Fate.HONOURED, options.text(), help, secret=secret)


def _no_effect(
    spelling: str, kind: Kind, reason: str, *quiet: object, platform: tuple[str, ...] = (), secret: bool = False
) -> LauncherOption:
    return _row(spelling, Fate.NO_EFFECT, kind, reason, quiet=quiet, platform=platform, secret=secret)


def _refused(
    spelling: str, kind: Kind, reason: str, *quiet: object, remedy: str = "leave it out", platform: tuple[str, ...] = ()
) -> LauncherOption:
    return _row(spelling, Fate.REFUSED, kind, reason, quiet=quiet, remedy=remedy, platform=platform)


_ONE_DEVICE = "one model runs on one device in this version"
_ROPE = "positions are scaled as the checkpoint's config.json says"
_JOINING = "waiting requests join at every step, as soon as the cache and --max-batch-prefill-tokens have room"
_NO_TUNNEL = "no tunnel is opened"
_NO_SHARDS = "there are no shards to talk to"
_HUB = "Read by the Hugging Face Hub library."
_QUANTISATIONS = """
    none awq compressed-tensors eetq exl2 gptq marlin bitsandbytes bitsandbytes-nf4 bitsandbytes-fp4 fp8
""".split()

LAUNCHER_OPTIONS: tuple[LauncherOption, ...] = (
    _honoured(
        "--model-id",
        "model",
        note="Hub id, checkpoint folder or preset. Absent: the bundled eyas, and a line that says so.",
        platform=("HF_MODEL_ID",),
    ),
    _honoured("--revision", "revision", platform=("HF_MODEL_REVISION",)),
    _no_effect(
        "--validation-workers", options.whole(1), "the number of tokenizer threads follows the machine's cores", 2
    ),
    _refused("--sharded", options.one_of("true", "false"), _ONE_DEVICE, "false", remedy="leave it out, or say false"),
    _refused(
        "--num-shard",
        options.whole(0),
        _ONE_DEVICE,
        1,
        remedy="set it to 1, and run one server for each device",
        platform=("SM_NUM_GPUS",),
    ),
    _refused(
        "--quantize",
        options.one_of(*_QUANTISATIONS),
        "weights are served in the precision of --dtype",
        "none",
        remedy="leave it out, and serve the checkpoint that is not quantised",
        platform=("HF_MODEL_QUANTIZE",),
    ),
    _no_effect("--speculate", options.whole(0), "one token is generated a step; the text is the same without it", 0),
    _honoured("--dtype", "dtype"),
    _refused(
        "--kv-cache-dtype",
        options.one_of("auto", "fp8_e4m3fn", "fp8_e5m2"),
        "the cache has the precision of --dtype",
        "auto",
    ),
    _refused(
        "--trust-remote-code",
        options.switch(),
        config.REFUSED["trust_remote_code"],
        False,
        platform=("HF_MODEL_TRUST_REMOTE_CODE",),
    ),
    _honoured("--max-concurrent-requests", "max_concurrent_requests", default=128),
    _honoured("--max-best-of", "max_best_of", default=2),
    _honoured("--max-stop-sequences", "max_stop_sequences", default=4),
    _honoured("--max-top-n-tokens", "max_top_n_tokens", default=5),
    _honoured("--max-input-tokens", "max_input_tokens"),
    _honoured("--max-input-length", "max_input_tokens", note="Old name of --max-input-tokens; not both."),
    _honoured("--max-total-tokens", "max_total_tokens"),
    _no_effect("--waiting-served-ratio", options.number(0), _JOINING, 0.3, 1.2),
    _honoured("--max-batch-prefill-tokens", "max_batch_prefill_tokens"),
    _honoured(
        "--max-batch-total-tokens", "max_batch_total_tokens", note="Size of the KV cache in tokens, on every device."
    ),
    _no_effect("--max-waiting-tokens", options.whole(0), _JOINING, 20),
    _honoured("--max-batch-size", "max_batch_size"),
    _no_effect(
        "--cuda-graphs",
        options.listing(options.whole(0)),
        "this version captures no graphs",
        (0,),
        (1, 2, 4, 8, 16, 32),
    ),
    _honoured(
        "--hostname",
        "host",
        kind=options.text(),
        default="0.0.0.0",  # noqa: S104 - what a container's user expects
        note="Address to listen on. What is no IP address means 0.0.0.0, with a line if it was a flag.",
    ),
    _honoured(
        "--port -p",
        "port",
        default=3000,
        note="Port to listen on. Vertex AI's variable wins over PORT; where HF_MODEL_ID is set it is SageMaker's 8080.",
        platform=("AIP_HTTP_PORT",),
    ),
    _no_effect("--prometheus-port", options.whole(0, 65535), "metrics are at /metrics on the server's port", 9000),
    _no_effect(
        "--shard-uds-path",
        options.text(),
        _NO_SHARDS,
        "/tmp/text-generation-server",  # noqa: S108 - compared with, never opened
    ),
    _no_effect("--master-addr", options.text(), _NO_SHARDS, "localhost"),
    _no_effect("--master-port", options.whole(0), _NO_SHARDS, 29500),
    _honoured("--huggingface-hub-cache", "huggingface_hub_cache"),
    _refused(
        "--weights-cache-override",
        options.path(),
        "weights are read from the checkpoint's own folder",
        remedy="give the folder that holds them, with its config.json, as --model-id",
    ),
    _no_effect("--disable-custom-kernels", options.switch(), "there are no kernels made for one model", False),
    _honoured(
        "--cuda-memory-fraction",
        "kv_cache_fraction",
        note="Share of the memory free after loading that the KV cache may take, on every device; 1 leaves the choice "
        "to the server. Without effect beside --max-batch-total-tokens.",
        default=1.0,
        quiet=(1.0, None),
    ),
    _refused(
        "--rope-scaling",
        options.one_of("linear", "dynamic"),
        _ROPE,
        "linear",  # with no factor, a factor of 1: nothing is scaled
        remedy="write rope_scaling into the checkpoint's config.json, where linear and llama3 are known",
    ),
    _refused(
        "--rope-factor",
        options.number(0, above=True),
        _ROPE,
        1.0,
        remedy='write "rope_scaling": {"rope_type": "linear", "factor": ...} into the checkpoint\'s config.json',
    ),
    _honoured("--json-output", "json_output"),
    _honoured(
        "--otlp-endpoint",
        "otlp_endpoint",
        note="URL of an OpenTelemetry collector that takes OTLP over HTTP (port 4318, not gRPC's 4317).",
    ),
    _honoured("--otlp-service-name", "otlp_service_name", default="text-generation-inference.router"),
    _honoured("--cors-allow-origin", "cors_allow_origin"),
    _honoured("--api-key", "api_key"),
    _honoured("--watermark-gamma", "watermark_gamma"),
    _honoured("--watermark-delta", "watermark_delta"),
    _refused("--ngrok", options.switch(), _NO_TUNNEL, False, remedy="leave it out, and run a tunnel beside the server"),
    _no_effect("--ngrok-authtoken", options.text(), _NO_TUNNEL, secret=True),
    _no_effect("--ngrok-edge", options.text(), _NO_TUNNEL),
    _honoured("--tokenizer-config-path", "tokenizer_config_path"),
    _no_effect(
        "--disable-grammar-support", options.switch(), "this version refuses a request's grammar in any case", False
    ),
    _row(
        "--env -e",
        Fate.HONOURED,
        options.switch(),
        "Print versions, machine and settings, then serve.",
        has_variable=False,
    ),
    _no_effect("--max-client-batch-size", options.whole(1), "a request holds one prompt in this version", 4),
    _refused(
        "--lora-adapters",
        options.text(),
        "adapters are not served in this version",
        remedy="leave it out, and serve a checkpoint that the adapter is merged into",
    ),
    _no_effect(
        "--usage-stats", options.one_of("on", "off", "no-stack"), "nothing is ever sent about its use", "off", "on"
    ),
    _honoured("--payload-limit", "payload_limit", default=2_000_000),
    _no_effect(
        "--enable-prefill-logprobs", options.switch(), "a prompt's log-probabilities can always be asked for", False
    ),
    _honoured("--graceful-termination-timeout -g", "graceful_termination_timeout", default=90),
    # Variables without a flag.
    _honoured("LOG_LEVEL", "log_level", kind=options.text(), note="What is no level means info, with a line."),
    _honoured("COMPUTE_TYPE", "compute_type"),
    _honoured("PREFIX_CACHING", "prefix_caching"),
    _no_effect("LOG_COLORIZE", options.text(), "lines are coloured on a terminal and nowhere else"),
    _no_effect("ATTENTION", options.text(), "there is one attention for each device"),
    _no_effect("PREFILL_CHUNKING", options.switch(), "prompts are always computed in chunks", True),
    _no_effect("TGI_WIGGLE_ROOM", options.text(), "--cuda-memory-fraction says what the KV cache may take"),
    _no_effect("MAX_IMAGE_FETCH_SIZE", options.text(), "this version fetches no images", "1073741824"),
    _honoured("AIP_PREDICT_ROUTE", "aip_predict_route"),
    _honoured("AIP_HEALTH_ROUTE", "aip_health_route"),
    _no_effect("HF_HUB_ENABLE_HF_TRANSFER", options.text(), "downloads go the Hub library's way", "0"),
    _read_elsewhere("HF_TOKEN", _HUB, secret=True),
    _read_elsewhere("HUGGING_FACE_HUB_TOKEN", _HUB, secret=True),
    _read_elsewhere("HF_API_TOKEN", "Used for downloads where HF_TOKEN is not set.", secret=True),
    _read_elsewhere("HF_HOME", _HUB),
    _read_elsewhere("HF_HUB_OFFLINE", _HUB),
    _read_elsewhere("HF_HUB_USER_AGENT_ORIGIN", _HUB),
    _read_elsewhere("CUDA_VISIBLE_DEVICES", "Read by CUDA."),
    _read_elsewhere("NVIDIA_VISIBLE_DEVICES", "Read by the container's runtime."),
)
