"""How good translations are: BLEU and chrF, COMET in an environment of its own, names kept alike."""

import json
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from templora.bench.guofeng import Outcome
from templora.bench.tables import table
from templora.errors import OutputError
from templora.formats.extra import needed

# COMET needs transformers < 5, so it runs in another Python; it reads and writes JSON.
COMET = """
import json, sys
from comet import download_model, load_from_checkpoint
model = load_from_checkpoint(download_model("Unbabel/wmt22-comet-da"))
print(json.dumps(model.predict(json.load(sys.stdin), batch_size=8, gpus=0).system_score))
"""
LEAST_REPEATS = 3  # passages in which a run of characters must stand to be taken for a name


def scores(drafts: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF with their signatures."""
    metrics = _metrics()
    found: dict[str, Any] = {}
    for name, metric in (("bleu", metrics.BLEU()), ("chrf", metrics.CHRF())):
        found[name] = metric.corpus_score(list(drafts), [list(references)]).score
        found[f"{name}_signature"] = str(metric.get_signature())
    return found


def see_ready(comet_python: Path | None) -> None:
    """See that all that quality is measured with is there, before hours of translating.

    Raises:
        MissingExtra: sacreBLEU is not. OutputError: that Python has no COMET.
    """
    _metrics()
    if comet_python:
        _run(comet_python, "import comet")


def comet(python: Path, sources: Sequence[str], drafts: Sequence[str], references: Sequence[str]) -> float:
    """COMET of all drafts, computed by that Python.

    Raises:
        OutputError: it could not; the message holds its last line.
    """
    data = [{"src": s, "mt": d, "ref": r} for s, d, r in zip(sources, drafts, references, strict=True)]
    return float(json.loads(_run(python, COMET, json.dumps(data)).strip().splitlines()[-1]))


def _metrics() -> Any:
    return needed("sacrebleu.metrics", "measuring translations", "translate")


def _run(python: Path, program: str, given: str = "") -> str:
    """What a program prints in that Python."""
    try:
        done = subprocess.run([python, "-c", program], input=given, capture_output=True, text=True)
    except OSError as error:
        raise OutputError(f"cannot run {python}: {error.strerror}; give a Python with COMET") from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OutputError(f"COMET failed in {python}: {reason}; see that it is installed there")
    return done.stdout


def consistency(pairs: Iterable[tuple[str, str]], names: Iterable[str]) -> float | None:
    """Share of repeats of a source name that are translated as it mostly is; None without repeats.

    A name's usual translation is guessed without a dictionary: of the capitalised words of the passages that
    hold the name, the one that goes with it most and with other passages least.
    """
    passages = [(source, set(re.findall(r"\b[A-Z][a-z]+\b", target))) for source, target in pairs]
    agree = repeats = 0
    for name in names:
        inside = [words for source, words in passages if name in source]
        outside = [words for source, words in passages if name not in source]
        if len(inside) < 2:
            continue
        weights: dict[str, float] = defaultdict(float)
        for words in inside:
            for word in words:
                weights[word] += 1
        for words in outside:
            for word in words & weights.keys():
                weights[word] -= len(inside) / len(outside)
        best = max(weights, key=lambda word: (weights[word], word), default=None)
        repeats += len(inside)
        agree += sum(best in words for words in inside)
    return agree / repeats if repeats else None


def names_in(sources: Sequence[str], most: int = 20) -> list[str]:
    """Runs of two to four Chinese characters that come again in many passages, the longest of each kind."""
    counts: Counter[str] = Counter()
    for source in sources:
        runs = re.findall(r"[\u4e00-\u9fff]+", source)
        counts.update({run[i : i + n] for run in runs for n in (2, 3, 4) for i in range(len(run) - n + 1)})
    often = {gram: n for gram, n in counts.items() if n >= LEAST_REPEATS}
    whole = [g for g, n in often.items() if not any(g != h and g in h and often[h] == n for h in often)]
    return sorted(whole, key=lambda gram: (-often[gram] * len(gram), gram))[:most]


def table_of(outcomes: Sequence[Outcome], comet_python: Path | None) -> str:
    """Quality of the last passages' translations, with what the numbers mean."""
    rows: list[list[str]] = []
    signatures = ""
    for outcome in outcomes:
        if not outcome.drafts:
            continue
        found = scores(outcome.drafts, outcome.references)
        signatures = f"{found['bleu_signature']}; {found['chrf_signature']}"
        pairs = list(zip(outcome.sources, outcome.drafts, strict=True))
        alike = consistency(pairs, names_in(outcome.sources))
        row = [outcome.work, str(outcome.pairs), "own" if outcome.free else "references"]
        row += [
            f"{found['bleu']:.2f}",
            f"{found['chrf']:.2f}",
            "–" if alike is None else f"{100 * alike:.0f} %",
        ]
        if comet_python:
            row.append(f"{comet(comet_python, outcome.sources, outcome.drafts, outcome.references):.4f}")
        rows.append(row)
    heads = ["work", "K", "learned", "BLEU", "chrF", "names alike"] + (["COMET"] if comet_python else [])
    return f"### The last passages\n\n{table(heads, rows)}\n\n{signatures}\n" if rows else ""
