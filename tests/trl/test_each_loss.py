"""Each loss of TRL's `DPOTrainer` and ours, value and gradient, on one batch of one tiny model whose policy has moved.

TRL's side is `compute_loss` of one real trainer whose settings are changed between calls. Ours is the method on
log-probabilities of a twin of the policy, scored by a plain forward of the same token ids. What stands where the
definitions differ is in `each_loss`.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from align.methods import terms
from align.testing.steps import whole_difference
from align.testing.tiny import random_pairs, save_tiny, tiny_tokenizer
from tests.trl.each_loss import LOSSES, SETTINGS, Part, Row, Same

pytest.importorskip("trl")

PAIRS = 6
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
MOVES: tuple[tuple[list[int], bool], ...] = (([0], False), ([0], True), ([1, 2], False))
NEUTRAL = {
    "loss_types": ["sigmoid"],
    "loss_weights": None,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.05,
}


class Bench:
    """A `DPOTrainer`, one of its batches, and a twin of its policy; policy and reference differ."""

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        arguments = DPOConfig(
            output_dir=str(folder / "out"),
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            per_device_train_batch_size=PAIRS,
            use_weighting=True,  # so that the head gives what the weights need
        )
        rows = alike(PAIRS)
        self.trainer = DPOTrainer(
            model=str(save_tiny(folder / "model", "qwen3")),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tiny_tokenizer(),
        )
        self.model, self.reference = self.trainer.model.eval(), self.trainer.ref_model
        self.batch = next(iter(self.trainer.get_train_dataloader()))
        self._move()
        self.twin = _unpatched(self.model)
        self.frozen = _unpatched(self.reference)

    def _move(self) -> None:
        """Noise everywhere, likelihood for both answers of the first pair (a weight in WPO above 1) and for the chosen
        one of the next two (another order of margins than the reference's, for AOT)."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
        optimiser = torch.optim.SGD(self.model.parameters(), lr=0.02)
        for _ in range(3):
            terms = [self.theirs({"loss_types": ["sft"]}, rows, turned) for rows, turned in MOVES]
            optimiser.zero_grad()
            torch.stack(terms).sum().backward()
            optimiser.step()

    @contextmanager
    def settings(self, given: Mapping[str, Any]) -> Iterator[None]:
        wanted = {**NEUTRAL, **given}
        wanted["loss_weights"] = wanted["loss_weights"] or [1.0] * len(wanted["loss_types"])
        self.trainer.args.discopop_tau = wanted.pop("discopop_tau")
        for name, value in wanted.items():
            assert hasattr(self.trainer, name), f"TRL's trainer has no `{name}` any more"
            setattr(self.trainer, name, value)
        yield

    def theirs(
        self, given: Mapping[str, Any], rows: Sequence[int] = tuple(range(PAIRS)), turned: bool = False
    ) -> Tensor:
        """TRL's loss of some of the pairs, or of these the other way round."""
        sides = [list(rows), [row + PAIRS for row in rows]]
        both = torch.tensor(sides[::-1] if turned else sides).flatten()
        with self.settings(given):
            return self.trainer.compute_loss(self.model, {name: x[both] for name, x in self.batch.items()})

    def rows(self) -> list[Row]:
        """The pairs with per-token numbers of the twin, float32 with gradient, and of the reference."""
        ids, mask = self.batch["input_ids"], self.batch["completion_mask"].bool()
        return [
            {"chosen": self._one(ids[i], mask[i]), "rejected": self._one(ids[i + PAIRS], mask[i + PAIRS])}
            for i in range(PAIRS)
        ]

    def _one(self, ids: Tensor, mask: Tensor) -> Row:
        end = int(mask.nonzero().max()) + 1
        ids, scored = ids[None, :end], mask[1:end]
        policy = self.twin(input_ids=ids).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            fixed = self.frozen(input_ids=ids).logits[0, :-1].log_softmax(-1)
        at = ids[0, 1:, None]
        numbers = {
            "logp": policy.gather(1, at)[:, 0],
            "ref_logp": fixed.gather(1, at)[:, 0],
            "log_sum_sq": policy.exp().square().sum(-1).log(),
        }
        return {name: x[scored] for name, x in numbers.items()}


def _unpatched(model: Any) -> Any:
    """A copy with the model's own forward: TRL puts its own in the instance."""
    copied = type(model)(copy.deepcopy(model.config))
    copied.load_state_dict(model.state_dict())
    return copied.eval()


def alike(count: int) -> list[dict[str, str]]:
    """Pairs of short answers of nearly one length: margins then lie close, and a sort mixes them. Half are turned."""
    short = [row for row in random_pairs(600, seed=3) if max(map(len, row.values())) < 60]
    close = [row for row in short if 0 < abs(len(row["chosen"]) - len(row["rejected"])) < 8][:count]
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if number % 2 else row
        for number, row in enumerate(close)
    ]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("trl"))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def near(ours: Tensor | float, theirs: Tensor | float, tolerance: float = LOSS_TOLERANCE) -> bool:
    mine, other = (x.item() if isinstance(x, Tensor) else x for x in (ours, theirs))
    return abs(mine - other) <= tolerance * max(1.0, abs(other))


def test_the_batch_says_something(bench: Bench) -> None:
    """Log-ratios of both signs and of a size that bends every loss, and lengths that differ."""
    rows = bench.rows()
    ratios = [float((one["logp"] - one["ref_logp"]).sum().detach()) for row in rows for one in row.values()]
    assert min(ratios) < -0.3 and 1 < max(ratios) < 30, ratios
    lengths = [(len(row["chosen"]["logp"]), len(row["rejected"]["logp"])) for row in rows]
    assert any(a > b for a, b in lengths) and any(a < b for a, b in lengths)
    assert len({a for a, _ in lengths}) > 2


@pytest.mark.parametrize("case", [*LOSSES, *SETTINGS], ids=lambda case: case.name)
def test_value_and_gradient(bench: Bench, case: Same) -> None:
    theirs, ours = bench.theirs(case.theirs), case.value(bench.rows())
    assert near(ours, theirs), f"ours {float(ours):.8g}, TRL's {float(theirs):.8g}"
    found, wanted = gradients(bench.twin, ours), gradients(bench.model, theirs)
    assert whole_difference(found, wanted) <= GRADIENT_TOLERANCE
    moved = bench.theirs({**case.theirs, "beta": 1.01 * case.theirs["beta"]})
    if case.theirs.get("loss_types") != ["sft"]:
        assert not near(ours, moved), "a hundredth of beta must be seen, or the equality says nothing"


def test_every_loss_of_trl_is_compared(bench: Bench) -> None:
    with pytest.raises(ValueError, match="Should be one of") as caught:
        bench.theirs({"loss_types": ["no such loss"]})
    theirs = ast.literal_eval(str(caught.value).partition("Should be one of ")[2])
    assert {case.name for case in LOSSES} == set(theirs) and len(theirs) == 15
    source = inspect.getsource(type(bench.trainer)._compute_loss)
    divergences = set(re.findall(r'f_divergence_type == "(\w+)"', source))
    assert divergences == {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}
    assert divergences <= {case.name for case in SETTINGS}


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_the_sorts_of_aot_stop_at_trls_micro_batch(bench: Bench, name: str) -> None:
    """TRL's loss of two micro-batches is the mean of two sorts, which depends on the split; ours is one sort of all."""
    rows, part = bench.rows(), Part(name, {"beta": 0.3})

    def apart(half: Sequence[int]) -> float:
        halves = [[rows[i] for i in half], [row for i, row in enumerate(rows) if i not in half]]
        return sum(float(part.value(some).detach()) for some in halves) / 2

    half = max(itertools.combinations(range(PAIRS), PAIRS // 2), key=apart)
    other = [i for i in range(PAIRS) if i not in half]
    theirs = sum(bench.theirs({"loss_types": [name], "beta": 0.3}, some).item() for some in (half, other)) / 2
    assert near(apart(half), theirs)
    assert not near(part.value(rows), theirs, 1e-4)


def test_token_means_of_trl_stop_at_its_micro_batch(bench: Bench) -> None:
    """`sft` is a mean over the tokens of a micro-batch in TRL, over those of the global batch here."""
    rows, halves = bench.rows(), (range(2), range(2, 6))
    theirs = [bench.theirs({"loss_types": ["sft"]}, half) for half in halves]
    sizes = [sum(len(rows[i]["chosen"]["logp"]) for i in half) for half in halves]
    weighed = sum(x.item() * size for x, size in zip(theirs, sizes, strict=True)) / sum(sizes)
    ours = Part("sft").value(rows)
    assert near(ours, weighed)
    assert not near(ours, sum(x.item() for x in theirs) / 2, 1e-4)


def test_sigmoid_and_sft_are_rpo_for_one_pair_a_micro_batch(bench: Bench) -> None:
    """`rpo` with `token_mean` takes each answer's own mean; TRL's mean over tokens is that for one pair only."""
    settings = {"loss_types": ["sigmoid", "sft"], "loss_weights": [2.0, 0.5], "beta": 0.3}
    rpo = Part("rpo", {"beta": 0.3, "eta": 0.5 / 2.0, "sft_reduction": "token_mean"}, 2.0)
    ours = rpo.value(bench.rows())
    one_by_one = [bench.theirs(settings, [row]).item() for row in range(PAIRS)]
    assert near(ours, sum(one_by_one) / PAIRS)
    assert not near(ours, bench.theirs(settings), 1e-4)
    assert not near(replace(rpo, options={**rpo.options, "eta": 0.2}).value(bench.rows()), ours, 1e-4)


def test_trl_does_not_cut_the_weights_of_wpo(bench: Bench) -> None:
    """Where weights exceed 1, our default (the authors' clamp) is below TRL's, and `clamp: null` is TRL's."""
    rows, settings = bench.rows(), {"use_weighting": True, "beta": 0.3}
    options = {"beta": 0.3, "clamp": None}
    weights = terms("wpo", options, pairs=rows)["loss"].values / terms("dpo", {"beta": 0.3}, pairs=rows)["loss"].values
    for row, weight in enumerate(weights.tolist()):
        cut = Part("wpo", {"beta": 0.3}).value(rows[row : row + 1]).item()
        assert near(cut * max(weight, 1.0), bench.theirs(settings, [row]))
    assert weights.max().item() > 1 > weights.min().item()


def test_label_smoothing_of_sigmoid_is_not_cdpo(bench: Bench) -> None:
    """TRL takes `label_smoothing` with `sigmoid` and does nothing with it; conservative DPO adds eps * z."""
    rows = bench.rows()
    theirs = bench.theirs({"beta": 0.3, "label_smoothing": 0.2})
    assert near(Part("dpo", {"beta": 0.3}).value(rows), theirs)
    assert not near(Part("cdpo", {"beta": 0.3, "eps": 0.2}).value(rows), theirs, 1e-3)


def test_the_centre_is_all_that_bco_adds(bench: Bench) -> None:
    """With its own centre ours is another number than TRL's `bco_pair`, also where they would agree in scale."""
    theirs = bench.theirs({"loss_types": ["bco_pair"], "beta": 0.3})
    assert not near(Part("bco", {"beta": 0.3}, 2.0).value(bench.rows()), theirs, 1e-4)


def cpo_loss(rows: Sequence[Row], average: bool, **settings: Any) -> Tensor:
    """The preference part of TRL's CPOTrainer, by its own code."""
    from trl.experimental.cpo import CPOTrainer

    said = {"alpha": 0.0, "label_smoothing": 0.0, "accelerator": SimpleNamespace(device="cpu"), **settings}
    sides = [torch.stack([_total(row[side], average) for row in rows]) for side in ("chosen", "rejected")]
    return CPOTrainer.cpo_loss(SimpleNamespace(**said), *sides)[0].mean()


def _total(one: Row, average: bool) -> Tensor:
    return one["logp"].detach().mean() if average else one["logp"].detach().sum()


def test_cpo(bench: Bench) -> None:
    rows = bench.rows()
    for ours, settings, average in (
        (Part("cpo", {"beta": 0.03}, term="preference"), {"loss_type": "sigmoid", "beta": 0.03}, False),
        (
            Part("simpo", {"beta": 2.5, "gamma_ratio": 0.8 / 2.5, "label_smoothing": 0.1}),
            {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 0.8, "label_smoothing": 0.1},
            True,
        ),
        (
            Part("slic", {"delta": 1 / 0.03, "lambda": 0.0}, factor=0.03),
            {"loss_type": "hinge", "beta": 0.03},
            False,
        ),
    ):
        theirs = cpo_loss(rows, average, **settings)
        assert near(ours.value(rows), theirs), settings
        assert not near(ours.value(rows), cpo_loss(rows, average, **{**settings, "beta": settings["beta"] * 1.1}))


def test_orpo(bench: Bench) -> None:
    """The odds ratio, by TRL's own code, which returns it without the minus of the loss."""
    from trl.experimental.orpo import ORPOTrainer

    rows = bench.rows()
    settings = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    sides = [torch.stack([_total(row[side], True) for row in rows]) for side in ("chosen", "rejected")]
    theirs = -ORPOTrainer.odds_ratio_loss(settings, *sides)[0].mean()
    assert near(Part("orpo", {"lambda": 0.3}, term="odds_ratio").value(rows), theirs)


@pytest.mark.parametrize(("kind", "prompts"), [("cpo", False), ("orpo", True)])
def test_whose_tokens_the_likelihood_terms_count(bench: Bench, tmp_path: Path, kind: str, prompts: bool) -> None:
    """CPOTrainer's NLL is over the answers' tokens, ORPOTrainer's over the prompts' too; ours never over prompts."""
    import importlib

    from datasets import Dataset

    module = importlib.import_module(f"trl.experimental.{kind}")
    arguments = getattr(module, f"{kind.upper()}Config")(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=2
    )
    rows = random_pairs(2, seed=3)
    trainer = getattr(module, f"{kind.upper()}Trainer")(
        model=copy.deepcopy(bench.twin),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        theirs = float(trainer.concatenated_forward(bench.twin, batch)[4])
        ids, mask, answer = (batch[f"chosen_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        logp = bench.twin(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        each = -logp.gather(2, ids[:, 1:, None])[..., 0]
    counted = {with_prompt: each[(mask if with_prompt else answer != -100)[:, 1:].bool()] for with_prompt in (0, 1)}
    assert near(counted[prompts].mean(), theirs)
    assert not near(counted[not prompts].mean(), theirs, 1e-4)
