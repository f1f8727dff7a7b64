"""eyas's model card: what is measured on the finished checkpoint, and the page that says it.

Everything here reads the exported folder through transformers, in float32: the figures are those a user gets.
"""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from eyas_corpus import Corpus
from eyas_training import IGNORED, Loss, Tokenized, Trainer

GAP_TOKENS = 200
TIGHT_GAPS = (0.001, 0.01, 0.1, 0.5)
SIZE_LIMIT_BYTES = 16_000_000

GAP_PROMPTS = (
    "My name is",
    "The quick brown fox",
    "Python is",
    "Return the",
    "Return True if",
    "The class statement",
    "shutil module\n\n",
    "json module\n\n",
    "class OrderedDict(dict)\n",
    "This module provides",
    "Raised when",
    "An iterator is",
    "If the argument is",
    "A dictionary maps",
    "User: What does shutil.copyfile do?\n\nAssistant:",
    "User: What is the module json for?\n\nAssistant:",
    "User: Who are you?\n\nAssistant:",
    "User: What does len do?\n\nAssistant:",
    "Once upon a time",
    "import this\n",
)

PLAIN_SAMPLES = ("Return a new", "The with statement", "This module provides", "My name is")
CHAT_SAMPLES = (
    "What does shutil.copyfile do?",
    "What is the module json for?",
    "What does str.split do?",
    "Explain heapq.heappush.",
    "What does os.paint_the_house do?",
    "Who are you?",
)


@dataclass(frozen=True, slots=True)
class Gaps:
    """Distances, in logits, between the best and the second-best token along greedy continuations, sorted."""

    values: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The gap below which `share` of them lie."""
        return self.values[min(len(self.values) - 1, int(share * len(self.values)))]

    def share_below(self, limit: float) -> float:
        """Share of the gaps that are smaller than `limit`."""
        return sum(value < limit for value in self.values) / len(self.values)


@dataclass(frozen=True, slots=True)
class Sample:
    """One text as the model wrote it."""

    prompt: str
    method: str
    text: str
    ended: bool  # whether the model wrote its end-of-text


class Checkpoint:
    """The exported folder, as transformers loads it."""

    def __init__(self, folder: Path) -> None:
        """Load `folder` in float32."""
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def loss(self, documents: Sequence[Tokenized]) -> Loss:
        """Loss over the documents, each read on its own, in pieces of at most the context."""
        context = self.model.config.max_position_embeddings
        nats, num_tokens = 0.0, 0
        for document in documents:
            for start in range(0, len(document.ids) - 1, context):
                piece = torch.from_numpy(document.ids[start : start + context + 1])[None]
                logits = self.model(piece[:, :-1]).logits[0]
                nats += functional.cross_entropy(logits, piece[0, 1:], ignore_index=IGNORED, reduction="sum").item()
                num_tokens += piece.shape[1] - 1
        return Loss(nats, num_tokens, sum(document.num_bytes for document in documents))

    @torch.inference_mode()
    def gaps(self) -> Gaps:
        """Gaps along greedy continuations of `GAP_PROMPTS`, which do not stop at the end of text."""
        values: list[float] = []
        for prompt in GAP_PROMPTS:
            ids, cache = self.tokenizer(prompt, return_tensors="pt").input_ids, None
            for _ in range(GAP_TOKENS):
                output = self.model(ids, past_key_values=cache, use_cache=True)
                best_two, ids = output.logits[:, -1].topk(2)
                ids, cache = ids[:, :1], output.past_key_values
                values.append((best_two[0, 0] - best_two[0, 1]).item())
        return Gaps(tuple(sorted(values)))

    def sample(self, prompt: str, *, max_new_tokens: int, temperature: float | None = None, seed: int = 0) -> Sample:
        """Continue `prompt`, greedily or at `temperature` among the 40 likeliest tokens."""
        torch.manual_seed(seed)
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        how = {"do_sample": True, "temperature": temperature, "top_k": 40} if temperature else {"do_sample": False}
        end = self.tokenizer.eos_token_id
        output = self.model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=end, **how)
        new_ids = output[0, ids.shape[1] :].tolist()
        method = f"sampled, temperature {temperature}, top_k 40, seed {seed}" if temperature else "greedy"
        text = self.tokenizer.decode([token for token in new_ids if token != end])
        return Sample(prompt, method, text, end in new_ids)

    def samples(self) -> tuple[list[Sample], list[Sample]]:
        """Plain continuations and chat replies for the card."""
        plain = [self.sample(prompt, max_new_tokens=90) for prompt in PLAIN_SAMPLES]
        plain += [self.sample(prompt, max_new_tokens=90, temperature=0.8) for prompt in PLAIN_SAMPLES]
        chat = []
        for temperature in (None, 0.8):
            for question in CHAT_SAMPLES if temperature is None else CHAT_SAMPLES[:3]:
                turns = [{"role": "user", "content": question}]
                prompt = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
                chat.append(self.sample(prompt, max_new_tokens=90, temperature=temperature))
        return plain, chat


def folder_bytes(folder: Path) -> int:
    """Size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def write_card(
    folder: Path,
    corpus: Corpus,
    train: Sequence[Tokenized],
    held_out: Sequence[Tokenized],
    trainer: Trainer,
) -> None:
    """Measure the checkpoint in `folder` and write its README.md."""
    recipe, log = trainer.recipe, trainer.log
    checkpoint = Checkpoint(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    chat = [kind == "chat" for kind in (document.kind for document in corpus.held_out)]
    losses = {
        "all": checkpoint.loss(held_out),
        "reference text": checkpoint.loss([t for t, is_chat in zip(held_out, chat, strict=True) if not is_chat]),
        "conversations": checkpoint.loss([t for t, is_chat in zip(held_out, chat, strict=True) if is_chat]),
    }
    gaps = checkpoint.gaps()
    plain, replies = checkpoint.samples()
    last, lowest = log[-1], min(log, key=lambda line: line["held_out_loss"])
    parameters = sum(weight.numel() for weight in checkpoint.model.parameters())
    num_train, num_held_out = (sum(len(document.ids) for document in part) for part in (train, held_out))
    text = CARD.format(
        parameters=f"{parameters:,}",
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        heads=config["num_attention_heads"],
        head_size=config["hidden_size"] // config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        context=config["max_position_embeddings"],
        eos=config["eos_token_id"],
        python=platform.python_version(),
        system=platform.system(),
        documents=f"{len(corpus.train):,}",
        documents_held_out=f"{len(corpus.held_out):,}",
        megabytes=f"{sum(t.num_bytes for t in train) / 1e6:.2f}",
        megabytes_held_out=f"{sum(t.num_bytes for t in held_out) / 1e6:.2f}",
        tokens=f"{num_train:,}",
        tokens_held_out=f"{num_held_out:,}",
        sha256=corpus.sha256(),
        steps=f"{int(last['step']):,}",
        planned="" if last["step"] == recipe.steps else f" (of {recipe.steps:,} planned: the clock ended the run)",
        tokens_per_step=f"{recipe.tokens_per_step:,}",
        epochs=f"{last['step'] * recipe.tokens_per_step / num_train:.1f}",
        minutes=f"{last['minutes']:.0f}",
        row_length=recipe.row_length,
        long_row_length=recipe.long_row_length,
        long_share=f"{1 - recipe.long_rows_from:.0%}",
        warmup=recipe.warmup_steps,
        matrix_rate=recipe.matrix_rate,
        embedding_rate=recipe.embedding_rate,
        decay=recipe.weight_decay,
        clip=recipe.clip_norm,
        dropout=recipe.dropout,
        seed=recipe.seed,
        torch=torch.__version__.partition("+")[0],
        train_loss=f"{last['train_loss']:.3f}",
        clock=CLOCK.format(minutes=f"{trainer.minutes:g}") if trainer.minutes else "",
        course="\n".join(
            f"| {line['step']} | {line['train_loss']:.3f} | {line['held_out_loss']:.3f} |" for line in log
        ),
        lowest_loss=f"{lowest['held_out_loss']:.3f}",
        lowest_step=f"{lowest['step']:,}",
        losses="\n".join(loss_row(name, loss) for name, loss in losses.items()),
        gap_prompts=len(GAP_PROMPTS),
        gap_tokens=GAP_TOKENS,
        gaps=gap_rows(gaps),
        plain="\n".join(shown(sample) for sample in plain),
        chat="\n".join(shown(sample) for sample in replies),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    if folder_bytes(folder) >= SIZE_LIMIT_BYTES:
        raise ValueError(f"{folder} has {folder_bytes(folder)} bytes; fewer than {SIZE_LIMIT_BYTES} are allowed")


def loss_row(name: str, loss: Loss) -> str:
    """One line of the table of losses."""
    perplexity = math.exp(loss.per_token)
    return f"| {name} | {loss.num_tokens:,} | {loss.per_token:.3f} | {perplexity:.1f} | {loss.bits_per_byte:.3f} |"


def gap_rows(gaps: Gaps) -> str:
    """The table of gaps."""
    rows = [("smallest", f"{gaps.values[0]:.5f}")]
    rows += [(f"{share:.0%} are below", f"{gaps.quantile(share):.3f}") for share in (0.01, 0.05, 0.25, 0.5, 0.75)]
    rows += [(f"share below {limit}", f"{gaps.share_below(limit):.2%}") for limit in TIGHT_GAPS]
    return "\n".join(f"| {name} | {value} |" for name, value in rows)


def shown(sample: Sample) -> str:
    """One sample as a block: the method, then prompt and text with a mark between them."""
    end = "" if sample.ended else " …"
    return f"{sample.method}:\n\n```text\n{sample.prompt}▸{sample.text}{end}\n```\n"


CLOCK = """\
This run had `--minutes {minutes}` as well. Where the clock is ahead of the steps the schedule follows the clock, so a
repetition comes close to these weights but does not equal them bit for bit.

"""

CARD = """\
---
language: en
license: other
license_name: apache-2.0-and-psf-2.0
pipeline_tag: text-generation
library_name: transformers
tags:
- falcon
- demo
---

# eyas

A young falcon, still in the nest: the demo model that comes with Gyrfalcon. It is a real language model of the Falcon
architecture, {parameters} parameters small, trained from nothing on the documentation inside one Python
installation. It writes text that looks like Python's reference documentation, and answers questions about the standard
library in a chat. **What it says is not to be relied on.**

It is made for showing a server at work without a download, for tests that compare tokens exactly, and as the smallest
member of a benchmark. It is not made for answering questions, for writing code, or for any language but English.

## The model

| | |
|---|---|
| architecture | `FalconForCausalLM` in the layout of falcon-7b: rotary positions, multi-query, parallel attention |
| size | {layers} layers, hidden {hidden}, {heads} query heads of {head_size}, one key/value head, tied embeddings |
| parameters | {parameters}, stored as bfloat16, meant to be computed in float32 |
| context | {context} tokens |
| tokenizer | byte-level BPE, {vocabulary} entries, all 256 bytes: every text comes back exactly |
| end of text | `<|endoftext|>`, id {eos}; there is no beginning-of-text and no padding token |

The chat template is that of falcon-7b-instruct in spirit: an optional system text, then `User: ` and `Assistant: `
turns with a blank line between them, and a prompt that ends in `Assistant:`.

## Data and licence

All from CPython {python} ({system}), by `tools/train_eyas.py`:

- the docstrings of the standard library's Python modules with their signatures, and the longer comments between them;
- the docstrings of the modules written in C;
- the chapters of the language reference in `pydoc_data.topics`, and the Zen of Python;
- questions and answers made from the same docstrings, for the chat;
- some thirty short lines of our own, so that a greeting gets a reply.

Python's text is under the Python Software Foundation License Version 2, © Python Software Foundation; what the model
repeats from it stays so. The rest is under Gyrfalcon's licence, Apache-2.0.

| | documents | megabytes | tokens |
|---|---|---|---|
| training | {documents} | {megabytes} | {tokens} |
| held out | {documents_held_out} | {megabytes_held_out} | {tokens_held_out} |

About three in a hundred modules and chapters are held out, by a hash of their names, together with all conversations
about them; paragraphs that also occur in the training part are removed from them. SHA-256 of all documents:
`{sha256}`.

## Training

{steps} steps{planned} of {tokens_per_step} tokens ({epochs} times over the data), {minutes} minutes
on two shared CPU cores with torch {torch}: rows of {row_length} tokens, of {long_row_length} in the last {long_share};
float32 weights, bfloat16 arithmetic; Muon for the blocks' matrices at a peak rate of {matrix_rate}, AdamW for the rest
at {embedding_rate}; {warmup} steps of warm-up, then a cosine; weight decay {decay}, gradients clipped at {clip},
dropout {dropout}, seed {seed}. To do it again:

```sh
OMP_WAIT_POLICY=passive python tools/train_eyas.py --compile --out src/gyrfalcon/eyas
```

{clock}Another version of Python has other documents, and makes a slightly different model; another processor or
number of threads rounds differently, and does so too.

## Measured

On these files, in float32. Loss on the held-out documents, each read on its own from its beginning; it counts every
token but a document's first, the end of text included:

| held out | tokens | nats per token | perplexity | bits per byte |
|---|---|---|---|---|
{losses}

The mean training loss at the end was {train_loss} nats per token: much of what it has read, it knows by heart. On the
way, in nats per token (training: mean of the steps since the line before):

| step | training | held out |
|---|---|---|
{course}

The lowest of these held-out losses, {lowest_loss}, was at step {lowest_step}; the shipped weights are those of the
last step. For a demo, knowing its text by heart is worth some hundredths of held-out loss.

Gap between the best and the second-best logit along greedy continuations of {gap_tokens} tokens of {gap_prompts}
prompts, in float32, running on past the end of text. Two correct float32 implementations differ by some hundred
thousandths, so they agree on every token unless a gap is as small as that:

| gap | |
|---|---|
{gaps}

## What it cannot do

It has no knowledge of the world, cannot reason or count, cannot write a program, and follows no instruction except by
chance. Asked about a function that does not exist, it describes one. Asked about one it has not read of, or has half
forgotten, it does the same with equal confidence. Long texts wander and repeat themselves. It never saw more than
{context} tokens at once.

## Samples

As generated by these files, neither chosen nor edited; ▸ stands where the prompt ends, … where the text was cut at 90
tokens.

### Plain

{plain}
### Chat

{chat}"""
