"""How large the gradients of an adapter's numbers are, in texts that a base was trained on.

What Adam divides by is a running mean of squares, and after a few chunks of a text it is mostly chance. Other
texts know it better: a number whose gradient is loud in every book says little of this one.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from team import Team
from torch import Tensor

from templora.base import Base
from templora.injection import PEFT_PREFIX, named
from templora.session import Session
from templora.start import RMS_A, RMS_B

WINDOW = 256  # tokens, and the context's
SQUARES_FROM = 10  # texts
LEAST = 1e-20
FLATTER = 0.8  # the power of the root mean squares that is best to divide by


def expected(base: Base, texts: Iterable[list[int]], recipe: str, team: Team) -> dict[str, Tensor]:
    """RMS_A, [rank, in], and RMS_B, [out, rank], of each layer: from Adam's squares at the end of each text.

    `recipe` begins with what `base.start` says, without these two. Each of the team has its own texts.
    """
    total, count = dict[str, Tensor](), 0
    for ids in texts:
        count += 1
        session = base.session(recipe, seed=0, window=WINDOW, context=WINDOW)
        session.extend(ids, "")
        for _ in session.learning():
            pass
        adapter, sites = session.adapter, session.adapter.sites
        of_a = dict(zip(map(id, sites), _squares(session, adapter.a, [s.a for s in sites]), strict=True))
        of_b = dict(zip(map(id, sites), _squares(session, adapter.b, [s.b for s in sites]), strict=True))
        for name, site in named(base.model, sites):
            for kind, own in ((RMS_A, of_a), (RMS_B, of_b)):
                key = name.removeprefix(PEFT_PREFIX) + kind
                total[key] = total.get(key, 0) + own[id(site)]
    squares = {name: sum_ / count for name, sum_ in total.items()}
    team.average_tensors([*squares.values()])
    return _flatter(squares, RMS_A) | _flatter(squares, RMS_B)


def _squares(session: Session, side: Tensor, matrices: list[Tensor]) -> list[Tensor]:
    """Adam's, without its bias at the beginning, of each of the matrices that `side` holds."""
    state = session.learner.optimizer.state[side]
    flat = state["exp_avg_sq"] / (1 - session.recipe.beta2 ** float(state["step"]))
    parts = flat.split([matrix.numel() for matrix in matrices])
    return [part.view_as(matrix) for part, matrix in zip(parts, matrices, strict=True)]


def _flatter(squares: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Roots of those of a kind, less different from each other, with the same geometric mean over all."""
    logs = {n: v.clamp_min(LEAST).log() / 2 for n, v in squares.items() if n.endswith(kind)}
    mean = torch.cat([log.flatten() for log in logs.values()]).mean()
    return {name: (FLATTER * log + (1 - FLATTER) * mean).exp() for name, log in logs.items()}
