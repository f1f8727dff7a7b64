"""`gyrfalcon launcher`: the arguments and the environment of a text-generation-launcher container keep working."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gyrfalcon.cli.flags import flag_parameter, version_parameter
from gyrfalcon.cli.foreign_options import Given, judge
from gyrfalcon.cli.launch_plan import LaunchPlan, fit_to_folder, start_logging
from gyrfalcon.cli.launcher_options import LAUNCHER_OPTIONS, find_given
from gyrfalcon.config import OPTIONS, Settings, resolve
from gyrfalcon.errors import SettingsError
from gyrfalcon.options import is_ip_address
from gyrfalcon.presets import BUNDLED

logger = logging.getLogger(__name__)

SAGEMAKER_PORT = "8080"
_SETTINGS = {option.name: option for option in OPTIONS}
# What holds where no source gives a setting, as far as the launcher differs from `serve`.
DEFAULTS = {
    row.field: row.option.default
    for row in LAUNCHER_OPTIONS
    if row.field is not None and row.option.default not in (_SETTINGS[row.field].default, *row.quiet)
}


def launcher(flags: Mapping[str, object]) -> None:
    """Serve with the flags and variables of text-generation-launcher.

    Each is honoured, or has no effect and gets a line at start that says why, or is refused. A flag wins over its
    variable (MAX_BEST_OF for --max-best-of). What the launcher has no flag for is set by GYRFALCON_ variables and in
    gyrfalcon.toml, as for `gyrfalcon serve`.
    """
    # The flags are explained without loading what serving takes.
    from gyrfalcon.cli.serve import run_server

    plan = plan_launch(flags, os.environ)
    start_logging(plan)
    if flags.get("env"):
        show_environment(plan.settings)
    run_server(plan.settings)


def launcher_command() -> Callable[..., None]:
    """`launcher` with one parameter for each of its flags; values arrive as they were typed."""
    parameters = [flag_parameter(row.option, has_opposite=False) for row in LAUNCHER_OPTIONS if row.option.flags] + [
        version_parameter()
    ]

    def command(**typed: Any) -> None:
        del typed["version"]
        launcher({name: None if value == [] else value for name, value in typed.items()})

    command.__name__ = launcher.__name__
    command.__doc__ = launcher.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def plan_launch(flags: Mapping[str, object], environ: Mapping[str, str]) -> LaunchPlan:
    """Read what was given as text-generation-launcher would, and say what this server makes of it.

    flags: texts from the command line by name (`max_best_of`); None counts as not given. GYRFALCON_ variables win
    over the launcher's, and gyrfalcon.toml over its defaults.

    Raises SettingsError that names flag and value: for a value that is wrong or contradicts another one, and for an
    option that asks for what this server cannot do.
    """
    given = find_given(flags, environ)
    _check_pairs(given)
    lines = [*_give_way(given), *judge(given)]
    settings = resolve(
        {each.row.field: each.raw for each in given.values() if each.row.field and each.is_flag},
        _as_variables(given, environ, lines),
        defaults=DEFAULTS,
    )
    _check_batches(settings)
    settings = fit_to_folder(settings, lines)
    if settings.model == BUNDLED and "model_id" not in given:
        lines.append(f"--model-id: not given; the bundled demonstration model `{BUNDLED}` is served")
    return LaunchPlan(settings, tuple(lines))


def _check_pairs(given: Mapping[str, Given]) -> None:
    new, old = given.get("max_input_tokens"), given.get("max_input_length")
    if new is not None and old is not None:
        raise SettingsError(
            "--max-input-length",
            f"`{old.raw}` is the old name of --max-input-tokens (`{new.raw}`), and both are given; leave it out",
        )
    key = given.get("api_key")
    if key is not None:
        texts = key.raw if isinstance(key.raw, list) else [key.raw]
        if any("," in str(text) for text in texts):
            quoted = key.row.option.quote(key.raw, key.origin)
            raise SettingsError("--api-key", f"{quoted} holds a comma, which parts keys here; choose a key without one")


def _give_way(given: dict[str, Given]) -> Iterator[str]:
    """Take out what has no effect beside another value, and what the launcher passes over; a line for each."""
    sharded, num_shard = given.get("sharded"), given.get("num_shard")
    if sharded is not None and sharded.value == "false" and num_shard is not None:
        del given["num_shard"]
        if not num_shard.is_quiet:
            yield num_shard.no_effect("--sharded is false")
    fraction = given.get("cuda_memory_fraction")
    if fraction is not None and fraction.is_quiet:
        del given["cuda_memory_fraction"]
    elif fraction is not None and "max_batch_total_tokens" in given:
        del given["cuda_memory_fraction"]
        yield fraction.no_effect("--max-batch-total-tokens says how large the KV cache is")
    hostname = given.get("hostname")
    if hostname is not None and not is_ip_address(str(hostname.value)):
        del given["hostname"]
        yield hostname.no_effect(f"it is no IP address; {DEFAULTS['host']} is listened on")
    level = given.get("log_level")
    if level is not None and not _is_level(level.raw):
        del given["log_level"]
        yield level.no_effect("it is no level; info is logged")


def _is_level(raw: object) -> bool:
    try:
        _SETTINGS["log_level"].kind.read(raw)
    except ValueError:
        return False
    return True


def _as_variables(given: Mapping[str, Given], environ: Mapping[str, str], lines: list[str]) -> dict[str, str]:
    """The environment in the settings' own spelling: without what was passed over, platforms' names made plain."""
    plain = dict(environ)
    for row in LAUNCHER_OPTIONS:
        each = given.get(row.name)
        if row.field is None or (each is not None and each.is_flag):
            continue
        variable = row.option.variables[-1]
        own = _SETTINGS[row.field].variables
        plain.pop(variable, None)
        if each is not None and variable in own:
            plain[variable] = str(each.raw)
        elif each is not None:
            plain.setdefault(own[0], str(each.raw))
    # A permission that nothing uses: it was given its line, and is no reason to refuse to start, as `serve` does.
    plain.pop("TRUST_REMOTE_CODE", None)
    # SageMaker connects to one port, and its image sets that port by a flag: a PORT from elsewhere does not count.
    if environ.get("HF_MODEL_ID") and not environ.get("AIP_HTTP_PORT"):
        port = given.get("port")
        if port is not None and not port.is_flag and port.raw != SAGEMAKER_PORT:
            lines.append(port.no_effect(f"HF_MODEL_ID is set, and SageMaker connects to {SAGEMAKER_PORT}"))
        plain["PORT"] = SAGEMAKER_PORT
    return plain


def _check_batches(settings: Settings) -> None:
    prefill, total = settings.max_batch_prefill_tokens, settings.max_batch_total_tokens
    if prefill is not None and total is not None and prefill > total:
        raise SettingsError(
            "--max-batch-prefill-tokens", f"{prefill} exceeds --max-batch-total-tokens ({total}); lower it to that"
        )


def show_environment(settings: Settings) -> None:
    """Print what the machine has and what holds, secrets hidden; as a log line where logs are JSON."""
    from gyrfalcon.cli.doctor import machine_facts

    facts = machine_facts(settings)
    if settings.json_output:
        logger.info("environment", extra={**dict(facts), **settings.shown()})
        return
    for name, value in [*facts, *settings.shown().items()]:
        print(f"{name:<28} {value}")
