"""One update of the adapter on one chunk: a transaction.

If it fails (a loss or gradient that is not finite, no memory, an interrupt), adapter, optimiser and
version are what they were, bit for bit. It is told what to minimise and knows nothing of texts.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from templora.adapter import Adapter
from templora.layer_rates import LayerRates
from templora.magnitude import Magnitudes
from templora.recipe import Recipe
from templora.savepoint import Savepoint
from templora.turns import random_state

KNOWN = 1e6  # steps after which Adam takes its mean squares for what they are
SHORTEST = 5  # a step of a thousandth is the shortest that is tried


@dataclass(frozen=True, slots=True)
class Update:
    """What one update did.

    learning_rate: of A. gradient_norm: of the last step, before clipping. share: how much of the update
    was kept: 1 unless it had to be shortened, 0 if nothing of it helped.
    """

    version: int
    learning_rate: float
    gradient_norm: float
    share: float


class NotFinite(ArithmeticError):
    """The loss or a gradient was NaN or infinite; the update was dropped."""


class Learner:
    """The adapter's optimiser: AdamW over two flat tensors, as the recipe says."""

    def __init__(self, adapter: Adapter, recipe: Recipe, seed: int) -> None:
        self.adapter, self.recipe = adapter, recipe
        self._savepoint, self._unstepped = Savepoint(), Savepoint()
        self.restart()
        # LoRA dropout draws from torch's global generator: each session lends it its own state.
        self._dropout_state = torch.Generator().manual_seed(seed).get_state()

    def restart(self) -> None:
        """Forget what the steps so far have left behind (moments, rates of layers), as when the weights were
        put back to an earlier version."""
        adapter, recipe = self.adapter, self.recipe
        self.optimizer = torch.optim.AdamW(
            [{"params": [adapter.a]}, {"params": [adapter.b]}],
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
            # Squares that are known are the least to divide by: only what is louder in this text counts more.
            amsgrad=adapter.squares is not None,
            fused=True,
        )
        for side, squares in zip((adapter.a, adapter.b), adapter.squares or (), strict=False):
            self.optimizer.state[side] = {
                "step": torch.tensor(KNOWN, device=side.device),
                "exp_avg": torch.zeros_like(side),
                "exp_avg_sq": torch.zeros_like(side),
                "max_exp_avg_sq": squares.clone(),
            }
        weights, rate = adapter.layers_b[0], recipe.magnitude_rate
        self.magnitudes = Magnitudes(len(weights), rate, adapter.flat.device) if rate else None
        self.layer_rates = LayerRates(weights, recipe.layer_rate) if recipe.layer_rate else None

    def rate_at(self, chunk: int) -> float:
        """Learning rate of A on the chunk of that number (from 0)."""
        known = self.adapter.squares is not None
        return self.recipe.rate_at(chunk) * (self.recipe.start_rate if known else 1.0)

    @property
    def one_pass(self) -> bool:
        """Whether the pass that scores a chunk can also be the first that is learned from."""
        return self.recipe.dropout == 0

    def learn(
        self,
        rate: float,
        nll: Callable[[], Tensor],
        first: Tensor | None = None,
        helps: Callable[[], bool] | None = None,
        *,
        ready: bool = False,
    ) -> Update:
        """All epochs on one chunk, by its mean NLL.

        Args:
            rate: learning rate of A.
            nll: makes a differentiable pass, [tokens] in nats, under the attached adapter.
            first: such a pass that was made already, used for the first epoch.
            helps: looks at the updated adapter; while it says no, the update is cut to a quarter.
            ready: `adapter.gradient` holds the first epoch's gradient already.

        Raises:
            NotFinite: after everything was put back.
        """
        adapter, share, norm = self.adapter, 1.0, 0.0
        put_back = self._save()
        try:
            for epoch in range(self.recipe.epochs):
                if epoch > 0 or not ready:
                    self._backward(first if epoch == 0 and first is not None else self._pass(nll))
                norm = self._step(rate, unlearned=epoch == 0)
            # One pass over the weights; isfinite() takes three and two copies.
            if not float(torch.linalg.vector_norm(adapter.flat)) < float("inf"):
                raise NotFinite("the updated adapter is not finite")
            if helps is not None:
                share = self._shorten(self._savepoint.copies[0], helps)
        except BaseException:
            put_back()
            raise
        finally:
            self._savepoint.done()
        adapter.updated()
        return Update(adapter.version, rate, norm, share)

    def state(self) -> dict[str, Any]:
        """Everything that a resumed session needs besides the adapter's weights."""
        optimizer = copy.deepcopy(self.optimizer.state_dict())
        return {
            "optimizer": optimizer,
            "magnitudes": self.magnitudes.state() if self.magnitudes else None,
            "layer_rates": self.layer_rates.state() if self.layer_rates else None,
            "dropout": self._dropout_state.clone(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""
        # Copied, because torch goes on in the very tensors that it is given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if self.magnitudes:
            self.magnitudes.load_state(state["magnitudes"])
        if self.layer_rates:
            self.layer_rates.load_state(state["layer_rates"])
        self._dropout_state = state["dropout"].cpu().clone()

    def _save(self) -> Callable[[], None]:
        """Copy all that an update changes; what puts it back."""
        optimizer, adapter = self.optimizer, self.adapter
        learned = [part for part in (self.magnitudes, self.layer_rates) if part is not None]
        states = [state for state in optimizer.state.values() if state]
        moments = [tensor for state in states for tensor in state.values()]
        self._savepoint.take([adapter.flat, *moments, *(own for part in learned for own in part.tensors)])
        version, steps, dropout = adapter.version, [part.steps for part in learned], self._dropout_state
        rates = [group["lr"] for group in optimizer.param_groups]

        def put_back() -> None:
            if not states:  # made by its first step
                optimizer.state.clear()
            self._savepoint.put_back()
            adapter.restore(self._savepoint.copies[0], version)
            self._dropout_state = dropout
            for part, before in zip(learned, steps, strict=True):
                part.steps = before
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        return put_back

    @torch.no_grad()
    def _shorten(self, before: Tensor, helps: Callable[[], bool]) -> float:
        """Keep as much of the update as helps: all, a quarter, … down to 4^-SHORTEST, or nothing."""
        flat, step = self.adapter.flat, self.adapter.flat - before
        for power in range(SHORTEST + 1):
            share = 0.25**power
            torch.add(before, step, alpha=share, out=flat)
            if helps():
                return share
        flat.copy_(before)
        return 0.0

    def _pass(self, nll: Callable[[], Tensor]) -> Tensor:
        with self.adapter.attached(training=True), torch.enable_grad():
            if self.recipe.dropout == 0:
                return nll()
            device = self.adapter.flat.device
            with random_state(device):
                torch.random.set_rng_state(self._dropout_state)
                if device.type == "cuda":  # it has a generator of its own
                    torch.cuda.manual_seed(int(torch.randint(1 << 62, ())))
                result = nll()
                self._dropout_state = torch.random.get_rng_state()
            return result

    def _backward(self, nll: Tensor) -> None:
        """The gradient of its mean."""
        self.adapter.gradient.zero_()
        with torch.enable_grad():  # transformers' `generate` calls us with gradients switched off
            loss = nll.mean()
        loss.backward()

    def _step(self, rate: float, *, unlearned: bool) -> float:
        """One optimiser step along the gradient; returns the norm of that before clipping.

        unlearned: the chunk is new to the adapter.
        """
        adapter = self.adapter
        norm = float(torch.linalg.vector_norm(adapter.gradient))
        if not norm < float("inf"):
            raise NotFinite("the loss or its gradient is not finite")
        if self.magnitudes and unlearned and rate:
            self.magnitudes.step(*adapter.layers_b)
        clip = self.recipe.clip
        if clip is not None and norm > clip:
            # torch.nn.utils.clip_grad_norm_ adds this small number too: the paper's loop is matched exactly.
            adapter.gradient.mul_(clip / (norm + 1e-6))
        for group, factor in zip(self.optimizer.param_groups, (1.0, self.recipe.b_rate), strict=True):
            group["lr"] = rate * factor
        if self.layer_rates is None:
            self.optimizer.step()
            return norm
        weights, gradients = adapter.layers_b
        if unlearned and rate:
            self.layer_rates.judge(gradients)
        self._unstepped.take(weights)
        self.optimizer.step()
        self.layer_rates.apply(self._unstepped.copies, weights)
        self._unstepped.done()
        return norm
