"""A recipe: a named, complete set of hyper-parameters, as plain values.

Named recipes are the YAML files beside this package's code; a user's file or `key=value` pairs are
laid over one. Deliberately knows nothing of torch or of any base.
"""

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from templora.errors import InvalidRecipe
from templora.window import Plan, fit

SIZES = frozenset({"window", "chunk", "context"})
# vLLM refuses LoRA ranks outside this list, and what we save is meant to be served there.
Rank = Literal[8, 16, 32, 64, 128, 256]
Keys = Literal["recompute", "reuse", "base"]
Precision = Literal["fp32", "bf16", "auto"]
LARGEST_SCALE = 1e6  # far beyond what learns; the product of two still is a number in fp32
Tokens = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Recipe(BaseModel):
    """All that decides how an adapter learns. Sizes are in tokens; rates are per optimiser step.

    Source of the names: arXiv 2401.11504 (window W, chunk Δ, context L_T), PEFT (rank, alpha, dropout,
    rslora, targets), torch.optim.AdamW (beta1, beta2, eps, weight_decay).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            missing = sum(each["type"] == "missing" for each in error.errors())
            if missing > len(values):  # made of the keys that somebody cares for
                raise InvalidRecipe(
                    "a Recipe takes every key; for one with some of them changed say base.session(rank=16), "
                    'or templora.recipe.load("default", {"rank": 16})'
                ) from error
            raise

    name: str = Field("", description="the named recipe or file this one came from")
    window: Tokens = Field(description="W: tokens that are visible before a chunk")
    chunk: Tokens = Field(description="Δ: tokens that are written, then learned")
    context: Tokens = Field(description="L_T: tokens visible before a chunk while it is learned")
    # Sessions of old do not have the keys with a default: there it was like that.
    sinks: int = Field(
        0, ge=0, description="tokens at the very beginning of the text that stay visible (attention sinks)"
    )
    epochs: Tokens = Field(description="optimiser steps on each chunk")
    rank: Rank = Field(description="LoRA rank")
    alpha: Positive = Field(le=LARGEST_SCALE, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: Fraction = Field(description="LoRA dropout while learning")
    rslora: bool = Field(description="scale by alpha / sqrt(rank) instead")
    targets: str | tuple[str, ...] = Field(description='"all-linear" or module names')
    first_block: Fraction = Field(
        description="the adapter starts at this share of the base's blocks: 0 all, 0.5 the upper half"
    )
    start: Literal["random", "learned"] = Field(
        "random",
        description="random: A; learned: A, B and what Adam divides by, from the base's folder, if there",
    )
    head: NonNegative = Field(
        0.0,
        le=LARGEST_SCALE,
        description="the output layer learns as well, with this share of alpha; 0: it does not",
    )
    learning_rate: NonNegative = Field(description="AdamW's rate for A; 0 switches learning off")
    start_rate: Positive = Field(
        1.0, description="A's and B's rates times this where the base's folder says what Adam divides by"
    )
    b_rate: Positive = Field(description="B's rate as a multiple of A's (LoRA+)")
    magnitude_rate: NonNegative = Field(
        0.0, description="rate at which each layer's B grows or shrinks as a whole; 0: only as AdamW moves it"
    )
    layer_rate: NonNegative = Field(
        0.0, description="rate at which each layer's own learning rate moves; 0: the same for all layers"
    )
    beta1: Fraction = Field(description="AdamW's momentum")
    beta2: Fraction = Field(description="how slowly AdamW forgets squares of gradients")
    eps: Positive = Field(description="what AdamW divides by at least")
    weight_decay: NonNegative = Field(description="AdamW's decay towards zero")
    clip: Positive | None = Field(description="largest gradient norm; null for no clipping")
    warmup_chunks: int = Field(ge=0, description="the rate rises from 0 over this many chunks")
    decay_chunks: Positive | None = Field(description="rate / sqrt(1 + chunk / this); null: constant")
    context_from: Literal["cache", "recompute"] = Field(
        description="cache: no gradient through the context; recompute: as the paper does"
    )
    cache: Keys = Field(
        description="keys and values of earlier chunks: recompute them after an update, reuse what older "
        "adapters made, or take the base's own, which are never stale"
    )
    precision: Precision = Field(
        "fp32",
        description="of products with an fp32 base's weights on a CPU, over many tokens, or single ones of a "
        "large base; auto: bf16 where it has instructions for that",
    )
    guard: bool = Field(description="watch each update; skip what harms, roll back what did")
    # Sizes the user named: never shrunk to fit a base. Not a hyper-parameter, so not in the YAML.
    fixed: frozenset[str] = Field(frozenset(), exclude=True, repr=False)

    @property
    def context_equals_window(self) -> bool:
        """Whether the pass that scores a chunk sees what the pass that learns it sees."""
        return self.context == self.window

    def rate_at(self, chunk: int) -> float:
        """Learning rate of A on the chunk of that number (from 0), warm-up and decay applied."""
        rate = self.learning_rate
        if chunk < self.warmup_chunks:
            rate *= chunk / self.warmup_chunks
        if self.decay_chunks is not None:
            rate /= (1 + chunk / self.decay_chunks) ** 0.5
        return rate


def names() -> list[str]:
    """The named recipes."""
    folder = resources.files("templora") / "recipes"
    return sorted(Path(f.name).stem for f in folder.iterdir() if f.name.endswith(".yaml"))


def load(recipe: "str | Path | Recipe", overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe by name, from a YAML file laid over `default` (or over its own `extends`), or as is.

    overrides: values that win over it; sizes named here are taken as the user's wish and never shrunk.

    Raises:
        InvalidRecipe: no such recipe, an unknown key, or a value that cannot work.
    """
    if not isinstance(recipe, str | Path | Recipe):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRecipe(
            f"a recipe is a name, a YAML file or a Recipe, not a {type(recipe).__name__}; "
            "keys are given by name, as in base.session(rank=16)"
        )
    if isinstance(recipe, Recipe):
        values, fixed = recipe.model_dump(), set(recipe.fixed)
    elif str(recipe) in names():
        values, fixed = _named(str(recipe)), set[str]()
    else:
        values, fixed = _from_file(Path(recipe))
    # A size of None is a wish that was not made; elsewhere None is a value.
    given = {k: v for k, v in (overrides or {}).items() if v is not None or k not in SIZES}
    fixed |= SIZES & given.keys()
    made = _validated(values | given | {"fixed": fixed})
    if given.get("context") is not None and made.context_from == "cache" and made.context > made.window:
        raise InvalidRecipe(
            f"context {made.context} is more than the window of {made.window}, and only its keys are kept; "
            "raise the window, or set context_from=recompute"
        )
    return made


def fitted(recipe: Recipe, positions: int | None) -> tuple[Plan, Recipe]:
    """The sizes that a base with so many positions can hold, and the recipe with them.

    Raises:
        WindowTooLarge: those that were asked for cannot fit.
    """
    follows = recipe.context_from == "cache" and "window" in recipe.fixed and "context" not in recipe.fixed
    context = recipe.window if follows else recipe.context  # as long a one costs nothing there
    plan = fit(recipe.window, recipe.chunk, context, positions, recipe.fixed, recipe.sinks)
    return plan, recipe.model_copy(update={name: getattr(plan, name) for name in SIZES})


def refitted(wished: Recipe, fits: Recipe) -> str:
    """The sizes that had to change for a base, such as "window 4096 → 1792"; "" where none had to."""
    # A context that follows a smaller window is what was asked for, and no news.
    free, _ = fitted(wished, None)
    changed = [name for name in sorted(SIZES) if getattr(fits, name) != getattr(free, name)]
    return ", ".join(f"{name} {getattr(wished, name)} → {getattr(fits, name)}" for name in changed)


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """`["epochs=2", "clip=null"]` as values; the right-hand sides are YAML."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise InvalidRecipe(f"--set takes key=value, not {pair!r}; say for example epochs=2")
        values[key.strip()] = _yaml(value, f"--set {pair}")
    _refuse_unknown(values)
    if size := next((key for key in sorted(SIZES & values.keys()) if values[key] is None), None):
        raise InvalidRecipe(f"--set {size}= has no number; say for example {size}=512")
    return values


def _named(name: str) -> dict[str, Any]:
    text = (resources.files("templora") / "recipes" / f"{name}.yaml").read_text("utf-8")
    return {"name": name, **_yaml(text, name)}


def _from_file(path: Path) -> tuple[dict[str, Any], set[str]]:
    if not path.is_file():
        known = ", ".join(names())
        raise InvalidRecipe(f"no recipe {str(path)!r}; named recipes are {known}, or give a YAML file")
    try:
        values = _yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRecipe(f"cannot read recipe {path}: {error}; give a YAML file in UTF-8") from error
    if not isinstance(values, dict):
        raise InvalidRecipe(f"{path} is not a recipe; it must hold lines of the form key: value")
    given = cast(dict[str, Any], values)
    extends = given.pop("extends", "default")
    if extends not in names():
        raise InvalidRecipe(f"{path} extends {extends!r}; named recipes are {', '.join(names())}")
    _refuse_unknown(given)
    return {**_named(str(extends)), "name": path.stem, **given}, set(SIZES & given.keys())


def _yaml(text: str, place: str) -> Any:
    try:
        if aliased := next((t for t in yaml.scan(text) if isinstance(t, yaml.AliasToken)), None):
            raise ValueError(f"*{aliased.value} stands for what is elsewhere; write it out")
        value = yaml.safe_load(text)
        # YAML 1.1 reads 5e-5 (no dot) as a string, which no user means.
        return _number(value)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # The parser's own, and what it lets through: dates that there are not, tags without a value, depth.
        raise InvalidRecipe(f"{place} is not valid YAML: {' '.join(str(error).split())}") from error


def _number(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _number(v) for k, v in cast(dict[str, Any], value).items()}
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def refuse_unknown(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """See that each is one of those that are known.

    Raises:
        InvalidRecipe: with the nearest of those, or all.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"the nearest known one is {near[0]!r}" if near else f"known are {', '.join(known)}"
            raise InvalidRecipe(f"unknown {what} {str(name)!r}; {cure}")


def _refuse_unknown(values: Mapping[str, Any]) -> None:
    refuse_unknown("recipe key", values, [name for name in Recipe.model_fields if name != "fixed"])


def _validated(values: Mapping[str, Any]) -> Recipe:
    _refuse_unknown({k: v for k, v in values.items() if k != "fixed"})
    for key, value in values.items():  # yes and on are YAML for true, which pydantic takes for 1
        if isinstance(value, bool) and Recipe.model_fields[key].annotation is not bool:
            raise InvalidRecipe(f"recipe key {key}: give a value, not the switch {value!r}")
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"][:1])
        raise InvalidRecipe(f"recipe key {key}: {first['msg']}, not {first['input']!r}") from error
