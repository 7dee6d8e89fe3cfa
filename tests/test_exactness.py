"""The promises that everything else stands on: the paper's numbers, the exact window, the untouched base."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import templora
from templora.base import Base
from templora.decoder import Decoder
from templora.errors import InvalidRecipe, ModelNotFound, SessionClosed, TemploraError
from templora.events import ChunkScored
from templora.session import Session
from templora.testing import ByteTokenizer, tiny_llama
from tests import plain_loop

PROSE = (
    "The lighthouse keeper climbed the stairs each evening, counting them aloud, and each evening there "
    "were ninety-nine. On the last night of October there were a hundred. He stood upon the hundredth "
    "stair for a long while, and the lamp above him turned, and the sea below him turned. "
) * 4


def tiny_base(**changes: object) -> Base:
    return templora.load(model=tiny_llama(**changes), tokenizer=ByteTokenizer())


def scores(session: Session, text: str) -> list[float]:
    return [event.adapted_nll for event in session.reading(text) if isinstance(event, ChunkScored)]


@pytest.mark.parametrize("name", ["tiny", pytest.param("novelist", marks=pytest.mark.slow)])
def test_the_paper_recipe_gives_the_nll_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    base = tiny_base() if name == "tiny" else templora.load(name)
    bare = copy.deepcopy(base.model)
    # A rate a thousand times the paper's would drown a mistake in noise; the paper's own hides it, so
    # the loop must run long enough for the adapter to matter: its effect is asserted below.
    sizes = (
        {"window": 32, "chunk": 32, "context": 32}
        if name == "tiny"
        else {"window": 48, "chunk": 32, "context": 48}
    )
    session = base.session("paper", seed=3, dropout=0.0, **sizes)
    session.adapter.save(tmp_path)
    start = load_file(tmp_path / "adapter_model.safetensors")
    ours = scores(session, PROSE)
    rows = plain_loop.rows_of(session.ids, sizes["chunk"], sizes["context"])
    theirs = plain_loop.run(bare, rows, seed=3, adapter_from=start)
    frozen = scores(base.session("paper", seed=3, learning_rate=0.0, **sizes), PROSE)
    tokens = sizes["chunk"]
    assert len(ours) == len(theirs) >= 5
    assert [n / tokens for n in ours] == pytest.approx([n / tokens for n in theirs], abs=1e-4)
    assert max(abs(a - b) / tokens for a, b in zip(ours, frozen, strict=True)) > 1e-3


def test_a_context_from_the_cache_scores_as_a_recomputed_one() -> None:
    base = tiny_base()
    sizes = {"window": 48, "chunk": 16, "context": 48, "cache": "recompute"}
    kept = scores(base.session(seed=1, learning_rate=0.0, **sizes), PROSE)
    fresh = scores(base.session(seed=1, learning_rate=0.0, context_from="recompute", **sizes), PROSE)
    assert kept == pytest.approx(fresh, abs=1e-3)


@settings(max_examples=20)
@given(
    window=st.integers(1, 60),
    chunk=st.integers(1, 40),
    sinks=st.integers(0, 4),
    number=st.integers(1, 4),
    written=st.integers(0, 39),
)
def test_the_token_just_outside_the_window_changes_no_logit_and_the_one_just_inside_does(
    window: int, chunk: int, sinks: int, number: int, written: int
) -> None:
    base, session = BASE, session_after_learning(window, chunk, sinks=sinks)
    span = session.plan.span(number)
    length = span.start + min(written, chunk - 1)
    ids = [(7 * i) % 250 for i in range(length)]

    def logits(changed: int | None) -> torch.Tensor:
        decoder = Decoder(base, session.adapter, session.plan, "recompute")
        return decoder.logits([249 if i == changed else t for i, t in enumerate(ids)], span)

    if span.visible > sinks:
        assert torch.equal(logits(None), logits(span.visible - 1))
    assert not torch.equal(logits(None), logits(span.visible))
    if sinks > 0:
        assert not torch.equal(logits(None), logits(min(sinks, length) - 1))


@settings(max_examples=30)
@given(
    window=st.integers(1, 40),
    chunk=st.integers(1, 24),
    sinks=st.integers(0, 4),
    draws=st.integers(1, 120),
    keys=st.sampled_from(["reuse", "base"]),
)
def test_where_keys_stay_none_older_than_the_window_is_attended_to_but_the_sinks(
    window: int, chunk: int, sinks: int, draws: int, keys: str
) -> None:
    session = session_after_learning(window, chunk, cache=keys, sinks=sinks, learning_rate=0.0)
    of_sinks: list[torch.Tensor] = []
    session.extend([1, 2, 3], "")
    for count, _ in enumerate(session.write(draws, score_base=False)):
        cache, span = session.decoder.cache, session.plan.span(session.chunk)
        if session.decoder.chunk == span.chunk:
            assert cache.first == (span.visible if span.visible > sinks else 0)
            assert cache.get_seq_length() <= sinks + window + chunk
            if span.visible >= sinks > 0:  # the first block's keys say which tokens they are, and where
                state = cache.state()["layers"][0]
                of_sinks.append(state["keys"][:, :, :sinks])
                assert torch.allclose(of_sinks[0], of_sinks[-1], atol=1e-5)
            assert cache.stop - cache.origin <= 128, "a position beyond those the base was trained for"
        if count > draws:
            break


def test_under_reuse_old_keys_are_used_until_positions_run_out() -> None:
    base = tiny_base()
    session = base.session(seed=1, window=32, chunk=8, context=32, cache="reuse", learning_rate=0.5)
    scored = (event for event in session.reading(PROSE) if isinstance(event, ChunkScored))
    origins = [session.decoder.cache.origin for _ in scored]
    assert len(set(origins)) < len(origins) / 4, "the window was recomputed at each chunk"
    assert len(set(origins)) > 2, "positions never started again"


@torch.no_grad()
def test_where_the_base_encodes_every_key_before_the_chunk_is_its_own() -> None:
    """Those that it keeps when it scores a chunk, so that both have seen the same."""
    session = session_after_learning(24, 8, cache="base", learning_rate=0.02)
    bare, chunks = Decoder(BASE, None, session.plan, "base"), 0
    session.extend([(7 * i) % 250 for i in range(30)], "")
    for event in session.write(80, score_base=False):
        span = session.plan.span(session.chunk)
        if event.kind != "token" or session.decoder.chunk != span.chunk:
            continue
        ids = session.ids
        while chunks <= span.chunk:
            if chunks:
                over = session.plan.span(chunks - 1)
                prefix, position = bare.prefix(ids, over, 24)
                BASE.nll(ids[over.start - 1 : over.stop - 1], ids[over.start : over.stop], position, prefix)
                bare.keep(prefix, over)
            theirs, _ = bare.prefix(ids, session.plan.span(chunks), 24)
            chunks += 1
        assert session.decoder.cache.origin == bare.cache.origin
        ours = session.decoder.cache.prefix(session.decoder.cache.first, span.start - 1)
        for own, other in zip(ours.layers, theirs.layers, strict=True):  # pyright: ignore[reportPossiblyUnbound]
            assert torch.allclose(own.keys, other.keys, atol=1e-5)  # pyright: ignore[reportArgumentType]
            assert torch.allclose(own.values, other.values, atol=1e-5)  # pyright: ignore[reportArgumentType]
    assert chunks > 12
    assert session.adapter.version > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_the_base_is_bit_identical_after_writing_reading_and_discarding(
    dtype: torch.dtype, recipe: str
) -> None:
    model = tiny_llama().to(dtype)
    base = templora.load(model=model, tokenizer=ByteTokenizer())
    fixed = torch.arange(40).unsqueeze(0)
    before, logits, names = base.fingerprint(), model(fixed).logits, [n for n, _ in model.named_modules()]
    session = base.session(recipe, seed=2, window=32, chunk=16, context=32, learning_rate=1e-2)
    session.read(PROSE[:200])
    for _ in session.write(60):
        assert torch.equal(model(fixed).logits, logits), "the base was not bare between two events"
    assert session.adapter.version > 10
    session.discard()
    assert base.fingerprint() == before
    assert torch.equal(model(fixed).logits, logits)
    assert [n for n, _ in model.named_modules()] == names
    assert not any(p.requires_grad for p in model.parameters())


def test_the_fingerprint_sees_a_single_bit() -> None:
    base = tiny_base()
    before = base.fingerprint()
    weight = base.model.model.layers[1].mlp.down_proj.weight
    weight.data.view(torch.int32)[3, 5] ^= 1
    assert base.fingerprint() != before


def test_a_fresh_adapter_and_a_learning_rate_of_zero_equal_the_base() -> None:
    base = tiny_base()
    session = base.session(seed=4, window=32, chunk=16, context=32, learning_rate=0.0)
    for event in session.reading(PROSE, score_base=True):
        assert isinstance(event, ChunkScored)
        assert event.adapted_nll == event.base_nll
    assert session.adapter.version == 0
    ids = torch.arange(30).unsqueeze(0)
    bare = base.model(ids).logits
    with session.adapter.attached():
        assert torch.equal(base.model(ids).logits, bare)
    with session.adapter.decoding():
        assert torch.equal(base.model(ids).logits, bare)


def test_the_merged_copy_computes_what_the_side_path_does_and_leaves_when_it_should() -> None:
    base = tiny_base()
    session = base.session(seed=4, window=32, chunk=16, context=32, learning_rate=1e-2)
    session.read(PROSE[:200])
    ids = torch.arange(30).unsqueeze(0)
    bare = base.model(ids).logits
    with session.adapter.attached():
        side = base.model(ids).logits
        with session.adapter.decoding():
            merged = base.model(ids).logits
        assert torch.equal(base.model(ids).logits, side), "what stood there before did not come back"
    assert torch.equal(base.model(ids).logits, bare)
    assert not torch.allclose(side, bare, atol=1e-3)
    assert torch.allclose(side, merged, atol=1e-4)


def test_what_is_merged_for_one_pass_gives_the_same_bits_and_is_not_kept() -> None:
    base = tiny_base()
    session = base.session(seed=4, window=32, chunk=16, context=32, learning_rate=1e-2, cache="recompute")
    session.read(PROSE[:200])
    adapter, ids = session.adapter, torch.arange(30).unsqueeze(0)
    assert adapter.version > 5
    assert adapter._merged is None, "reading alone needs no copy"
    with torch.no_grad(), adapter.decoding(once=True):
        once = base.model(ids).logits
    with torch.no_grad(), adapter.decoding():
        assert torch.equal(base.model(ids).logits, once)
    session.read(PROSE[200:300])
    with torch.no_grad(), adapter.decoding(once=True):
        newer = base.model(ids).logits
    assert not torch.equal(newer, once)
    with torch.no_grad(), adapter.attached():
        assert torch.allclose(base.model(ids).logits, newer, atol=1e-4)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, MemoryError])
def test_a_learning_step_that_fails_leaves_everything_as_it_was(failure: type[BaseException]) -> None:
    base = tiny_base()
    session = base.session(seed=4, window=32, chunk=16, context=32, epochs=3, dropout=0.1)
    session.read(PROSE[:100])
    learner, adapter = session.learner, session.adapter
    weights, version, state = adapter.snapshot(), adapter.version, copy.deepcopy(learner.state())
    passes = 0

    def fails_in_the_third_epoch() -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise failure("stop")
        return base.nll(session.ids[:16], session.ids[1:17])

    with pytest.raises(failure):
        learner.learn(1e-3, fails_in_the_third_epoch)
    assert passes == 3
    assert torch.equal(adapter.flat, weights)
    assert adapter.version == version
    after = learner.state()
    assert str(after["optimizer"]["param_groups"]) == str(state["optimizer"]["param_groups"])
    for index, old in state["optimizer"]["state"].items():
        for key, value in old.items():
            assert torch.equal(after["optimizer"]["state"][index][key], value), key
    assert torch.equal(after["dropout"], state["dropout"])


def test_a_saved_adapter_is_loaded_by_peft_with_the_same_logits(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_base()
    session = base.session(seed=4, window=32, chunk=16, context=32, learning_rate=1e-2)
    session.read(PROSE[:200])
    session.adapter.save(tmp_path)
    ids = torch.arange(30).unsqueeze(0)
    with session.adapter.attached():
        ours = base.model(ids).logits
    theirs = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-5)
    other = tiny_base().session(seed=9, window=32, chunk=16, context=32)
    other.adapter.load(tmp_path, version=12)
    assert torch.equal(other.adapter.flat, session.adapter.flat)


@pytest.mark.parametrize(
    ("wishes", "folder", "error"),
    [
        ({"rank": 8}, ".", InvalidRecipe),
        ({"head": 0.0}, ".", InvalidRecipe),
        ({"head": 1.0}, "nowhere", ModelNotFound),
    ],
)
def test_an_adapter_of_another_recipe_is_refused_whole(
    wishes: dict[str, Any], folder: str, error: type[Exception], tmp_path: Path
) -> None:
    BASE.session(seed=4).adapter.save(tmp_path)
    adapter = BASE.session(seed=9, **wishes).adapter
    before = adapter.snapshot()
    with pytest.raises(error):
        adapter.load(tmp_path / folder, version=1)
    assert torch.equal(adapter.flat, before) and adapter.version == 0


def test_an_adapter_that_would_be_lost_is_not_taken(tmp_path: Path) -> None:
    """A session on disk computes its adapter again."""
    BASE.session(seed=4).adapter.save(tmp_path / "adapter")
    with BASE.session(seed=4, dir=tmp_path / "session") as session:
        with pytest.raises(TemploraError, match="keeps its own adapter"):
            session.adapter.load(tmp_path / "adapter", version=1)
        assert session.adapter.version == 0


def test_an_adapter_that_is_gone_is_not_saved_as_an_empty_one(tmp_path: Path) -> None:
    with BASE.session(seed=4) as session:
        session.adapter.save(tmp_path)
    for use in (lambda: session.adapter.save(tmp_path), lambda: session.adapter.load(tmp_path, 1)):
        with pytest.raises(SessionClosed, match="was discarded"):
            use()
    assert load_file(tmp_path / "adapter_model.safetensors")


BASE = tiny_base()


def session_after_learning(window: int, chunk: int, **changes: object) -> Session:
    """A session whose adapter is not zero; its own text is not looked at."""
    session = BASE.session(seed=1, window=window, chunk=chunk, context=min(window, 4), **changes)
    with torch.no_grad():
        session.adapter.flat.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    session.adapter.updated()
    return session
