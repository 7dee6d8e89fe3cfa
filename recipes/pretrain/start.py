"""Where adapters of a base should begin: for each layer the directions in which books differ.

    python recipes/pretrain/start.py src/templora/models/novelist --data ../shared/data

An adapter's A chooses in which directions of a layer's input B may learn. Chosen at random they are mostly
noise. Over chunks of a book, the gradient of a layer's weight has a part that all chunks share (what there
is to learn of this book) and a part that is each chunk's own. Products of the gradients of *different* chunks
of one book estimate the first, products of each chunk's gradient with itself both together; added up over
many books, the directions in which their ratio is largest come first (a generalised eigenvalue problem).
Scaled so that noise is alike in all of them, they are what `start: learned` begins with.

The texts are those that were held out from the base's training: on others it has learned what there is to
learn. Those that share much with the dev novels or PG19 are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from data import drop_overlapping, hold_out, read_documents
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

from templora.start import FILE, A

CONTEXT, CHUNK = 256, 64  # tokens: what a chunk sees before it, and what it is
FIRST = 2000  # tokens that are passed over: title pages are alike and no part of the book
HOLD_OUT = 6  # every sixth novel, which the base has not seen
OVERLAP = 0.01  # share of 13-word runs that a book may have in common with those that are measured
DAMPING = 1e-3  # of the noise's mean: directions that hardly occur are no gain


class Moments:
    """What gradients of one layer's weight come to, over many books.

    signal, noise: [in, in], products over different chunks of a book, and of each chunk with itself.
    """

    def __init__(self, width: int) -> None:
        self.signal, self.noise = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        self._begin()

    def _begin(self) -> None:
        self._total: Tensor | float = 0.0
        self._own: Tensor | float = 0.0
        self._chunks = 0

    def add(self, gradient: Tensor) -> None:
        """Add a chunk of the book at hand, [out, in]."""
        self._total = self._total + gradient
        self._own = self._own + gradient.T @ gradient
        self._chunks += 1

    def end_book(self) -> None:
        """The next chunk is of another book."""
        if self._chunks > 1:
            different = self._total.T @ self._total - self._own
            self.signal += (different / (self._chunks * (self._chunks - 1))).cpu()
            self.noise += (self._own / self._chunks).cpu()
        self._begin()

    def directions(self, rows: int) -> Tensor:
        """The best ones first, [rows, in]; noise is alike in all, and as in PEFT's random rows."""
        width = len(self.noise)
        damping = DAMPING * self.noise.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        whitened = torch.linalg.inv(torch.linalg.cholesky(self.noise + damping))
        _, vectors = torch.linalg.eigh(whitened @ self.signal @ whitened.T)  # the largest ratio last
        found = vectors.flip(1)[:, :rows].T @ whitened  # noise 1 in each
        usual = self.noise.trace() / (3 * width)  # in a row of uniform numbers up to 1 / sqrt(in)
        return found * usual.sqrt()


def layers(model: LlamaForCausalLM, first_block: float) -> dict[str, nn.Parameter]:
    """The weights of the upper blocks' linear layers by name, and of the head, which may be tied, a copy."""
    blocks = model.model.layers
    found = {
        name: module.weight
        for block in range(round(first_block * len(blocks)), len(blocks))
        for name, module in blocks[block].named_modules(prefix=f"model.layers.{block}")
        if isinstance(module, nn.Linear)
    }
    model.requires_grad_(False)
    for weight in found.values():
        weight.requires_grad_()
    return found | {"lm_head": nn.Parameter(model.lm_head.weight.detach().clone())}


def gradients(
    model: LlamaForCausalLM, weights: dict[str, nn.Parameter], ids: list[int], chunks: int
) -> Iterator[dict[str, Tensor]]:
    """Of each layer, [out, in], for one chunk of a book after another: of its mean NLL under the base.

    Every other chunk is taken, as many as there are and at most `chunks`.
    """
    ids = ids[FIRST:] if len(ids) > 2 * FIRST else ids
    for start in range(CONTEXT, len(ids) - CHUNK, 2 * CHUNK)[:chunks]:
        row = torch.tensor([ids[start - CONTEXT : start + CHUNK]], device=model.device)
        hidden = model.model(row[:, :-1], use_cache=False).last_hidden_state[0, -CHUNK:]
        loss = cross_entropy(hidden @ weights["lm_head"].T, row[0, -CHUNK:])
        yield dict(zip(weights, torch.autograd.grad(loss, [*weights.values()]), strict=True))


def main() -> None:
    """Read the command line; write the file beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--hold-out", type=int, default=HOLD_OUT, help="as of the base's own configuration")
    parser.add_argument("--books", type=int, default=36, help="at most, spread over all that there are")
    parser.add_argument("--chunks", type=int, default=256, help="of each book")
    parser.add_argument("--rows", type=int, default=64, help="rows of A: the largest rank that will use them")
    parser.add_argument("--first-block", type=float, default=0.17, help="as of the recipe; the head always")
    parser.add_argument("--out", type=Path, help="by default MODEL/start.safetensors")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    unseen = [args.data / "novels.dev.jsonl.xz", *sorted(args.data.glob("pg19/*.txt.xz"))]
    _, documents = hold_out(read_documents(args.data / "novels.train.jsonl.xz"), args.hold_out)
    documents = drop_overlapping(documents, unseen, OVERLAP)
    weights = layers(model, args.first_block)
    moments = {name: Moments(weight.shape[1]) for name, weight in weights.items()}
    documents = documents[:: max(1, len(documents) // args.books)][: args.books]
    for number, document in enumerate(documents):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids
        for chunk in gradients(model, weights, ids, args.chunks):
            for name, gradient in chunk.items():
                moments[name].add(gradient)
        for own in moments.values():
            own.end_book()
        print(f"{number + 1}/{len(documents)} {document.title}", flush=True)
    rows = {name + A: own.directions(args.rows).half().contiguous() for name, own in moments.items()}
    save_file(rows, args.out or args.model / FILE)


if __name__ == "__main__":
    main()
