"""`scoring.assemble`: the view of token groups and engine outputs equals the view of the same bare numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from align.core.errors import ConfigError, DataError
from align.data.groups import Preference, RowId, TokenCompletion, TokenGroup, beside
from align.data.marks import mark_differences
from align.data.readers import reader_for
from align.data.tokenise import Tokeniser
from align.methods import METHODS
from align.methods.base import finish, terms_of
from align.methods.evaluate import make_bare_view
from align.scoring.assemble import columns_needed, completion_key, make_view, placeholder_outputs, trees_of
from align.scoring.views import Lists, Pairs, Singles
from align.testing.rows import ORIGINS
from align.testing.tiny import random_pairs, tiny_tokenizer


def completion(rng: np.random.Generator, advantages: bool = False, **feedback: Any) -> TokenCompletion:
    length = int(rng.integers(1, 6))
    mask = rng.random(length) < 0.7
    mask[-1] = True
    feedback |= {"columns": {"advantage": rng.normal(size=length)}} if advantages else {}
    return TokenCompletion(rng.integers(3, 99, length), mask, np.arange(length) // 2, **feedback)


def make_groups(view: str, seed: int = 0, needs: frozenset[str] = frozenset()) -> list[TokenGroup]:
    rng = np.random.default_rng(seed)
    groups = []
    for row in range(4):
        # Of three answers, no two authors could have written every pair.
        size = {"pairs": 2 + row % 2 * ("role" not in needs), "singles": 2, "demonstrations": 1}.get(view, row + 1)
        own = tuple(
            completion(
                rng,
                label=bool((row + i) % 2),
                reward=float(rng.random() if view == "lists" else rng.normal()),
                rewards={"helpful": float(i)},
                rank=i + 1,
                weight=1.0 + (row if view in ("lists", "groups") else i),
                finished=i != 1,
                role=ORIGINS[(row + i) % 2] if "role" in needs else "",
                advantages="advantage" in needs,
            )
            for i in range(size)
        )
        preferences = tuple(
            Preference(i, j, probability=0.9 if i else None, margin=0.5 + j, weight=0.5 + row)
            for i in range(size)
            for j in range(size)
            if i > j
        )
        others = tuple(completion(rng) for _ in own) if view == "singles" else ()
        roles = ["sample"] * (1 + row % 3) * ("samples" in needs) + ["demonstration"] * ("baseline" in needs)
        if "contrasts" in needs:
            roles += ["intra:0:+", "intra:0:-", "inter:0:+", "inter:0:-", "inter:0:-", "inter:0:+"] * (row != 2)
        own += tuple(completion(rng, role=role) for role in roles)
        prompt = rng.integers(3, 99, 3)
        group = TokenGroup(RowId("made.jsonl", row), prompt, own, preferences * (view == "pairs"), others)
        groups.append(mark_differences(group) if "marked" in needs else group)
    return groups


def outputs_for(groups: list[TokenGroup], needs: frozenset[str], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = placeholder_outputs(groups, needs)
    return {name: -torch.rand(zeros.shape, generator=generator).double() - 0.1 for name, zeros in shapes.items()}


def bare_rows(view: str, groups: list[TokenGroup], outputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows, place = [], 0
    contrasts = any(":" in one.role for group in groups for one in group.completions)
    for group in groups:
        made = []
        for index, one in enumerate((*group.completions, *group.mismatched)):
            extra = {"value": 1}
            row = {name: column[place, : len(one) + extra.get(name, 0)] for name, column in outputs.items()}
            anchors = {name.removeprefix("anchor."): row.pop(name) for name in list(row) if name.startswith("anchor.")}
            row |= {"anchor": anchors} if anchors else {}
            row |= {"mask": one.mask.tolist(), "weight": one.weight, "finished": one.finished}
            row |= {"key": completion_key(group.row, index), "step": one.step.tolist()}
            row |= {"label": one.label, "reward": one.reward} if one.label is not None else {}
            row |= {"role": one.role} if one.role in ORIGINS else {}
            row |= {name: column.tolist() for name, column in one.columns.items()}
            made.append(row)
            place += 1
        drawn, imitated = (
            [row for row, one in zip(made, group.completions, strict=False) if one.role == role]
            for role in ("sample", "demonstration")
        )
        judged = sum(not beside(one.role) for one in group.completions)
        own, others = made[:judged], made[len(group.completions) :]
        more = ({"samples": drawn} if drawn else {}) | ({"baseline": imitated[0]} if imitated else {})
        contrasted = [(row, one) for row, one in zip(made, group.completions, strict=False) if ":" in one.role]
        if contrasts:
            more["contrasts"] = [{**row, "role": one.role} for row, one in contrasted]
        if view == "pairs":
            rows += [
                {
                    "chosen": own[p.winner] | ({"marked": p.marks[0].tolist()} if p.marks else {}),
                    "rejected": own[p.loser] | ({"marked": p.marks[1].tolist()} if p.marks else {}),
                    "weight": p.weight,
                    "margin": p.margin,
                    "probability": 1.0 if p.probability is None else p.probability,
                    **more,
                }
                for p in group.preferences
            ]
        elif view in ("lists", "groups"):
            plain = [{name: value for name, value in one.items() if name != "weight"} for one in own]
            rows.append({"completions": plain, "weight": own[0]["weight"]})
        else:
            partners = others or [None] * len(own)
            rows += [one | ({"mismatched": p} if p else {}) | more for one, p in zip(own, partners, strict=True)]
    return rows


@pytest.mark.parametrize("name", METHODS.entries())
def test_equals_the_view_of_bare_numbers(name: str) -> None:
    method = METHODS.get(name)()
    groups = make_groups(method.view, needs=method.requires())
    outputs = outputs_for(groups, columns_needed(method).outputs)
    state = method.initial_state()
    ours = make_view(method.view, groups, outputs, state=state, dtype=torch.float64)
    theirs = make_bare_view(method.view, bare_rows(method.view, groups, outputs), state=state)
    first, second = terms_of(method, ours), terms_of(method, theirs)
    assert first.counts == second.counts
    for term in first:
        torch.testing.assert_close(first[term].values, second[term].values, rtol=0, atol=1e-14)
    blank = {**placeholder_outputs(groups, outputs)}
    zeros = make_view(method.view, groups, blank, state=state)
    assert terms_of(method, zeros).counts == first.counts


def test_gradients_reach_the_outputs_of_scored_tokens_only() -> None:
    groups = make_groups("pairs")
    outputs = outputs_for(groups, frozenset({"ref_logp"}))
    logp = outputs["logp"].requires_grad_()
    method = METHODS.get("dpo")()
    view = make_view("pairs", groups, outputs, dtype=torch.float64)
    finish(method.loss(view), view).total().backward()
    scored = np.concatenate([one.mask for group in groups for one in group.completions])
    lengths = [len(one) for group in groups for one in group.completions]
    filled = np.arange(logp.shape[1]) < np.array(lengths)[:, None]
    assert logp.grad is not None
    found = logp.grad.numpy()
    assert not found[~filled].any()
    assert not found[filled][~scored].any()
    assert found[filled][scored].all()


def test_data_columns() -> None:
    groups = make_groups("singles")
    view = make_view("singles", groups, placeholder_outputs(groups, ()), seed=7)
    assert isinstance(view, Singles)
    own = [one for group in groups for one in group.completions]
    completions = view.completions
    assert completions.label.tolist() == [one.label for one in own]
    assert completions.reward.tolist() == pytest.approx([one.reward for one in own])
    assert completions.weight.tolist() == [one.weight for one in own]
    assert completions.finished.tolist() == [one.finished for one in own]
    assert completions.rewards["helpful"].tolist() == [one.rewards["helpful"] for one in own]
    assert view.seed == 7
    for i, one in enumerate(own):
        assert completions.step[i, : len(one)].tolist() == one.step.tolist()
        assert completions.mask[i, : len(one)].tolist() == one.mask.tolist()
        assert not completions.mask[i, len(one) :].any()
    assert view.mismatched is not None
    partners = [one for group in groups for one in group.mismatched]
    assert view.mismatched.mask.sum(-1).tolist() == [int(one.mask.sum()) for one in partners]


def test_trees_take_completions_then_mismatched() -> None:
    groups = make_groups("singles")
    for tree, group in zip(trees_of(groups), groups, strict=True):
        branches = [*group.completions, *group.mismatched]
        assert tree.prompt is group.prompt
        assert all(a is b.ids for a, b in zip(tree.branches, branches, strict=True))
        assert all(a is b.mask for a, b in zip(tree.scored, branches, strict=True))


def test_lists_take_scores_from_rewards_else_from_ranks() -> None:
    rng = np.random.default_rng(0)
    for reward, expected in ((0.25, [0.25] * 3), (None, [0.75, 0.0, 0.75])):
        own = tuple(completion(rng, rank=rank, reward=reward) for rank in (1, 3, 1))
        groups = [TokenGroup(RowId("a", 0), np.array([1]), own)]
        view = make_view("lists", groups, placeholder_outputs(groups, ()))
        assert isinstance(view, Lists)
        assert view.scores is not None
        assert view.scores.tolist() == expected
        assert view.ranks is not None
        assert view.ranks.tolist() == [1, 3, 1]


def test_baseline_and_samples_are_the_unpaired_completions_with_these_roles() -> None:
    rng = np.random.default_rng(0)
    roles = ("", "sample", "demonstration", "sample", "")
    own = tuple(completion(rng, role=role) for role in roles)
    pairs = (Preference(0, 4), Preference(4, 0))
    groups = [TokenGroup(RowId("a", 0), np.array([1]), own, pairs)]
    outputs = {"logp": torch.arange(5.0)[:, None].expand(5, 5)}
    view = make_view("pairs", groups, outputs)
    assert isinstance(view, Pairs)
    assert view.baseline is not None
    assert view.baseline.logp[:, 0].tolist() == [2, 2]
    assert view.samples is not None
    assert view.samples.logp[:, 0].tolist() == [1, 3, 1, 3]
    assert view.sample_pair is not None
    assert view.sample_pair.tolist() == [0, 0, 1, 1]
    lone = TokenGroup(RowId("a", 1), np.array([1]), own[:1] * 2, (Preference(0, 1),))
    with pytest.raises(DataError, match="baseline"):
        make_view("pairs", [*groups, lone], placeholder_outputs([*groups, lone], ()))


def test_columns_are_sorted_by_origin() -> None:
    found = columns_needed(METHODS.get("tdpo")())
    assert found.engine == {"logp", "kl_ref_policy"}
    assert found.reference == {"ref_logp"}
    assert found.live_reference
    found = columns_needed(METHODS.get("dro_v")())
    assert found.value == {"value"}
    assert found.data == {"reward"}
    assert found.outputs == {"logp", "ref_logp", "value"}
    assert not found.live_reference

    class Odd:
        def requires(self) -> frozenset[str]:
            return frozenset({"ref_lgp"})

    with pytest.raises(ConfigError, match="did you mean `ref_logp`"):
        columns_needed(Odd())


def test_outputs_of_another_shape_are_refused() -> None:
    groups = make_groups("pairs")
    outputs = placeholder_outputs(groups, {"value"})
    n, width = outputs["logp"].shape
    for bad in ({"logp": torch.zeros(n - 1, width)}, {"logp": torch.zeros(n, width - 1)}):
        with pytest.raises(ConfigError, match="`logp` has shape"):
            make_view("pairs", groups, bad)
    with pytest.raises(ConfigError, match="`value` has shape"):
        make_view("pairs", groups, {**outputs, "value": outputs["logp"]})
    with pytest.raises(ConfigError, match="unknown view"):
        make_view("pair", groups, outputs)


def test_wider_outputs_are_padding() -> None:
    groups = make_groups("pairs")
    outputs = outputs_for(groups, frozenset({"ref_logp"}))
    method = METHODS.get("dpo")()
    wide = {name: torch.nn.functional.pad(column, (0, 4), value=3.0) for name, column in outputs.items()}
    totals = []
    for some in (outputs, wide):
        view = make_view("pairs", groups, some, dtype=torch.float64)
        totals.append(float(finish(method.loss(view), view).total()))
    assert totals[0] == totals[1]


def test_a_list_read_from_a_pair_has_the_weight_of_the_pair() -> None:
    """lipo of two answers is dpo, weights of rows included; and so it is where `weight` comes with scores."""
    tokenise = {view: Tokeniser(tiny_tokenizer(), view) for view in ("pairs", "lists")}
    rows = [{**row, "weight": weight} for row, weight in zip(random_pairs(3, seed=4), (0.5, 3.0, 1.0), strict=True)]
    reader = reader_for(rows, where="made")
    scored = [
        {**row, "completions": [row.pop("chosen"), row.pop("rejected")], "scores": [1.0, 0.0]}
        for row in map(dict, rows)
    ]
    scores = reader_for(scored, where="made")
    found = {}
    for name, view, read, given in (
        ("dpo", "pairs", reader, rows),
        ("lipo", "lists", reader, rows),
        ("lipo", "lists", scores, scored),
    ):
        groups = [tokenise[view](read(row, RowId("made", i))) for i, row in enumerate(given)]
        outputs = outputs_for(groups, frozenset({"ref_logp"}))
        made = make_view(view, groups, outputs, dtype=torch.float64)
        found[name, read is scores] = terms_of(METHODS.get(name)(beta=0.1), made)["loss"].values
        assert made.weights()[made.own_unit].tolist() == [0.5, 3.0, 1.0]
    dpo, *lists = found.values()
    assert all(torch.allclose(dpo, one, rtol=0, atol=1e-14) for one in lists)


def test_a_list_has_one_weight() -> None:
    own = tuple(completion(np.random.default_rng(0), rank=rank, weight=rank) for rank in (1, 2))
    groups = [TokenGroup(RowId("made", 7), np.array([1]), own)]
    with pytest.raises(DataError, match=r"weights \[1, 2\]") as caught:
        make_view("lists", groups, placeholder_outputs(groups, ()))
    assert caught.value.where == "made row 7"
    assert make_view("pairs", groups, placeholder_outputs(groups, ())).counts()["pair"] == 0
