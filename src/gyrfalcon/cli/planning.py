"""What `gyrfalcon fit` and `gyrfalcon k8s` have in common: which model, loaded how, for what load."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from gyrfalcon import options
from gyrfalcon.errors import SettingsError
from gyrfalcon.footprint import Device, Dtype, Planned, Quantize, plan_load, read_spec, stored_codes
from gyrfalcon.hub import locate_checkpoint
from gyrfalcon.presets import find_preset

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A preset's name, a checkpoint folder, or a Hub id.", show_default=False)
]
DtypeOption = Annotated[
    str, typer.Option(metavar="auto|float32|bfloat16|float16", help="Precision; auto takes the checkpoint's.")
]
QuantizeOption = Annotated[
    str | None, typer.Option(metavar="int8|int4", help="Quantised weights, as `serve --quantize`.", show_default=False)
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="cpu|cuda", help="Where it runs; cuda, and cpu with --quantize.", show_default=False),
]
ContextOption = Annotated[
    int | None,
    typer.Option(min=1, help="Tokens of a sequence; the model's own, at most 8192, if absent.", show_default=False),
]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Sequences at once.")]

_DTYPES = ("float32", "bfloat16", "float16")


def plan_model(
    model: str,
    *,
    dtype: str,
    quantize: str | None,
    device: str | None,
    context: int | None,
    concurrency: int,
    revision: str | None = None,
) -> Planned:
    """Read the model's config.json and check the rest against it. Touches the network for a Hub id only.

    Raises SettingsError naming the option, ModelLoadError for the model.
    """
    checked_quantize = cast(Quantize | None, one_of("--quantize", quantize, "int8", "int4"))
    checked_device = one_of("--device", device, "cpu", "cuda") or ("cpu" if quantize else "cuda")
    if checked_quantize is not None and checked_device == "cuda":
        raise SettingsError("--quantize", f"`{quantize}` weights are served on CPU only; leave out --device cuda")
    chosen_dtype = one_of("--dtype", dtype, "auto", *_DTYPES)
    folder = _config_folder(model, revision)
    spec, stored = read_spec(folder), stored_codes(folder)
    if stored is not None and checked_quantize is not None:
        raise SettingsError("--quantize", f"`{model}` holds {stored} codes already; leave it out")
    return Planned(
        model=model,
        spec=spec,
        dtype=cast(Dtype, spec.dtype if chosen_dtype == "auto" else chosen_dtype),
        quantize=checked_quantize or stored,
        device=cast(Device, checked_device),
        load=plan_load(spec, device=cast(Device, checked_device), context=context, concurrency=concurrency),
    )


def _config_folder(model: str, revision: str | None) -> Path:
    preset = find_preset(model)
    if preset is not None and revision is None and not (Path(model) / "config.json").is_file():
        return preset.config_folder
    return locate_checkpoint(model, revision=revision, with_weights=False).folder


def one_of(flag: str, value: str | None, *names: str) -> str | None:
    """The value, if it is one of the names. Raises SettingsError."""
    if value is not None and value not in names:
        raise SettingsError(flag, f"`{value}` is not one of {', '.join(names)}")
    return value


def read_size(flag: str, text: str | None) -> int | None:
    """Bytes from a text such as 16GiB. Raises SettingsError."""
    if text is None:
        return None
    try:
        return cast(int, options.size().read(text))
    except ValueError:
        raise SettingsError(flag, f"`{text}` is not {options.size().allowed}") from None


def show_bytes(number: int) -> str:
    """A size for people."""
    for size, unit in ((1024**3, "GiB"), (1024**2, "MiB"), (1024, "KiB")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"
