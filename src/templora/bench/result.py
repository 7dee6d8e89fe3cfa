"""The JSON result of scoring one document: what was measured, with what, on what."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from templora.header import software
from templora.session import Session
from templora.tasks.score import Scores

PACKAGES = ("torch", "transformers", "peft")


def result(document: str, scores: Scores, session: Session, seconds: float) -> dict[str, Any]:
    """One document's result; NLL in nats per token, seconds of wall clock, peak memory in MiB."""
    found = software()
    return {
        "document": document,
        "tokens": scores.adapted.tokens,
        "base": _measures(scores, "base"),
        "adapted": _measures(scores, "adapted"),
        "chunks": scores.chunks,
        "seconds": seconds,
        "learn_seconds": scores.learn_seconds,
        "guard": scores.guarded,
        "peak_rss_mb": peak_mb(),
        "config": {
            "model": session.base.name,
            "dtype": session.base.dtype,
            "recipe": session.recipe.model_dump(mode="json"),
            "positions": session.base.positions,
        },
        "versions": {name: found[name] for name in ("templora", *PACKAGES, "python")},
        "git": git_commit(),
        "seed": session.seed,
    }


def _measures(scores: Scores, which: str) -> dict[str, float | None] | None:
    tally = getattr(scores, which)
    if not tally.tokens:
        return None
    return {
        "nll": tally.nll / tally.tokens,
        "perplexity": tally.perplexity,
        "bits_per_byte": tally.bits_per_byte,
        "mean_chunk_perplexity": scores.mean_chunk_perplexity(f"{which}_nll"),
    }


def peak_mb() -> float:
    """The largest resident memory of this process so far, in MiB."""
    status = Path("/proc/self/status")
    for line in status.read_text("utf-8").splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):  # getrusage knows the parent's as well, if that was larger
            return int(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def git_commit() -> str | None:
    """The commit this package runs from, with "+" if its files were changed; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)  # else it merely lies in one
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()
