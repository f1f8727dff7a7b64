"""The training loop of eyas: rows of tokens, the schedule, the held-out loss, checkpoints to resume from."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from eyas_corpus import Document
from eyas_model import Eyas, Shape
from eyas_tokenizer import END_OF_TEXT

IGNORED = -100  # cross_entropy's own mark for a target that does not count


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the weights depend on besides the corpus and the shape."""

    steps: int
    seed: int = 7
    tokens_per_step: int = 4096
    row_length: int = 256
    long_row_length: int = 1024  # for the last part, so that late positions are trained too
    long_rows_from: float = 0.75
    warmup_steps: int = 100
    matrix_rate: float = 4e-3
    embedding_rate: float = 3e-3
    final_rate_fraction: float = 0.01
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    dropout: float = 0.0
    steps_per_evaluation: int = 400


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One document as token ids, the end of text included, and which of them are to be learned."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    learned: np.ndarray[Any, np.dtype[np.bool_]]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss over whole documents."""

    nats: float
    num_tokens: int
    num_bytes: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; independent of the tokenizer."""
        return self.nats / math.log(2) / self.num_bytes


def tokenize_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Tokenized]:
    """Encode every document on its own and end it."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenized = []
    for document, encoding in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
        learned = np.ones(len(encoding.ids) + 1, dtype=np.bool_)
        for start, stop in document.unlearned:
            learned[:-1] &= [not (start <= first < stop) for first, _ in encoding.offsets]
        ids = np.array([*encoding.ids, end], dtype=np.int64)
        tokenized.append(Tokenized(ids, learned, len(document.text.encode())))
    return tokenized


def rows(documents: Sequence[Tokenized], length: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets) of `length` tokens for ever, the documents in a new order every epoch.

    A short document that a row cuts off begins again in the next row, so that many rows open with the beginning of a
    document as prompts do; a long one goes on where it was cut.
    """
    order = np.random.default_rng([seed, length])
    row_ids: list[np.ndarray[Any, Any]] = []
    row_learned: list[np.ndarray[Any, Any]] = []
    filled = 0
    while True:
        for index in order.permutation(len(documents)):
            document, start = documents[index], 0
            while start < len(document.ids):
                taken = min(length + 1 - filled, len(document.ids) - start)
                row_ids.append(document.ids[start : start + taken])
                row_learned.append(document.learned[start : start + taken])
                filled += taken
                cut_short = start + taken < len(document.ids)
                if filled == length + 1:
                    ids, learned = np.concatenate(row_ids), np.concatenate(row_learned)
                    targets = np.where(learned, ids, IGNORED)
                    yield torch.from_numpy(ids[:-1]), torch.from_numpy(targets[1:])
                    row_ids, row_learned, filled = [], [], 0
                    if cut_short and len(document.ids) <= length // 2:
                        start = 0
                    else:
                        start += taken - cut_short  # the last target of a row is the first input of the next
                else:
                    start += taken


def batches(documents: Sequence[Tokenized], length: int, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows in steps of `tokens_per_step` tokens."""
    stream = rows(documents, length, recipe.seed)
    while True:
        step = [next(stream) for _ in range(recipe.tokens_per_step // length)]
        yield torch.stack([row[0] for row in step]), torch.stack([row[1] for row in step])


class Trainer:
    """Owns the weights, the optimizers and the clock of one training run."""

    def __init__(self, shape: Shape, recipe: Recipe, minutes: float | None, *, compiled: bool = False) -> None:
        """minutes: wall time after which the schedule ends even if steps are left; None for no limit.

        compiled: let `torch.compile` fuse the step, which needs a C++ compiler and saves a fifth of the time.
        """
        torch.manual_seed(recipe.seed)
        self.recipe, self.minutes = recipe, minutes
        self.model = Eyas(shape, recipe.dropout)
        self.optimizers = make_optimizers(self.model, recipe)
        self.loss = torch.compile(training_loss, dynamic=False) if compiled else training_loss
        self.step, self.long_steps, self.elapsed_s = 0, 0, 0.0
        self.log: list[dict[str, float]] = []

    @property
    def progress(self) -> float:
        """Share of the run that is done, by steps or by the clock, whichever is ahead."""
        by_clock = self.elapsed_s / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(self.step / self.recipe.steps, by_clock))

    def run(self, train: Sequence[Tokenized], held_out: Sequence[Tokenized], checkpoint: Path) -> None:
        """Train to the end of the schedule, with a checkpoint at every evaluation."""
        short = batches(train, self.recipe.row_length, self.recipe)
        long = batches(train, self.recipe.long_row_length, self.recipe)
        for _ in range(self.step - self.long_steps):
            next(short)
        for _ in range(self.long_steps):
            next(long)
        running: list[float] = []
        while self.progress < 1.0:
            started = time.monotonic()
            late = self.progress >= self.recipe.long_rows_from
            running.append(self.learn(*next(long if late else short)))
            self.step += 1
            self.long_steps += late
            self.elapsed_s += time.monotonic() - started
            if self.step % self.recipe.steps_per_evaluation == 0 or self.progress >= 1.0:
                self.report(sum(running) / len(running), evaluate(self.model, held_out))
                running = []
                self.save(checkpoint)

    def learn(self, inputs_BT: Tensor, targets_BT: Tensor) -> float:
        """One step; returns its loss in nats per learned token."""
        self.model.train()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate_fraction()
        loss = self.loss(self.model, inputs_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def rate_fraction(self) -> float:
        """Learning rate as a share of its peak: a linear warm-up, then half a cosine."""
        warmup = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        final = self.recipe.final_rate_fraction
        return warmup * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * self.progress)))

    def report(self, train_loss: float, held_out: Loss) -> None:
        """Log and print one evaluation."""
        line = {
            "step": self.step,
            "minutes": round(self.elapsed_s / 60, 2),
            "train_loss": round(train_loss, 4),
            "held_out_loss": round(held_out.per_token, 4),
        }
        self.log.append(line)
        print(line, flush=True)

    def save(self, path: Path) -> None:
        """Write what `resume` needs, never leaving half a file behind."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": (self.step, self.long_steps, self.elapsed_s),
            "log": self.log,
            "generator": torch.get_rng_state(),
        }
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def resume(self, path: Path) -> None:
        """Go back to where `save` was called."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.long_steps, self.elapsed_s = state["counters"]
        self.log = state["log"]
        torch.set_rng_state(state["generator"])


def training_loss(model: Eyas, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean loss of the learned tokens, in nats; the matrices are multiplied in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_BTV = model(inputs_BT)
    return functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)


def make_optimizers(model: Eyas, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".h." in name]
    embedding = [model.transformer.word_embeddings.weight]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": embedding, "peak": recipe.embedding_rate, "weight_decay": recipe.weight_decay},
        {"params": norms, "peak": recipe.embedding_rate, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(
        [{"params": matrices, "peak": recipe.matrix_rate}],
        weight_decay=recipe.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)]


@torch.inference_mode()
def evaluate(model: Eyas, documents: Sequence[Tokenized]) -> Loss:
    """Loss over every token of the documents but the first of each, each document read on its own from position 0.

    A document longer than the context is read in pieces. The matrices are multiplied in bfloat16: good enough to watch
    the training by; the model card's figures are computed in float32.
    """
    model.eval()
    context = model.shape.context
    pieces = [d.ids[i : i + context + 1] for d in documents for i in range(0, len(d.ids) - 1, context)]
    pieces.sort(key=len)
    nats, num_tokens = 0.0, 0
    while pieces:
        count = max(1, 8192 // len(pieces[-1]))
        batch, pieces = pieces[-count:], pieces[:-count]
        ids_BT = torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(piece) for piece in batch], batch_first=True, padding_value=IGNORED
        )
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = model(ids_BT[:, :-1].clamp(min=0))
        targets = ids_BT[:, 1:].flatten()
        total = functional.cross_entropy(
            logits_BTV.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"
        )
        nats += total.item()
        num_tokens += int((targets != IGNORED).sum())
    return Loss(nats, num_tokens, sum(document.num_bytes for document in documents))
