"""What a pretraining run is told: one YAML file, unknown keys refused."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Shape(BaseModel):
    """The Llama that a run from scratch builds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocabulary: int = Field(4096, ge=257, le=65536)
    layers: int = Field(6, ge=1)
    hidden: int = Field(256, ge=8)
    feed_forward: int = Field(704, ge=8)
    heads: int = Field(4, ge=1)
    rope_theta: float = Field(10_000.0, gt=0)


class Stage(BaseModel):
    """From this share of the run on, rows are this many tokens long."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    progress: float = Field(ge=0, lt=1)
    window: int = Field(gt=0)


class PretrainConfig(BaseModel):
    """A whole run. Rates are peak rates; shares are of the run's length.

    `minutes` ends a run by wall clock: progress is the larger of the token share and the time
    share, so the rate always decays to its end. Such a run resumes, but not to the same losses.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    init_from: str | None = None
    shape: Shape = Shape()
    stages: list[Stage]
    total_tokens: int = Field(gt=0)
    minutes: float | None = Field(None, gt=0)
    batch_tokens: int = Field(gt=0)
    muon_rate: float = Field(0.01, ge=0)
    adam_rate: float = Field(0.002, ge=0)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.02, ge=0, lt=1)
    decay_from: float = Field(0.3, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    overlap_limit: float = Field(0.01, ge=0, le=1)
    hold_out: int | None = Field(None, ge=2)  # one novel in so many is left to the start of adapters
    evaluate_every: int = Field(200, gt=0)
    evaluate_blocks: int = Field(16, gt=0)
    checkpoint_every: int = Field(200, gt=0)
    shard_megabytes: int | None = Field(None, gt=0)
    bf16: bool = True
    attention: Literal["sdpa", "eager"] = "sdpa"
    compile: bool = False
    seed: int = 0

    @model_validator(mode="after")
    def _windows_fit(self) -> Self:
        if self.stages[0].progress != 0:
            raise ValueError("the first stage must start at progress 0")
        for stage in self.stages:
            if self.longest % stage.window or self.batch_tokens % stage.window:
                raise ValueError(
                    f"window {stage.window} must divide the longest window {self.longest} "
                    f"and the batch of {self.batch_tokens} tokens"
                )
        return self

    @property
    def longest(self) -> int:
        """The positions the finished model is trained for."""
        return max(stage.window for stage in self.stages)

    def window_at(self, progress: float) -> int:
        """Return the row length at a progress in [0, 1]."""
        return [stage.window for stage in self.stages if stage.progress <= progress][-1]

    def rate_at(self, progress: float) -> float:
        """Return the factor on the peak rates: linear warm-up, plateau, linear decay to zero."""
        up = progress / self.warmup if self.warmup else 1.0
        down = (1 - progress) / (1 - self.decay_from)
        return max(0.0, min(1.0, up, down))


def load_config(path: Path) -> PretrainConfig:
    """Read a YAML file into a checked configuration."""
    return PretrainConfig.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
