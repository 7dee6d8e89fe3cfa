"""The size of each layer's B: its slope is the loss's, its steps are Adam's."""

import math

import pytest
import torch

import templora
from templora.magnitude import BETA1, BETA2, WARM_UP, Magnitudes
from templora.testing import ByteTokenizer, tiny_llama

PROSE = "The old captain looked at the sea for a long time before he answered. " * 8


def test_its_slope_is_that_of_the_loss_when_a_layer_is_scaled() -> None:
    base = templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())
    session = base.session(seed=1, window=32, context=32, chunk=16, learning_rate=1e-2)
    session.read(PROSE[:200])
    adapter, ids = session.adapter, base.encode(PROSE[200:264])

    def loss() -> torch.Tensor:
        with adapter.attached():
            return base.nll(ids[:-1], ids[1:]).double().mean()  # so that differences mean something

    adapter.gradient.zero_()
    loss().backward()
    weights, gradients = adapter.layers_b
    magnitudes = Magnitudes(len(weights), 0.03, adapter.flat.device)
    magnitudes.step(weights, gradients)
    slopes = magnitudes.mean / (1 - BETA1)
    assert slopes.abs().max() > 1e-4
    for weight, slope in zip(weights, slopes, strict=True):
        kept, losses = weight.clone(), list[float]()
        for factor in (1.01, 0.99):
            weight.copy_(kept * factor)
            with torch.no_grad():
                losses.append(float(loss()))
        weight.copy_(kept)
        assert (losses[0] - losses[1]) / 0.02 == pytest.approx(float(slope), rel=0.05, abs=2e-5)


def test_its_steps_are_adams_over_logarithms() -> None:
    weight, gradient = torch.full((2, 2), 3.0), torch.zeros(2, 2)
    magnitudes, rate = Magnitudes(1, 0.1, weight.device), 0.1
    size, mean, square = 3.0, 0.0, 0.0
    for step in range(1, 20):
        gradient.fill_(math.sin(step))
        slope = 4 * size * math.sin(step)
        mean, square = BETA1 * mean + (1 - BETA1) * slope, BETA2 * square + (1 - BETA2) * slope**2
        if step > WARM_UP:
            size *= math.exp(-rate * mean / (1 - BETA1**step) / math.sqrt(square / (1 - BETA2**step)))
        magnitudes.step([weight], [gradient])
        assert weight.flatten().tolist() == pytest.approx([size] * 4, rel=1e-4)
    assert abs(size - 3.0) > 0.1
