"""What a user imports: few names, at once, without torch."""

import subprocess
import sys

import pytest

import templora

# psutil, yaml and pydantic are light; these are not.
HEAVY = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy", "numba")


def modules_after(statement: str) -> set[str]:
    """What is loaded in a fresh interpreter after that statement."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import templora; templora.__version__, templora.TemploraError, templora.Recipe",
        "import templora.recipe; templora.recipe.load('paper')",
        "import templora.errors, templora.events, templora.window, templora.metrics, templora.guard",
        "import templora.cli",
    ],
)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    loaded = modules_after(statement)
    assert "templora" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_public_names_are_these() -> None:
    names = (
        "Base DurableSession Passage Recipe Sampling Session TemploraError "
        "generate load resume score score_batch write_batch"
    )
    assert sorted(templora.__all__) == names.split()


@pytest.mark.parametrize("name", templora.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert getattr(templora, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'leod'"):
        templora.leod  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    assert not hasattr(templora, "__path_that_is_not__")


def test_all_errors_are_of_one_tree() -> None:
    from templora import errors

    kinds = [v for v in vars(errors).values() if isinstance(v, type)]
    assert len(kinds) >= 9
    assert all(issubclass(kind, templora.TemploraError) for kind in kinds)
    assert all(kind.__doc__ for kind in kinds)
