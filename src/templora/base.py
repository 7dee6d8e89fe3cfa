"""The base: a frozen causal LM and its tokenizer, and the few ways in which it is run.

It runs no adapter by itself: whoever wants one swaps modules in for that pass and out again.
Its parameters are never written to and never require a gradient while a session works.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from templora import compiled_step, graph_step, identity, kernels, lean_attention, loading, start
from templora.cache import WindowCache, on_top_of
from templora.cross_entropy import judged, linear_nll, logits_nll
from templora.errors import InvalidRecipe, InvalidText
from templora.half import Halves
from templora.probe import Probe, Watch, probe
from templora.repeated import repeats
from templora.rotary import Rotary, positions_of, rotary_of
from templora.turns import turn

if TYPE_CHECKING:
    from templora.durable import DurableSession
    from templora.recipe import Recipe
    from templora.session import Session


class Base:
    """A loaded model with its tokenizer. Make one with `templora.load`.

    name: what it was loaded as. positions: how many it was trained for, None if without limit. start: what
    its folder says of where its adapters begin, see `templora.start`; empty where that is nothing. rotary:
    moves its keys to other positions; None where they must be made again. halves: see `templora.half`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str = ""
    ) -> None:
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper hides what `forward` takes
        self.model, self.turn, self._tokenizer = model, turn(model), tokenizer
        self.name = name or model.config.name_or_path or ""
        self.start = start.read(model.config.name_or_path or "")
        with self.turn:
            model.eval().requires_grad_(False)
            self._probe: Probe = probe(model)
            self.halves = Halves(model)
            self._few = kernels.pays_for_few(model)
            self._step = graph_step.step_of(model) or compiled_step.step_of(model)
            self._watched = Watch(model.modules())
        text = model.config.get_text_config()
        self.positions: int | None = positions_of(text)
        self.vocabulary: int = text.vocab_size
        accepted = inspect.signature(model.forward).parameters
        self._accepts = {"position_ids", "logits_to_keep"} & accepted.keys()
        placed = "position_ids" in self._accepts
        with self.turn:
            self.rotary: Rotary | None = rotary_of(model, self.positions) if placed else None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            InvalidText: a base made from a bare model has none; it works with token ids only.
        """
        if self._tokenizer is None:
            raise InvalidText("this base has no tokenizer; load it with tokenizer=…, or extend by ids")
        return self._tokenizer

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.model.device

    @property
    def dtype(self) -> str:
        """Of its weights, as `load` takes it."""
        in_four = getattr(self.model, "is_loaded_in_4bit", False)
        return loading.FOUR_BITS if in_four else str(self.model.dtype).removeprefix("torch.")

    @property
    def head(self) -> nn.Module:
        """The output layer that stands in the model now."""
        return self.model.get_output_embeddings()  # pyright: ignore[reportReturnType]

    @overload
    def session(
        self, recipe: "str | Path | Recipe" = "default", *, seed: int = 0, dir: None = None, **overrides: Any
    ) -> "Session": ...

    @overload
    def session(
        self, recipe: "str | Path | Recipe" = "default", *, seed: int = 0, dir: str | Path, **overrides: Any
    ) -> "DurableSession": ...

    def session(
        self,
        recipe: "str | Path | Recipe" = "default",
        *,
        seed: int = 0,
        dir: str | Path | None = None,
        budget: int | None = None,
        parallel: bool = False,
        **overrides: Any,
    ) -> "Session | DurableSession":
        """A new session: one text with a fresh adapter.

        Args:
            recipe: a name, a YAML file or a `Recipe`. overrides: recipe keys that win over it.
            seed: of the adapter's start and of sampling.
            dir: a folder that does not exist yet: the session lives there, survives, and can be undone;
                `templora.resume` continues it. budget: bytes its saved versions may take, by default 1 GiB.
            parallel: learn each chunk while the next is written, by an older adapter; in memory only.

        Raises:
            InvalidRecipe, WindowTooLarge, UnsupportedModel: before any work starts.
            NotASession, OutputError: `dir` cannot be used.
        """
        from templora import durable, session

        if parallel:
            from templora.parallel import ParallelSession

            if dir is not None:
                raise InvalidRecipe(
                    f"a session on disk learns in turn; leave out parallel or the folder {dir}"
                )
            return ParallelSession(self, recipe, seed=seed, **overrides)
        if dir is None:
            return session.Session(self, recipe, seed=seed, **overrides)
        return durable.create(self, dir, recipe, seed, budget, **overrides)

    def check(self, ids: Sequence[int]) -> None:
        """See that it has all these tokens.

        Raises:
            InvalidText: it has not, such as one that was added to the tokenizer alone.
        """
        strange = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if strange is not None:
            raise InvalidText(f"token {strange} is none of this base's {self.vocabulary}; take its text out")

    def describe(self) -> dict[str, Any]:
        """What makes it this base and no other, as plain values; computed anew each time."""
        return identity.of_base(self)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens.

        Raises:
            InvalidText: it holds halves of characters.
        """
        # verbose: that a novel is longer than the positions is no news here.
        return self.tokenizer.encode(InvalidText.check(text), add_special_tokens=False, verbose=False)  # pyright: ignore[reportReturnType]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    @property
    def has_tokenizer(self) -> bool:
        """False for a base made from a bare model."""
        return self._tokenizer is not None

    @property
    def eos_ids(self) -> list[int]:
        """Tokens with which the model ends a document."""
        ids: Any = getattr(self.model.generation_config, "eos_token_id", None)
        if ids is None and self._tokenizer is not None:
            ids = self._tokenizer.eos_token_id
        return [] if ids is None else [ids] if isinstance(ids, int) else [int(i) for i in ids]

    @property
    def prefix_ids(self) -> list[int]:
        """What stands before the first token of a text: BOS, else EOS, else nothing (as lm-eval does)."""
        known = self._tokenizer
        for token in (known.bos_token_id, known.eos_token_id) if known else ():
            if isinstance(token, int):
                return [token]
        return []

    def fast(self, rows: int, *, half: bool = False) -> AbstractContextManager[object]:
        """Faster kernels for a pass over that many tokens. half: with its fp32 weights as bf16 copies."""
        how: Any = {"halves": self.halves if half else None, "few": self._few, "repeats": repeats(self.model)}
        return kernels.fast(rows, self.device, self.model.dtype, **how)

    def last_logits(self, ids: Sequence[int], position: int, cache: Cache, *, half: bool = False) -> Tensor:
        """Run `ids` from that position on top of `cache`, which grows. half: as for `fast`.

        Returns:
            Logits after the last of them, [vocab], in the model's dtype.
        """
        short = self._step if len(ids) == 1 and not self._watched() else None
        if short and isinstance(cache, WindowCache) and cache.layers:
            with self.turn, torch.no_grad(), self.fast(1, half=half):
                return short(ids[0], position, cache)
        with self.turn, torch.no_grad(), self.fast(len(ids), half=half):
            if self._probe.plain_head:
                return self.head(self._hidden(ids, position, cache)[-1:])[0]
            return self._logits(ids, position, cache, keep=1)[0]

    @property
    def runs_rows(self) -> bool:
        """Whether `hidden` works: with positions of one's own, and logits that are head(hidden)."""
        return self._probe.plain_head and "position_ids" in self._accepts

    def hidden(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        """Run a row for each of several texts.

        Args:
            ids, positions: [texts, tokens]. mask: what is visible of cache and tokens, bool
                [texts, cached + tokens]; None if all is.

        Returns:
            What the head is given, [texts, tokens, width].
        """
        with self.turn:
            output = self._probe.backbone(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                **on_top_of(self._probe.backbone, cache),
            )
        return output.last_hidden_state

    def nll(
        self,
        ids: Sequence[int],
        labels: Sequence[int],
        position: int = 0,
        cache: Cache | None = None,
        *,
        half: bool = False,
    ) -> Tensor:
        """Run `ids` from that position; the last `len(labels)` outputs are scored.

        Gradients flow unless switched off by the caller. half: as for `fast`.

        Returns:
            NLL of each label in nats, fp32, [labels].
        """
        target = torch.tensor(labels, device=self.device)
        rows = len(ids)
        with self.turn, lean_attention.lean(rows, self.model), self.fast(rows, half=half):
            if self._probe.plain_head:
                hidden = self._hidden(ids, position, cache)[-len(labels) :]
                return linear_nll(hidden, self.head, target)
            return logits_nll(self._logits(ids, position, cache, keep=len(labels)), target)

    @torch.no_grad()
    def judged(
        self, ids: Sequence[int], labels: Sequence[int], position: int, cache: Cache | None, *, half: bool
    ) -> tuple[Tensor, Tensor]:
        """As `nll`, without gradients; and whether each label is the likeliest token, bool, [labels]."""
        target = torch.tensor(labels, device=self.device)
        with self.turn, lean_attention.lean(len(ids), self.model), self.fast(len(ids), half=half):
            if self._probe.plain_head:
                return judged(self._hidden(ids, position, cache)[-len(labels) :], self.head, target)
            return judged(self._logits(ids, position, cache, keep=len(labels)), nn.Identity(), target)

    def fingerprint(self) -> str:
        """SHA-256 over the name, dtype and bytes of every parameter and buffer."""
        with self.turn:
            return identity.of_tensors((*self.model.named_parameters(), *self.model.named_buffers()))

    def _inputs(self, ids: Sequence[int], position: int, cache: Cache | None) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=self.device)}  # [1, tokens]
        if "position_ids" in self._accepts:
            stop = position + len(ids)
            inputs["position_ids"] = torch.arange(position, stop, device=self.device).unsqueeze(0)
        return inputs

    def _hidden(self, ids: Sequence[int], position: int, cache: Cache | None) -> Tensor:
        """What the head is given, [tokens, width]."""
        backbone = self._probe.backbone
        output = backbone(**self._inputs(ids, position, cache), **on_top_of(backbone, cache))
        return output.last_hidden_state[0]

    def _logits(self, ids: Sequence[int], position: int, cache: Cache | None, keep: int) -> Tensor:
        """The model's own logits for the last `keep` tokens, [keep, vocab]."""
        kwargs: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in self._accepts else {}
        kwargs |= on_top_of(self.model, cache)
        return self.model(**self._inputs(ids, position, cache), **kwargs).logits[0, -keep:]


def load(
    name: str | Path | None = None,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Base:
    """A base by name ("novelist", "smollm2", a folder, a GGUF file, a hub id), or from a loaded model.

    Args:
        tokenizer: in place of the model's own.
        dtype: "float32", "bfloat16", "float16", or "4bit" (NF4, by bitsandbytes); by default the checkpoint's
            on a GPU, and float32 on a CPU for models of up to two billion parameters.
        device: "cuda", "cpu", …; by default a GPU where there is one.

    Raises:
        ModelNotFound: nothing of that name, or unreadable. UnsupportedModel: it cannot carry an adapter.
        MissingExtra: 4bit, a GGUF file or smollm2, and what that needs is not installed.
        InvalidRecipe: a loaded model, and a dtype or device as well.
    """
    if isinstance(name, nn.Module) or isinstance(model, str | Path):
        raise InvalidRecipe("load takes a loaded model by model=…, and a name without it")
    if model is not None:
        if dtype is not None or device is not None:
            raise InvalidRecipe("a loaded model has its dtype and device; leave them out, or use model.to(…)")
        return Base(model, tokenizer, str(name or ""))
    name = str(name or loading.EMBEDDED)
    return Base(*loading.load_pretrained(name, dtype, device, tokenizer), name)
