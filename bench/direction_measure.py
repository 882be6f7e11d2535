"""The metrics of `align.methods.claim.METRICS`, by a plain padded forward: exact sums over the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align.core.seeds import derive, generator
from align.evaluate import Side, load_side
from align.sampling import SamplingParams
from align.sampling.prompts import PromptEncoder
from align.worlds.base import last_content

ANSWERS = 256
"""Held-out prompts that are answered, once each."""
NEW_TOKENS = 64
Sequences = Sequence[tuple[list[int], list[int]]]
"""Ids of a prompt, and of an answer with its end token."""


@dataclass(frozen=True, eq=False)
class Held:
    """What a model is measured on. Prompts are held out; pairs are ordered by the gold reward, whoever annotates.

    Attributes:
        prompts: texts to answer. better, worse: the pairs' answers. shown: demonstrations.
    """

    world: Any
    seed: int
    prompts: list[str]
    better: Sequences
    worse: Sequences
    shown: Sequences


def measured_on(demo: Any, made: Any, answers: int = ANSWERS) -> Held:
    """The held-out material of a demo: its pairs' prompts give pairs and demonstrations, other prompts are answered."""
    world, seed = demo.world.speaks(), demo.seed
    encode = load_side(str(made.model), "float32", "cpu").tokenizer
    asked, own = made.answers["held_out"]
    rows, _ = world.pairs(asked, own, seed)
    pairs = [(last_content(row["prompt"]), last_content(row["chosen"]), last_content(row["rejected"])) for row in rows]
    shown = [(prompt, world.demonstrate(prompt, generator(seed, "held_out", prompt))) for prompt in asked]
    count = len(asked)
    return Held(
        world=world,
        seed=seed,
        prompts=demo.world.prompts(count + answers, "held_out", seed)[count:],
        better=_ids(encode, [(prompt, chosen) for prompt, chosen, _ in pairs]),
        worse=_ids(encode, [(prompt, rejected) for prompt, _, rejected in pairs]),
        shown=_ids(encode, shown),
    )


def measure(policy: Path, start: Path, held: Held) -> dict[str, float]:
    """All metrics of a policy, name -> number."""
    side, before = (load_side(str(path), "float32", "cpu") for path in (policy, start))
    drawn = _drawn(side, held)
    texts = [" ".join(side.tokenizer.decode(answer, skip_special_tokens=True).split()) for _, answer in drawn]
    rewards = [held.world.reward(prompt, text) for prompt, text in zip(held.prompts, texts, strict=True)]
    own, away = _sums(side, before, drawn)
    better, worse = _likelihood(side, held.better), _likelihood(side, held.worse)
    ratio = (better - _likelihood(before, held.better)) - (worse - _likelihood(before, held.worse))
    ordered = (ratio > 0).double() + 0.5 * (ratio == 0).double()
    found = {
        "gold_reward": torch.tensor(rewards, dtype=torch.float64),
        "length": torch.tensor([len(answer) for _, answer in drawn], dtype=torch.float64),
        "kl": away,
        "entropy": own,
        "accuracy": ordered,
        "margin": ratio,
        "chosen_logp": better,
        "rejected_logp": worse,
        "demo_logp": _likelihood(side, held.shown),
    }
    return {name: float(values.mean()) for name, values in found.items()}


def _drawn(side: Side, held: Held) -> Sequences:
    params = SamplingParams(max_new_tokens=NEW_TOKENS, seed=derive(held.seed, "direction") >> 11)
    asked = [[{"role": "user", "content": prompt}] for prompt in held.prompts]
    prompts, answers = side.sample(asked, [None] * len(asked), 1, params)
    return [(prompt, list(own[0].ids)) for prompt, own in zip(prompts, answers, strict=True)]


def _ids(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> Sequences:
    encode = PromptEncoder(tokenizer)
    return [
        (
            encode([{"role": "user", "content": prompt}]),
            [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id],
        )
        for prompt, answer in texts
    ]


@torch.inference_mode()
def _logs(side: Side, sequences: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities [N, T, V], tokens [N, T], answer mask [N, T]) of the positions that predict each token."""
    longest = max(len(prompt) + len(answer) for prompt, answer in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(sequences):
        ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, len(prompt) : len(prompt) + len(answer)] = True
    # Padding stands on the right of a causal model: what is before it does not see it.
    logits = _plain(side)(input_ids=ids).logits[:, :-1].double()
    return logits.log_softmax(-1), ids[:, 1:], mask[:, 1:]


def _plain(side: Side) -> Any:
    """The model with an attention that needs no layout of packed prompts."""
    side.model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return side.model


def _likelihood(side: Side, sequences: Sequences) -> Tensor:
    """Summed log-likelihood of each answer, float64 [N]."""
    logs, ids, mask = _logs(side, sequences)
    return (logs.gather(-1, ids[..., None]).squeeze(-1) * mask).sum(-1)


def _sums(side: Side, before: Side, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(entropy, KL to the start), exact at each token, summed over each answer: float64 [N] both.

    Entropy and KL of the answers' distribution, by the chain rule, with less variance than sums of log-probabilities.
    """
    ours, _, mask = _logs(side, sequences)
    theirs, _, _ = _logs(before, sequences)
    entropy = -(ours.exp() * ours).sum(-1)
    away = (ours.exp() * (ours - theirs)).sum(-1)
    return (entropy * mask).sum(-1), (away * mask).sum(-1)
