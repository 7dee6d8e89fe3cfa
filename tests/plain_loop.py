"""The method as anyone would write it from the paper: PEFT, AdamW, the context recomputed, full logits.

Slow and obvious on purpose. It shares no code with the package: it is what the package is checked against.
"""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

# A stretch of ids of which those from `start` on are scored and learned, seeing all before them.
Row = tuple[list[int], int]


def row_nll(model: torch.nn.Module, ids: list[int], start: int) -> Tensor:
    """NLL of ids[start:], [tokens]."""
    logits = model(input_ids=torch.tensor([ids])).logits[0]  # [tokens, vocab]
    return cross_entropy(logits[start - 1 : -1].float(), torch.tensor(ids[start:]), reduction="none")


def rows_of(ids: list[int], chunk: int, context: int) -> list[Row]:
    """Each full chunk of a text with the context before it."""
    starts = range(1, len(ids) - chunk + 1, chunk)
    return [(ids[max(0, start - context) : start + chunk], min(start, context)) for start in starts]


def run(
    model: PreTrainedModel, rows: list[Row], *, seed: int, adapter_from: dict[str, Tensor]
) -> list[float]:
    """Score, then learn, each row with the authors' settings; the summed NLL of each.

    adapter_from: the A matrices to start from, since two libraries draw them in different orders.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=64, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name:
            parameter.data.copy_(adapter_from[name.replace(".default", "")])
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, betas=(0.9, 0.999), eps=1e-7, weight_decay=0.0)
    scores: list[float] = []
    for number, (ids, start) in enumerate(rows):
        with torch.no_grad():
            scores.append(float(row_nll(adapted, ids, start).sum()))
        for group in optimizer.param_groups:
            group["lr"] = 5e-5 * min(1.0, number / 2)
        for _ in range(2):
            optimizer.zero_grad()
            row_nll(adapted, ids, start).mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
    return scores
