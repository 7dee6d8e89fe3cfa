"""Many recipes on the same texts: one table, the best on top.

A configuration is YAML: `recipe`, `tokens`, `seed`, `set` (keys for all runs) and `runs`, a list of maps from
key to value. A list as value stands for several runs; `recipe` may be among the keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import yaml

from templora.base import Base
from templora.bench.tables import table
from templora.errors import InvalidRecipe, InvalidText
from templora.recipe import fitted, load, refuse_unknown
from templora.tasks.batch import score_batch, together
from templora.tasks.score import Scores, score


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to run: each run's keys are laid over `common`."""

    recipe: str
    tokens: int | None
    seed: int
    common: dict[str, Any]
    runs: list[dict[str, Any]]

    def recipe_of(self, keys: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """A run's recipe, and what is changed in it."""
        wishes = {**self.common, **keys}
        return str(wishes.pop("recipe", self.recipe)), wishes


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: change of perplexity per text, as fractions; seconds spent learning, over all texts."""

    keys: dict[str, Any]
    changes: list[float]
    learn_seconds: float

    @property
    def mean(self) -> float:
        """Mean change over the texts."""
        return sum(self.changes) / len(self.changes)


def read(path: Path) -> Sweep:
    """A sweep from its YAML file.

    Raises:
        InvalidRecipe: it is not of that form.
    """
    try:
        values: Any = yaml.safe_load(path.read_text("utf-8"))
        runs = [run for entry in values["runs"] for run in _expanded(entry)]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())  # YAML's own takes several lines
        raise InvalidRecipe(
            f"{path} is not a sweep ({reason}); it needs a list under the key runs"
        ) from error
    if not runs:
        raise InvalidRecipe(f"{path} has no runs; list maps of recipe keys, {{}} for the recipe as it is")
    refuse_unknown(f"key of {path}", values, ("recipe", "tokens", "seed", "set", "runs"))
    # A key without a value is one that is left out.
    common, tokens, seed = values.get("set") or {}, values.get("tokens"), values.get("seed") or 0
    if not isinstance(common, dict):
        raise InvalidRecipe(
            f"{path}: set is {common!r}; write a map such as {{window: 256}}, or leave it out"
        )
    if tokens is not None and (type(tokens) is not int or tokens < 1):
        raise InvalidRecipe(f"{path}: tokens is {tokens!r}; write a number from 1 on, or leave it out")
    if type(seed) is not int:
        raise InvalidRecipe(f"{path}: seed is {seed!r}; write a whole number, or leave it out")
    recipe = str(values.get("recipe") or "default")
    return Sweep(recipe, tokens, seed, cast(dict[str, Any], common), runs)


def run(base: Base, sweep: Sweep, texts: Sequence[tuple[str, str]], *, batch: int = 1) -> Iterator[Outcome]:
    """Run after run; yields each as it ends. texts: (name, text), where names may be alike; `batch` at once.

    Raises:
        InvalidRecipe, WindowTooLarge, UnsupportedModel, InvalidText: before the first run, a run or a text
            that cannot work.
    """
    for keys in sweep.runs:
        _, recipe = fitted(load(*sweep.recipe_of(keys)), base.positions)
        if batch > 1:
            together(base, recipe, size=batch)
    for name, text in texts:
        # As `score` counts: the first token of all has none before it, and is not scored.
        if len(base.prefix_ids) + len(base.encode(text)[: sweep.tokens]) < 2:
            raise InvalidText(f"{name} is too short: no token of it is scored; leave it out")
    for keys in sweep.runs:
        scores = _scores(base, sweep, keys, [text for _, text in texts], batch)
        changes = [s.change for s in scores if s.change is not None]
        yield Outcome(keys, changes, sum(s.learn_seconds for s in scores))


def _scores(base: Base, sweep: Sweep, keys: dict[str, Any], texts: Sequence[str], batch: int) -> list[Scores]:
    recipe, wishes = sweep.recipe_of(keys)
    wishes |= {"recipe": recipe, "tokens": sweep.tokens, "seed": sweep.seed}
    if batch > 1:
        return score_batch(base, texts, size=batch, **wishes)
    return [score(base, text, **wishes) for text in texts]


def markdown(outcomes: list[Outcome]) -> str:
    """All runs, the largest gain first."""
    rows = [
        [
            ", ".join(f"{k} {v}" for k, v in o.keys.items()) or "as it is",
            f"{100 * o.mean:+.2f} %",
            " ".join(f"{100 * c:+.1f}" for c in o.changes),
            f"{o.learn_seconds:.0f}",
        ]
        for o in sorted(outcomes, key=lambda o: o.mean)
    ]
    return table(["run", "mean change", "each text", "s learning"], rows)


def _expanded(entry: dict[str, Any]) -> list[dict[str, Any]]:
    lists = [value if isinstance(value, list) else [value] for value in entry.values()]
    return [dict(zip(entry, values, strict=True)) for values in product(*lists)]
