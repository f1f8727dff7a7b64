"""Looking for a watermark without an engine: all it takes of a checkpoint is its tokenizer."""

from __future__ import annotations

from gyrfalcon.config import Settings
from gyrfalcon.engine.interface import WatermarkParams
from gyrfalcon.hub import locate_checkpoint
from gyrfalcon.service.interface import DetectCall, Detection
from gyrfalcon.service.tokenizer import load_tokenizer, read_json_object
from gyrfalcon.service.watermark import detect


def detect_offline(settings: Settings, call: DetectCall) -> Detection:
    """What a server with these settings would answer, for a text of any length.

    Raises InvalidRequest for the call's values, OperatorError when the checkpoint cannot be had.
    """
    checkpoint = locate_checkpoint(
        settings.model,
        revision=settings.revision,
        cache_dir=settings.huggingface_hub_cache,
        offline=settings.offline,
        with_weights=False,
    )
    tokenizer = load_tokenizer(checkpoint.folder)
    width = read_json_object(checkpoint.folder / "config.json").get("vocab_size")
    return detect(
        call,
        model=checkpoint.name,
        tokenizer=tokenizer,
        num_ids=max(tokenizer.vocab_size, width) if type(width) is int else tokenizer.vocab_size,
        settings=WatermarkParams(
            gamma=settings.watermark_gamma,
            delta=settings.watermark_delta,
            key=settings.watermark_key,
            context_width=settings.watermark_context_width,
        ),
    )
