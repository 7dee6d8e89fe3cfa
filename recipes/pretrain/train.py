"""Pretrain the embedded base: novels in, a Hugging Face folder out.

    python recipes/pretrain/train.py --config recipes/pretrain/novelist.yaml \
        --data ../shared/data --out runs/novelist

Run it again to go on from the last checkpoint. On two CPU cores, two processes are faster than one:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 recipes/pretrain/train.py --config …
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from config import PretrainConfig, load_config
from data import Batches, encode, load_stream, read_documents
from measure import LossCount, TextLengths, sample_windows
from model import build_model, export, token_losses
from optim import Optimizers
from team import Team
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM
from vocabulary import train_tokenizer


@dataclass(frozen=True)
class Run:
    """One training: its configuration, where it writes, what it reads."""

    config: PretrainConfig
    out: Path
    tokenizer: Tokenizer
    train: np.ndarray
    dev: np.ndarray
    device: torch.device
    team: Team = field(default_factory=Team)

    def autocast(self) -> AbstractContextManager:
        """bf16 matrix products where the configuration wants them; weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)


@dataclass
class Progress:
    """How far a run is; saved with every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def share(self, config: PretrainConfig) -> float:
        """Return progress in [0, 1]: of the tokens, or of the minutes if those run out first."""
        by_time = self.seconds / 60 / config.minutes if config.minutes else 0.0
        return min(1.0, max(self.tokens / config.total_tokens, by_time))


def prepare(config: PretrainConfig, data: Path, out: Path, team: Team) -> Run:
    """Get tokenizer and token streams, from the run's folder where they are there already."""
    train, dev = data / "novels.train.jsonl.xz", data / "novels.dev.jsonl.xz"
    out.mkdir(parents=True, exist_ok=True)
    source = Path(config.init_from or out) / "tokenizer.json"
    if not source.exists():
        train_tokenizer(read_documents(train), config.shape.vocabulary).save(str(source))
    tokenizer = Tokenizer.from_file(str(source))
    unseen = [str(dev), str(data / "pg19" / "*.txt.xz")]
    cache = out / "train.npy"
    stream = load_stream(train, unseen, tokenizer, cache, config.overlap_limit, config.hold_out)
    if not (out / "dev.npy").exists():
        np.save(out / "dev.npy", encode(read_documents(dev), tokenizer))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Run(config, out, tokenizer, stream, np.load(out / "dev.npy"), device, team)


@torch.no_grad()
def evaluate(run: Run, model: LlamaForCausalLM, window: int) -> dict:
    """Return the loss on windows spread over the dev novels (a sample: see evaluate.py for all)."""
    count = LossCount(TextLengths.of(run.tokenizer))
    blocks = run.config.evaluate_blocks
    for row in sample_windows(run.dev, window, blocks).to(run.device).split(1):
        # Seldom and without gradients: not worth compiling anew for.
        with run.autocast(), torch.compiler.set_stance("force_eager"):
            losses = token_losses(model, row)
        count.add(losses, row[:, 1:])
        count.add_positions(losses)
    return count.report()


def save_checkpoint(run: Run, model: LlamaForCausalLM, optimizers: Optimizers, progress: Progress) -> None:
    """Write everything a resumed run needs, and the model so far as a Hugging Face folder.

    A kill half-way leaves the last checkpoint whole.
    """
    if not run.team.leads:
        return
    state = {
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "progress": vars(progress),
    }
    torch.save(state, run.out / "checkpoint.tmp")
    os.replace(run.out / "checkpoint.tmp", run.out / "checkpoint.pt")
    export(model, run.tokenizer, run.out / "export", run.config.shard_megabytes)


def load_checkpoint(run: Run, model: LlamaForCausalLM, optimizers: Optimizers) -> Progress:
    """Take over the run folder's checkpoint, if there is one."""
    path = run.out / "checkpoint.pt"
    if not path.exists():
        return Progress()
    state = torch.load(path, map_location=run.device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    return Progress(**state["progress"])


def log(run: Run, **values: object) -> None:
    """Print one JSON line and append it to the run's log."""
    if not run.team.leads:
        return
    line = json.dumps(values)
    print(line, flush=True)
    with (run.out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def train(run: Run, stop_after: int | None = None) -> list[float]:
    """Train to the end, or for `stop_after` more steps; return the loss of each step taken.

    Args:
        run: what to train, and where.
        stop_after: stop early, with a checkpoint, as an interrupted run would.
    """
    config, team = run.config, run.team
    model = build_model(config, run.tokenizer.token_to_id("<|endoftext|>")).to(run.device)
    optimizers = Optimizers(model, config)
    progress = load_checkpoint(run, model, optimizers)
    batches = Batches(run.train, config.longest, config.seed)
    if config.compile:
        model.model.compile(dynamic=False)  # once for each stage's window
    losses: list[float] = []
    model.train()
    clock = time.monotonic()
    while (share := progress.share(config)) < 1 and len(losses) != stop_after:
        window = config.window_at(share)
        batch = team.rows(batches.take(progress.tokens, config.batch_tokens, window)).to(run.device)
        with run.autocast():
            loss = token_losses(model, batch).mean()
        loss.backward()
        team.average(model.parameters())
        losses.append(team.mean(loss.item()))
        norm = optimizers.step(config.rate_at(share))
        progress.step += 1
        progress.tokens += config.batch_tokens
        now = time.monotonic()  # evaluation and checkpoints of the step before are counted too
        seconds, clock = team.mean(now - clock), now
        progress.seconds += seconds
        if progress.step % 20 == 0:
            log(
                run, step=progress.step, tokens=progress.tokens, share=round(share, 4),
                window=window, loss=round(float(np.mean(losses[-20:])), 4), norm=round(norm, 3),
                tokens_per_second=round(config.batch_tokens / seconds),
            )  # fmt: skip
        if progress.step % config.evaluate_every == 0 and team.leads:
            log(run, step=progress.step, dev=evaluate(run, model, window))
        if progress.step % config.checkpoint_every == 0:
            save_checkpoint(run, model, optimizers, progress)
    save_checkpoint(run, model, optimizers, progress)
    if progress.share(config) >= 1 and team.leads:
        log(run, step=progress.step, dev=evaluate(run, model, config.longest))
    return losses


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/novelist"))
    parser.add_argument("--init-from", help="start from this folder's weights and tokenizer")
    args = parser.parse_args()
    config = load_config(args.config)
    if args.init_from:
        config = config.model_copy(update={"init_from": args.init_from})
    team = Team.join()
    if team.leads:  # the others find the token streams ready
        prepare(config, args.data, args.out, team)
    team.wait()
    train(prepare(config, args.data, args.out, team))


if __name__ == "__main__":
    main()
