"""What is wrong with a translation, as far as can be told without knowing either language."""

import unicodedata

# What each problem means, after "the translation".
MEANS = {
    "empty": "is empty",
    "runaway": "goes on and on",
    "untranslated": "is the source once more",
    "lines": "has more or fewer lines than the source",
}
LONGEST = 6  # times the source's length: more is a loop
LEAST_LETTERS = 12  # of a line that may not come back as it was: shorter ones are names and numbers


def problem(source: str, target: str, *, ended: bool) -> str | None:
    """The first thing that is wrong, a key of MEANS; None if nothing is.

    ended: whether the model ended it; else it ran out of room.
    """
    if not target.strip():
        return "empty"
    if not ended or len(target) > LONGEST * max(20, _width(source)):
        return "runaway"
    if _is_copied(source, target):
        return "untranslated"
    if source.count("\n") != target.count("\n"):
        return "lines"
    return None


def _is_copied(source: str, target: str) -> bool:
    """Whether at least half of the source's longer lines stand in the target as they were."""
    lines = [line for line in source.split("\n") if sum(map(str.isalpha, line)) >= LEAST_LETTERS]
    return bool(lines) and 2 * sum(line.strip() in target for line in lines) >= len(lines)


def _width(text: str) -> int:
    """Length in columns: an ideograph says about as much as a few letters."""
    return sum(3 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
