"""The house has six floors: an import runs down, never up, never in a circle."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "templora"
FLOORS = {
    0: "errors events recipe window metrics",
    1: "base loading probe cross_entropy cache injection lora_linear gated_mlp merging lean_attention "
    "adapter magnitude layer_rates start passes template filtering compiled compiled_step dry "
    "savepoint learner guard study decoder rotary detokenizer sampling memory sizes kernels step pen stacked "
    "rows products repeated causal_attention graph_step cuda_graph cache_layers row_passes turns "
    "identity half",
    2: "session batch parallel crew durable replay snapshot store shelf header history journal versions lock "
    "migrations",
    3: "tasks formats hook",
    4: "report text_file bench",
    5: "commands cli __main__",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}
BESIDE = {"testing": 1}  # public fakes stand beside the house and may use its two lowest floors
# `Base.session()` makes a session without knowing it, `Session.translate()` a translator.
DOORS = {("base", "session"), ("base", "durable"), ("base", "parallel"), ("session", "tasks")}
HEAVY = {"torch", "transformers", "peft", "tokenizers", "safetensors"}


def part(module: str) -> str:
    """`templora.tasks.score` is of the part `tasks`."""
    return module.split(".")[1] if "." in module else "__init__"


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the full name"
            module = node.module or ""
            found |= {f"templora.{a.name}" for a in node.names} if module == "templora" else {module}
    return found


def type_only(path: Path) -> set[str]:
    """What is imported for annotations alone."""
    blocks = [n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.If)]
    return {
        inner.module
        for block in blocks
        if isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for inner in block.body
        if isinstance(inner, ast.ImportFrom) and inner.module
    }


def modules(source: Path) -> dict[str, Path]:
    """Every module of the package but its `__init__`, by part; parts may hold several files."""
    return {
        ".".join(("templora", *p.relative_to(source).with_suffix("").parts)): p for p in source.rglob("*.py")
    }


def complaints(source: Path) -> list[str]:
    """What breaks the law of the floors."""
    found: list[str] = []
    for name, path in sorted(modules(source).items()):
        own = part(name)
        if own == "__init__":
            continue
        floor = FLOOR_OF.get(own, BESIDE.get(own))
        if floor is None:
            found.append(f"{name} has no floor; give it one in tests/test_house.py")
            continue
        for imported in imports(path):
            root = imported.split(".")[0]
            other = part(imported) if root == "templora" else None
            above = other is not None and FLOOR_OF.get(other, BESIDE.get(other, 0)) > floor
            if above and (own, other) not in DOORS and imported not in type_only(path):
                found.append(f"{name} imports {imported}, which is above it")
            if root == "peft" and own != "injection":
                found.append(f"{name} imports peft; only injection may")
            if root in HEAVY and floor == 0:
                found.append(f"{name} imports {root}; the ground floor is light")
    return found + circles(source)


def circles(source: Path) -> list[str]:
    """Modules that import each other, at import time, in a ring."""
    names = modules(source)
    edges = {
        name: {i for i in top_level_imports(path) if i in names and part(i) != "__init__"}
        for name, path in names.items()
    }
    found: list[str] = []
    for start in edges:
        seen, todo = set[str](), list(edges[start])
        while todo:
            at = todo.pop()
            if at == start:
                found.append(f"{start} imports itself in a circle")
                break
            if at not in seen:
                seen.add(at)
                todo += edges[at]
    return found


def top_level_imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def test_every_import_runs_down() -> None:
    assert complaints(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("window.py", "from templora.session import Session", "above it"),
        ("window.py", "def f():\n    import templora.session", "above it"),
        ("window.py", "import torch", "light"),
        ("learner.py", "from peft import LoraConfig", "only injection"),
        ("helpers.py", "", "no floor"),
        ("cache.py", "from templora.decoder import Decoder", "circle"),
    ],
)
def test_the_law_sees_what_breaks_it(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    (tmp_path / "decoder.py").write_text("from templora.cache import WindowCache\n")
    (tmp_path / "cache.py").write_text("import torch\n")
    assert complaints(tmp_path) == []
    (tmp_path / file).write_text(text + "\n")
    assert complaint in " ".join(complaints(tmp_path))


def test_no_file_has_grown_past_one_idea() -> None:
    assert {
        p.name: n for p in SOURCE.rglob("*.py") if (n := len(p.read_text("utf-8").splitlines())) > 320
    } == {}
