"""What is served, and which of it a request's `model` field means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gyrfalcon.engine.interface import Engine, WatermarkParams
from gyrfalcon.errors import UnknownModel
from gyrfalcon.service.chat import ChatTemplate, load_chat_template
from gyrfalcon.service.interface import ModelInfo
from gyrfalcon.service.tokenizer import TextTokenizer, load_tokenizer
from gyrfalcon.service.validation import Limits

# What clients send that have no name to send.
PLACEHOLDER_NAMES = frozenset({"tgi", "dummy"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model: its engine, and all that turns text into the engine's ids and back."""

    name: str
    engine: Engine
    tokenizer: TextTokenizer
    chat_template: ChatTemplate | None
    limits: Limits
    watermark: WatermarkParams  # used by the requests that ask for one
    revision: str | None = None

    @property
    def info(self) -> ModelInfo:
        facts, limits = self.engine.facts, self.limits
        return ModelInfo(
            name=self.name,
            revision=self.revision,
            dtype=facts.dtype,
            device=facts.device,
            num_parameters=facts.num_parameters,
            num_text_tokens=min(self.tokenizer.vocab_size, facts.vocab_size),
            max_context=facts.max_context,
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            cache_tokens=facts.cache_tokens,
            max_concurrent_requests=limits.max_concurrent_requests,
            max_best_of=limits.max_best_of,
            max_stop_sequences=limits.max_stop_sequences,
            max_top_n_tokens=limits.max_top_n_tokens,
            default_max_new_tokens=limits.default_max_new_tokens,
            has_chat_template=self.chat_template is not None,
        )


def load_served_model(
    name: str,
    folder: Path,
    engine: Engine,
    limits: Limits,
    *,
    revision: str | None = None,
    watermark: WatermarkParams | None = None,
    chat_template_path: Path | None = None,
) -> ServedModel:
    """Read the text side of a checkpoint folder. Raises ModelLoadError naming the file at fault."""
    tokenizer = load_tokenizer(folder)
    return ServedModel(
        name=name,
        engine=engine,
        tokenizer=tokenizer,
        chat_template=load_chat_template(folder, tokenizer, chat_template_path),
        limits=limits,
        watermark=watermark or WatermarkParams(),
        revision=revision,
    )


class ModelTable:
    """The served models by name; the first is the default one."""

    def __init__(self, models: Sequence[ServedModel], *, strict_names: bool = False) -> None:
        """strict_names: refuse every name that is not served, even where only one model could be meant."""
        self._models = {model.name: model for model in models}
        if not models or len(self._models) != len(models):
            raise ValueError("serve at least one model, each under its own name")
        self._default = models[0]
        self._strict_names = strict_names

    @property
    def all(self) -> tuple[ServedModel, ...]:
        return tuple(self._models.values())

    def resolve(self, name: str | None) -> ServedModel:
        """The model that `name` means. Raises UnknownModel.

        A single model answers to any name, as clients written for one send whatever they like; of several, the
        placeholders mean the default one.
        """
        if name is None:
            return self._default
        found = self._models.get(name)
        if found is not None:
            return found
        if not self._strict_names and (len(self._models) == 1 or name in PLACEHOLDER_NAMES):
            return self._default
        raise UnknownModel(name[:200], tuple(self._models))
