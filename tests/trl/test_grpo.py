"""TRL's `GRPOTrainer` and `RLOOTrainer` and our policy gradients: loss and gradient on the same saved rollouts.

TRL's side is one real trainer of each kind. GRPO's takes the rollouts through its `rollout_func`, RLOO's, which has
none, in place of its generation; log-probs of the old policy and of the reference, advantages and sampler weights are
its own. Then the policy moves, so that ratios are no longer 1. Our side are our stages of shaping and our losses on
log-probabilities of twins, scored by plain forwards of the same token ids.

Where the definitions differ: at the level of sequences TRL multiplies k3 by the sequence's ratio, ours by the
token's; a completion without a reward stays in TRL's denominators with advantage 0, ours is left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.methods import METHODS, terms
from align.shaping import Batch, make, run
from align.testing.steps import whole_difference
from align.testing.tiny import EOS_ID, VOCAB, random_pairs, save_tiny, tiny_tokenizer
from tests.trl.test_each_loss import GRADIENT_TOLERANCE, _unpatched, gradients, near

pytest.importorskip("trl")

PROMPTS, GENERATIONS, LONGEST = 3, 4, 9
COUNT = PROMPTS * GENERATIONS
Row = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """Rollouts of made-up tokens: ragged, some cut, with rewards and with log-probs of a sampler that differs a bit."""

    prompts: list[str]
    ids: list[list[int]]
    rewards: list[float]
    noise: list[list[float]]

    @classmethod
    def random(cls, seed: int = 0) -> Saved:
        rng = random.Random(seed)
        ids = []
        for number in range(COUNT):
            length = rng.randint(2, LONGEST - 1)
            cut = number % 5 == 0
            ids.append([rng.randint(10, VOCAB - 1) for _ in range(length)] + ([] if cut else [EOS_ID]))
        rewards = [rng.choice((0.0, 0.5, 1.0, 2.0)) for _ in range(COUNT)]
        return cls(
            prompts=[row["prompt"] for row in random_pairs(PROMPTS, seed=5)],
            ids=ids,
            rewards=rewards,
            noise=[[rng.gauss(0, 0.4) for _ in own] for own in ids],
        )

    def reward(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [self.rewards[self.ids.index(list(own))] for own in completion_ids]

    def batch(self, log_ratio: np.ndarray | None = None) -> Batch:
        lengths = np.array([len(own) for own in self.ids])
        mask = np.arange(lengths.max()) < lengths[:, None]
        return Batch(
            group=np.repeat(np.arange(PROMPTS), GENERATIONS),
            reward=np.array(self.rewards),
            length=lengths,
            finished=np.array([own[-1] == EOS_ID for own in self.ids]),
            mask=mask,
            advantage=np.zeros(mask.shape),
            train=np.ones(COUNT, dtype=bool),
            log_ratio=log_ratio,
        )


def moved(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


class Bench:
    """A trainer of TRL, its batch of the saved rollouts, and twins of its policy now, as it sampled, and of its
    reference."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.saved = Saved.random()
        self.trainer = self._trainer(folder, kind)
        self.model = self.trainer.model
        moved(self.model, 1)
        self.old, self.reference = _unpatched(self.model), _unpatched(self.trainer.ref_model)
        rows = [{"prompt": prompt} for prompt in self.saved.prompts for _ in range(GENERATIONS)]
        self.rows = rows
        self.inputs = self.generated()
        moved(self.model, 2)
        self.model.eval()
        self.twin = _unpatched(self.model)

    def _trainer(self, folder: Path, kind: str) -> Any:
        import trl
        from datasets import Dataset

        shared = {
            "output_dir": str(folder / "out"),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "per_device_train_batch_size": COUNT,
            "num_generations": GENERATIONS,
            "num_iterations": 2,  # so that GRPO keeps log-probs of the policy that sampled
            "max_completion_length": LONGEST,
            "beta": 0.1,
        }
        given: dict[str, Any] = {
            "model": str(save_tiny(folder / "model", "qwen3")),
            "reward_funcs": self.saved.reward,
            "train_dataset": Dataset.from_list([{"prompt": one} for one in self.saved.prompts]),
            "processing_class": tiny_tokenizer(),
        }
        if kind == "grpo":
            made = trl.GRPOTrainer(args=trl.GRPOConfig(**shared), rollout_func=self._rollouts, **given)
            made._last_loaded_step = 0  # it has one with vLLM alone, whose correction is asked for below
            return made
        made = trl.RLOOTrainer(args=trl.RLOOConfig(**shared), **given)
        made._generate_single_turn = lambda *_: [list(own) for own in self.saved.ids]
        return made

    def _rollouts(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        encoded = [trainer.processing_class(one)["input_ids"] for one in prompts]
        logps = [(x + n).tolist() for x, n in zip(self._own(encoded), map(torch.tensor, self.saved.noise), strict=True)]
        return {"prompt_ids": encoded, "completion_ids": [list(own) for own in self.saved.ids], "logprobs": logps}

    def _own(self, encoded: list[list[int]]) -> list[Tensor]:
        pairs = zip(encoded, self.saved.ids, strict=True)
        with torch.no_grad():
            return [logps(self.old, prompt, own) for prompt, own in pairs]

    def generated(self) -> dict[str, Any]:
        """TRL's scored rollouts: its log-probs of the old policy and the reference, its advantages."""
        self.trainer.model.train()
        made = self.trainer._generate_and_score_completions(self.rows)
        self.trainer.model.eval()
        return made

    @contextmanager
    def settings(self, given: Mapping[str, Any]) -> Any:
        """Attributes of the trainer, or of its arguments (`args.NAME`)."""
        before = {}
        for name, value in given.items():
            owner = self.trainer.args if name.startswith("args.") else self.trainer
            name_ = name.removeprefix("args.")
            assert hasattr(owner, name_), f"TRL has no `{name}` any more"
            before[name] = getattr(owner, name_)
            setattr(owner, name_, value)
        yield
        for name, value in before.items():
            setattr(self.trainer.args if name.startswith("args.") else self.trainer, name.removeprefix("args."), value)

    def theirs(self, given: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> Tensor:
        with self.settings(given):
            return self.trainer._compute_loss(self.model, dict(inputs or self.inputs))

    def ours(self, method: str, options: Mapping[str, Any]) -> Tensor:
        """The method's own stages on the rewards, then its loss of the twin's log-probs."""
        return terms(method, options, groups=self.groups(method, options)).total()

    def groups(self, method: str, options: Mapping[str, Any]) -> list[Row]:
        advantage = self.shaped(method, options).advantage
        flat = []
        for i, own in enumerate(self.saved.ids):
            prompt = self.inputs["prompt_ids"][i][self.inputs["prompt_mask"][i].bool()].tolist()
            with torch.no_grad():
                old, ref = logps(self.old, prompt, own), logps(self.reference, prompt, own)
            noise = torch.tensor(self.saved.noise[i])
            gains = advantage[i, : len(own)].tolist()
            flat.append({"logp": logps(self.twin, prompt, own), "old_logp": old, "ref_logp": ref, "advantage": gains})
            flat[-1]["sampler_logp"] = old + noise
        return [{"completions": flat[g * GENERATIONS : (g + 1) * GENERATIONS]} for g in range(PROMPTS)]

    def shaped(self, method: str, options: Mapping[str, Any]) -> Batch:
        asked = METHODS.get(method)(**options).rollouts()
        return run([make(stage.id, stage.options) for stage in asked.shaping], self.saved.batch(self.drift()))

    def drift(self) -> np.ndarray:
        """log pi_old - log pi_ref of each token, as TRL's numbers have it."""
        found = np.zeros(self.saved.batch().mask.shape)
        for i, own in enumerate(self.saved.ids):
            prompt = self.inputs["prompt_ids"][i][self.inputs["prompt_mask"][i].bool()].tolist()
            with torch.no_grad():
                found[i, : len(own)] = (logps(self.old, prompt, own) - logps(self.reference, prompt, own)).numpy()
        return found


def logps(model: Any, prompt: Sequence[int], own: Sequence[int]) -> Tensor:
    ids = torch.tensor([[*prompt, *own]])
    each = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return each.gather(1, torch.tensor(own)[:, None])[:, 0]


@pytest.fixture(scope="module")
def grpo(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("grpo"), "grpo")


@pytest.fixture(scope="module")
def rloo(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("rloo"), "rloo")


@dataclass(frozen=True)
class Same:
    name: str
    theirs: Mapping[str, Any]
    method: str
    ours: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)
    """Settings under which TRL scores the rollouts anew."""


SEQ = {"loss_type": "grpo", "epsilon_low": 0.1, "epsilon_high": 0.1}
NO_KL = {"beta": 0.0}
PLAIN_K3 = {"args.use_bias_correction_kl": False}
E = {"epsilon": 0.1}
SAMPLED = {"use_vllm": True, "vllm_importance_sampling_clip_max": 1.5}
CASES = [
    Same("grpo", {**SEQ, **PLAIN_K3}, "grpo", {**E, "beta": 0.1}),
    Same(
        "k3 times the ratio",
        {**SEQ, "args.use_bias_correction_kl": True},
        "grpo",
        {**E, "beta": 0.1, "kl_estimator": "k3_ratio"},
    ),
    Same("without a KL", {**SEQ, **NO_KL}, "grpo", {**E, **NO_KL}),
    Same(
        "dapo",
        {"loss_type": "dapo", "epsilon_low": 0.1, "epsilon_high": 0.14, **PLAIN_K3},
        "dapo",
        {**E, "epsilon_high": 0.14, "beta": 0.1, "dynamic_sampling": False},
    ),
    Same("bnpo", {**SEQ, "loss_type": "bnpo", **NO_KL}, "grpo", {**E, **NO_KL, "aggregation": "tok"}),
    Same(
        "dr_grpo",
        {**SEQ, "loss_type": "dr_grpo", **NO_KL},
        "dr_grpo",
        {**E, "max_completion_length": LONGEST},
        {"scale_rewards": "none"},
    ),
    Same("luspo", {**SEQ, "loss_type": "luspo", **PLAIN_K3}, "grpo", {**E, "beta": 0.1, "aggregation": "sum"}),
    Same(
        "sequence",
        {**SEQ, **NO_KL, "importance_sampling_level": "sequence", "epsilon_low": 0.01, "epsilon_high": 0.02},
        "gspo",
        {"epsilon": 0.01, "epsilon_high": 0.02},
    ),
    Same(
        "sequence and k3",
        {**SEQ, **PLAIN_K3, "importance_sampling_level": "sequence"},
        "gspo",
        {**E, "epsilon_high": 0.1, "beta": 0.1},
    ),
    Same("epsilon_high", {**SEQ, **NO_KL, "epsilon_high": 0.3}, "grpo", {**E, **NO_KL, "epsilon_high": 0.3}),
    Same("delta", {**SEQ, **NO_KL, "args.delta": 1.12}, "grpo", {**E, **NO_KL, "delta": 1.12}),
    Same("scale by the batch", {**SEQ, **NO_KL}, "grpo", {**E, **NO_KL, "scale": "batch"}, {"scale_rewards": "batch"}),
    *(
        Same(
            mode,
            {**SEQ, **PLAIN_K3, **SAMPLED},
            "grpo",
            {**E, "beta": 0.1, "sampler_correction": mode, "sampler_cap": 1.5},
            {**SAMPLED, "vllm_importance_sampling_mode": mode},
        )
        for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_value_and_gradient_of_grpo(grpo: Bench, case: Same) -> None:
    inputs = scored(grpo, case)
    theirs, ours = grpo.theirs(case.theirs, inputs), grpo.ours(case.method, case.ours)
    assert near(ours, theirs), f"ours {ours.item():.8g}, TRL's {theirs.item():.8g}"
    found, wanted = gradients(grpo.twin, ours), gradients(grpo.model, theirs)
    assert whole_difference(found, wanted) <= GRADIENT_TOLERANCE


def scored(grpo: Bench, case: Same) -> Mapping[str, Any]:
    """The batch as TRL scores it under the case's settings, by the policy that sampled."""
    if not case.scores:
        return grpo.inputs
    now = {name: x.clone() for name, x in grpo.model.state_dict().items()}
    grpo.model.load_state_dict(grpo.old.state_dict())
    with grpo.settings(case.scores):
        inputs = grpo.generated()
    grpo.model.load_state_dict(now)
    return inputs


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("grpo", "k3 times the ratio"),
        ("without a KL", "epsilon_high"),
        ("without a KL", "delta"),
        ("grpo", "luspo"),
        ("without a KL", "bnpo"),
        ("grpo", "token_truncate"),
        ("token_truncate", "token_mask"),
        ("sequence_truncate", "sequence_mask"),
        ("token_mask", "sequence_mask"),
        ("without a KL", "scale by the batch"),
    ],
)
def test_the_cases_differ(grpo: Bench, first: str, second: str) -> None:
    """Or their equality would say nothing: each switch acts on this batch."""
    cases = {case.name: case for case in CASES}
    one, other = (grpo.ours(cases[name].method, cases[name].ours).item() for name in (first, second))
    assert not near(one, other, 1e-3)


def test_the_rollouts_say_something(grpo: Bench) -> None:
    """Ratios on both sides of the clip with advantages of both signs, and no group without spread."""
    rows = grpo.groups("grpo", {})
    ratios, signs = [], []
    for one in (one for row in rows for one in row["completions"]):
        ratios += (one["logp"].detach() - one["old_logp"]).exp().tolist()
        signs += [math.copysign(1, a) for a in one["advantage"]]
    for sign in (1, -1):
        own = [r for r, s in zip(ratios, signs, strict=True) if s == sign]
        assert min(own) < 0.9 < 1.1 < max(own)
    assert (grpo.inputs["advantages"].abs() > 0).any()


def test_advantages_are_trls(grpo: Bench, rloo: Bench) -> None:
    for scale in ("group", "batch", "none"):
        case = Same("", {}, "grpo", {}, {"scale_rewards": scale})
        theirs = scored(grpo, case)["advantages"]
        torch.testing.assert_close(
            torch.from_numpy(grpo.shaped("grpo", {"scale": scale}).advantage[:, 0]).float(), theirs, rtol=0, atol=1e-5
        )
    found = rloo.shaped("rloo", {"beta": 0.1}).advantage[:, 0]
    torch.testing.assert_close(torch.from_numpy(found).float(), rloo.inputs["advantages"], rtol=0, atol=1e-5)


def test_a_missing_reward_is_left_out_of_the_baseline_as_in_trl(grpo: Bench) -> None:
    """TRL keeps the completion in the loss with advantage 0; here it is not trained on."""
    rewards = list(grpo.saved.rewards)
    grpo.saved.rewards[2] = math.nan
    try:
        theirs = scored(grpo, Same("", {}, "grpo", {}, {"scale_rewards": "group"}))["advantages"]
        ours = grpo.shaped("grpo", {})
    finally:
        grpo.saved.rewards[:] = rewards
    torch.testing.assert_close(torch.from_numpy(ours.advantage[:, 0]).float(), theirs, rtol=0, atol=1e-5)
    assert ours.train.tolist() == [i != 2 for i in range(COUNT)]


def test_at_the_level_of_sequences_trl_corrects_the_kl_by_the_sequences_ratio(grpo: Bench) -> None:
    theirs = grpo.theirs({**SEQ, "importance_sampling_level": "sequence", "args.use_bias_correction_kl": True})
    options = {**E, "epsilon_high": 0.1, "beta": 0.1, "kl_estimator": "k3_ratio"}
    ours = terms("gspo", options, groups=grpo.groups("gspo", options))
    assert not near(ours.total(), theirs, 1e-6)
    assert near(ours["policy"].values.mean(), grpo.theirs({**SEQ, **NO_KL, "importance_sampling_level": "sequence"}))


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.9])
def test_value_and_gradient_of_rloo(rloo: Bench, epsilon: float) -> None:
    theirs = rloo.theirs({"epsilon_low": epsilon, "epsilon_high": epsilon})
    ours = rloo.ours("rloo", {"beta": 0.1, "epsilon": epsilon})
    assert near(ours, theirs), f"ours {ours.item():.8g}, TRL's {theirs.item():.8g}"
    found, wanted = gradients(rloo.twin, ours), gradients(rloo.model, theirs)
    assert whole_difference(found, wanted) <= GRADIENT_TOLERANCE
    assert not near(rloo.ours("rloo", {"beta": 0.11, "epsilon": epsilon}), theirs, 1e-4)
