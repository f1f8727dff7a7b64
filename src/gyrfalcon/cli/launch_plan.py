"""What the arguments and the environment of another server's container come to."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

from gyrfalcon.config import Settings
from gyrfalcon.presets import NAMES

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """lines: one for each option that was given and has no effect, and for what its user may not expect."""

    settings: Settings
    lines: tuple[str, ...]


def start_logging(plan: LaunchPlan) -> None:
    """Set logging up as the plan says, and log its lines."""
    from gyrfalcon.telemetry import setup_logging

    setup_logging(plan.settings.json_output, plan.settings.log_level)
    for line in plan.lines:
        logger.warning("%s", line)


def fit_to_folder(settings: Settings, lines: list[str]) -> Settings:
    """A model given as a folder has no revision, and clients know it by the path that was given."""
    if settings.model in NAMES or not Path(settings.model).expanduser().is_dir():
        return settings
    if settings.revision is not None:
        lines.append(
            f"--revision: `{settings.revision}` has no effect and can be left out: the model is a local folder"
        )
    return dataclasses.replace(settings, revision=None, served_model_name=settings.served_model_name or settings.model)
