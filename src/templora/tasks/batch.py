"""Several texts at once on one base: the loops over a `Batch` or a `Crew`, and whom each event is of.

A text gets what it would get alone, in the same order; only the order among texts is the batch's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from templora.base import Base
from templora.batch import Batch, Text
from templora.crew import Crew, Member, pays
from templora.detokenizer import open_ended
from templora.errors import InvalidText
from templora.events import End, Event
from templora.pen import Wishes
from templora.sampling import Sampling
from templora.tasks import score as alone
from templora.tasks.score import Scores


def together(
    base: Base,
    recipe: Any = "default",
    *,
    size: int,
    texts: int | None = None,
    lockstep: bool | None = None,
    **overrides: Any,
) -> Batch | Crew:
    """What runs up to `size` texts at once, as `score_batch` says of `lockstep`.

    texts: how many there are at most; which way they go does not depend on it, so that it stays the same for
    those that an earlier run has left.
    """
    if pays(base, size) if lockstep is None else not lockstep:
        return Crew(base, recipe, size=size, **overrides)
    return Batch(base, recipe, size=size if texts is None else min(size, texts), **overrides)


def scoring(
    batch: Batch | Crew, documents: Iterable[Sequence[int]], *, seed: int = 0, score_base: bool = True
) -> Iterator[tuple[Text | Member, Event | None]]:
    """`tasks.score.scoring` of many documents: as soon as one is over, the next takes its place.

    Args:
        documents: token ids of each; one is asked for when there is room for it.

    Yields:
        Each event with the text it is of; None as the last of a text. Its `number` counts from 0.
    """
    if isinstance(batch, Crew):
        loops = (partial(alone.scoring, ids=[*ids], score_base=score_base) for ids in documents)
        return batch.run(enumerate(loops), seed=seed)
    return _scoring(batch, documents, seed=seed, score_base=score_base)


def _scoring(
    batch: Batch, documents: Iterable[Sequence[int]], *, seed: int, score_base: bool
) -> Iterator[tuple[Text, Event | None]]:
    waiting = enumerate(documents)
    while True:
        while len(batch.texts) < batch.size and (following := next(waiting, None)) is not None:
            number, ids = following
            joined = batch.text(ids, seed=seed, number=number)
            batch.join(joined)
            yield from ((joined, event) for event in joined.announcements())
            yield from _let_go(batch)
        if not batch.texts:
            return
        yield from batch.finish_chunks(score_base=score_base)
        yield from _let_go(batch)


def score_batch(
    base: Base,
    texts: Sequence[str],
    recipe: Any = "default",
    *,
    size: int = 8,
    seed: int = 0,
    tokens: int | None = None,
    skip: int = 0,
    score_base: bool = True,
    lockstep: bool | None = None,
    **overrides: Any,
) -> list[Scores]:
    """Score several texts, each on a fresh adapter, `size` of them at once.

    Args:
        tokens, skip: score that many tokens of each after skipping so many; all by default.
        score_base: also score each chunk under the bare base with the same window.
        lockstep: run one pass for all of them; False: run each in one of torch's threads. None: in lockstep
            on a GPU, where the base is large, or where torch has more than two threads for each of `size`.
        recipe, seed, overrides: as for `Base.session`.

    Returns:
        Of each text what `tasks.score.score` says of it, within rounding.

    Raises:
        InvalidRecipe, UnsupportedModel: this recipe or base must run its texts one at a time.
        InvalidText: a number below 0, or one string was given in place of several.
    """
    documents = [alone.part_of(base.encode(text), tokens, skip) for text in _several(texts)]
    scores = [Scores.of(base, ids) for ids in documents]
    batch = together(base, recipe, size=size, texts=len(documents) or 1, lockstep=lockstep, **overrides)
    for text, event in scoring(batch, documents, seed=seed, score_base=score_base):
        if event is None:
            text.discard()
        else:
            scores[text.number].take(event)
    return scores


def write_batch(
    base: Base,
    prompts: Sequence[str],
    tokens: int,
    recipe: Any = "default",
    *,
    size: int = 8,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_at_eos: bool = False,
    score_base: bool = True,
    sampling: Sampling | None = None,
    lockstep: bool | None = None,
    **wishes: Any,
) -> Iterator[tuple[int, Event]]:
    """Continue several prompts, each with a fresh adapter, `size` of them at once.

    Args:
        tokens: how many to write of each at most.
        stop, stop_at_eos, score_base, sampling: as for `Session.write`.
        recipe, seed: as for `Base.session`.
        lockstep: as for `score_batch`.
        wishes: fields of `Sampling`, as for `Session.write`, and recipe keys, as for `Base.session`.

    Yields:
        The index of a prompt and what has happened to it, as `Session.reading` and `Session.write` tell it.

    Raises:
        InvalidRecipe, UnsupportedModel: this recipe or base must run its texts one at a time; or as there.
        InvalidText: a prompt is empty, or one string was given in place of several.
    """
    drawn = {name: wishes.pop(name) for name in [field.name for field in fields(Sampling)] if name in wishes}
    draw = Sampling.chosen(sampling, base.model.generation_config, drawn)
    wished = Wishes(tokens, draw, None, stop, stop_at_eos, score_base)
    prompts = _several(prompts)
    batch = together(base, recipe, size=size, texts=len(prompts) or 1, lockstep=lockstep, **wishes)
    return _numbered(batch, prompts, wished, seed)


def _several(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise InvalidText("one string stands where several texts belong; put it into a list")
    return list(texts)


def _numbered(
    batch: Batch | Crew, prompts: Sequence[str], wishes: Wishes, seed: int
) -> Iterator[tuple[int, Event]]:
    for text, event in writing(batch, prompts, wishes, seed=seed):
        yield text.number, event
        if isinstance(event, End):
            text.discard()


def writing(
    batch: Batch | Crew, prompts: Sequence[str], wishes: Wishes, *, seed: int = 0
) -> Iterator[tuple[Text | Member, Event]]:
    """Read each prompt and write on, as `Session.reading` and `Session.write` do, `batch.size` at once.

    The longest come first, so that in lockstep prompts of like length run together.

    Yields:
        Each event with the text it is of; the last of a text is its `End`.
    """
    if not all(prompts):
        raise InvalidText(f"prompt {[*map(bool, prompts)].index(False) + 1} is empty; give it some text")
    ids = [open_ended(batch.base, prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: -len(ids[number]))
    if isinstance(batch, Crew):
        loops = ((n, partial(_alone, ids=ids[n], prompt=prompts[n], wishes=wishes)) for n in order)
        for text, event in batch.run(loops, seed=seed):
            if event is not None:
                yield text, event
        return
    for start in range(0, len(order), batch.size):
        group = [
            batch.text(ids[n], prompts[n], seed=seed, number=n) for n in order[start : start + batch.size]
        ]
        yield from reading(batch, group, score_base=wishes.score_base)
        yield from going_on(batch, wishes)


def _alone(text: Member, ids: Sequence[int], prompt: str, wishes: Wishes) -> Iterator[Event]:
    text.extend(ids, prompt)
    yield from text.learning(score_base=wishes.score_base)
    yield from text.write(**{field.name: getattr(wishes, field.name) for field in fields(wishes)})


def reading(batch: Batch, group: Sequence[Text], *, score_base: bool) -> Iterator[tuple[Text, Event]]:
    """Learn what is given; a longer text begins earlier, so that all are read to their end at the same time.

    group: longest first.
    """
    for left in range(group[0].full_chunks, -1, -1):
        for text in group[len(batch.texts) :]:
            if text.full_chunks >= left:
                batch.join(text)
                yield from ((text, event) for event in text.announcements())
        if left:
            yield from batch.finish_chunks(score_base=score_base)


def going_on(batch: Batch, wishes: Wishes) -> Iterator[tuple[Text, Event]]:
    """Write on in every text of the batch, until none is left in it."""
    for text in batch.texts:
        text.begin(wishes)
    while batch.texts:
        yield from _writing(batch, wishes.score_base)


def _writing(batch: Batch, score_base: bool) -> Iterator[tuple[Text, Event]]:
    """One chunk of every text; texts that are done leave, learned if their chunk is full."""
    yield from batch.write_chunk()
    yield from _ends(batch, [text for text in batch.texts if not text.is_full])
    if not batch.texts:
        return
    for text, event in batch.finish_chunks(score_base=score_base):
        text.pen.count(event)
        yield text, event
    yield from _ends(batch, [text for text in batch.texts if text.pen.done])


def _ends(batch: Batch, texts: Sequence[Text]) -> Iterator[tuple[Text, Event]]:
    for text in texts:
        batch.leave(text)
        yield text, text.pen.end()


def _let_go(batch: Batch) -> Iterator[tuple[Text, None]]:
    """Texts that are scored to their end."""
    for text in [text for text in batch.texts if text.span.tokens < 1]:
        batch.leave(text)
        yield text, None
