"""Any text, token by token: the pieces join to the text, and none holds a broken character."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import templora
from templora.detokenizer import Detokenizer, open_ended, owed
from templora.loading import EMBEDDED, load_pretrained
from templora.testing import ByteTokenizer, ScriptedModel, tiny_llama

BYTES = ByteTokenizer()


@cache
def novelist() -> PreTrainedTokenizerBase:
    return load_pretrained(EMBEDDED, None, "cpu")[1]


# Half a surrogate pair is no text: it has no UTF-8. A replacement character at the very end cannot be told
# from an unfinished one, so it waits for what comes next.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).map(lambda t: t.rstrip("\ufffd"))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], before: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer, before or [])
    return [detokenizer.step(token) for token in ids]


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("name", ["bytes", "novelist"])
@given(text=texts)
@example(text="naïve – “字” 👩‍👩‍👧 e\u0301")
@example(text="\ufffd\ufffd x \ufffd.")
@example(text=" two  spaces \n\n\t and\r\nlines ")
def test_the_pieces_join_to_the_text(name: str, text: str) -> None:
    tokenizer = BYTES if name == "bytes" else novelist()
    ids = encoded(tokenizer, text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)
    if name == "bytes":
        assert "".join(pieces(tokenizer, ids)) == text


@given(text=texts, more=texts)
def test_a_text_is_continued_where_it_was_left(text: str, more: str) -> None:
    tokenizer = novelist()
    before, ids = encoded(tokenizer, text), encoded(tokenizer, more)
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=True)
    assert "".join([text, *pieces(tokenizer, ids, before)]) == whole


@given(text=texts, cut=st.integers(0, 40))
@example(text="ab字👧", cut=3)
def test_a_text_may_be_left_in_the_middle_of_a_character(text: str, cut: int) -> None:
    ids = encoded(BYTES, text)
    cut = min(cut, len(ids))
    assert "".join([*pieces(BYTES, ids[:cut]), *pieces(BYTES, ids[cut:], ids[:cut])]) == text


@given(ids=st.lists(st.integers(0, 255), max_size=60), cut=st.integers(0, 60))
@example(ids=[*[128] * 30, 65], cut=25)
def test_a_break_changes_nothing_even_among_bytes_that_are_no_character(ids: list[int], cut: int) -> None:
    whole = pieces(BYTES, ids)
    assert [*pieces(BYTES, ids[:cut]), *pieces(BYTES, ids[cut:], ids[:cut])] == whole


def test_a_character_comes_whole_with_its_last_byte() -> None:
    assert pieces(BYTES, encoded(BYTES, "a字👧b")) == ["a", "", "", "字", "", "", "", "👧", "b"]


def test_special_tokens_are_not_text() -> None:
    ids = [256, *encoded(BYTES, "ab"), 256, *encoded(BYTES, "c")]
    assert pieces(BYTES, ids) == ["", "a", "b", "", "c"]


@given(st.lists(st.integers(0, 256), max_size=60))
def test_any_tokens_at_all_give_text_that_has_a_utf_8(ids: list[int]) -> None:
    for piece in pieces(BYTES, ids):
        piece.encode()


@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_that_are_no_character_do_not_hold_back_what_follows(ids: list[int]) -> None:
    after = encoded(BYTES, "The end.")
    assert "".join(pieces(BYTES, [*ids, *after])).endswith("The end.")


@given(texts)
@example("naïve – “字” 👩‍👩‍👧")
def test_a_tokenizer_without_a_stream_of_its_own_gives_the_same_pieces(text: str) -> None:
    ids = encoded(BYTES, text)
    # As it is for a tokenizer written in Python.
    slow = Detokenizer(BYTES)
    slow._fast = None  # pyright: ignore[reportPrivateUsage]
    assert [slow.step(token) for token in ids] == pieces(BYTES, ids)


def test_pieces_are_never_taken_back() -> None:
    ids = encoded(BYTES, "one — two")
    so_far = ["".join(pieces(BYTES, ids[:stop])) for stop in range(len(ids) + 1)]
    assert all(later.startswith(earlier) for earlier, later in pairwise(so_far))


def falls_back_to_bytes() -> PreTrainedTokenizerFast:
    """Decodes as Llama 2's tokenizer does; after 256 bytes come three words."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁a", "b"]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made)


BYTE_FALLBACK = falls_back_to_bytes()


@given(st.lists(st.sampled_from([0x0A, 0x41, 0xE2, 0x82, 0xAC, 256, 257, 258]), max_size=30))
@example([0x0A, 0xE2, 256])
def test_bytes_that_make_no_character_stop_nothing(ids: list[int]) -> None:
    """A model may write them; then all else must come out, once and in order."""
    text = "".join(pieces(BYTE_FALLBACK, [*ids, 258, 258]))
    words = {256: "the", 257: "a", 258: "b"}
    kept = "".join(words.get(token, "") for token in [*ids, 258, 258])
    assert "".join(c for c in text if c in "theab") == kept


@pytest.mark.parametrize(
    "text", ["said he.\n\n", "said he.\n", "\n\n", "said ", "said he.", "  \n \n\n\t", "字\n\n"]
)
def test_white_space_at_the_end_is_cut_as_before_a_word(text: str) -> None:
    base = templora.load(EMBEDDED, device="cpu")
    ids = open_ended(base, text)
    assert base.decode(ids) + owed(base, ids, text) == text
    assert owed(base, ids, text) == (" " if text == "said " else "")
    assert ids == base.encode(text + "He")[: len(ids)]
    if text == "said he.\n\n":
        assert ids != base.encode(text)  # it ends in one token there, of which a space comes next


@pytest.mark.parametrize("text", ['"Go," said he.\n\n', '"Go," said '])
def test_a_session_and_a_batch_give_their_models_an_open_end(text: str) -> None:
    base = templora.load(EMBEDDED, device="cpu")
    session = base.session(window=64, context=64)
    session.read(text)
    assert session.text == text
    assert session.ids[1:] == open_ended(base, text) != base.encode(text)
    events = templora.write_batch(base, [text], tokens=1, window=64, context=64)
    (written,) = ((event.id, event.text) for _, event in events if event.kind == "token")
    assert [(event.id, event.text) for event in session.write(1) if event.kind == "token"] == [written]


@pytest.mark.parametrize("text", ["He looked at the ", "He came. ", "A  "])
@pytest.mark.parametrize("own", [False, True])
def test_after_a_space_comes_a_word_that_brings_it(text: str, own: bool) -> None:
    base = templora.load(EMBEDDED, device="cpu")
    for seed in range(5):
        session = base.session(window=64, context=64, seed=seed)
        session.read(text)
        none = LogitsProcessorList() if own else None  # a caller's own processors, in place of all others
        tokens = [e for e in session.write(3, processors=none) if e.kind == "token"]
        assert own or base.decode([tokens[0].id]) == " " + tokens[0].text
        assert session.text == text + "".join(token.text for token in tokens)
        assert base.decode(session.ids) == session.text or own, "they may draw what brings no space"


def of_llama(spaces: str) -> templora.Base:
    """A tokenizer that marks spaces as Llama 2's does, by its normalizer, or as later ones do."""
    made: Any = Tokenizer(models.BPE(byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    if spaces == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces)
    bytes_too = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", *bytes_too], show_progress=False)
    made.train_from_iterator(["A small cat sat. It was noon. So it sat."] * 3, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)  # pyright: ignore[reportArgumentType]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    first: dict[str, int] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return templora.load(model=tiny_llama(vocab_size=len(tokenizer), **first), tokenizer=tokenizer)


@pytest.mark.parametrize("spaces", ["normalizer", "first", "always", "never"])
def test_who_marks_spaces_as_llama_does_is_given_them_once(spaces: str) -> None:
    base, parts = of_llama(spaces), ["A small ", "cat sat. ", "It was ", "noon. ", "So", " it s", "at."]
    session = base.session(window=32, context=32, chunk=16)
    for part in parts:
        session.read(part)
    assert session.text == "".join(parts) == base.decode(session.ids)
    session = base.session(window=32, context=32, chunk=16)
    session.read("It was ")
    written = "".join(event.text for event in session.write(3) if event.kind == "token")
    assert session.text == "It was " + written == base.decode(session.ids)


def test_a_text_given_in_pieces_is_cut_as_the_whole() -> None:
    base, parts = (
        templora.load(EMBEDDED, device="cpu"),
        ["A small ", "cat sat. ", "It was ", "\n\nnoon. ", "So"],
    )
    session = base.session(window=64, context=64)
    for part in parts:
        session.read(part)
    assert session.text == "".join(parts)
    assert session.ids[1:] == base.encode(session.text)


def test_a_letter_of_two_bytes_may_bring_the_space() -> None:
    made: Any = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(["a a a a é ê è ë á à â ã w w w"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made)
    begun, rest, word, end = (made.token_to_id(token) for token in ("ĠÃ", "©", "Ġw", "a"))
    first: dict[str, int] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = ScriptedModel({end: begun, begun: rest, rest: word}, vocab_size=len(tokenizer), **first)
    base = templora.load(model=model, tokenizer=tokenizer)
    for parts in ([3], [1, 1, 1], [1, 2]):
        session = base.session(window=32, context=32, chunk=16)
        session.read("a ")
        for tokens in parts:
            for _ in session.write(tokens, temperature=0.0):
                pass
        assert session.text == base.decode(session.ids) == "a é w"


@pytest.mark.parametrize(
    ("parts", "tokens"), [(["the", " ", "cat"], "the cat"), (["the", " ", " ", "cat"], "the  cat")]
)
def test_a_space_that_is_given_alone_is_owed_too(parts: list[str], tokens: str) -> None:
    base = templora.load(EMBEDDED, device="cpu")
    session = base.session(window=64, context=64)
    for part in parts:
        session.read(part)
    assert session.text == base.decode(session.ids) == tokens


def test_on_disk_a_space_that_is_owed_outlives_the_session(tmp_path: Path) -> None:
    base, sizes = templora.load(EMBEDDED, device="cpu"), {"window": 64, "context": 64, "chunk": 16}
    plain = base.session(**sizes)
    plain.read("He looked at the ")
    texts = [event.text for event in plain.write(20) if event.kind == "token"]
    with base.session(dir=tmp_path / "s", **sizes) as session:
        session.read("He looked at the ")
        session.close()
    session = templora.resume(tmp_path / "s", base)
    assert [event.text for event in session.write(20) if event.kind == "token"] == texts
    session.undo(2)
    assert session.text == ""
    session.redo()
    session.edit(13, 17, "a ")
    assert session.text == "He looked at a " + "".join(texts) == base.decode(session.ids)
    first = len("He looked at a ")
    session.edit(first, first + len(texts[0]), "cat")
    assert session.text == "He looked at a cat" + "".join(texts[1:]) == base.decode(session.ids)
    session.edit(13, 15, "the ")
    assert session.text == "He looked at the cat" + "".join(texts[1:]) == base.decode(session.ids)
    session.rewind(0)
    session.read("He ")
    session.rewind(len(session.ids))
    assert session.text == "He "
    session.read("came.")
    assert (session.text, session.ids[1:]) == ("He came.", base.encode("He came."))
    session.close()
