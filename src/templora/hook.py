"""The hook that transformers users expect: `model.generate(ids, custom_generate=templora.generate)`.

transformers prepares the logits processors, stopping criteria and length; the loop is a session's.
"""

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from templora.base import Base
from templora.errors import InvalidRecipe
from templora.events import Token
from templora.recipe import Recipe
from templora.sampling import Sampling
from templora.turns import turn

ENDLESS = sys.maxsize  # the stopping criteria decide


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    recipe: str | Path | Recipe = "default",
    recipe_overrides: dict[str, Any] | None = None,
    seed: int | None = None,
    **model_inputs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """A decoding method for `GenerationMixin.generate` that learns while it writes.

    Args:
        input_ids: [1, tokens]; full chunks of it are learned first.
        recipe, recipe_overrides: as for `Base.session`.
        seed: of adapter and sampling; by default drawn from torch's generator, so that
            `torch.manual_seed` decides, as it does elsewhere in transformers.
        model_inputs: what `attention_mask`, [1, tokens], leaves out, such as padding, is no part of the text.

    Returns:
        [1, tokens + written], or transformers' output class if `return_dict_in_generate` is set.
    """
    _refuse(input_ids, generation_config, model_inputs)
    streamer = streamer or _callers_streamer(model)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    sampling = Sampling(temperature=1.0 if generation_config.do_sample else 0.0)
    mask: Tensor | None = model_inputs.get("attention_mask")
    seen = (mask if mask is not None and mask.ndim == 2 else torch.ones_like(input_ids))[0].bool()
    with ExitStack() as stack:
        stack.enter_context(_borrowed(model))
        # The base has the dtype that it was loaded in, and the adapter learns in fp32.
        stack.enter_context(torch.autocast(model.device.type, enabled=False))
        session = Base(model, None).session(recipe, seed=seed, **(recipe_overrides or {}))
        stack.callback(session.discard)
        session.extend(input_ids[0][seen].tolist(), "")
        callers = _Callers(logits_processor, input_ids[:, ~seen], generation_config)
        processors = callers if callers.are_needed else logits_processor
        for event in session.write(ENDLESS, sampling=sampling, processors=processors, score_base=False):
            if not isinstance(event, Token):
                continue
            token = torch.tensor([[event.id]], device=input_ids.device)
            input_ids = torch.cat((input_ids, token), dim=1)
            if streamer is not None:
                streamer.put(token[0].cpu())
            if bool(stopping_criteria(input_ids, callers.scores).all()):  # pyright: ignore[reportArgumentType]
                break
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        scores, logits = callers.scores, callers.logits
        return GenerateDecoderOnlyOutput(sequences=input_ids, scores=scores, logits=logits)  # pyright: ignore[reportArgumentType]
    return input_ids


class _Callers(LogitsProcessorList):
    """The caller's processors, which count the padding that a session does not know.

    logits, scores: what they were given and what they made of it, [1, vocab] for each token; None where
    nobody asked.
    """

    def __init__(self, processors: LogitsProcessorList, padding: Tensor, config: GenerationConfig) -> None:
        super().__init__(processors)
        self._padding, keeps = padding, bool(config.return_dict_in_generate)
        self.scores: tuple[Any, ...] | None = () if keeps and config.output_scores else None
        self.logits: tuple[Any, ...] | None = () if keeps and config.output_logits else None

    @property
    def are_needed(self) -> bool:
        """Whether they differ from those they were made of, for which `filtering` knows a shorter way."""
        return self._padding.numel() > 0 or self.scores is not None or self.logits is not None

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """As transformers'."""
        ids: Any = torch.cat((self._padding.to(input_ids), input_ids), dim=1)
        made = super().__call__(ids, scores, **kwargs)
        self.logits = self.logits if self.logits is None else (*self.logits, scores)
        self.scores = self.scores if self.scores is None else (*self.scores, made)
        return made


@contextmanager
def _borrowed(model: PreTrainedModel) -> Generator[None]:
    """Leave a model that is being trained as it was: which modules train, and which parameters."""
    with turn(model):
        training = [module for module in model.modules() if module.training]
        needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        with turn(model):
            for module in training:
                module.training = True
            for parameter in needed:
                parameter.requires_grad_()


def _refuse(input_ids: Tensor, config: GenerationConfig, others: dict[str, Any]) -> None:
    # First: transformers has already repeated the ids for each beam and sequence.
    if (config.num_beams or 1) > 1 or (config.num_return_sequences or 1) > 1:
        raise InvalidRecipe("templora.generate writes one text; set num_beams and num_return_sequences to 1")
    if input_ids.shape[0] != 1:
        raise InvalidRecipe("templora.generate writes one text at a time; pass a batch of one")
    for name in ("inputs_embeds", "pixel_values"):
        if others.get(name) is not None:
            raise InvalidRecipe(f"templora.generate learns token ids; pass input_ids without {name}")
    mask: Tensor | None = others.get("attention_mask")
    # transformers leaves out a mask of ones, and notes how long it was.
    whole = getattr(config, "_mask_length", None) if mask is None else mask.shape[-1]
    if whole not in (None, input_ids.shape[1]):
        raise InvalidRecipe("templora.generate learns the whole text; pass all its input_ids, and no cache")


def _callers_streamer(model: PreTrainedModel) -> BaseStreamer | None:
    """`generate(streamer=…)` reaches built-in decoding methods only: a callable is not handed it.

    So it is taken from the frame of `generate`, two calls up, or more where a function of the user's is in
    between. Without it a user would see no text, and who reads from it would wait for ever.
    """
    frame = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame and not (frame.f_code.co_name == "generate" and frame.f_locals.get("self") is model):
        frame = frame.f_back
    found = frame.f_locals.get("streamer") if frame else None
    return found if isinstance(found, BaseStreamer) else None
