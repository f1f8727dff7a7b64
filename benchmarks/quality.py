"""What quantisation costs in quality: perplexity and agreement with the same weights in float32.

    python benchmarks/quality.py [--tokens 92000] [--threads 2] [--forms falcon-7b,falcon-40b,...]

Text: the held-out part of the corpus that eyas was trained on, which `tools/eyas_corpus.py` collects anew from the
Python that runs this. With another Python than the model's card names some paragraphs differ; none of them was trained
on. The model is the bundled eyas. Each precision reads every document from its beginning, in pieces of at most the
context; compared are, position by position, the next token's probability and the likeliest token.

With --forms also tiny checkpoints of the published models' architectures, of random weights, on random tokens: as no
text is likelier than another there, only agreement and divergence are shown. Their widths of 64 to 128 leave one or two
groups a row; the logits of random weights lie close together, so that agreement is a harder test than on text.

The head is measured apart from the blocks: codes of 8 bits, as `--quantize` has them, and as it was trained.
Kernels are those that the server would use; GYRFALCON_CPU_KERNELS=off measures the plain operations.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from gyrfalcon.kernels.quantised import product, quantise_int8
from gyrfalcon.kernels.select import select_ops
from gyrfalcon.models.decoder import CausalLM
from gyrfalcon.models.registry import load_model
from gyrfalcon.models.spec import embedding_name
from gyrfalcon.testing.checkpoints import write_checkpoint
from gyrfalcon.testing.paged import PagedRows

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "tools"))

from eyas_corpus import collect_corpus  # noqa: E402 - it lies in tools/, which is no package

EYAS = REPOSITORY / "src" / "gyrfalcon" / "eyas"
BLOCK_SIZE = 32
TOKENS_AT_ONCE = 2048
RANDOM_ROWS, RANDOM_TOKENS = 16, 256


@dataclass(frozen=True, slots=True)
class Precision:
    """One way to load a model."""

    name: str
    dtype: str
    quantize: str | None = None
    group: int = 64


PRECISIONS = (
    Precision("float32", "float32"),
    Precision("bfloat16", "bfloat16"),
    Precision("int8", "float32", "int8"),
    Precision("int4, groups of 32", "float32", "int4", 32),
    Precision("int4, groups of 64", "float32", "int4", 64),
    Precision("int4, groups of 128", "float32", "int4", 128),
    Precision("int8, bfloat16 beside it", "bfloat16", "int8"),
    Precision("int4, groups of 64, bfloat16 beside it", "bfloat16", "int4", 64),
)


@dataclass(slots=True)
class Score:
    """Sums over the positions of a text."""

    nats: float = 0.0  # of the text's own tokens
    divergence: float = 0.0  # nats that coding with these probabilities costs beyond float32's own
    agreed: int = 0  # positions whose likeliest token is float32's
    positions: int = 0

    def add(self, logits_NV: Tensor, expected_NV: Tensor, targets_N: Tensor) -> None:
        logs_NV, expected_logs_NV = logits_NV.log_softmax(-1), expected_NV.log_softmax(-1)
        self.nats += F.nll_loss(logs_NV, targets_N, reduction="sum").item()
        self.divergence += F.kl_div(logs_NV, expected_logs_NV, reduction="sum", log_target=True).item()
        self.agreed += int((logits_NV.argmax(-1) == expected_NV.argmax(-1)).sum())
        self.positions += len(targets_N)

    def cells(self, with_perplexity: bool) -> str:
        perplexity = f"{math.exp(self.nats / self.positions):.2f} | " if with_perplexity else ""
        return f"{perplexity}{self.agreed / self.positions:.1%} | {self.divergence / self.positions:.5f}"


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=100_000, help="most tokens of the held-out text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--forms", default="falcon-7b,falcon-40b,falcon-11b,falcon-rw,llama,falcon3")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    pieces = held_out_pieces(options.tokens)
    print(f"\n## eyas on {sum(len(piece) - 1 for piece in pieces):,} tokens of held-out text\n")
    print("| blocks | head | perplexity | same likeliest token | divergence, nats |\n| --- | --- | --- | --- | --- |")
    measure(EYAS, pieces, options.threads, with_perplexity=True)
    for form in filter(None, options.forms.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            random_ids = np.random.default_rng(0).integers(1, 384, (RANDOM_ROWS, RANDOM_TOKENS + 1))
            write_checkpoint(Path(folder), form)
            print(f"\n## {form}, random weights\n")
            print("| blocks | head | same likeliest token | divergence, nats |\n| --- | --- | --- | --- |")
            measure(Path(folder), list(random_ids), options.threads, with_perplexity=False)


def held_out_pieces(most: int) -> list[np.ndarray]:
    """Token ids of the held-out documents, cut to the context; a piece begins with the last token of the one before."""
    from tokenizers import Tokenizer

    corpus = collect_corpus()
    print(
        f"Python {sys.version.split()[0]}, corpus sha256 {corpus.sha256()}, {len(corpus.held_out)} documents held out"
    )
    tokenizer = Tokenizer.from_file(str(EYAS / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    pieces: list[np.ndarray] = []
    for encoding in tokenizer.encode_batch([document.text for document in corpus.held_out]):
        ids = np.array([*encoding.ids, end], dtype=np.int64)
        pieces += [ids[start : start + 1025] for start in range(0, len(ids) - 1, 1024)]
    sizes = np.cumsum([len(piece) - 1 for piece in pieces])
    return pieces[: int(np.searchsorted(sizes, most, side="right"))]


def measure(folder: Path, pieces: Sequence[np.ndarray], threads: int, *, with_perplexity: bool) -> None:
    """Print a row for each precision and head."""
    ops = select_ops("cpu", block_size=BLOCK_SIZE, num_threads=threads)
    reference = load_model(folder, dtype="float32", device="cpu", ops=ops)
    tensors = load_file(folder / "model.safetensors")
    spec = reference.spec
    head_VD = tensors[embedding_name(spec) if spec.tied_head else "lm_head.weight"].float()
    codes = quantise_int8(head_VD)
    heads: dict[str, Callable[[Tensor], Tensor]] = {
        "as trained": lambda hidden: hidden.float() @ head_VD.t(),
        "int8": lambda hidden: product(hidden, codes),
    }
    models = [
        load_model(folder, dtype=each.dtype, device="cpu", ops=ops, quantize=each.quantize, group=each.group)
        for each in PRECISIONS
    ]
    scores = [{head: Score() for head in heads} for _ in PRECISIONS]
    for some in batches(pieces):
        targets_N = torch.from_numpy(np.concatenate([piece[1:] for piece in some]))
        expected_NV = heads["as trained"](hidden_states(reference, some))
        for model, of_heads in zip(models, scores, strict=True):
            hidden_ND = hidden_states(model, some)
            for head, score in of_heads.items():
                score.add(heads[head](hidden_ND), expected_NV, targets_N)
    for precision, of_heads in zip(PRECISIONS, scores, strict=True):
        for head, score in of_heads.items():
            print(f"| {precision.name} | {head} | {score.cells(with_perplexity)} |", flush=True)


def batches(pieces: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """The pieces, some at a time."""
    some: list[np.ndarray] = []
    for piece in pieces:
        if some and sum(map(len, some)) + len(piece) > TOKENS_AT_ONCE:
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def hidden_states(model: CausalLM, pieces: Sequence[np.ndarray]) -> Tensor:
    """Hidden states of every token but the pieces' last, one step for all."""
    rows = PagedRows(len(pieces), max(map(len, pieces)), block_size=BLOCK_SIZE)
    spec = model.spec
    caches = rows.empty_caches(spec.num_layers, spec.num_kv_heads, spec.head_size, model.cache_dtype)
    step = rows.grow({row: len(piece) - 1 for row, piece in enumerate(pieces)})
    ids_T = torch.from_numpy(np.concatenate([piece[:-1] for piece in pieces]))
    return model.forward(ids_T, step.positions_T, step.attention, caches)


if __name__ == "__main__":
    main()
