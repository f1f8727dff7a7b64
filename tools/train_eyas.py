"""Make eyas, the demo model in the package, from nothing but a Python installation.

    python tools/train_eyas.py --out src/gyrfalcon/eyas

collects the corpus, learns the tokenizer, trains the model, exports it as a Hugging Face folder, checks it against
`transformers`, measures it, and writes its model card with the figures and samples.

Corpus: what the running CPython says about itself: the standard library's docstrings, signatures and longer comments,
the language reference of `pydoc_data.topics`, and short conversations made from the docstrings; `eyas_corpus.py` says
precisely what. Its licence is Python's own, PSF-2.0. Some 5.5 MB, 1.6 million tokens; a few per cent of the modules are
held out to measure with. It depends on the version of Python: the shipped model was made with the one its card names.

Recipe: `eyas_training.Recipe` holds every number; the model is `eyas_model.Shape`. Seeds are fixed: the same Python,
torch, processor type and number of threads give the same weights, as long as the steps, not `--minutes`, end the run.

Time: about 40 minutes on two shared cores that have bfloat16 matrix instructions, several times that on ones that have
not. `--compile` saves a fifth. On a machine that does other work too, set OMP_WAIT_POLICY=passive in the environment:
threads that spin while they wait for a core made a step four times as long.
Interrupted, it goes on from its last checkpoint in `--work`, if started again with the same options.

Needs: torch, transformers, tokenizers, safetensors, numpy; no network, no accelerator.
"""

import argparse
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer

from eyas_card import Checkpoint, write_card
from eyas_corpus import Corpus, collect_corpus
from eyas_model import Eyas, Shape, num_parameters, save_model
from eyas_tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from eyas_training import Recipe, Tokenized, Trainer, tokenize_documents

LOGIT_TOLERANCE = 1e-3  # between our float32 logits and those of transformers, on the same weights


def main() -> None:
    """Corpus, tokenizer, training, export, check, card."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)

    corpus = collect_corpus()
    tokenizer = train_tokenizer(document.text for document in corpus.train)
    train, held_out = (tokenize_documents(part, tokenizer) for part in (corpus.train, corpus.held_out))
    describe(corpus, train, held_out)

    trainer = Trainer(Shape(), Recipe(steps=options.steps), options.minutes, compiled=options.compile)
    checkpoint = options.work / f"eyas-{corpus.sha256()[:12]}.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
        print(f"going on from step {trainer.step}")
    trainer.run(train, held_out, checkpoint)

    export(trainer.model, tokenizer, options.out)
    compare_with_transformers(trainer.model, options.out)
    write_card(options.out, corpus, train, held_out, trainer)
    print(f"{num_parameters(trainer.model):,} parameters in {options.out}")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets the finished checkpoint")
    parser.add_argument("--work", type=Path, default=Path("build/eyas"), help="folder for the training state")
    parser.add_argument("--steps", type=int, default=2600, help="length of the training run")
    parser.add_argument("--minutes", type=float, help="end the schedule by this training time even if steps are left")
    parser.add_argument("--compile", action="store_true", help="fuse the training step (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=2, help="processor threads")
    return parser.parse_args()


def describe(corpus: Corpus, train: list[Tokenized], held_out: list[Tokenized]) -> None:
    """Print what the model will learn from."""
    for name, documents in (("training", train), ("held out", held_out)):
        num_tokens, num_bytes = sum(len(d.ids) for d in documents), sum(d.num_bytes for d in documents)
        print(f"{name}: {len(documents)} documents, {num_bytes} bytes, {num_tokens} tokens")
    print(f"corpus sha256 {corpus.sha256()}", flush=True)


def export(model: Eyas, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder, all files or none: a reader never finds half a checkpoint."""
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_tokenizer(tokenizer, fresh)
    save_model(model, fresh, tokenizer.token_to_id(END_OF_TEXT))
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(fresh.iterdir()):
        path.replace(folder / path.name)
    fresh.rmdir()


@torch.inference_mode()
def compare_with_transformers(model: Eyas, folder: Path) -> None:
    """Raise ValueError unless transformers computes from the folder what we compute from the same rounded weights."""
    for weight in model.parameters():
        weight.copy_(weight.to(torch.bfloat16))
    model.eval()
    theirs = Checkpoint(folder).model
    ids = torch.randint(model.shape.vocabulary, (2, model.shape.context), generator=torch.Generator().manual_seed(0))
    difference = (model(ids) - theirs(ids).logits).abs().max().item()
    print(f"largest difference from the logits of transformers: {difference:.2g}")
    if difference > LOGIT_TOLERANCE:
        raise ValueError(f"logits differ from those of transformers by {difference}")


if __name__ == "__main__":
    main()
