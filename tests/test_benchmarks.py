"""Each benchmark runs at toy size, and both of its sides compute the same; no time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["learn", "score", "write"])
def test_it_runs_and_both_sides_compute_the_same(name: str, tmp_path: Path) -> None:
    line = [sys.executable, "-m", f"benchmarks.{name}", "--toy", "--rounds", "1", "--out", str(tmp_path)]
    subprocess.run(line, cwd=ROOT, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    results = json.loads((tmp_path / f"{name}.json").read_text("utf-8"))
    assert results["machine"]["torch"]
    for run in results["results"]:
        assert all(min(seconds) > 0 for seconds in run["seconds"].values())
    assert (tmp_path / f"{name}.md").read_text("utf-8").startswith("| base |")
