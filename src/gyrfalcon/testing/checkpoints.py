"""Tiny checkpoints of every supported form, written by transformers: ordinary folders that any server can load.

Needs the `transformers` package, which is imported only when a checkpoint is written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gyrfalcon.models.config_file import Json

VOCAB_SIZE = 384
MAX_CONTEXT = 1024
END_OF_TEXT = "<|endoftext|>"  # the only special token, id 0

_TRAINING_STEPS = 150
_TRAINING_ROWS, _TRAINING_TOKENS = 8, 96

_SENTENCES = (
    "The falcon climbs above the river and waits for the wind to turn.",
    "In the morning the young birds leave the cliff, one after another, and learn to stoop.",
    "A stoop begins high; the wings are folded, and the ground comes closer very fast.",
    "3 birds, 14 feathers and 159 metres: the keeper counts them all and writes them down.",
    "Nobody hears the owl; everybody hears the crow, who tells the whole valley about it.",
    "Zwölf Möwen fliegen über das Wasser – und eine kehrt zurück.",
    "When the light fades, the falcon returns to the cliff and the river is quiet again.",
)


@dataclass(frozen=True, slots=True)
class Form:
    """One shape of checkpoint: transformers' configuration class, its arguments, and an old spelling if wanted."""

    config_class: str
    arguments: dict[str, Any]
    respell: Callable[[dict[str, Json]], dict[str, Json]] | None = None


def _spell_refined_web_model(config: dict[str, Json]) -> dict[str, Json]:
    """config.json as the first 7B and RW repositories had it: flags that are off are left out."""
    flags = {key: True for key in ("multi_query", "parallel_attn", "alibi", "bias") if config[key]}
    return _spell_old(config, "RefinedWebModel") | flags


def _spell_refined_web(config: dict[str, Json]) -> dict[str, Json]:
    """config.json as the first 40B repositories had it: nothing but the model type tells the new layout."""
    return _spell_old(config, "RefinedWeb") | {"n_head_kv": config["num_kv_heads"], "bias": False, "alibi": False}


def _spell_old(config: dict[str, Json], model_type: str) -> dict[str, Json]:
    return {
        "architectures": ["RWForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_RW.RWConfig",
            "AutoModelForCausalLM": "modelling_RW.RWForCausalLM",
        },
        "apply_residual_connection_post_layernorm": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_size": config["hidden_size"],
        "layer_norm_epsilon": config["layer_norm_epsilon"],
        "model_type": model_type,
        "n_head": config["num_attention_heads"],
        "n_layer": config["num_hidden_layers"],
        "seq_length": config["max_position_embeddings"],
        "torch_dtype": config["dtype"],
        "vocab_size": config["vocab_size"],
    }


_SEVEN: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True}
_FORTY: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_kv_heads": 2,
    "new_decoder_architecture": True,
}
_RW: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "multi_query": False,
    "parallel_attn": False,
    "alibi": True,
    "bias": True,
}
_LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FORMS: dict[str, Form] = {
    "falcon-7b": Form("FalconConfig", _SEVEN),
    "falcon-40b": Form("FalconConfig", _FORTY),
    # Three query heads a group, as no power of two: 180B has 29.
    "falcon-180b": Form("FalconConfig", _FORTY | {"hidden_size": 96, "num_attention_heads": 6}),
    "falcon-11b": Form(
        "FalconConfig",
        _FORTY
        | {
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 320,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500042.0},
        },
    ),
    "falcon-rw": Form("FalconConfig", _RW),
    "falcon-rw-6-heads": Form("FalconConfig", _RW | {"hidden_size": 96, "num_attention_heads": 6}),
    "falcon-7b-legacy": Form("FalconConfig", _SEVEN, _spell_refined_web_model),
    "falcon-40b-legacy": Form("FalconConfig", _FORTY, _spell_refined_web),
    "falcon-rw-legacy": Form("FalconConfig", _RW, _spell_refined_web_model),
    "llama": Form("LlamaConfig", _LLAMA),
    "llama-tied": Form("LlamaConfig", _LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-biased": Form("LlamaConfig", _LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": Form(
        "LlamaConfig",
        _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama3-rope": Form("LlamaConfig", _LLAMA | {"rope_parameters": _LLAMA3_SCALING}),
    "mistral": Form("MistralConfig", _LLAMA | {"sliding_window": None}),
    # Heads whose sizes do not add up to the hidden size, as Falcon3 has.
    "falcon3": Form(
        "LlamaConfig",
        _LLAMA | {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1000042.0}},
    ),
}
"""Every form by name; the names are those of the published models they are shaped like."""


def write_checkpoint(
    folder: Path,
    form: str,
    *,
    seed: int = 0,
    trained: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
) -> Path:
    """Write a complete checkpoint with weights, tokenizer and generation settings into `folder`; returns it.

    trained: some seconds of training on a few sentences, so that the likeliest token leads clearly. The result depends
    on the arguments alone, on one machine and with one number of threads.
    """
    import transformers

    described = FORMS[form]
    tokenizer = _train_tokenizer()
    config = getattr(transformers, described.config_class)(
        **{
            "vocab_size": VOCAB_SIZE,
            "num_hidden_layers": 2,
            "max_position_embeddings": MAX_CONTEXT,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "initializer_range": 0.02 if trained else 0.1,
            # The other implementation adds the bias of ALiBi models twice.
            "attn_implementation": "sdpa",
            **described.arguments,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto_model: Any = transformers.AutoModelForCausalLM
        model = auto_model.from_config(config)
        _disturb_vectors(model)
        if trained:
            _train(model, _training_ids(tokenizer))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    _write_tokenizer(folder, tokenizer)
    if described.respell is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(described.respell(json.loads(path.read_text())), indent=2))
    return folder


def cached_checkpoint(cache: Path, form: str, *, seed: int = 0, trained: bool = False) -> Path:
    """The checkpoint of `write_checkpoint` from `cache`, written there on first use; safe with several processes."""
    folder = cache / f"{form}-{seed}{'-trained' if trained else ''}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=cache))
        write_checkpoint(fresh, form, seed=seed, trained=trained)
        try:
            fresh.rename(folder)
        except OSError:  # another process was faster
            shutil.rmtree(fresh)
    return folder


def _disturb_vectors(model: Any) -> None:
    """Norms and biases start as ones and zeros, which would hide that one is not applied."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))


def _train(model: Any, ids: torch.Tensor) -> None:
    """Next-token training on random stretches of `ids`."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=_TRAINING_STEPS)
    for _ in range(_TRAINING_STEPS):
        starts = torch.randint(len(ids) - _TRAINING_TOKENS, (_TRAINING_ROWS,))
        rows = torch.stack([ids[start : start + _TRAINING_TOKENS] for start in starts.tolist()])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _training_ids(tokenizer: Any) -> torch.Tensor:
    """The sentences over and over, always in the same order: what comes next is certain after a few tokens."""
    text = " ".join(_SENTENCES)
    return torch.tensor(tokenizer.encode(" ".join([text] * 8)).ids)


def _train_tokenizer() -> Any:
    """A byte-level BPE of `VOCAB_SIZE` entries; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": MAX_CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": END_OF_TEXT}, indent=2))
