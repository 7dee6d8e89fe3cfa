"""How many characters of a text each of its tokens completes: where a text can be cut between two tokens."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from templora.base import Base
from templora.detokenizer import SPACE, TAIL, Detokenizer, continuing, owed

if TYPE_CHECKING:
    from templora.history import History


def sizes(base: Base, ids: Sequence[int], text: str) -> list[int]:
    """Characters that each token completes; they add up to the whole text.

    A token that only begins a character, or that has no text, completes none.
    """
    if not ids:
        return []
    if not text or not base.has_tokenizer:
        return [*[0] * (len(ids) - 1), len(text)]
    detokenizer = Detokenizer(base.tokenizer)
    pieces = [detokenizer.step(token) for token in ids]
    found, joined = [len(piece) for piece in pieces], "".join(pieces)
    if joined == text:
        return found
    # The text before may owe the first token's space already, and the next token bring this one's last.
    if (words := text.strip(SPACE)) and joined.strip(SPACE) == words:
        first = next(place for place, piece in enumerate(pieces) if piece)
        found[first] += text.index(words) - joined.index(words)
        found[-1] += len(text) - sum(found)
        return found
    return _offsets(base, ids, text)


def spliced(base: Base, history: "History", new: str, start: int, stop: int) -> tuple[list[int], list[int]]:
    """Ids and sizes of a text that takes the place of the tokens [start, stop)."""
    whole, before, after = history.text.getvalue(), history.ids[:start], history.ids[stop:]
    text, follows = whole[: history.end(start)], whole[history.end(stop) :]
    if not after:
        ids = continuing(base, before, text, new)
    else:
        # The next word may bring the space that stands before it.
        brings = base.decode(after[:TAIL]).startswith(SPACE) and not follows.startswith(SPACE)
        own = new.removesuffix(SPACE) if brings else new
        ids = base.encode(owed(base, before, text) + own) if own else []
    return ids, sizes(base, ids, new)


def _offsets(base: Base, ids: Sequence[int], text: str) -> list[int]:
    """The tokenizer's own account, where its tokens do not give the text back letter by letter."""
    if not base.tokenizer.is_fast:
        return [*[0] * (len(ids) - 1), len(text)]
    found: Any = base.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [min(a[1], b[0]) for a, b in pairwise(found["offset_mapping"])] + [len(text)]
    if len(ends) > len(ids):  # ids that someone else has made of it
        return [*[0] * (len(ids) - 1), len(text)]
    # Tokens before the text's own, such as the one that begins a text.
    ends = [0] * (len(ids) - len(ends)) + ends
    return [after - before for before, after in pairwise([0, *ends])]
