"""What the terminal shows once the server is ready: what is served, where, within which limits, and how to try it."""

from __future__ import annotations

import shlex

import orjson

from gyrfalcon import __version__
from gyrfalcon.config import Settings
from gyrfalcon.options import is_ip_address
from gyrfalcon.service.interface import ModelInfo

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound to
_HERE = ("127.0.0.1", "::1", "localhost")


def render_banner(settings: Settings, model: ModelInfo) -> str:
    """The banner's lines; secrets are named, never shown."""
    url = f"{'http' if settings.tls_certificate is None else 'https'}://{_authority(settings)}"
    rows = [
        ("model", f"{model.name} ({_count(model.num_parameters)} parameters, {model.dtype} on {model.device})"),
        ("address", f"{url}{_reach(settings)}"),
        ("docs", f"{url}/docs"),
        (
            "tokens",
            f"{model.max_total_tokens:,} a sequence, {model.max_input_tokens:,} of them prompt; {_default(model)}",
        ),
        ("capacity", f"{model.max_concurrent_requests:,} sequences in work, KV cache of {model.cache_tokens:,} tokens"),
        ("access", _access(settings)),
    ]
    lines = [f"gyrfalcon {__version__}", "", *(f"  {name:<9} {text}" for name, text in rows)]
    return "\n".join(["", *lines, "", "Try it:", "", *_curl(settings, url), ""])


def _curl(settings: Settings, url: str) -> list[str]:
    body = orjson.dumps({"inputs": "Return the number of", "parameters": {"max_new_tokens": 20}}).decode()
    parts = [f"curl {url}/generate", "-H 'Content-Type: application/json'"]
    if settings.api_key or settings.api_key_file is not None:
        parts.append("-H 'Authorization: Bearer YOUR_KEY'")
    parts.append(f"-d {shlex.quote(body)}")
    return [" \\\n    ".join(parts)]


def _authority(settings: Settings) -> str:
    host = settings.host
    if host in _EVERYWHERE:
        host = "127.0.0.1"
    if is_ip_address(host) and ":" in host:
        host = f"[{host}]"
    return f"{host}:{settings.port}"


def _reach(settings: Settings) -> str:
    if settings.host in _HERE:
        return " (this machine only; --host 0.0.0.0 opens it to the network)"
    if settings.host in _EVERYWHERE:
        return " (and every other address of this machine)"
    return ""


def _access(settings: Settings) -> str:
    num_keys = len(settings.api_key)
    if settings.api_key_file is not None:
        return f"with an API key ({num_keys} known, and those of {settings.api_key_file})"
    if num_keys:
        return f"with an API key ({num_keys} known)"
    if settings.host in _HERE:
        return "open; --api-key asks for a key"
    return "OPEN to everyone who reaches this address; --api-key asks for a key"


def _default(model: ModelInfo) -> str:
    if model.default_max_new_tokens is None:
        return "new ones fill what is left unless a request says"
    return f"{model.default_max_new_tokens:,} new ones unless a request says"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"
