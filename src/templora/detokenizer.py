"""Token ids to text as they come, with no broken character.

Uses tokenizers' own DecodeStream; a tokenizer written in Python falls back to decoding a short tail.
"""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

TAIL = 8  # tokens: more than any character spans


class Detokenizer:
    """A stream of text pieces. before: the tokens already in the text, which decide about spaces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = fast if isinstance(fast, Tokenizer) else None
        self._stream: Any = DecodeStream(ids=list(before[-TAIL:]), skip_special_tokens=True)
        self._ids, self._done = list(before[-TAIL:]), self._decode(list(before[-TAIL:]))

    def step(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        if self._fast is not None:
            return self._stream.step(self._fast, token) or ""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece = text[len(self._done) :]
        self._ids = self._ids[-TAIL:]
        self._done = self._decode(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        if self._fast is not None:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))
