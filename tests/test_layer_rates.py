"""Each layer's rate: up where updates go on in one direction, down where they turn back."""

import math
from typing import Any

import pytest
import torch

import templora
from templora.layer_rates import DECAY, LEAST, MOST, LayerRates
from templora.magnitude import BETA1, BETA2, WARM_UP
from templora.testing import ByteTokenizer, tiny_llama

PROSE = "The old captain looked at the sea for a long time before he answered. " * 8
SIZES: dict[str, Any] = {"window": 32, "context": 32, "chunk": 16}


def stepped(rates: LayerRates, weight: torch.Tensor, step: torch.Tensor) -> None:
    before = [weight.clone()]
    weight.add_(step)
    rates.apply(before, [weight])


def test_its_steps_are_adams_over_logarithms() -> None:
    weight, rate = torch.zeros(2, 2), 0.1
    rates = LayerRates([weight], rate)
    log = trace = place = mean = square = 0.0
    for step in range(1, 30):
        gradient = math.sin(step)
        rates.judge([torch.full((2, 2), gradient)])
        slope = 4 * trace * gradient
        mean, square = BETA1 * mean + (1 - BETA1) * slope, BETA2 * square + (1 - BETA2) * slope**2
        if step > WARM_UP:
            log -= rate * mean / (1 - BETA1**step) / math.sqrt(square / (1 - BETA2**step))
        stepped(rates, weight, torch.full((2, 2), -0.01 * gradient))
        made = -0.01 * gradient * math.exp(log)
        trace, place = DECAY * trace + made, place + made
        assert weight.flatten().tolist() == pytest.approx([place] * 4, rel=1e-4)
    assert abs(log) > 0.1


def test_a_rate_rises_where_updates_agree_and_falls_where_they_do_not() -> None:
    weights = [torch.zeros(3, 2), torch.zeros(3, 2)]
    rates = LayerRates(weights, 0.1)
    for step in range(100):
        gradients = [torch.ones(3, 2), torch.full((3, 2), (-1.0) ** step)]
        rates.judge(gradients)
        before = [weight.clone() for weight in weights]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sub_(0.01 * gradient)
        rates.apply(before, weights)
    assert rates.logs.tolist() == pytest.approx([MOST, LEAST])


def test_a_text_learns_with_them_and_its_state_goes_on_bit_for_bit() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session, other = (base.session(seed=1, layer_rate=0.1, **SIZES) for _ in range(2))
    session.read(PROSE[:300])
    rates = session.learner.layer_rates
    assert rates is not None and len(set(rates.logs.tolist())) > 5, "each layer has its own"
    other.load_state(session.state())
    for one in (session, other):
        one.read(PROSE[300:])
    assert torch.equal(session.adapter.flat, other.adapter.flat)
    same = base.session(seed=1, layer_rate=0.0, **SIZES)
    same.read(PROSE)
    assert not torch.equal(session.adapter.flat, same.adapter.flat)
