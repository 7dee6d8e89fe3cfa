"""`model.generate(ids, custom_generate=templora.generate)`: transformers' call, a session's loop."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

import templora
from templora.base import Base
from templora.cache import on_top_of
from templora.errors import InvalidRecipe
from templora.testing import ByteTokenizer, tiny_llama

PROMPT = torch.tensor([list(b"The lighthouse keeper climbed the stairs each evening.")])
SIZES: dict[str, Any] = {"window": 48, "chunk": 16, "context": 48}
MODEL: Any = tiny_llama(initializer_range=0.2)


def generate(model: Any = MODEL, ids: Tensor = PROMPT, rate: float = 1e-3, **kwargs: Any) -> Any:
    """transformers' `generate` with templora's loop."""
    overrides = SIZES | {"learning_rate": rate}
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        custom_generate=templora.generate,
        recipe_overrides=overrides,
        seed=3,
        **kwargs,
    )


class Heard(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.tokens.extend(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


class Wants(LogitsProcessor):
    """Makes one token likely wherever it is allowed."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.token] += 100
        return scores


class Only(LogitsProcessor):
    """Leaves one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rest = torch.full_like(scores, -torch.inf)
        rest[:, self.token] = 0
        return rest


class After(StoppingCriteria):
    """Stops when the text is that long, and keeps what it saw."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen = input_ids.shape[1]
        return torch.full((input_ids.shape[0],), self.seen >= self.length)


def test_without_learning_greedy_is_transformers_own_greedy() -> None:
    # All of it fits the window: 54 + 12 tokens.
    ours = MODEL.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        custom_generate=templora.generate,
        recipe_overrides={"window": 100, "chunk": 16, "context": 16, "learning_rate": 0.0},
        max_new_tokens=12,
        do_sample=False,
    )
    theirs = MODEL.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=12, do_sample=False
    )
    assert torch.equal(ours, theirs)


def test_learning_makes_a_difference() -> None:
    still, learning = (generate(rate=rate, max_new_tokens=30, do_sample=False) for rate in (0.0, 1e-2))
    assert torch.equal(still[:, : PROMPT.shape[1]], learning[:, : PROMPT.shape[1]])
    assert not torch.equal(still, learning)


def test_exactly_max_new_tokens_are_written_and_the_prompt_is_kept() -> None:
    written = generate(max_new_tokens=20, do_sample=True)
    assert written.shape == (1, PROMPT.shape[1] + 20)
    assert written.dtype == PROMPT.dtype
    assert torch.equal(written[:, : PROMPT.shape[1]], PROMPT)


def test_the_same_seed_writes_the_same_and_torchs_seed_decides_where_none_is_given() -> None:
    assert torch.equal(
        generate(max_new_tokens=20, do_sample=True), generate(max_new_tokens=20, do_sample=True)
    )

    def seeded(seed: int) -> list[int]:
        torch.manual_seed(seed)
        return MODEL.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            custom_generate=templora.generate,
            recipe_overrides=SIZES,
            max_new_tokens=20,
            do_sample=True,
        )[0].tolist()

    assert seeded(1) == seeded(1) != seeded(2)


def test_a_streamer_hears_each_token_and_the_end() -> None:
    heard = Heard()
    written = generate(max_new_tokens=20, do_sample=True, streamer=heard)
    new = written[0, PROMPT.shape[1] :].tolist()
    # `generate` itself puts the prompt, as it does for its own decoding methods.
    assert heard.tokens in (new, written[0].tolist())
    assert heard.ended == 1


def test_transformers_text_streamer_streams_the_text() -> None:
    tokenizer = ByteTokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)  # pyright: ignore[reportArgumentType]
    script = LogitsProcessorList([Only(tokenizer.encode("x", add_special_tokens=False)[0])])
    generate(max_new_tokens=5, do_sample=False, streamer=streamer, logits_processor=script)
    assert "".join(streamer) == "xxxxx"


def test_logits_processors_of_the_caller_are_used() -> None:
    written = generate(max_new_tokens=6, do_sample=True, logits_processor=LogitsProcessorList([Only(7)]))
    assert written[0, -6:].tolist() == [7] * 6


def test_the_settings_of_generate_become_processors() -> None:
    one = generate(max_new_tokens=12, do_sample=True, top_k=1)
    greedy = generate(max_new_tokens=12, do_sample=False)
    assert torch.equal(one, greedy)
    free = generate(max_new_tokens=12, do_sample=True, suppress_tokens=list(range(200)))
    assert min(free[0, PROMPT.shape[1] :].tolist()) >= 200


def test_processors_that_count_see_the_whole_text() -> None:
    # The prompt is longer than the window, so that what is visible is never long enough.
    wishes: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": 256}
    written = generate(**wishes, forced_eos_token_id=256)
    assert written[0, -1] == 256 and 256 not in written[0, :-1], "at the end, and not before"
    least, eager = PROMPT.shape[1] + 5, LogitsProcessorList([Wants(256)])
    assert generate(**wishes, logits_processor=eager).shape[1] == PROMPT.shape[1] + 1
    assert generate(**wishes, logits_processor=eager, min_length=least).shape[1] == least + 1
    assert generate(**wishes, logits_processor=eager, min_new_tokens=3).shape[1] == PROMPT.shape[1] + 4


def test_stopping_criteria_of_the_caller_end_the_text() -> None:
    length = PROMPT.shape[1] + 4
    criterion = After(length)
    written = generate(max_new_tokens=50, do_sample=True, stopping_criteria=StoppingCriteriaList([criterion]))
    assert written.shape[1] == length == criterion.seen


def test_max_length_ends_the_text() -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + 3)])
    assert generate(max_new_tokens=50, stopping_criteria=criteria).shape[1] == PROMPT.shape[1] + 3
    assert generate(max_length=PROMPT.shape[1] + 5).shape[1] == PROMPT.shape[1] + 5


def test_the_models_end_token_ends_the_text() -> None:
    script = LogitsProcessorList([Only(256)])
    written = generate(max_new_tokens=50, do_sample=False, logits_processor=script, eos_token_id=256)
    assert written[0, PROMPT.shape[1] :].tolist() == [256]


def test_a_dict_is_returned_where_one_is_asked_for() -> None:
    output = generate(max_new_tokens=5, return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert output.sequences.shape == (1, PROMPT.shape[1] + 5)


def test_scores_and_logits_are_returned_where_they_are_asked_for() -> None:
    wishes: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    lengths: list[int] = []

    def never(_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        lengths.append(len(scores))
        return torch.tensor([False])

    criteria: Any = StoppingCriteriaList([never])
    ours = MODEL.generate(
        PROMPT,
        custom_generate=templora.generate,
        recipe_overrides={"window": 100, "chunk": 16, "context": 16, "learning_rate": 0.0},
        stopping_criteria=criteria,
        **wishes,
    )
    theirs = MODEL.generate(PROMPT, **wishes)
    torch.testing.assert_close(ours.scores, theirs.scores)
    torch.testing.assert_close(ours.logits, theirs.logits)
    assert lengths == [1, 2, 3, 4, 5, 6]


def test_the_model_is_bit_for_bit_what_it_was_even_after_a_failure() -> None:
    base = Base(MODEL, None)
    before, keys = base.fingerprint(), set(vars(MODEL))
    names = [(name, type(module)) for name, module in MODEL.named_modules()]
    generate(max_new_tokens=40, do_sample=True, rate=1e-2)

    class Broken(BaseStreamer):
        def put(self, value: Tensor) -> None:
            if value.numel() == 1:
                raise KeyboardInterrupt

        def end(self) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        generate(max_new_tokens=40, do_sample=True, streamer=Broken())
    assert base.fingerprint() == before
    assert set(vars(MODEL)) == keys
    assert [(name, type(module)) for name, module in MODEL.named_modules()] == names


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"ids": PROMPT.repeat(2, 1)}, "pass a batch of one"),
        ({"num_beams": 2}, "set num_beams and num_return_sequences to 1"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences to 1"),
        ({"inputs_embeds": torch.zeros(1, PROMPT.shape[1], 32)}, "pass input_ids without inputs_embeds"),
    ],
    ids=["batch", "beams", "sequences", "embeddings"],
)
def test_what_a_session_cannot_do_is_refused(kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRecipe, match=reason):
        generate(max_new_tokens=3, **kwargs)


def test_tokens_that_are_in_a_cache_alone_are_refused() -> None:
    cache = DynamicCache()
    with torch.no_grad():
        MODEL(PROMPT[:, :30], **on_top_of(MODEL, cache))
    for hidden in (0, 3):  # transformers leaves out a mask that hides nothing
        mask = torch.ones_like(PROMPT)
        mask[:, :hidden] = 0
        with pytest.raises(InvalidRecipe, match="pass all its input_ids"):
            MODEL.generate(
                PROMPT[:, 30:],
                attention_mask=mask,
                **on_top_of(MODEL, cache),
                custom_generate=templora.generate,
                max_new_tokens=3,
            )


def test_a_model_in_training_is_only_borrowed() -> None:
    model: Any = tiny_llama(initializer_range=0.2).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.norm.eval()
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    generate(model, max_new_tokens=5)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needed
    assert [m.training for m in (model, model.model, model.model.norm)] == [True, True, False]


def test_it_works_on_gpt2_too() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=257, bos_token_id=256, eos_token_id=256)
    ).eval()
    written = generate(model, max_new_tokens=20, do_sample=True, pad_token_id=256)
    assert PROMPT.shape[1] < written.shape[1] <= PROMPT.shape[1] + 20


def test_padding_is_no_part_of_the_text() -> None:
    padded = torch.cat((torch.zeros_like(PROMPT[:, :20]), PROMPT), dim=1)
    mask = torch.cat((torch.zeros_like(PROMPT[:, :20]), torch.ones_like(PROMPT)), dim=1)
    made = MODEL.generate(
        padded,
        attention_mask=mask,
        custom_generate=templora.generate,
        recipe_overrides=SIZES | {"learning_rate": 1e-3},
        seed=3,
        max_new_tokens=40,
        do_sample=False,
    )
    assert made[0, 20:].tolist() == generate(max_new_tokens=40, do_sample=False)[0].tolist()
    forced = MODEL.generate(
        padded,
        attention_mask=mask,
        custom_generate=templora.generate,
        recipe_overrides=SIZES,
        max_new_tokens=20,
        forced_eos_token_id=77,
    )
    assert forced[0, -1] == 77, "processors that count see the padding, as elsewhere"


def test_inside_autocast_it_learns_as_outside() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        inside = generate(max_new_tokens=40, do_sample=False)
    assert inside.tolist() == generate(max_new_tokens=40, do_sample=False).tolist()


def test_a_streamer_is_heard_through_a_function_of_the_users() -> None:
    heard = Heard()

    def mine(model: Any, ids: Tensor, recipe_overrides: Any = None, seed: int = 0, **rest: Any) -> Any:
        return templora.generate(model, ids, recipe_overrides=recipe_overrides, seed=seed, **rest)

    MODEL.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        custom_generate=mine,
        recipe_overrides=SIZES,
        seed=3,
        max_new_tokens=5,
        streamer=heard,
    )
    assert len(heard.tokens) == PROMPT.shape[1] + 5
    assert heard.ended == 1
