"""Between texts and tokens where a text is still growing.

Token ids to text as they come, with no broken character, by tokenizers' own DecodeStream; a tokenizer written
in Python falls back to decoding a short tail.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from templora.base import Base

TAIL = 8  # tokens: more than any character spans
SPACE, SPACES = " ", " Ġ▁"  # and how tokenizers write one inside a token
ANCHORS = "\na"  # what a piece of text is encoded after, to be encoded as in the middle of one
REACH = 256  # characters of a text's end: more than decide about its last token
UNFINISHED = "\ufffd"  # what a character decodes to before its last byte has come


def open_ended(base: "Base", text: str) -> list[int]:
    """Token ids of a text that goes on.

    Many tokenizers cut the white space at the very end of a text otherwise than before a word. To a model two
    line breaks in one token say that a third, or an indented line, comes next; and so it would go on. And a
    space at the end is a token that no word follows, since words bring their own: it is left out (`owed`).

    Raises:
        InvalidText: it holds halves of characters.
    """
    ids = base.encode(text)
    if not text[-1:].isspace():
        return ids
    before, whole = base.encode(text + "a")[:-1], base.decode(ids)
    alike = [base.decode(before)]
    if text[-REACH // 2 :].strip(SPACE):  # of nothing but spaces none is owed
        alike.append(alike[0] + SPACE)
    return before if before and whole in alike else ids


def owed(base: "Base", ids: Sequence[int], text: str) -> str:
    """The space that a text ends with and its tokens do not: what comes next must bring it."""
    if not text.endswith(SPACE) or not base.has_tokenizer:
        return ""
    held = base.decode(ids[-REACH:])
    for stop in range(-1, -TAIL, -1):  # a token that only begins a character has no text yet
        if not held.endswith(UNFINISHED):
            break
        held = base.decode(ids[-REACH + stop : stop])
    words = held.rstrip(SPACE)
    lacks = len(text) - len(text.rstrip(SPACE)) == len(held) - len(words) + 1
    return SPACE if words and lacks and _leaves_out(base, text[-REACH:]) else ""


def continuing(base: "Base", before: Sequence[int], text: str, new: str) -> list[int]:
    """`open_ended` ids of a text that goes on after another. before, text: of that, so far."""
    space, last = owed(base, before, text), list(before[-TAIL:])
    if new == SPACE and not text.endswith(SPACE) and _leaves_out(base, text[-REACH:] + SPACE):
        return []
    wanted = (base.decode(last) + space + new).rstrip(SPACE)
    ids = open_ended(base, space + new)
    if not text or base.decode(last + ids).rstrip(SPACE) == wanted:
        return ids
    # Llama 2's tokenizer and its like put a space before whatever they are given.
    others = [open_ended(base, new)]
    for anchor in ANCHORS:
        begin, whole = base.encode(anchor), open_ended(base, anchor + space + new)
        others += [whole[len(begin) :]] if whole[: len(begin)] == begin else []
    return next((o for o in others if base.decode(last + o).rstrip(SPACE) == wanted), ids)


def _leaves_out(base: "Base", text: str) -> bool:
    """Whether the tokens of a text that ends in a space leave that to the next word."""
    return base.decode(open_ended(base, text)) + SPACE == base.decode(base.encode(text))


def word_starts(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that are one space, with something after it or nothing, as before a number."""
    tokens: Any = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return {
        n for n, token in enumerate(tokens) if token and token[0] in SPACES and token[1:2] not in {*SPACES}
    }


class Detokenizer:
    """A stream of text pieces. before: the tokens already in the text, which decide about spaces.

    Where they end inside a character, it comes whole with its last byte, as if there had been no break.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = fast if isinstance(fast, Tokenizer) else None
        self._stream: Any = DecodeStream(ids=[], skip_special_tokens=True)
        self._before: list[int] = []  # the last token, which decides about a space
        self._ids: list[int] = []
        self._done = ""
        for token in before[self._last_clean_start(before) :]:
            self.step(token)

    def step(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if self._fast is not None:
            return self._streamed(self._fast, token)
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(self._done) :]
        self._ids = self._ids[-TAIL:]
        self._done = self._decode(self._ids)
        return piece

    def _streamed(self, tokenizer: Tokenizer, token: int) -> str:
        try:
            return self._stream.step(tokenizer, token) or ""
        except Exception:  # of tokenizers, which has no narrower one: bytes came that make no character
            self._stream = DecodeStream(ids=self._before, skip_special_tokens=True)
            piece = self._stream.step(tokenizer, token) or ""
            return piece if piece.startswith(UNFINISHED) else UNFINISHED + piece
        finally:
            self._before = [token]

    def _last_clean_start(self, ids: Sequence[int]) -> int:
        """Where the last few of these tokens begin, not inside a character."""
        start = max(0, len(ids) - TAIL)
        while start > 0 and self._decode(ids[max(0, start - TAIL) : start]).endswith(UNFINISHED):
            start -= 1
        return start

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
