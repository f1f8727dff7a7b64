"""A small real tokenizer in a folder, and a text service over any engine: for tests of what lies above the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from gyrfalcon.engine.interface import Engine
from gyrfalcon.metrics import Metrics
from gyrfalcon.service.generation import GenerationService
from gyrfalcon.service.models import ModelTable, load_served_model
from gyrfalcon.service.validation import Limits, resolve_limits
from gyrfalcon.tracing import Tracer

SPECIAL_TOKENS = ("<|pad|>", "<|user|>", "<|endoftext|>")
EOS_TOKEN = "<|endoftext|>"  # noqa: S105  (a token of text, not a secret)
EOS_ID = SPECIAL_TOKENS.index(EOS_TOKEN)
CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- message.role | capitalize }}: {{ message.content | trim }}{{ "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}Assistant:{% endif %}"""

_SENTENCES = (
    "My name is Olivier and I am a photographer who lives near the sea.",
    "The falcon flies over the hills, and the people of the town look up.",
    "Numbers such as 12, 345 and 6789 are split; punctuation is not!",
    "déjà vu, naïve, Zürich, 北京, 東京, Москва, 🦅 and 🙂",
)


def write_tokenizer(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a byte-level BPE tokenizer of a few hundred entries, as a checkpoint folder holds it; give the folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[AddedToken(text, special=True) for text in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_SENTENCES * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {"eos_token": EOS_TOKEN, "model_max_length": 256}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_ID}), encoding="utf-8")
    return folder


def text_service(
    engine: Engine,
    folder: Path,
    *,
    name: str = "tiny",
    limits: Limits | None = None,
    max_concurrent_requests: int = 128,
    tracer: Tracer | None = None,
    **options: Any,
) -> tuple[GenerationService, Metrics]:
    """A service of one model, whose text side is in the folder, and its metrics. options: more of the service's."""
    limits = limits or resolve_limits(engine.facts, max_concurrent_requests=max_concurrent_requests)
    metrics = Metrics()
    metrics.limits_known(
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        cache_tokens=engine.facts.cache_tokens,
    )
    models_ = ModelTable([load_served_model(name, folder, engine, limits)])
    service = GenerationService(
        models_, metrics, max_concurrent_requests=limits.max_concurrent_requests, tracer=tracer, **options
    )
    metrics.watch_engines(service.stats)
    return service, metrics
