"""Samples drawn before a step: whose they are, the same on every rank, and the gradient that they estimate."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from align.core.errors import ConfigError, DataError
from align.data.groups import Preference, RowId, TokenCompletion, TokenGroup
from align.methods import METHODS, Method
from align.methods.base import Live
from align.testing.steps import engine_for, random_groups, role_module
from align.testing.tiny import EOS_ID, random_pairs, save_tiny, tiny_model, tiny_tokenizer
from align.trainers import AlignConfig, PreferenceTrainer
from align.trainers.live import LiveSamples

TOKENS, LONGEST = 6, 3
PROMPT = (3, 5)


def group() -> TokenGroup:
    """One pair of two one-token answers after a prompt of a vocabulary of six."""
    answers = tuple(TokenCompletion(np.array([token]), np.array([True]), np.array([0])) for token in (3, 4))
    return TokenGroup(RowId("made", 0), np.array(PROMPT), answers, (Preference(0, 1),))


def models() -> list[nn.Module]:
    """A policy and a reference over six tokens, far enough from each other for a KL of about a nat."""
    return [tiny_model("llama", vocab=TOKENS, seed=seed, initializer_range=0.4).eval() for seed in (1, 2)]


def live_engine(method: Method, live: Live) -> tuple[Any, nn.Module]:
    policy, reference = models()
    roles = role_module(policy, method)
    engine = engine_for(method, roles, reference, 1 << 20)
    engine.live_samples = LiveSamples(roles, tiny_tokenizer(), torch.device("cpu"), live)
    return engine, roles.policy


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).view(-1) if g is None else g.view(-1) for p, g in zip(parameters, found, strict=True)]
    )


def exact_kl(policy: nn.Module, reference: nn.Module) -> Tensor:
    """KL of the answers, up to LONGEST tokens, by adding up every one of them."""
    total = torch.zeros(())
    for length in range(1, LONGEST + 1):
        for ids in itertools.product(range(TOKENS), repeat=length):
            if EOS_ID in ids[:-1] or (length < LONGEST and ids[-1] != EOS_ID):
                continue
            whole = torch.tensor([[*PROMPT, *ids]])
            logp = [
                model(input_ids=whole)
                .logits[0, len(PROMPT) - 1 : -1]
                .log_softmax(-1)
                .gather(-1, whole[0, len(PROMPT) :, None])
                .sum()
                for model in (policy, reference)
            ]
            total = total + logp[0].exp() * (logp[0] - logp[1].detach())
    return total


@pytest.mark.parametrize("baseline", ["rloo", "zero"])
def test_the_gradient_is_that_of_the_kl(baseline: str) -> None:
    """The mean over many draws, against every answer of a vocabulary of six; standard errors from the draws."""
    method = METHODS.get("hypo")(live=64, max_new_tokens=LONGEST, baseline=baseline)
    engine, policy = live_engine(method, method.live_samples())
    draws = []
    for seed in range(60):
        groups = engine.ready([group()], seed)
        (micro,) = engine.share(groups).micros
        view = engine.view(micro.groups, engine.outputs(micro), {}, seed)
        draws.append(gradient(method.loss(view.only(method.reads()))["kl_surrogate"].values.sum(), policy))
    found, exact = torch.stack(draws), gradient(exact_kl(policy, models()[1]), policy)
    mean, error = found.mean(0), found.std(0) / len(draws) ** 0.5
    moved = error > 1e-4
    far = ((mean - exact)[moved] / error[moved]).abs()
    assert moved.sum() > 1000
    assert float((far < 2).float().mean()) > 0.9, "95 % of honest estimates are within two standard errors"
    assert float(torch.nn.functional.cosine_similarity(mean, exact, dim=0)) > (0.98 if baseline == "rloo" else 0.9)
    assert float(mean @ exact / (exact @ exact)) == pytest.approx(1, abs=0.06)


def test_samples_are_the_present_policys_and_stand_beside_the_pair() -> None:
    method = METHODS.get("hypo")(live=3, max_new_tokens=LONGEST)
    engine, policy = live_engine(method, method.live_samples())
    first = engine.ready([group()], 7)
    assert [one.role for one in first[0].completions] == ["", "", "sample", "sample", "sample"]
    for one in first[0].completions[2:]:
        assert len(one) <= LONGEST and one.mask.all()
        assert one.finished == (one.ids[-1] == EOS_ID)
    again, other = (engine.ready([group()], seed) for seed in (7, 8))
    assert ids(again) == ids(first) != ids(other)
    with torch.no_grad():
        policy.lm_head.weight.zero_()
        policy.lm_head.weight[4] = 50.0 * torch.sign(hidden(policy))
    moved = engine.ready([group()], 7)
    assert ids(moved) == [[4] * LONGEST] * 3
    (micro,) = engine.share(moved).micros
    view = engine.view(micro.groups, engine.outputs(micro), {}, 0)
    assert len(view) == 1
    assert view.sample_pair.tolist() == [0, 0, 0]
    assert (view.chosen.mask.sum(), view.rejected.mask.sum()) == (1, 1)


def hidden(policy: Any) -> Tensor:
    return policy.model(input_ids=torch.tensor([PROMPT])).last_hidden_state[0, -1]


def ids(groups: list[TokenGroup]) -> list[list[int]]:
    return [one.ids.tolist() for own in groups for one in own.completions if one.role == "sample"]


def test_ranks_draw_parts_of_what_one_process_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS.get("hypo")(live=2, max_new_tokens=4)
    groups = random_groups("pairs", 5, seed=3)
    roles = role_module(tiny_model("llama", seed=1), method)
    alone = LiveSamples(roles, tiny_tokenizer(), torch.device("cpu"), Live(2, 4))(groups, 9)
    parts: dict[int, Any] = {}
    for rank in (0, 1):
        sampling = LiveSamples(roles, tiny_tokenizer(), torch.device("cpu"), Live(2, 4), rank, 2)
        monkeypatch.setattr(sampling, "_of_all", lambda drawn, rank=rank: parts.setdefault(rank, drawn))
        sampling(groups, 9)
    assert [[len(own) for own in parts[rank]] for rank in (0, 1)] == [[2, 0, 2, 0, 2], [0, 2, 0, 2, 0]]

    def gather(out: list[Any], mine: Any) -> None:
        out[:] = [parts[0], parts[1]]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    for rank in (0, 1):
        whole = LiveSamples(roles, tiny_tokenizer(), torch.device("cpu"), Live(2, 4), rank, 2)(groups, 9)
        assert ids(whole) == ids(alone)
        assert len(ids(whole)) == 10


def arguments(folder: Path, **more: Any) -> AlignConfig:
    common = {"global_batch_size": 4, "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "use_cpu": True}
    return AlignConfig(output_dir=str(folder), disable_tqdm=True, **{**common, **more})


def test_a_run_without_samples_in_its_data(tmp_path: Path) -> None:
    model, rows = str(save_tiny(tmp_path / "model")), random_pairs(16, seed=0)
    with pytest.raises(DataError, match="needs `samples`"):
        PreferenceTrainer(model, METHODS.get("hypo")(), arguments(tmp_path / "none"), rows)
    method = METHODS.get("hypo")(live=2, max_new_tokens=12, lambda_=0.02)
    logs = []
    for name in ("one", "two"):
        trainer = PreferenceTrainer(model, method, arguments(tmp_path / name, eval_every=2), rows[:12], rows[12:])
        trainer.train()
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([line["loss"] for line in lines if "loss" in line])
        assert any("eval_loss" in line for line in lines)
    assert logs[0] == logs[1]
    assert logs[0][0] == pytest.approx(np.log(2), abs=1e-4), "l is 0 where policy and reference are equal"
    assert logs[0][2] != pytest.approx(np.log(2), abs=1e-4)


def test_what_live_samples_do_not_go_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="live: 2"):
        METHODS.get("hypo")(max_new_tokens=12)
    assert "baseline" in METHODS.get("hypo")(live=1).cautions()[0]
    assert "older policy" in METHODS.get("hypo")().cautions()[0]
    assert METHODS.get("hypo")(live=2).cautions() == ()
    args = arguments(tmp_path / "cached", reference="cached", reference_cache=str(tmp_path / "cache"))
    trainer = PreferenceTrainer(
        str(save_tiny(tmp_path / "model")), METHODS.get("hypo")(live=2), args, random_pairs(4, seed=0)
    )
    with pytest.raises(ConfigError, match="cached reference"):
        trainer.train()
