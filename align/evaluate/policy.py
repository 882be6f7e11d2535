"""A policy against the model that it started from, on held-out prompts: sampled, scored, compared."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from align.core.chunks import Chunks
from align.core.errors import ConfigError, raise_all
from align.core.files import atomic_write
from align.core.options import check_all, option
from align.core.progress import Progress, silent
from align.core.seeds import derive
from align.data.encode import Encoder
from align.data.groups import Preference, TokenGroup
from align.evaluate.held_out import HeldOut, Prompt
from align.evaluate.results import Evaluation, summarise
from align.evaluate.sides import Side
from align.feedback.functions import Reward
from align.sampling.base import Rollout, SamplingParams
from align.scoring.assemble import trees_of
from align.scoring.layout import Tree
from align.scoring.token_view import SHOWN, told

COMPLETIONS, RESULT, WORK = "completions.jsonl", "result.json", "work"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a policy is evaluated."""

    n: int = option(1, at_least=1, doc="completions of a prompt by each model")
    sampling: SamplingParams = field(default_factory=SamplingParams)
    chunk_size: int = option(32, at_least=1, doc="prompts of a chunk: what a kill can cost")

    def __post_init__(self) -> None:
        errors = []
        try:
            check_all(self, "evaluation")
        except ConfigError as error:
            errors.append(error)
        if self.sampling.temperature == 0 and self.n > 1:
            errors.append(
                ConfigError(
                    f"{self.n} completions of a prompt at temperature 0",
                    why="they would all be the same",
                    mend="use n = 1, or a temperature above 0",
                )
            )
        raise_all(errors)


def evaluate_policy(
    policy: Side,
    baseline: Side,
    held_out: HeldOut,
    output: str | Path,
    *,
    reward: Reward | None = None,
    settings: Settings | None = None,
    restart: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Measure a policy; the same call after a kill does only the chunks that are not on disk.

    Both models answer every prompt, with draws that are independent of each other. `output` receives
    `completions.jsonl` (a row per prompt: texts, ids, rewards, log-ratios, pairs) and a folder of work.

    Args:
        reward: without one there is no win rate; KL, lengths and what pairs say are measured all the same.
        restart: throw away what other settings left in `output`.
        progress: is told of completions.

    Raises:
        CheckpointError: `output` holds an evaluation of other settings, or is damaged.
        ConfigError: the reward function fails.
    """
    settings = settings or Settings()
    run = _Run(policy, baseline, held_out, reward, settings)
    folder = Path(output)
    key = run.key()
    chunks = Chunks(folder / WORK, key, len(held_out.prompts), settings.chunk_size, restart)
    target = folder / COMPLETIONS
    if not chunks.assembled(target):
        each = 2 * settings.n
        progress(each * sum(len(chunks.items(chunk)) for chunk in chunks.finished))
        for chunk in chunks.missing:
            chunks.write(chunk, run.chunk(chunk, chunks.items(chunk), progress))
        chunks.assemble(target)
    rows = read_rows(target)
    names = {"policy": policy.name, "baseline": baseline.name}
    return summarise(rows, names, reward.name if reward else "", held_out.report, key, run.notes())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `completions.jsonl`."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@dataclass(eq=False)
class _Run:
    policy: Side
    baseline: Side
    held_out: HeldOut
    reward: Reward | None
    settings: Settings

    def __post_init__(self) -> None:
        self.shared = same_tokens(self.policy.tokenizer, self.baseline.tokenizer)
        if self.shared:
            # One template for both: a base model that has none is asked as the policy is.
            self.baseline = replace(self.baseline, tokenizer=self.policy.tokenizer)
        self.with_kl = self.shared and self.settings.sampling.temperature > 0
        paired = (number for number, prompt in enumerate(self.held_out.prompts) if prompt.pairs)
        self.shown = frozenset(itertools.islice(paired, SHOWN)) if self.shared else frozenset()
        self.encoder = Encoder(self.policy.tokenizer)

    def key(self) -> dict[str, Any]:
        """Everything that determines the result."""
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        return {
            "policy": self.policy.weights,
            "baseline": self.baseline.weights,
            "reward": self.reward.name if self.reward else "",
            "reward_source": self.reward.source if self.reward else "",
            "data": self.held_out.fingerprint,
            "n": self.settings.n,
            "sampling": asdict(self.settings.sampling),
            "dtypes": [str(next(side.model.parameters()).dtype) for side in (self.policy, self.baseline)],
            "devices": [side.device.type for side in (self.policy, self.baseline)],
            "versions": versions,
        }

    def notes(self) -> list[str]:
        """What the numbers do not say themselves."""
        found = []
        temperature = self.settings.sampling.temperature
        if self.reward is None:
            found.append("no reward function: no win rate; see KL and, where the data hold pairs, their measures")
        if not self.shared:
            found.append("the two models have different tokenizers: KL and implicit rewards are not defined")
        elif temperature == 0:
            found.append("sampled at temperature 0: KL cannot be estimated from one likeliest completion")
        elif temperature != 1:
            found.append(
                f"sampled at temperature {temperature:g}: KL is a mean log-ratio on these samples, not an unbiased "
                "estimate for the policy itself; use temperature 1 for that"
            )
        return found

    def chunk(self, number: int, items: Sequence[int], progress: Progress) -> list[dict[str, Any]]:
        """A row per prompt."""
        prompts = [self.held_out.prompts[item] for item in items]
        drawn: dict[str, list[list[Rollout]]] = {}
        asked: dict[str, list[list[int]]] = {}
        rewards: dict[str, list[list[float | None]]] = {}
        for role, side in (("policy", self.policy), ("baseline", self.baseline)):
            params = replace(self.settings.sampling, seed=self._seed(role, number))
            texts, tools = [one.prompt for one in prompts], [one.tools for one in prompts]
            asked[role], drawn[role] = side.sample(texts, tools, self.settings.n, params, progress)
            rewards[role] = self._rewards(prompts, drawn[role])
        ratios = self._ratios(asked["policy"], drawn["policy"])
        pairs = self._pairs(items, prompts)
        return [
            {
                "number": item,
                "row": str(prompt.row),
                "prompt": prompt.prompt if isinstance(prompt.prompt, str) else [dict(turn) for turn in prompt.prompt],
                "policy": [
                    _completion(rollout, reward) | ratio
                    for rollout, reward, ratio in zip(
                        drawn["policy"][at], rewards["policy"][at], ratios[at], strict=True
                    )
                ],
                "baseline": [
                    _completion(rollout, reward)
                    for rollout, reward in zip(drawn["baseline"][at], rewards["baseline"][at], strict=True)
                ],
                "pairs": pairs[at],
            }
            for at, (item, prompt) in enumerate(zip(items, prompts, strict=True))
        ]

    def _seed(self, role: str, chunk: int) -> int:
        # Options are checked as floats, which hold 53 bits.
        return derive(self.settings.sampling.seed, "evaluate", role, chunk) >> 10

    def _rewards(self, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Rollout]]) -> list[list[float | None]]:
        if self.reward is None:
            return [[None] * len(own) for own in drawn]
        flat = [(prompt, rollout) for prompt, own in zip(prompts, drawn, strict=True) for rollout in own]
        names = sorted({name for prompt in prompts for name in prompt.columns})
        values = iter(
            self.reward(
                [prompt.prompt for prompt, _ in flat],
                [rollout.text for _, rollout in flat],
                [rollout.ids.tolist() for _, rollout in flat],
                {name: [prompt.columns.get(name) for prompt, _ in flat] for name in names},
            ).tolist()
        )
        return [[None if (value := next(values)) != value else value for _ in own] for own in drawn]

    def _ratios(self, asked: Sequence[Sequence[int]], drawn: Sequence[Sequence[Rollout]]) -> list[list[dict[str, Any]]]:
        """k1 and k3 of each completion of the policy."""
        if not self.with_kl:
            return [[{} for _ in own] for own in drawn]
        trees = [Tree.of(ids, [one.ids.tolist() for one in own]) for ids, own in zip(asked, drawn, strict=True)]
        ours, theirs = self.policy.logp(trees), self.baseline.logp(trees)
        found = []
        for one, other in zip(ours, theirs, strict=True):
            ratios = [p - q for p, q in zip(one, other, strict=True)]
            found.append([{"k1": float(r.sum()), "k3": float((np.expm1(-r) + r).sum())} for r in ratios])
        return found

    def _pairs(self, items: Sequence[int], prompts: Sequence[Prompt]) -> list[list[dict[str, Any]]]:
        """Summed log-probabilities of both answers, by the policy and, where its tokens are the same, the baseline.

        The first pair of the first few prompts has its log-ratios token by token too.
        """
        groups = [group for prompt in prompts for group in prompt.pairs]
        ours = iter(self.policy.logp(trees_of(groups)))
        theirs = iter(self.baseline.logp(trees_of(groups))) if self.shared else None
        made: list[list[dict[str, Any]]] = []
        for item, prompt in zip(items, prompts, strict=True):
            own: list[dict[str, Any]] = []
            for group in prompt.pairs:
                policy = next(ours)
                baseline = next(theirs) if theirs is not None else None
                entries: list[dict[str, Any]] = [
                    {
                        "policy": _of_pair(group, policy, pair),
                        "baseline": None if baseline is None else _of_pair(group, baseline, pair),
                    }
                    for pair in group.preferences
                ]
                if baseline is not None and item in self.shown and entries and not own:
                    ratios = [p - q for p, q in zip(policy, baseline, strict=True)]
                    entries[0]["tokens"] = told(group, ratios, self.encoder)
                own += entries
            made.append(own)
        return made


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers give the same text the same ids, as far as vocabulary and a few texts tell."""
    if one.get_vocab() != other.get_vocab():
        return False
    texts = ("The quick brown fox, 3.14!\n\tÄrger 漢字", " a  b", "")
    return all(one(text)["input_ids"] == other(text)["input_ids"] for text in texts)


def save_result(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write `result.json`; the same evaluation gives the same bytes. NaN becomes null."""
    text = json.dumps(_finite(evaluation.to_json()), indent=1, sort_keys=True, ensure_ascii=False)
    return atomic_write(Path(folder) / RESULT, text + "\n")


def _of_pair(group: TokenGroup, logps: Sequence[np.ndarray], pair: Preference) -> dict[str, Any]:
    """Of both answers: the summed log-probability of scored tokens (others have 0), and how many these are."""
    return {
        "chosen": float(logps[pair.winner].sum()),
        "rejected": float(logps[pair.loser].sum()),
        "chosen_tokens": int(group.completions[pair.winner].mask.sum()),
        "rejected_tokens": int(group.completions[pair.loser].mask.sum()),
    }


def _completion(rollout: Rollout, reward: float | None) -> dict[str, Any]:
    return {"text": rollout.text, "ids": rollout.ids.tolist(), "finished": rollout.finished, "reward": reward}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
