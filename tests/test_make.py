"""`make write`, as a person types it, in a checkout whose environment is already there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_make_write_streams_prose_and_says_where_it_is_and_what_the_adapter_was_worth(tmp_path: Path) -> None:
    if Path(sys.prefix).resolve() != (ROOT / ".venv").resolve():
        pytest.skip("runs in the environment that make made")
    out = tmp_path / "novel.txt"
    done = subprocess.run(
        ["make", "--no-print-directory", "write", "TOKENS=300", f"ARGS=--out {out}"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(done.stdout.split()) > 150
    assert out.read_text("utf-8").strip() == done.stdout.strip()
    found = re.search(r"perplexity of \d+ tokens: base ([\d.]+), adapter ([\d.]+) \(-[\d.]+ %\)", done.stderr)
    assert found, done.stderr
    assert float(found[2]) < 0.9 * float(found[1]), "what was read should be known"
    assert re.search("Odo|Brask|Wenna|Skarravoe|Merganser|Sisters", done.stdout)
    assert f"saved to {out}" in done.stderr
