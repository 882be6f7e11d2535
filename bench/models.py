"""The benchmarks' random Qwen3 models and their tokenizers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bench.data import Kind, Row, word

Size = Literal["7m", "59m"]
SPECIAL = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """A Qwen3 of these sizes."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int


SHAPES: dict[Size, Shape] = {
    "7m": Shape(vocabulary=8192, hidden=256, layers=4, heads=4, kv_heads=4, head_dim=64, intermediate=640),
    "59m": Shape(vocabulary=32768, hidden=512, layers=8, heads=8, kv_heads=8, head_dim=64, intermediate=1408),
}


def build(size: Size, kind: Kind, rows: list[Row], folder: Path) -> dict[str, Any]:
    """Save model and tokenizer to `folder`; return what they are. Input and output embeddings are apart."""
    shape = SHAPES[size]
    tokenizer = bpe_tokenizer(rows, shape.vocabulary) if kind == "hh" else word_tokenizer(shape.vocabulary)
    model = random_model(shape, tied=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "architecture": "Qwen3",
        **asdict(shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokenizer": "byte-level BPE trained on the rows" if kind == "hh" else "one word, one token",
        "tokenizer_vocabulary": len(tokenizer),
    }


def random_model(shape: Shape, tied: bool) -> Any:
    """The same random weights in every process, on torch's current device."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def bpe_tokenizer(rows: list[Row], vocabulary: int) -> Any:
    """A byte-level BPE trained on the rows. Small corpora end below the wanted vocabulary; the model keeps its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in row.values()), trainer)
    return _fast(tokenizer)


def word_tokenizer(vocabulary: int) -> Any:
    """Words `w0`, `w1`, ... between spaces; ids fill the vocabulary behind the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = [*SPECIAL, *(word(number) for number in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(tokenizer)


def _fast(tokenizer: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    pad, begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=begin, eos_token=end)
