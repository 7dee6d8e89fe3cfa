"""Where adapters of a base should begin, learned through their updates; it goes on from what start.py found.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/pretrain/meta_start.py \
        src/templora/models/novelist --data ../shared/data

start.py takes the gradients of the bare base and asks which directions are worth learning in. Here a text is
read as a session reads it, Adam, guard and all, and each chunk, scored before it is learned, says what would
have been better at the start. B is the sum of all updates so far, B = -Σ rate · (Gᵢ Aᵀ) / √v, so

- through them a chunk's loss has a gradient for A, -((G Aᵀ) / √v)ᵀ Σ rate Gᵢ, where v is taken as given;
- for the logarithm of the rate of each row of B: that row times its own gradient, added up;
- and for what B begins with: its own gradient, added up, as first-order MAML has it (arXiv 1803.02999).

G is the gradient of a layer's whole weight, [out, in]. Each text counts alike, and after each Adam takes a
step (hypergradients, as in arXiv 1703.04782, over the whole text so far). What B begins with must not be a
better base in disguise: the model card says what it is worth before anything is learned.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from data import Document, drop_overlapping, read_documents
from safetensors.torch import load_file, save_file
from start import FIRST, OVERLAP
from team import Team
from torch import Tensor, nn

import templora
from templora.base import Base
from templora.events import ChunkLearned, ChunkScored
from templora.injection import PEFT_PREFIX, Site, named
from templora.metrics import Tally
from templora.session import Session
from templora.start import B_RATE, FILE, A, B

WINDOW = 256  # tokens, and the context's
BEGINNING = 1024  # tokens
EARLY = 4  # updates after which v means something
FORGET = 0.998  # of earlier updates, a chunk: their rate was higher and v has changed since
# Steps on A by its own size, on B (2.5e-3 ran away), and on the logarithms of B's rates.
STEPS = {A: 0.05, B: 1.5e-3, B_RATE: 0.05}
LARGEST_LOG = 2.0
BETAS, DAMPING = (0.8, 0.95), 0.3  # of Adam; what is small against a text's whole gradient stays where it is


class Layer:
    """One layer of one text: what its chunks say of A, [rank, in], B, [out, rank], and B's rates, [out]."""

    def __init__(self, site: Site, rates: Tensor | None) -> None:
        self.site, self.rates = site, torch.ones(()) if rates is None else rates
        self.whole: Tensor | None = None  # this chunk's gradient of the weight, [out, in]
        self.path = torch.zeros(site.b.shape[0], site.a.shape[1])  # of the updates so far
        self.before = site.b.detach().clone()  # B as the chunk met it: an update always fits its own chunk
        self.a, self.b = torch.zeros_like(site.a), torch.zeros_like(site.b)
        self.log_rate = torch.zeros(len(site.b))

    def watch(self) -> torch.utils.hooks.RemovableHandle:
        """From now on each pass that is differentiated leaves the weight's gradient."""

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach().flatten(0, -2)
                output.register_hook(lambda slope: self._add(slope.flatten(0, -2).T @ x))

        return self.site.module.register_forward_hook(after)

    def _add(self, gradient: Tensor) -> None:
        self.whole = gradient if self.whole is None else self.whole + gradient

    @torch.no_grad()
    def learned(self, clip: float, rate: float, square: Tensor, *, counts: bool) -> None:
        """A chunk was learned.

        Args:
            clip, rate: what its gradient and its update were multiplied by. square: Adam's v, [out, rank].
            counts: whether what it says is added up.
        """
        if self.whole is None:
            return
        of_b = self.whole @ self.site.a.T
        if counts:
            self.b += clip * of_b
            self.log_rate += (of_b * self.before).sum(1)
            self.a -= (self.rates * of_b / (square.sqrt() + 1e-8)).T @ self.path
        self.path.mul_(FORGET).add_(self.whole, alpha=clip * rate)
        self.before.copy_(self.site.b)
        self.whole = None


def read(base: Base, ids: list[int], recipe: str) -> tuple[dict[str, Tensor], float, float]:
    """What one text says, by the names of what is learned, each of mean square 1; and its NLL per token.

    The last is that of its first tokens alone: if what B begins with runs away, it shows there alone.
    """
    session = base.session(recipe, seed=0, window=WINDOW, context=WINDOW)
    session.extend(ids, "")
    adapter, total, first = session.adapter, Tally(), Tally()
    layers = [Layer(site, rates) for site, rates in zip(adapter.sites, adapter.b_rates, strict=True)]
    with ExitStack() as stack:
        with adapter.attached():
            for layer in layers:
                stack.callback(layer.watch().remove)
        for event in session.learning():
            if isinstance(event, ChunkScored):
                total.add(event.adapted_nll, event.tokens)
                if event.start < BEGINNING:
                    first.add(event.adapted_nll, event.tokens)
            elif isinstance(event, ChunkLearned):
                _learned(session, layers, event)
    found = dict[str, Tensor]()
    for name, site in named(base.model, adapter.sites):
        (layer,) = (own for own in layers if own.site is site)
        key = name.removeprefix(PEFT_PREFIX)
        found |= {key + A: layer.a, key + B: layer.b, key + B_RATE: layer.log_rate}
    found = {name: g / (g.square().mean().sqrt() + 1e-20) for name, g in found.items()}
    return found, total.nll / total.tokens, first.nll / first.tokens


def _learned(session: Session, layers: list[Layer], event: ChunkLearned) -> None:
    recipe, learner = session.recipe, session.learner
    state = learner.optimizer.state[session.adapter.b]
    squares = state["exp_avg_sq"] / (1 - recipe.beta2 ** float(state["step"]))
    clip = min(1.0, (recipe.clip or float("inf")) / (event.gradient_norm + 1e-6))
    rates = learner.layer_rates.logs.exp() if learner.layer_rates else torch.ones(len(layers))
    rates = rates * event.share * event.learning_rate / recipe.learning_rate
    sizes = [layer.site.b.numel() for layer in layers]
    for layer, square, rate in zip(layers, squares.split(sizes), rates.tolist(), strict=True):
        counts = event.version > EARLY
        layer.learned(clip, rate, square.view_as(layer.site.b), counts=counts)


def pieces(documents: list[Document], base: Base, texts: int, tokens: int, team: Team) -> Iterator[list[int]]:
    """This process's share of the texts, each a piece from anywhere in a book."""
    places = random.Random(0)
    for number in range(texts):
        document, place = places.choice(documents), places.random()
        if number % team.size == team.rank:
            ids = base.encode(document.text)
            first = min(FIRST, len(ids) // 4)
            begin = first + int(place * max(0, len(ids) - first - tokens))
            yield ids[begin : begin + tokens]


def optimizer(values: dict[str, nn.Parameter], rounds: int) -> Callable[[], None]:
    """A step on all values along their gradients; steps get shorter, down to a fifth."""
    kinds = [next(kind for kind in STEPS if name.endswith(kind)) for name in values]
    sizes = [
        float(value.detach().std()) if kind == A else 1.0
        for value, kind in zip(values.values(), kinds, strict=True)
    ]
    rates = [STEPS[kind] * size for kind, size in zip(kinds, sizes, strict=True)]
    groups = [{"params": [value], "lr": rate} for value, rate in zip(values.values(), rates, strict=True)]
    adam = torch.optim.Adam(groups, betas=BETAS, eps=DAMPING)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.2, max(1, rounds))

    def step() -> None:
        adam.step()
        schedule.step()

    return step


@torch.no_grad()
def start_of(values: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """What sessions begin with: A as it is, rates in place of their logarithms."""
    for name, value in values.items():
        if name.endswith(B_RATE):
            value.clamp_(-LARGEST_LOG, LARGEST_LOG)
    return {n: v.exp() if n.endswith(B_RATE) else v.clone() for n, v in values.items()}


def main() -> None:
    """Read the command line; write the file beside the weights, anew after each text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--tokens", type=int, default=8192, help="of each")
    parser.add_argument("--out", type=Path, help="by default MODEL/start.safetensors")
    args = parser.parse_args()
    team, out = Team.join(), args.out or args.model / FILE
    part = out.with_suffix(".part")
    base = templora.load(str(args.model))
    unseen = [args.data / "novels.dev.jsonl.xz", *sorted(args.data.glob("pg19/*.txt.xz"))]
    documents = drop_overlapping(read_documents(args.data / "novels.train.jsonl.xz"), unseen, OVERLAP)
    start = {name: value.float() for name, value in load_file(args.model / FILE).items()}
    for layer in [name.removesuffix(A) for name in start if name.endswith(A)]:
        out_features = base.model.get_submodule(layer).out_features
        start.setdefault(layer + B, torch.zeros(out_features, len(start[layer + A])))
        start[layer + B_RATE] = start.get(layer + B_RATE, torch.ones(out_features)).log()
    values = {name: nn.Parameter(value) for name, value in start.items()}
    base.start, rounds = start_of(values), args.texts // team.size
    step = optimizer(values, rounds)
    for number, ids in enumerate(pieces(documents, base, rounds * team.size, args.tokens, team)):
        found, *nll = read(base, ids, args.recipe)
        for name, value in values.items():
            value.grad = found[name]
        team.average(values.values())
        step()
        base.start, (mean, first) = start_of(values), map(team.mean, nll)
        if team.leads:
            save_file({name: value.half().contiguous() for name, value in base.start.items()}, part)
            os.replace(part, out)  # a kill half-way leaves the last file whole
            print(f"{number + 1}/{rounds} {mean:.4f} nats, first {BEGINNING} tokens {first:.4f}", flush=True)


if __name__ == "__main__":
    main()
