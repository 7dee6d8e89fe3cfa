"""Recipes: named, from a file, with values over them; what is not known is refused with what is near."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from templora import recipe
from templora.errors import InvalidRecipe
from templora.recipe import Recipe


def refusal(name: "str | Path", overrides: dict[str, Any] | None = None) -> str:
    """The message with which it is refused: one line."""
    with pytest.raises(InvalidRecipe) as caught:
        recipe.load(name, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_named_recipes_are_the_files() -> None:
    assert recipe.names() == ["default", "paper"]
    assert [recipe.load(name).name for name in recipe.names()] == recipe.names()


def test_the_paper_recipe_is_the_authors_settings() -> None:
    assert recipe.load("paper").model_dump() == {
        "name": "paper",
        "window": 1024,
        "chunk": 1024,
        "context": 1024,
        "sinks": 0,
        "epochs": 2,
        "rank": 64,
        "alpha": 64.0,
        "dropout": 0.05,
        "rslora": False,
        "targets": "all-linear",
        "first_block": 0.0,
        "start": "random",
        "head": 0.0,
        "learning_rate": 5e-5,
        "start_rate": 1.0,
        "b_rate": 1.0,
        "magnitude_rate": 0.0,
        "layer_rate": 0.0,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-7,
        "weight_decay": 0.0,
        "clip": 1.0,
        "warmup_chunks": 2,
        "decay_chunks": None,
        "context_from": "recompute",
        "cache": "recompute",
        "precision": "fp32",
        "guard": False,
    }


def test_overrides_win_and_sizes_among_them_are_fixed() -> None:
    changed = recipe.load("paper", {"window": 512, "epochs": 3, "clip": 2, "chunk": None})
    assert (changed.window, changed.chunk, changed.epochs, changed.clip) == (512, 1024, 3, 2.0)
    assert changed.fixed == {"window"}
    assert recipe.load("paper").fixed == frozenset()


def test_a_recipe_is_taken_as_it_is_and_keeps_what_was_fixed() -> None:
    first = recipe.load("default", {"window": 100})
    assert recipe.load(first) == first
    assert recipe.load(first, {"chunk": 7}).fixed == {"window", "chunk"}


def test_a_file_is_laid_over_default_or_over_what_it_extends(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 5\nwindow: 300\n")
    mine = recipe.load(path)
    assert mine == recipe.load("default", {"name": "mine", "epochs": 5, "window": 300})
    assert mine.fixed == {"window"}
    path.write_text("extends: paper\nepochs: 5\n")
    assert recipe.load(str(path)) == recipe.load("paper", {"name": "mine", "epochs": 5})


def test_every_key_of_a_recipe_can_be_written_to_a_file_and_read_again(tmp_path: Path) -> None:
    import yaml

    for name in recipe.names():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe.load(name).model_dump()))
        again = recipe.load(path)
        assert again.model_dump() == recipe.load(name).model_dump()


@pytest.mark.parametrize(
    ("pairs", "values"),
    [
        (["epochs=2"], {"epochs": 2}),
        (["learning_rate=5e-5", "eps=1e-7"], {"learning_rate": 5e-5, "eps": 1e-7}),
        (["guard=false", "cache=reuse"], {"guard": False, "cache": "reuse"}),
        (["targets=[q_proj, v_proj]"], {"targets": ["q_proj", "v_proj"]}),
        (["targets=.*=x"], {"targets": ".*=x"}),
        ([" epochs = 2 "], {"epochs": 2}),
        ([], {}),
    ],
)
def test_pairs_are_yaml(pairs: list[str], values: dict[str, Any]) -> None:
    assert recipe.parse_pairs(pairs) == values
    recipe.load("default", values)


@pytest.mark.parametrize("pair", ["window=null", "chunk=", "context=~"])
def test_a_size_of_nothing_is_refused(pair: str) -> None:
    with pytest.raises(InvalidRecipe, match="has no number; say for example"):
        recipe.parse_pairs([pair])


@pytest.mark.parametrize(("pair", "key"), [("clip=null", "clip"), ("decay_chunks=null", "decay_chunks")])
def test_null_switches_a_setting_off(pair: str, key: str) -> None:
    assert getattr(recipe.load("default", recipe.parse_pairs([pair])), key) is None


@pytest.mark.parametrize("pair", ["epochs", "=2", "", " =2"])
def test_a_pair_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(InvalidRecipe, match="--set takes key=value"):
        recipe.parse_pairs([pair])


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("learning_rat", "learning_rate"),
        ("epoch", "epochs"),
        ("lora_dropout", "dropout"),
        ("winow", "window"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(wrong: str, near: str, tmp_path: Path) -> None:
    expected = f"unknown recipe key {wrong!r}; the nearest known one is {near!r}"
    assert refusal("default", {wrong: 1}) == expected
    path = tmp_path / "mine.yaml"
    path.write_text(f"{wrong}: 1\n")
    assert refusal(path) == expected
    with pytest.raises(InvalidRecipe, match=near):
        recipe.parse_pairs([f"{wrong}=1"])


@pytest.mark.parametrize("hidden", ["fixed", "extends"])
def test_what_is_not_a_hyper_parameter_is_not_a_key(hidden: str) -> None:
    with pytest.raises(InvalidRecipe, match="unknown recipe key"):
        recipe.parse_pairs([f"{hidden}=1"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("window", 0),
        ("chunk", -1),
        ("epochs", 1.5),
        ("rank", 7),
        ("rank", "big"),
        ("alpha", 0),
        ("dropout", 1.0),
        ("learning_rate", -1e-4),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("b_rate", 0),
        ("beta1", 1.0),
        ("clip", 0),
        ("decay_chunks", 0),
        ("warmup_chunks", -1),
        ("first_block", 1),
        ("cache", "forget"),
        ("context_from", "nowhere"),
        ("guard", "perhaps"),
        ("targets", 3),
        ("learning_rate", True),
        ("epochs", True),
        ("clip", False),
        ("alpha", 1e308),
        ("head", 1e308),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_key_and_value(key: str, value: object) -> None:
    message = refusal("default", {key: value})
    assert f"recipe key {key}: " in message
    assert repr(value) in message


def test_a_recipe_is_not_made_of_some_keys() -> None:
    with pytest.raises(InvalidRecipe, match=r"takes every key.*base\.session\(rank=16\)"):
        Recipe(rank=16)  # pyright: ignore[reportCallIssue]
    whole = recipe.load("default").model_dump()
    assert Recipe(**whole) == recipe.load("default")
    with pytest.raises(ValidationError, match="rank"):
        Recipe(**{**whole, "rank": 0})
    with pytest.raises(InvalidRecipe, match=r"not a dict; keys are given by name"):
        recipe.load({"rank": 16})  # pyright: ignore[reportArgumentType]


def test_an_unknown_recipe_is_refused_with_the_known_ones() -> None:
    assert refusal("papr") == "no recipe 'papr'; named recipes are default, paper, or give a YAML file"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("- 1\n- 2\n", "is not a recipe"),
        ("just words", "is not a recipe"),
        ("", "is not a recipe"),
        ("epochs: [", "is not valid YAML"),
        ("epochs: 2024-13-45\n", "is not valid YAML"),
        ("epochs: !!int many\n", "is not valid YAML"),
        ("extends: nothing\n", "extends 'nothing'"),
        ("extends: [paper]\n", "extends"),
        ("1: 2\n", "unknown recipe key '1'"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert reason in refusal(path)


def test_a_recipe_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00epochs")
    assert "mine.yaml" in refusal(path)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe.load("default").epochs = 2  # pyright: ignore[reportAttributeAccessIssue]


@given(chunk=st.integers(0, 1000), warmup=st.integers(0, 20), decay=st.none() | st.floats(0.5, 100))
def test_the_rate_rises_over_the_warm_up_and_never_rises_again(
    chunk: int, warmup: int, decay: float | None
) -> None:
    made = recipe.load("paper", {"warmup_chunks": warmup, "decay_chunks": decay, "learning_rate": 2.0})
    rate = made.rate_at(chunk)
    assert 0 <= rate <= 2.0
    if chunk >= warmup:
        assert made.rate_at(chunk + 1) <= rate
        assert decay is not None or rate == 2.0
    if chunk == 0:
        assert rate == (0.0 if warmup else 2.0)


def test_the_papers_rates_in_full() -> None:
    rates = [recipe.load("paper").rate_at(chunk) for chunk in range(4)]
    assert rates == [0.0, 2.5e-5, 5e-5, 5e-5]


def test_decay_is_an_inverse_square_root() -> None:
    made = recipe.load("paper", {"warmup_chunks": 0, "decay_chunks": 20, "learning_rate": 1.0})
    assert [made.rate_at(c) for c in (0, 60, 300)] == pytest.approx([1.0, 0.5, 0.25])


def test_the_schema_describes_every_hyper_parameter() -> None:
    assert {k for k, f in Recipe.model_fields.items() if not f.description} == {"fixed"}


@pytest.mark.parametrize(
    ("name", "asked", "expected"),
    [
        ("default", {"window": 1536}, 1536),
        ("default", {"window": 256}, 256),
        ("default", {"window": 1536, "context": 512}, 512),
        ("paper", {"window": 1536, "chunk": 256}, 1024),  # gradients run through it: it stays what it was
    ],
)
def test_the_context_follows_the_window(name: str, asked: dict[str, int], expected: int) -> None:
    plan, sizes = recipe.fitted(recipe.load(name, asked), 2048)
    assert (plan.window, plan.context) == (asked["window"], expected)
    assert sizes.context == expected


@pytest.mark.parametrize("text", ["&a {b: *a}", "[" * 2000, '!!int ""', "!!bool x", '!!timestamp "x"'])
def test_what_the_parser_stumbles_over_is_one_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"window: {text}\n")
    assert "is not valid YAML" in refusal(file)


def test_a_context_that_no_key_is_kept_for_is_refused() -> None:
    wish = {"window": 256, "context": 512}
    with pytest.raises(InvalidRecipe, match="context 512 is more than the window of 256"):
        recipe.load("default", wish)
    assert recipe.load("default", wish | {"context_from": "recompute"}).context == 512
    stored = recipe.load("default", {"window": 256}).model_copy(update={"context": 512})
    assert recipe.load(stored).context == 512, "sessions of old go on"
