"""A book as passages that fit a prompt: whole segments, or sentences of one that is too long."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from templora.formats.extra import needed

# Written without spaces between words, so pieces are joined without one.
UNSPACED = frozenset(("zh", "ja", "th", "lo", "km", "my", "yue"))
Count = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Block:
    """One passage. places: the segments it consists of, a line each; or one, of which it may be a part."""

    source: str
    places: tuple[int, ...]


def blocks(
    segments: Sequence[str],
    language: str,
    count: Count,
    budget: int,
    *,
    split: bool = True,
    whole: Sequence[bool] = (),
) -> list[Block]:
    """Passages of at most `budget` tokens, as `count` counts them. Segments without text are left out.

    split False: a segment that is too long is a passage all the same. whole: for each segment whether that
    is so; those of one kind and the other do not share a passage.

    Raises:
        MissingExtra: a segment must be split, and the sentence splitter is not installed.
    """
    made: list[Block] = []
    lines: list[str] = []
    places: list[int] = []
    room = budget

    def close() -> None:
        nonlocal room
        if lines:
            made.append(Block("\n".join(lines), tuple(places)))
        lines.clear()
        places.clear()
        room = budget

    for place, segment in enumerate(segments):
        text = " ".join(segment.split())
        if not text:
            continue
        tokens = count(text) + 1
        if tokens > room or (places and whole and whole[place] != whole[places[-1]]):
            close()
        if tokens > budget and split and not (whole and whole[place]):
            made += [Block(piece, (place,)) for piece in pieces(text, language, count, budget)]
            continue
        lines.append(text)
        places.append(place)
        room -= tokens
    close()
    return made


def pieces(text: str, language: str, count: Count, budget: int) -> list[str]:
    """A long line as runs of whole sentences; a sentence that is too long is cut at spaces, or anywhere."""
    split = needed("sentencex", "splitting long paragraphs into sentences", "translate")
    sentences = [sentence for sentence in split.segment(_code(language), text) if sentence.strip()]
    made: list[str] = []
    for sentence in sentences:
        for part in _cut(sentence, count, budget):
            if made and count(made[-1] + part) < budget:
                made[-1] += part
            else:
                made.append(part)
    return [piece.strip() for piece in made if piece.strip()]


def assembled(blocks: Sequence[Block], targets: Sequence[str], segments: int, language: str) -> list[str]:
    """Translations of passages as translations of segments.

    Blank lines count for nothing where there is a line for each segment without them. A translation with more
    lines than its passage keeps the rest in the last line's segment.
    """
    parts: list[list[str]] = [[] for _ in range(segments)]
    for block, target in zip(blocks, targets, strict=False):
        last = len(block.places) - 1
        worded = [line for line in target.split("\n") if line.strip()]
        lines = worded if len(worded) == last + 1 else target.split("\n", last)
        for place, line in zip(block.places, lines, strict=False):
            parts[place].append(in_one_line(line))
    space = "" if _code(language) in UNSPACED else " "
    return [space.join(part) for part in parts]


def in_one_line(text: str) -> str:
    """A translation without line breaks. Spaces that do not break, or are as wide as a letter, are meant."""
    return re.sub(r"[ \t\n\r\f\v\x1c-\x1f\x85\u2028\u2029]+", " ", text).strip(" ")


def _code(language: str) -> str:
    """zh of zh-Hans, zh_CN and ZH."""
    return re.split("[-_]", language.lower())[0]


def _cut(sentence: str, count: Count, budget: int) -> Iterator[str]:
    while sentence:
        # Not all that is left is counted for each cut: one line may be a whole book.
        high = 4 * budget
        while (fits := count(sentence[:high]) < budget) and high < len(sentence):
            high *= 2
        if fits:
            yield sentence
            return
        # No tokenizer gives fewer tokens to more of the same text, so halving finds a cut that fits.
        low, high = 1, min(high, len(sentence))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(sentence[:middle]) < budget else (low, middle)
        cut = sentence.rfind(" ", low // 2, low) + 1 or low
        yield sentence[:cut]
        sentence = sentence[cut:]
