"""The tokenizer: byte-level BPE, trained on the training novels, one special token."""

from __future__ import annotations

from data import BOUNDARY, Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def train_tokenizer(documents: list[Document], vocabulary: int) -> Tokenizer:
    """Train a byte-level BPE of `vocabulary` entries; the boundary token is number 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOUNDARY],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer
