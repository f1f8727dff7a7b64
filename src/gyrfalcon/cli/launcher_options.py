"""What each flag and variable of text-generation-launcher means to us: honoured, without effect, or refused.

The one table behind `gyrfalcon launcher`, the lines that `serve` writes about variables it does not heed, and
docs/tgi-launcher.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from gyrfalcon import config, options
from gyrfalcon.cli.foreign_options import (
    Fate,
    ForeignOption,
    Given,
    declare,
    find_options,
    honoured,
    no_effect,
    refused,
    sources,
)


def find_given(flags: Mapping[str, object], environ: Mapping[str, str]) -> dict[str, Given]:
    """The launcher's options that were given, by name; as `find_options`."""
    return find_options(LAUNCHER_OPTIONS, flags, environ)


def unheeded_by_serve(environ: Mapping[str, str]) -> list[str]:
    """A line for each variable by which the launcher would be asked for what this server does not do.

    `serve` has other options of its own and is not stopped by these: a variable may be meant for another program.
    Variables that would change nothing get no line.
    """
    lines = []
    for row in LAUNCHER_OPTIONS:
        if row.fate is not Fate.REFUSED:
            continue
        for raw, origin in sources(row, {}, environ):
            try:
                value = row.option.kind.read(raw)
            except (ValueError, OverflowError):
                value = raw
            if value not in row.quiet:
                lines.append(f"{row.option.label}: {row.option.quote(raw, origin)} is not heeded: {row.reason}")
    return lines


def _read_elsewhere(variable: str, help: str, *, secret: bool = False) -> ForeignOption:
    return declare(variable, Fate.HONOURED, options.text(), help, secret=secret)


_ONE_DEVICE = "one model runs on one device in this version"
_ROPE = "positions are scaled as the checkpoint's config.json says"
_JOINING = "waiting requests join at every step, as soon as the cache and --max-batch-prefill-tokens have room"
_NO_TUNNEL = "no tunnel is opened"
_NO_SHARDS = "there are no shards to talk to"
_HUB = "Read by the Hugging Face Hub library."

LAUNCHER_OPTIONS: tuple[ForeignOption, ...] = (
    honoured(
        "--model-id",
        "model",
        note="Hub id, checkpoint folder or preset. Absent: the bundled eyas, and a line that says so.",
        platform=("HF_MODEL_ID",),
    ),
    honoured("--revision", "revision", platform=("HF_MODEL_REVISION",)),
    no_effect(
        "--validation-workers", options.whole(1), "the number of tokenizer threads follows the machine's cores", 2
    ),
    refused("--sharded", options.one_of("true", "false"), _ONE_DEVICE, "false", remedy="leave it out, or say false"),
    refused(
        "--num-shard",
        options.whole(0),
        _ONE_DEVICE,
        1,
        remedy="set it to 1, and run one server for each device",
        platform=("SM_NUM_GPUS",),
    ),
    honoured(
        "--quantize",
        "quantize",
        note="How the checkpoint stores its weights (gptq, awq, compressed-tensors; found without it too), or int8 or "
        "int4 to quantise it while it is loaded. The others are refused: no kernels read them.",
        platform=("HF_MODEL_QUANTIZE",),
    ),
    honoured("--speculate", "speculate"),
    honoured("--dtype", "dtype"),
    refused(
        "--kv-cache-dtype",
        options.one_of("auto", "fp8_e4m3fn", "fp8_e5m2"),
        "the cache has the precision of --dtype",
        "auto",
    ),
    no_effect(
        "--trust-remote-code",
        options.switch(),
        config.REFUSED["trust_remote_code"],
        False,
        platform=("HF_MODEL_TRUST_REMOTE_CODE",),
    ),
    honoured("--max-concurrent-requests", "max_concurrent_requests", default=128),
    honoured("--max-best-of", "max_best_of", default=2),
    honoured("--max-stop-sequences", "max_stop_sequences", default=4),
    honoured("--max-top-n-tokens", "max_top_n_tokens", default=5),
    honoured("--max-input-tokens", "max_input_tokens"),
    honoured("--max-input-length", "max_input_tokens", note="Old name of --max-input-tokens; not both."),
    honoured("--max-total-tokens", "max_total_tokens"),
    no_effect("--waiting-served-ratio", options.number(0), _JOINING, 0.3, 1.2),
    honoured("--max-batch-prefill-tokens", "max_batch_prefill_tokens"),
    honoured(
        "--max-batch-total-tokens", "max_batch_total_tokens", note="Size of the KV cache in tokens, on every device."
    ),
    no_effect("--max-waiting-tokens", options.whole(0), _JOINING, 20),
    honoured("--max-batch-size", "max_batch_size"),
    no_effect(
        "--cuda-graphs",
        options.listing(options.whole(0)),
        "this version captures no graphs",
        (0,),
        (1, 2, 4, 8, 16, 32),
    ),
    honoured(
        "--hostname",
        "host",
        kind=options.text(),
        default="0.0.0.0",  # noqa: S104 - what a container's user expects
        note="Address to listen on. What is no IP address means 0.0.0.0, with a line if it was a flag.",
    ),
    honoured(
        "--port -p",
        "port",
        default=3000,
        note="Port to listen on. Vertex AI's variable wins over PORT; where HF_MODEL_ID is set it is SageMaker's 8080.",
        platform=("AIP_HTTP_PORT",),
    ),
    no_effect("--prometheus-port", options.whole(0, 65535), "metrics are at /metrics on the server's port", 9000),
    no_effect(
        "--shard-uds-path",
        options.text(),
        _NO_SHARDS,
        "/tmp/text-generation-server",  # noqa: S108 - compared with, never opened
    ),
    no_effect("--master-addr", options.text(), _NO_SHARDS, "localhost"),
    no_effect("--master-port", options.whole(0), _NO_SHARDS, 29500),
    honoured("--huggingface-hub-cache", "huggingface_hub_cache"),
    refused(
        "--weights-cache-override",
        options.path(),
        "weights are read from the checkpoint's own folder",
        remedy="give the folder that holds them, with its config.json, as --model-id",
    ),
    no_effect("--disable-custom-kernels", options.switch(), "there are no kernels made for one model", False),
    honoured(
        "--cuda-memory-fraction",
        "kv_cache_fraction",
        note="Share of the memory free after loading that the KV cache may take, on every device; 1 leaves the choice "
        "to the server. Without effect beside --max-batch-total-tokens.",
        default=1.0,
        quiet=(1.0, None),
    ),
    refused(
        "--rope-scaling",
        options.one_of("linear", "dynamic"),
        _ROPE,
        "linear",  # with no factor, a factor of 1: nothing is scaled
        remedy="write rope_scaling into the checkpoint's config.json, where linear and llama3 are known",
    ),
    refused(
        "--rope-factor",
        options.number(0, above=True),
        _ROPE,
        1.0,
        remedy='write "rope_scaling": {"rope_type": "linear", "factor": ...} into the checkpoint\'s config.json',
    ),
    honoured("--json-output", "json_output"),
    honoured(
        "--otlp-endpoint",
        "otlp_endpoint",
        note="URL of an OpenTelemetry collector that takes OTLP over HTTP (port 4318, not gRPC's 4317).",
    ),
    honoured("--otlp-service-name", "otlp_service_name", default="text-generation-inference.router"),
    honoured("--cors-allow-origin", "cors_allow_origin"),
    honoured("--api-key", "api_key"),
    honoured("--watermark-gamma", "watermark_gamma"),
    honoured("--watermark-delta", "watermark_delta"),
    refused("--ngrok", options.switch(), _NO_TUNNEL, False, remedy="leave it out, and run a tunnel beside the server"),
    no_effect("--ngrok-authtoken", options.text(), _NO_TUNNEL, secret=True),
    no_effect("--ngrok-edge", options.text(), _NO_TUNNEL),
    honoured("--tokenizer-config-path", "tokenizer_config_path"),
    no_effect(
        "--disable-grammar-support", options.switch(), "this version refuses a request's grammar in any case", False
    ),
    declare(
        "--env -e",
        Fate.HONOURED,
        options.switch(),
        "Print versions, machine and settings, then serve.",
        has_variable=False,
    ),
    no_effect("--max-client-batch-size", options.whole(1), "a request holds one prompt in this version", 4),
    refused(
        "--lora-adapters",
        options.text(),
        "adapters are not served in this version",
        remedy="leave it out, and serve a checkpoint that the adapter is merged into",
    ),
    no_effect(
        "--usage-stats", options.one_of("on", "off", "no-stack"), "nothing is ever sent about its use", "off", "on"
    ),
    honoured("--payload-limit", "payload_limit", default=2_000_000),
    no_effect(
        "--enable-prefill-logprobs", options.switch(), "a prompt's log-probabilities can always be asked for", False
    ),
    honoured("--graceful-termination-timeout -g", "graceful_termination_timeout", default=90),
    # Variables without a flag.
    honoured("LOG_LEVEL", "log_level", kind=options.text(), note="What is no level means info, with a line."),
    honoured("COMPUTE_TYPE", "compute_type"),
    honoured("PREFIX_CACHING", "prefix_caching"),
    no_effect("LOG_COLORIZE", options.text(), "lines are coloured on a terminal and nowhere else"),
    no_effect("ATTENTION", options.text(), "there is one attention for each device"),
    no_effect("PREFILL_CHUNKING", options.switch(), "prompts are always computed in chunks", True),
    no_effect("TGI_WIGGLE_ROOM", options.text(), "--cuda-memory-fraction says what the KV cache may take"),
    no_effect("MAX_IMAGE_FETCH_SIZE", options.text(), "this version fetches no images", "1073741824"),
    honoured("AIP_PREDICT_ROUTE", "aip_predict_route"),
    honoured("AIP_HEALTH_ROUTE", "aip_health_route"),
    no_effect("HF_HUB_ENABLE_HF_TRANSFER", options.text(), "downloads go the Hub library's way", "0"),
    _read_elsewhere("HF_TOKEN", _HUB, secret=True),
    _read_elsewhere("HUGGING_FACE_HUB_TOKEN", _HUB, secret=True),
    _read_elsewhere("HF_API_TOKEN", "Used for downloads where HF_TOKEN is not set.", secret=True),
    _read_elsewhere("HF_HOME", _HUB),
    _read_elsewhere("HF_HUB_OFFLINE", _HUB),
    _read_elsewhere("HF_HUB_USER_AGENT_ORIGIN", _HUB),
    _read_elsewhere("CUDA_VISIBLE_DEVICES", "Read by CUDA."),
    _read_elsewhere("NVIDIA_VISIBLE_DEVICES", "Read by the container's runtime."),
)
