"""Settings of all tests: one thread, because tiny models lose more in waiting than they gain."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import templora
from templora.base import Base
from templora.testing import ByteTokenizer, tiny_llama

os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
torch.set_num_threads(1)
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


@pytest.fixture
def base() -> Base:
    """A tiny base, where a test file has none of its own."""
    return templora.load(model=tiny_llama(), tokenizer=ByteTokenizer())


@pytest.fixture
def folder(base: Base, tmp_path: Path) -> Path:
    """The test's base, saved as a model of its own."""
    place = tmp_path / "model"
    base.model.save_pretrained(place)
    base.tokenizer.save_pretrained(place)
    return place
