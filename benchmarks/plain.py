"""The yardstick: Temp-LoRA as one would write it today from transformers and PEFT alone.

PEFT's layers, torch's AdamW, the context recomputed with each pass, full logits, `generate` for writing. It
shares no code with the package.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

# The authors' settings (arXiv 2401.11504 and their code), but for dropout: it would make two runs differ.
RANK, RATE, EPS, EPOCHS, WARM_UP, CLIP = 64, 5e-5, 1e-7, 2, 2, 1.0


class PlainLoop:
    """One text with its adapter.

    adapter_from: the A matrices to begin with, by PEFT's names; two libraries draw them in different orders.
    """

    def __init__(self, model: PreTrainedModel, adapter_from: dict[str, Tensor] | None = None) -> None:
        config = LoraConfig(
            r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(model, config)
        for name, weight in self.model.named_parameters():
            if adapter_from and "lora_A" in name:
                weight.data.copy_(adapter_from[name.replace(".default", "")])
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=RATE, eps=EPS, weight_decay=0.0)
        self.chunk = 0

    def nll(self, ids: Sequence[int], start: int) -> Tensor:
        """NLL of ids[start:] in nats, [tokens], from logits of all of ids."""
        rows = torch.tensor(list(ids), device=self.model.device)
        logits = self.model(input_ids=rows.unsqueeze(0)).logits[0]  # [tokens, vocab]
        return cross_entropy(logits[start - 1 : -1].float(), rows[start:], reduction="none")

    def learn(self, ids: Sequence[int], start: int) -> None:
        """Two optimiser steps on ids[start:], seeing what stands before them."""
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * min(1.0, self.chunk / WARM_UP)
        for _ in range(EPOCHS):
            self.optimizer.zero_grad()
            self.nll(ids, start).mean().backward()
            torch.nn.utils.clip_grad_norm_(self.weights, CLIP)
            self.optimizer.step()
        self.chunk += 1

    def score(self, ids: Sequence[int], window: int, chunk: int) -> float:
        """Mean NLL of a text, in nats, each chunk scored before it is learned."""
        total, tokens = 0.0, 0
        for start in range(1, len(ids) - chunk + 1, chunk):
            row, seen = ids[max(0, start - window) : start + chunk], min(start, window)
            with torch.no_grad():
                total += float(self.nll(row, seen).sum())
            tokens += chunk
            self.learn(row, seen)
        return total / tokens

    def write(self, ids: list[int], tokens: int, window: int, chunk: int) -> list[int]:
        """Write on, greedily, learning each chunk when it is full."""
        ids = list(ids)
        while tokens > 0:
            start = len(ids)
            new = generate(self.model, ids[max(0, start - window) :], min(chunk, tokens))
            ids += new
            tokens -= len(new)
            if len(new) == chunk:
                self.learn(ids[max(0, start - window) :], min(start, window))
        return ids


def generate(model: Any, ids: Sequence[int], tokens: int, **more: Any) -> list[int]:
    """The greedy tokens after ids. more: what else `generate` is told."""
    inputs = torch.tensor([list(ids)], device=model.device)
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            repetition_penalty=1.0,
            **more,
        )
    return made[0, len(ids) :].tolist()
