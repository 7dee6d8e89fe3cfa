"""Where adapters of a base should begin, learned through their updates; it goes on from what start.py found.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/pretrain/meta_start.py \
        src/templora/models/novelist --data ../shared/data

start.py takes the gradients of the bare base and asks which directions are worth learning in. Here a text is
read as a session reads it, Adam, guard and all, and each chunk, scored before it is learned, says what would
have been better at the start. What Adam divides by is known before the text begins (RMS_A and RMS_B in the
file), so B is what it began with less all updates, B = B₀ - Σ rate · Gᵢ Aᵀ / RMS_B, and through them the loss
of a chunk has a gradient

- for A: -(G Aᵀ / RMS_B)ᵀ Σ rate Gᵢ, and Bᵀ G;
- for what B begins with: G Aᵀ, as first-order MAML has it (arXiv 1803.02999);
- for the logarithms of RMS_B and RMS_A: B's, and A's, own gradient times what they have come, with a minus.

G is the gradient of a layer's whole weight, [out, in]. What a text has learned by now repairs much of how it
began, so the direct gradients of A and B₀ count less with each chunk. Each text counts alike, and after each
one Adam takes a step (hypergradients, as in arXiv 1703.04782, over the whole text so far). What B begins with
must not be a better base in disguise: the model card says what it is worth before anything is learned.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import torch
from data import Document, drop_overlapping, hold_out, read_documents
from safetensors.torch import load_file, save_file
from squares import SQUARES_FROM, WINDOW, expected
from start import FIRST, HOLD_OUT, OVERLAP
from team import Team
from torch import Tensor, nn

import templora
from templora.base import Base
from templora.events import ChunkLearned, ChunkScored
from templora.injection import PEFT_PREFIX, Site, named
from templora.metrics import Tally
from templora.session import Session
from templora.start import FILE, RMS_A, RMS_B, A, B

BEGINNING = 1024  # tokens
ROWS = ".lora_B.rows"  # by what RMS_B's rows have changed: they are surer than its numbers
FORGET = 0.999  # of earlier updates, a chunk: Adam's squares do change a little
REPAIRED = 0.97  # of what the beginning counts for directly, a chunk; without it B ran away
TEXTS_A_STEP = 2  # that these are for: on A by its own size, on B, and on logarithms
STEPS = {A: 0.05, B: 1e-3, RMS_A: 0.02, RMS_B: 0.02, ROWS: 0.04}
LOGS = (RMS_A, RMS_B, ROWS)
BETAS, DAMPING = (0.8, 0.95), 0.3  # of Adam; what is small against a text's whole gradient stays where it is


class Layer:
    """One layer of one text: what its chunks say, under the names of the file.

    rates: of B's numbers, [out, rank]: by what its gradient is multiplied.
    """

    def __init__(self, site: Site, rates: Tensor) -> None:
        self.site, self.rates = site, rates
        self.whole: Tensor | None = None  # this chunk's gradient of the weight, [out, in]
        self.path = torch.zeros(site.b.shape[0], site.a.shape[1])  # of the updates so far
        self.begun = (site.a.detach().clone(), site.b.detach().clone())
        self.before = self.begun  # as the chunk met them: an update always fits its own chunk
        self.direct = 1.0
        self.found = {
            A: torch.zeros_like(site.a),
            B: torch.zeros_like(site.b),
            RMS_A: torch.zeros_like(site.a),
            RMS_B: torch.zeros_like(site.b),
        }

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
    def learned(self, clip: float, rate: float) -> None:
        """A chunk was learned; clip, rate: what its gradient and its update were multiplied by."""
        if self.whole is None:
            return
        (a, b), (first_a, first_b), whole = self.before, self.begun, clip * self.whole
        of_a, of_b = b.T @ whole, whole @ a.T
        self.found[A] += self.direct * of_a - (self.rates * of_b).T @ self.path
        self.found[B] += self.direct * of_b
        self.found[RMS_A] -= of_a * (a - first_a)
        self.found[RMS_B] -= of_b * (b - first_b)
        self.path.mul_(FORGET).add_(whole, alpha=rate)
        self.direct *= REPAIRED
        self.before = (self.site.a.detach().clone(), self.site.b.detach().clone())
        self.whole = None


def read(base: Base, ids: list[int], recipe: str) -> tuple[dict[str, Tensor], float, float]:
    """What one text says, by the names of what is learned, each of mean square 1; and its NLL per token.

    The last is that of its first tokens alone: if what B begins with runs away, it shows there alone.
    """
    session = base.session(recipe, seed=0, window=WINDOW, context=WINDOW)
    session.extend(ids, "")
    adapter, total, first = session.adapter, Tally(), Tally()
    if adapter.squares is None:
        raise SystemExit(f"recipe {recipe} does not use what {FILE} says; it needs start: learned")
    squares = adapter.squares[1].split([site.b.numel() for site in adapter.sites])
    layers = [
        Layer(site, own.rsqrt().view_as(site.b)) for site, own in zip(adapter.sites, squares, strict=True)
    ]
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
        of_rows = layer.found[RMS_B].sum(1, keepdim=True)
        found |= {
            name.removeprefix(PEFT_PREFIX) + kind: g for kind, g in (layer.found | {ROWS: of_rows}).items()
        }
    found = {name: g / (g.square().mean().sqrt() + 1e-20) for name, g in found.items()}
    return found, total.nll / total.tokens, first.nll / first.tokens


def _learned(session: Session, layers: list[Layer], event: ChunkLearned) -> None:
    recipe, learner = session.recipe, session.learner
    clip = min(1.0, (recipe.clip or float("inf")) / (event.gradient_norm + 1e-6))
    rates = learner.layer_rates.logs.exp() if learner.layer_rates else torch.ones(len(layers))
    for layer, rate in zip(layers, rates.tolist(), strict=True):
        layer.learned(clip, rate * event.share * event.learning_rate * recipe.b_rate)


def pieces(
    documents: list[Document], base: Base, texts: int, tokens: int, team: Team, seed: int
) -> Iterator[list[int]]:
    """This process's share of the texts, each a piece from anywhere in a book."""
    places = random.Random(seed)
    for number in range(texts):
        document, place = places.choice(documents), places.random()
        if number % team.size == team.rank:
            ids = base.encode(document.text)
            first = min(FIRST, len(ids) // 4)
            begin = first + int(place * max(0, len(ids) - first - tokens))
            yield ids[begin : begin + tokens]


def optimizer(values: dict[str, nn.Parameter], texts_a_step: int) -> Callable[[float], None]:
    """A step on all values along their gradients, shorter with the share of the run, down to a fifth.

    What more texts say together is surer, and steps are longer by the root of their number.
    """
    longer = (texts_a_step / TEXTS_A_STEP) ** 0.5
    groups = [
        {
            "params": [value],
            "peak": longer * STEPS[kind] * (float(value.detach().std()) if kind == A else 1.0),
        }
        for name, value in values.items()
        for kind in STEPS
        if name.endswith(kind)
    ]
    adam = torch.optim.Adam(groups, betas=BETAS, eps=DAMPING)

    def step(share: float) -> None:
        for group in adam.param_groups:
            group["lr"] = group["peak"] * (1 - 0.8 * share)
        adam.step()

    return step


def learnable(start: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """What is learned: A and B as they are, what Adam divides by as its logarithm, and that of its rows."""
    values = {name: value.log() if name.endswith(LOGS) else value.clone() for name, value in start.items()}
    for layer in [name.removesuffix(A) for name in start if name.endswith(A)]:
        width = values[layer + RMS_B].shape
        values.setdefault(layer + B, torch.zeros(width))
        values[layer + ROWS] = torch.zeros(width[0], 1)
    return {name: nn.Parameter(value) for name, value in values.items()}


@torch.no_grad()
def start_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What sessions begin with, and the file holds."""
    start = {name: value.clone() for name, value in values.items() if not name.endswith(LOGS)}
    for name, value in values.items():
        if name.endswith(RMS_A):
            start[name] = value.exp()
        elif name.endswith(RMS_B):
            start[name] = (value + values[name.removesuffix(RMS_B) + ROWS]).exp()
    return start


def save(start: Mapping[str, Tensor], path: Path) -> None:
    """Write the file; a kill half-way leaves the last one whole."""
    part = path.with_suffix(".part")
    kinds = {name: torch.bfloat16 if name.endswith(LOGS) else torch.float16 for name in start}
    save_file({name: value.to(kinds[name]).contiguous() for name, value in start.items()}, part)
    os.replace(part, path)


def main() -> None:
    """Read the command line; write the file beside the weights, anew after each text."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--hold-out", type=int, default=HOLD_OUT, help="as of the base's own configuration")
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--texts", type=int, default=240)
    parser.add_argument("--texts-a-step", type=int, default=1, help="of all processes, at least one of each")
    parser.add_argument("--tokens", type=int, default=8192, help="of each")
    parser.add_argument("--seed", type=int, default=0, help="another one where a run goes on from the last")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then, if it is not done")
    parser.add_argument("--out", type=Path, help="by default MODEL/start.safetensors")
    args = parser.parse_args()
    team, out = Team.join(), args.out or args.model / FILE
    base = templora.load(str(args.model))
    unseen = [args.data / "novels.dev.jsonl.xz", *sorted(args.data.glob("pg19/*.txt.xz"))]
    _, documents = hold_out(read_documents(args.data / "novels.train.jsonl.xz"), args.hold_out)
    documents = drop_overlapping(documents, unseen, OVERLAP)
    base.start = {name: value.float() for name, value in load_file(args.model / FILE).items()}
    if not any(name.endswith(RMS_B) for name in base.start):
        texts = pieces(
            documents, base, -(-SQUARES_FROM // team.size) * team.size, args.tokens, team, args.seed
        )
        base.start |= expected(base, texts, args.recipe, team)
    own = -(-args.texts_a_step // team.size)  # texts of a step that are this process's
    values, rounds = learnable(base.start), args.texts // (own * team.size)
    if not rounds:
        parser.error(f"--texts {args.texts} are fewer than a step's {own * team.size}")
    step, started = optimizer(values, own * team.size), time.monotonic()
    texts = pieces(documents, base, rounds * own * team.size, args.tokens, team, args.seed)
    for number in range(rounds):
        nll = [0.0, 0.0]
        for value in values.values():
            value.grad = torch.zeros_like(value)
        for ids in islice(texts, own):
            found, *of_text = read(base, ids, args.recipe)
            nll = [total + one / own for total, one in zip(nll, of_text, strict=True)]
            for name, value in values.items():
                assert value.grad is not None
                value.grad.add_(found[name], alpha=1 / own)
        team.average(values.values())
        share = max(number / rounds, team.mean(time.monotonic() - started) / 60 / args.minutes)
        if share >= 1:
            break
        step(share)
        base.start, (mean, first) = start_of(values), map(team.mean, nll)
        if team.leads:
            save(base.start, out)
            print(f"{number + 1}/{rounds} {mean:.4f} nats, first {BEGINNING} tokens {first:.4f}", flush=True)


if __name__ == "__main__":
    main()
