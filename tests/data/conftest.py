"""Tokenizers made on the spot."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from align.testing.tiny import tiny_tokenizer

CORPUS = [
    "The sky is blue today and the river is cold.",
    "Tell me more about how the committee repairs two small boats.",
    "Because the old teacher explains a long letter again, nobody asks.",
    "Hello world, hello there; wonderful worlds are wonderfully worldly.",
] * 20


@pytest.fixture(scope="session")
def byte_level() -> Any:
    """GPT-2-like: no BOS."""
    return tiny_tokenizer(add_bos=False)


@pytest.fixture(scope="session")
def with_bos() -> Any:
    """Llama-3-like: BOS before plain text and in the template."""
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def dummy_prefix() -> Any:
    """Llama-2-like: SentencePiece pieces with byte fallback, and a blank put before every text."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=480, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    pieces = [(token, score) for token, score in _pieces(trained)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=False
    )


@pytest.fixture(scope="session")
def prepending() -> Any:
    """Llama-2-like in its other form: BPE whose normaliser puts a blank before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((word for line in CORPUS for word in line.split()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _pieces(trained: Tokenizer) -> list[tuple[str, float]]:
    return [(str(token), float(score)) for token, score in json.loads(trained.to_str())["model"]["vocab"]]
