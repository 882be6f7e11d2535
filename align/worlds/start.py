"""The model that a world's runs start from: made and trained from nothing on its demonstrations, cached by content."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.core.errors import CheckpointError, TrainingError
from align.core.files import atomic_directory, verify_manifest
from align.core.hashing import digest
from align.core.options import check_all, option
from align.worlds.base import World

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|> ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)
_FORMAT = 1
"""Raise it when what this file makes of the same options changes."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """How the starting model is made."""

    demonstrations: int = option(8000, at_least=1, doc="rows of the training set")
    epochs: int = option(4, at_least=1, doc="passes over them")
    batch: int = option(32, at_least=1, doc="demonstrations a step")
    learning_rate: float = option(3e-3, above=0, doc="peak learning rate")
    layers: int = option(2, at_least=1, doc="layers of the model, of the Qwen3 family")
    width: int = option(128, at_least=16, doc="hidden size; heads are 32 wide")
    seed: int = option(0, at_least=0, doc="of weights, demonstrations and order")

    def __post_init__(self) -> None:
        check_all(self, "the starting model")


def starting_model(
    world: World,
    start: Start | None = None,
    cache: str | Path | None = None,
    watch: Callable[[Any], None] | None = None,
) -> Path:
    """The folder of the model and tokenizer; trained on the first call, found in the cache by the next.

    Args:
        world: what it learns to speak.
        start: how it is made.
        cache: folder of such models; None: `$ALIGN_CACHE/worlds`, else `~/.cache/align/worlds`.
        watch: called with the trainer before it trains.
    """
    start = start or Start()
    world = world.speaks()
    key = digest([_FORMAT, world.fingerprint(), dataclasses.asdict(start), CHAT_TEMPLATE, list(SPECIAL)])[:20]
    folder = cache_folder(cache) / f"{world.id}-{key}"
    if folder.is_dir():
        try:
            verify_manifest(folder)
            return folder
        except CheckpointError:  # left by a full disk or an editor: made anew
            shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
        trained = _train(world, start, Path(work), watch)
        with atomic_directory(folder, info={"world": world.id, **dataclasses.asdict(start)}) as place:
            shutil.copytree(trained, place, dirs_exist_ok=True)
            tokenizer(world).save_pretrained(place)
    return folder


def cache_folder(given: str | Path | None = None) -> Path:
    """Where starting models are kept."""
    if given is not None:
        return Path(given)
    root = os.environ.get("ALIGN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "align") / "worlds"


def tokenizer(world: World) -> Any:
    """One token a word, with a chat template; decoding joins words by one space, as the world writes them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate((*SPECIAL, *world.vocabulary()))}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(SPECIAL[4:]),
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def config(world: World, start: Start) -> Any:
    """The configuration: a Qwen3 with tied embeddings, which transformers and vLLM both run."""
    from transformers import Qwen3Config

    heads = max(1, start.width // 32)
    return Qwen3Config(
        vocab_size=-(-(len(SPECIAL) + len(world.vocabulary())) // 8) * 8,
        hidden_size=start.width,
        intermediate_size=2 * start.width,
        num_hidden_layers=start.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=32,
        max_position_embeddings=1024,
        # At the usual 0.02 so narrow a model takes thousands of steps before it copies a word from the prompt.
        initializer_range=0.08,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def _train(world: World, start: Start, work: Path, watch: Callable[[Any], None] | None) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from align.trainers import AlignConfig, PreferenceTrainer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start.seed)
        model = AutoModelForCausalLM.from_config(config(world, start), dtype=torch.float32)
    arguments = AlignConfig(
        output_dir=str(work / "run"),
        learning_rate=start.learning_rate,
        lr_scheduler_type="cosine",
        global_batch_size=start.batch,
        num_train_epochs=start.epochs,
        max_length=128,
        max_grad_norm=1.0,
        adam_beta2=0.98,
        save_strategy="no",
        tokens_per_micro_batch=4096,
        seed=start.seed,
        disable_tqdm=True,
    )
    trainer = PreferenceTrainer(
        model=model,
        method="sft",
        args=arguments,
        train_dataset=world.demonstrations(start.demonstrations, start.seed),
        processing_class=tokenizer(world),
    )
    if watch is not None:
        watch(trainer)
    trainer.train()
    if trainer.stopped_by_signal:
        raise TrainingError(
            "the starting model's training was stopped by a signal", mend="the same command starts it again"
        )
    return work / "run" / "policy"
