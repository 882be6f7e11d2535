"""Tiny random models, a tokenizer trained on the spot, made-up preference rows: nothing is fetched, all is seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 320
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SUBJECTS = ("the cat", "a small robot", "my neighbour", "the river", "an old teacher", "this recipe", "the committee")
_VERBS = ("explains", "builds", "forgets", "repairs", "follows", "describes", "questions", "paints")
_OBJECTS = ("the bridge", "a long letter", "seven stars", "the budget", "an idea", "the garden", "two small boats")
_TAILS = ("in the morning", "with great care", "for no reason", "after the rain", "as everybody knows", "again")
_QUESTIONS = ("Why does it matter that", "Tell me more about how", "Is it true that", "Write one line on how")
_REFUSALS = ("I do not know.", "No.", "That is hard to say.", "Ask somebody else.")


def _sentence(rng: random.Random) -> str:
    parts = (rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_TAILS))
    return " ".join(parts[: rng.choice((3, 4, 4))])


def random_pairs(n: int, seed: int = 0, *, conversational: bool = False) -> list[dict[str, Any]]:
    """`n` rows `prompt`, `chosen`, `rejected` (texts, or lists of messages); responses always differ."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(n):
        prompt = f"{rng.choice(_QUESTIONS)} {_sentence(rng)}?"
        chosen = " ".join(f"Because {_sentence(rng)}." for _ in range(rng.randint(1, 3)))
        rejected = rng.choice((rng.choice(_REFUSALS), f"{_sentence(rng).capitalize()}."))
        if conversational:
            rows.append(
                {
                    "prompt": [{"role": "user", "content": prompt}],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                }
            )
        else:
            rows.append({"prompt": prompt, "chosen": " " + chosen, "rejected": " " + rejected})
    return rows


@cache
def _trained() -> str:
    def corpus() -> Iterator[str]:
        for row in random_pairs(200, seed=7):
            yield from row.values()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, add_bos: bool = True, chat_template: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens with BOS, EOS, PAD and a prefix-preserving chat template.

    Args:
        add_bos: whether plain encoding puts `<s>` first, as Llama's does. The chat template always writes it.
        chat_template: whether there is a chat template.
    """
    tokenizer = Tokenizer.from_str(_trained())
    if add_bos:
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS_ID)]),
            ]
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
_HEAD = {"head_dim": 8}
_GEMMA = _HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 8, "tie_word_embeddings": True}
_ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
_NO_GQA = {"num_key_value_heads": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE | _HEAD,
    "mistral": _LLAMA_LIKE | _HEAD | {"sliding_window": 8},
    "gemma2": _LLAMA_LIKE | _GEMMA | _ALTERNATING | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
    "gemma3_text": _LLAMA_LIKE | _GEMMA | _ALTERNATING,
    "phi": _LLAMA_LIKE | _NO_GQA | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0},
    "olmo": _LLAMA_LIKE | _NO_GQA,
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
        "initializer_range": 0.1,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gpt_neox": {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"},
    "mixtral": _LLAMA_LIKE | _HEAD | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.0},
    "qwen3_moe": _LLAMA_LIKE
    | _HEAD
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mamba": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "state_size": 8,
        "time_step_rank": 4,
        "initializer_range": 0.1,
    },
}
"""Family (transformers' `model_type`) -> configuration. Windows are shorter than the rows that tests make."""


def tiny_config(family: str = "llama", vocab: int = VOCAB, **overrides: Any) -> Any:
    """The configuration of a tiny model of `family`; `overrides` replace its values."""
    if family not in FAMILIES:
        raise KeyError(f"no tiny model of family {family!r}; one of {', '.join(FAMILIES)}")
    ids = {"vocab_size": vocab, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    return AutoConfig.for_model(family, **(FAMILIES[family] | ids | overrides))


def tiny_model(family: str = "llama", vocab: int = VOCAB, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM in float32 and evaluation mode; the global random state is left as it was."""
    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(tiny_config(family, vocab, **overrides), dtype=torch.float32)
    return model.eval()


def save_tiny(directory: str | Path, family: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Save a tiny model and its tokenizer as one folder, as a user would name it in a recipe; return the folder."""
    folder = Path(directory)
    tiny_model(family, seed=seed, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
