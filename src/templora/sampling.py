"""From logits to a token. The filtering is transformers' own logits processors; here is only the draw.

A sampler's random numbers are its own, so a text does not depend on what else draws some. Its whole random
state is two integers, so that it can be written down with each token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from templora.dry import DryLogitsProcessor
from templora.errors import InvalidRecipe
from templora.filtering import filtered
from templora.recipe import refuse_unknown

LEAST = 1e-12  # of what logits are divided by: both such together leave them finite


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn; the names and meanings are transformers', those of DRY llama.cpp's.

    temperature 0 takes the likeliest token. None leaves a filter out. The repetition penalty and DRY look
    at the visible window and the chunk so far, as everything else does. In that, a larger repetition penalty
    falls on every common word and comma, and ends in a salad of rare ones; without DRY a smaller one loops.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = 0.95
    min_p: float | None = None
    repetition_penalty: float | None = 1.05
    dry_multiplier: float | None = 0.8
    dry_base: float = 1.75
    dry_allowed_length: int = 2

    def __post_init__(self) -> None:
        checks = {
            "temperature": (
                self.temperature == 0 or LEAST <= self.temperature <= 1 / LEAST,
                f"0, or between {LEAST:g} and {1 / LEAST:g}",
            ),
            "top_k": (self.top_k is None or self.top_k >= 0, "0 or more; 0 switches it off"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (
                self.repetition_penalty is None or LEAST <= self.repetition_penalty <= 1 / LEAST,
                f"between {LEAST:g} and {1 / LEAST:g}; 1 switches it off",
            ),
            "dry_multiplier": (
                self.dry_multiplier is None or 0 <= self.dry_multiplier < inf,
                "0 or more; 0 switches it off",
            ),
            "dry_base": (1 <= self.dry_base < inf, "1 or more"),
            "dry_allowed_length": (self.dry_allowed_length >= 1, "1 or more"),
        }
        for name, (holds, range_) in checks.items():
            if not holds:
                raise InvalidRecipe(f"{name} is {getattr(self, name)}; it must be {range_}")

    @classmethod
    def of(cls, config: GenerationConfig | None, **wishes: Any) -> "Sampling":
        """A model's own generation config where it speaks, these defaults elsewhere, wishes over both.

        Raises:
            InvalidRecipe: a wish that is no field, or a value that cannot work.
        """
        refuse_unknown("sampling option", wishes, [field.name for field in fields(cls)])
        values: dict[str, Any] = {}
        for field in fields(cls):
            own = getattr(config, field.name, None)
            wish = wishes.get(field.name)
            if wish is not None or own is not None:
                values[field.name] = own if wish is None else wish
        return cls(**values)

    @classmethod
    def chosen(
        cls, sampling: "Sampling | None", config: GenerationConfig | None, wishes: dict[str, Any]
    ) -> "Sampling":
        """`sampling`, or where there is none what `of` makes of the wishes.

        Raises:
            InvalidRecipe: as `of`; or there are both.
        """
        if sampling is not None and wishes:
            raise InvalidRecipe(f"sampling and {', '.join(wishes)} were both given; give one")
        return sampling or cls.of(config, **wishes)

    def processors(self, banned: Sequence[int] = (), device: str = "cpu") -> LogitsProcessorList:
        """transformers' processors in transformers' order. banned: token ids that are never drawn."""
        made: list[Any] = []
        if self.repetition_penalty not in (None, 1.0):
            made.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.dry_multiplier:
            made.append(DryLogitsProcessor(self.dry_multiplier, self.dry_base, self.dry_allowed_length))
        if banned:
            made.append(SuppressTokensLogitsProcessor(list(banned), device=device))
        if self.temperature not in (0, 1.0):
            made.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature > 0:
            made.extend(self._filters())
        return LogitsProcessorList(made)

    def _filters(self) -> list[Any]:
        made: list[Any] = []
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            made.append(TopPLogitsWarper(self.top_p))
        if self.min_p:
            made.append(MinPLogitsWarper(self.min_p))
        return made


class Sampler:
    """Draws tokens. draws: how many it has drawn from that seed; greedy ones do not count."""

    def __init__(self, seed: int, draws: int = 0) -> None:
        self.seed, self.draws = seed, draws

    @torch.no_grad()
    def draw(
        self,
        logits: Tensor,
        shown: Sequence[int],
        processors: LogitsProcessorList,
        *,
        greedy: bool,
    ) -> int:
        """One token id.

        Args:
            logits: [vocab]. shown: ids, for the processors that look at them.
            greedy: take the likeliest.

        Raises:
            RuntimeError: the processors left no token, or scores that are no numbers.
        """
        scores = filtered(processors, shown, logits.float().unsqueeze(0))[0]
        if greedy:
            return int(scores.argmax())
        drawn = _at(_uniform(self.seed, self.draws), scores.softmax(dim=-1))
        self.draws += 1  # not of what a caller's own processor made impossible
        return drawn


def _at(share: float, probabilities: Tensor) -> int:
    """The token that has that share of all probability before it, or within itself. probabilities: [vocab].

    One number decides; `torch.multinomial` draws one for each token of the vocabulary, in a large one for
    longer than a GPU runs the model.
    """
    upto = probabilities.cpu().double().cumsum(dim=0)  # one after another, as a GPU would not
    total = float(upto[-1])
    if not 0 < total < inf:
        raise RuntimeError("no token is left to draw; see which logits processors leave none, or NaN")
    # right: past all that are impossible, which add nothing.
    return int(torch.searchsorted(upto, share * total, right=True))


def _uniform(seed: int, draw: int) -> float:
    """A number for each draw, 0 or more and below 1: SplitMix64's output function."""
    mask = (1 << 64) - 1
    z = (seed * 0xD1342543DE82EF95 + (draw + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)
