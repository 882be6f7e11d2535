"""How far a sampler's numbers are from the trainer's: measured once a launch, loud where they differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from align.core.errors import ConfigError
from align.sampling.base import Rollout, Sampler, SamplingParams
from align.scoring.backends import plain_attention
from align.scoring.facts import language_model

TIE = 1e-4
"""Two best logits nearer than this may come in either order."""
LOUD_PROBABILITY = 0.01
"""Mean difference of probabilities that is a fault; below half of it is usual (verl's range)."""
LOUD_RATIO = 1.05
"""Mean of exp|difference of log-probs| that is a fault (NeMo RL's threshold)."""
LOUD_GREEDY = 0.02
"""Share of greedy sequences that may differ; those that part at a tie do not count."""

Logp = Callable[[Sequence[Sequence[int]], Sequence[Rollout], float], Sequence[np.ndarray]]
"""(prefix of each rollout, rollouts, temperature) -> the trainer's log-prob of each token, [T] each."""
Best = Callable[[Sequence[Sequence[int]], Sequence[Rollout]], Sequence[tuple[np.ndarray, np.ndarray]]]
"""(prefix of each rollout, rollouts) -> the trainer's likeliest id at each place, and its lead over the second in
logits; [T] each."""


@dataclass(frozen=True)
class Greedy:
    """Greedy completions of the sampler, read by the trainer.

    Attributes:
        sequences: compared. same: equal to the end. ties: equal up to a place where the two best logits lie within
            `TIE`; what follows is another sequence and is not compared. different: all others.
    """

    sequences: int
    same: int
    ties: int
    different: int


@dataclass(frozen=True)
class ParityReport:
    """The sampler's log-probs against the trainer's, on the same rollouts at the same temperature.

    Attributes:
        mean, largest: of |log-prob difference|, over tokens.
        kl: mean of exp(d) - 1 - d, d = trainer - sampler: an estimate of KL(sampler || trainer) per token, >= 0.
        probability: mean |difference of probabilities|.
        ratio: mean of exp|d|, 1 where they are equal.
        greedy: where greedy completions were compared too.
        loud: a sentence where a threshold is crossed, else empty.
    """

    rollouts: int
    tokens: int
    mean: float
    largest: float
    kl: float
    probability: float
    ratio: float
    greedy: Greedy | None = None
    loud: str = ""

    def metrics(self) -> dict[str, float]:
        """Numbers for a log, named `parity/...`."""
        plain = asdict(replace(self, greedy=None))
        found = {name: float(value) for name, value in plain.items() if name not in ("greedy", "loud")}
        if self.greedy is not None:
            found |= {f"greedy_{name}": float(value) for name, value in asdict(self.greedy).items()}
        return {f"parity/{name}": value for name, value in found.items()}


def compare(sampler: Sequence[np.ndarray], trainer: Sequence[np.ndarray], greedy: Greedy | None = None) -> ParityReport:
    """The report on log-probs [T] of the same rollouts.

    Raises:
        ConfigError: lengths that do not match, or no tokens.
    """
    if [len(one) for one in sampler] != [len(one) for one in trainer]:
        raise ConfigError("sampler and trainer have other numbers of tokens", mend="score the sampler's own ids")
    if not any(len(one) for one in sampler):
        raise ConfigError("there are no tokens to compare", mend="sample at least one completion")
    drawn = np.concatenate([np.asarray(one, np.float64) for one in sampler])
    scored = np.concatenate([np.asarray(one, np.float64) for one in trainer])
    difference = scored - drawn
    size = np.abs(difference)
    report = ParityReport(
        rollouts=len(sampler),
        tokens=len(drawn),
        mean=float(size.mean()),
        largest=float(size.max()),
        kl=float((np.exp(difference) - 1 - difference).mean()),
        probability=float(np.abs(np.exp(scored) - np.exp(drawn)).mean()),
        ratio=float(np.exp(size).mean()),
        greedy=greedy,
    )
    return replace(report, loud=_loud(report))


def compare_greedy(
    rollouts: Sequence[Rollout], best: Sequence[tuple[np.ndarray, np.ndarray]], tie: float = TIE
) -> Greedy:
    """Whether greedy ids are the trainer's likeliest at every place, up to the first that is a tie.

    Args:
        best: (id, lead over the second best logit) at each place of each rollout, [T] each.
    """
    same = ties = 0
    for rollout, (ids, lead) in zip(rollouts, best, strict=True):
        wrong, near = rollout.ids != ids, lead <= tie
        first = int(wrong.argmax()) if wrong.any() else len(ids)
        same += first == len(ids)
        ties += first < len(ids) and bool(near[: first + 1].any())
    return Greedy(len(rollouts), same, ties, len(rollouts) - same - ties)


def parity(
    sampler: Sampler,
    prefixes: Sequence[Sequence[int]],
    params: SamplingParams,
    logp: Logp,
    best: Best | None = None,
    n: int = 1,
) -> ParityReport:
    """Sample, score the same ids with the trainer, and compare; call it after a push.

    Args:
        params: as the run samples. Truncation (top_p, top_k) is left out of the comparison: the trainer scores the
            whole distribution.
        best: with it, greedy completions are compared too.
        n: completions of each prefix.
    """
    open_params = replace(params, top_p=1.0, top_k=0, temperature=params.temperature or 1.0)
    groups = sampler.sample(prefixes, n, open_params)
    flat = [rollout for group in groups for rollout in group]
    owners = [prefix for prefix, group in zip(prefixes, groups, strict=True) for _ in group]
    greedy = None
    if best is not None:
        likeliest = [group[0] for group in sampler.sample(prefixes, 1, replace(open_params, temperature=0.0))]
        greedy = compare_greedy(likeliest, best(prefixes, likeliest))
    scored = logp(owners, flat, open_params.temperature)
    return compare([rollout.logp for rollout in flat], scored, greedy)


class PlainForward:
    """`Logp` and `Best` by one forward a sequence, with the model's plain attention: slow, and right.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def logp(
        self, prefixes: Sequence[Sequence[int]], rollouts: Sequence[Rollout], temperature: float
    ) -> list[np.ndarray]:
        return [
            (logits / temperature).log_softmax(-1).gather(1, torch.as_tensor(rollout.ids)[:, None])[:, 0].numpy()
            for rollout, logits in zip(rollouts, self._logits(prefixes, rollouts), strict=True)
        ]

    def best(
        self, prefixes: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        two = [logits.topk(2, dim=-1) for logits in self._logits(prefixes, rollouts)]
        return [(one.indices[:, 0].numpy(), (one.values[:, 0] - one.values[:, 1]).numpy()) for one in two]

    @torch.inference_mode()
    def _logits(self, prefixes: Sequence[Sequence[int]], rollouts: Sequence[Rollout]) -> list[torch.Tensor]:
        """float32 [T, V] of each rollout's places, on the CPU."""
        inner: Any = language_model(self._model)
        device = inner.get_input_embeddings().weight.device
        found = []
        with plain_attention(self._model):
            for prefix, rollout in zip(prefixes, rollouts, strict=True):
                ids = torch.tensor([[*prefix, *rollout.ids.tolist()]], device=device)
                logits = inner(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 : -1]
                found.append(logits.float().cpu())
        return found


def refuse_or_say(params: SamplingParams, method_uses_ratio: bool) -> str:
    """What truncated sampling means for a method; empty where nothing is cut.

    The sampler's log-probs are renormalised over the tokens that were kept, the trainer's are over all. A ratio of the
    two carries the mass that was cut (a mean of 0.9 at top_p 0.8, where it should be 1).

    Raises:
        ConfigError: truncated sampling under a method whose loss has such a ratio.
    """
    cuts = [f"top_p {params.top_p:g}"] if params.top_p < 1 else []
    cuts += [f"top_k {params.top_k}"] if params.top_k > 0 else []
    if not cuts:
        return ""
    what = " and ".join(cuts)
    if method_uses_ratio:
        raise ConfigError(
            f"{what} with a method whose loss divides the policy's probabilities by the sampler's",
            why="the sampler's are of the truncated distribution, the policy's of the whole one: the ratio is biased",
            mend="set top_p to 1 and top_k to 0, or choose a method without a ratio",
        )
    return (
        f"sampling with {what}: the sampler's log-probs are of the truncated distribution, renormalised; "
        "the method uses none of them"
    )


def _loud(report: ParityReport) -> str:
    found = []
    if not report.probability <= LOUD_PROBABILITY:
        found.append(f"probabilities differ by {report.probability:.3g} on average (limit {LOUD_PROBABILITY})")
    if not report.ratio <= LOUD_RATIO:
        found.append(f"exp|log-prob difference| is {report.ratio:.3g} on average (limit {LOUD_RATIO})")
    if report.greedy is not None and report.greedy.different > LOUD_GREEDY * report.greedy.sequences:
        found.append(f"{report.greedy.different} of {report.greedy.sequences} greedy completions differ")
    if not found:
        return ""
    return (
        "sampler and trainer do not agree: "
        + "; ".join(found)
        + ". Look for other weights (a push that did not arrive), another dtype, another template, a sampling cut"
    )
