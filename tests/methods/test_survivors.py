"""Assertions that planted faults showed to be missing: what is logged, declared or kept, and numbers at the edges."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from align.core.errors import ConfigError, DataError
from align.methods import METHODS, Method, terms
from align.methods._lists import unit_scores
from align.methods._pairs import matched
from align.methods.base import Live, finish, method, terms_of
from align.methods.evaluate import make_bare_view, make_method
from align.methods.hypo import HyPO
from align.methods.stages import log1mexp, logistic
from align.scoring.views import Completions, Lists, Pairs
from align.testing.checks import variants
from align.testing.rows import Row, map_completions, random_rows, tracked
from align.trainers.metrics import implicit_reward
from tests.methods.loops import LOOPS, softplus


def at_h(ratio: float, **more: Any) -> Row:
    """A completion of one token with log-ratio `ratio`."""
    return {"logp": [-1.0], "ref_logp": [-1.0 - ratio], **more}


class Watched(dict[str, Any]):
    """A row that notes which of its fields are read, in itself and in the rows inside it."""

    def __init__(self, row: Mapping[str, Any], read: set[str], prefix: str = "") -> None:
        self.read, self.prefix = read, prefix
        super().__init__({name: self._within(name, value) for name, value in row.items()})

    def _within(self, name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return Watched(value, self.read, "anchor." if name == "anchor" else "")
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [Watched(one, self.read) for one in value]
        return value

    def __getitem__(self, name: str) -> Any:
        self.read.add(self.prefix + name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.read.add(self.prefix + name)
        return super().get(name, default)


FREE = {"logp", "mask", "weight", "chosen", "rejected", "completions", "anchor", "role"}
"""What every row has: nothing of it is declared. `role` comes with `contrasts`."""


CHARGED = {"rloo", "reinforce_pp", "reinforce_pp_baseline"}
"""Methods whose KL to the reference is charged to the rewards, before the loss."""


def read_by_loop(name: str, made: Any) -> set[str]:
    """The columns that the method's loop, written from its paper, reads of rows that have them."""
    read: set[str] = set()
    rows = [Watched(row, read) for row in random_rows(made, 5, seed=2)]
    options = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    LOOPS[name](rows, {key: x.tolist() for key, x in made.initial_state().items()}, **options)
    return {"scores" if one == "ranks" else one for one in read} - FREE


@pytest.mark.parametrize("name", METHODS.entries())
def test_a_method_declares_what_its_loop_reads(name: str) -> None:
    cls = METHODS.get(name)
    needs: set[str] = set()
    for label, made in variants(cls).items():
        assert made.requires() <= cls.needs, label
        read = read_by_loop(name, made)
        assert read <= made.reads(), label
        needs |= read
    assert needs <= cls.needs | cls.takes
    charged = {"ref_logp"} if name in CHARGED else set()
    assert (cls.needs | cls.takes) - needs <= {"ties", "scored_prompts", "role", *charged}


@pytest.mark.parametrize("name", METHODS.entries())
def test_a_method_works_without_what_it_does_not_declare(name: str) -> None:
    """`observe` and `measure` too, on rows that have every column; and it gives the same numbers."""
    for label, made in variants(METHODS.get(name)).items():
        rows = [with_everything(row) for row in random_rows(made, 5, seed=2)]
        view = make_bare_view(made.view, rows, requires=made.requires(), state=made.initial_state())
        less = view.only(made.reads())
        whole, bare = (finish(made.loss(one), view) for one in (view, less))
        for term in whole:
            assert torch.equal(whole[term].values, bare[term].values), label
        whole_state, bare_state = (made.observe(one) for one in (view, less))
        assert all(torch.equal(whole_state[key], bare_state[key]) for key in whole_state), label
        assert made.measure(view) == made.measure(less), label


def with_everything(row: Row) -> Row:
    """The row with a number in every column that its completions may have."""

    def filled(one: Row) -> Row:
        tokens = len(one["logp"])
        given = {"label": True, "reward": 0.7, "finished": False, "key": 5, "step": list(range(tokens))}
        given |= {name: [-0.3] * tokens for name in ("ref_logp", "token_reward", "entropy", "log_max")}
        return {**given, "anchor": {}, **one}

    more = {"probability": 0.7, "margin": 0.4} if "chosen" in row else {}
    return {**more, **map_completions(row, filled)}


def reading_probability(**declared: Any) -> Method:
    """A method that reads a column with a default, which nothing would tell from the data's own."""

    @method("reading", view="pairs", needs={"ref_logp"}, **declared)
    class Reading(Method):
        def loss(self, pairs: Pairs) -> torch.Tensor:
            return logistic(pairs.probability * pairs.delta)

    return Reading()


def test_an_undeclared_column_is_refused() -> None:
    pair = {"chosen": at_h(1.0), "rejected": at_h(0.0), "probability": 0.8}
    with pytest.raises(ConfigError, match="no `probability`") as caught:
        terms(reading_probability(), pairs=[pair])
    assert "takes={'probability'}" in caught.value.mend
    taking = reading_probability(takes={"probability"})
    for p, given in ((0.8, {"probability": 0.8}), (1.0, {})):
        found = np.asarray(terms(taking, pairs=[{"chosen": at_h(1.0), "rejected": at_h(0.0), **given}]))
        assert found.tolist() == pytest.approx([softplus(-p)], abs=1e-12)
    view = make_bare_view("pairs", [pair]).only(())
    assert not hasattr(view, "no_such_field")
    with pytest.raises(ConfigError, match="no `ref_logp`"):
        view.chosen.ref_logp  # noqa: B018  read for its refusal


def test_which_methods_take_ties() -> None:
    """No column, but leave to see pairs of which neither is better: with a probability of one half in the loss."""
    take = {name for name in METHODS.entries() if "ties" in METHODS.get(name)().requires()}
    assert take == {"robust_bt", "smpo", "soft_dpo", "dno"}
    for name in ("online_dpo", "online_ipo"):
        assert "ties" in METHODS.get(name)(label="prob").requires()


REWARDS: dict[str, tuple[dict[str, Any], float]] = {
    "beta_dpo": ({"beta0": 0.3}, 0.3 * 1.5),
    "cpo": ({"beta": 0.3}, 0.3 * -2.0),
    "dpo": ({"beta": 0.3}, 0.3 * 1.5),
    "dpo_norm": ({"beta": 0.3}, 0.3 * 0.75),
    "exo_pref": ({"beta_pi": 0.3}, 0.3 * 1.5),
    "flex_dpo": ({"beta_w": 0.3, "beta_l": 0.7}, 0.3 * 1.5),
    "slic": ({}, -2.0),
    "spac": ({"eta": 4.0}, 1.5 / 4),
    "spin": ({"lambda": 0.3}, 0.3 * 1.5),
    "simpo": ({"beta": 3.0}, 3.0 * -1.0),
    "f_dpo": ({"beta": 0.3, "divergence": "js"}, 0.3 * (math.log(2) - softplus(-1.5))),
    "chi_po": ({"beta": 0.3, "gamma": 0.5}, 0.3 * (math.exp(1.5) + 0.5 * 1.5)),
}
"""Options, and the reward by the paper of a completion of two tokens with log-prob -2 and log-ratio 1.5."""


@pytest.mark.parametrize("name", REWARDS)
def test_the_reward_that_is_logged(name: str) -> None:
    options, expected = REWARDS[name]
    one = {"logp": [-0.5, -1.5], "ref_logp": [-1.0, -2.5]}
    needs = METHODS.get(name).needs
    completions: Any = make_bare_view("demonstrations", [one if "ref_logp" in needs else {"logp": one["logp"]}])
    found = implicit_reward(make_method(name, options), completions.completions)
    assert found.tolist() == pytest.approx([expected], abs=1e-12)


def test_every_reward_of_its_own_is_listed() -> None:
    own = {name for name in METHODS.entries() if hasattr(METHODS.get(name), "implicit_reward")}
    assert own <= set(REWARDS), "write the paper's reward of these down in REWARDS"


def measured(
    name: str, options: dict[str, Any], rows: list[Row], view: str = "pairs"
) -> dict[str, tuple[float, float]]:
    method = make_method(name, options)
    made = make_bare_view(view, rows, requires=method.requires())
    return {key: (float(top), below) for key, (top, below) in method.measure(made).items()}


def test_chi_po_counts_what_it_clips() -> None:
    def two(ratio: float) -> Row:
        return {"logp": [-1.0, -1.0], "ref_logp": [-1.0 - ratio, -1.0]}

    ratios = [(3.0, 0.0), (0.0, 4.0), (2.0, -9.0), (1.0, 0.9), (0.5, -0.5), (5.0, 5.0), (2.0, 2.0)]
    pairs = [{"chosen": two(w), "rejected": two(x)} for w, x in ratios]
    found = measured("chi_po", {"beta": 0.2, "R_max": 0.4, "gamma": 0.5, "max_exponent": 2.0}, pairs)
    # beta (min(e^h, e^2) + h / 2), and a margin is clipped beyond 0.8
    rewards = [[0.2 * (math.exp(min(ratio, 2.0)) + ratio / 2) for ratio in pair] for pair in ratios]
    assert [abs(w - x) > 0.8 for w, x in rewards] == [True] * 3 + [False] * 4
    assert found == {"clipped": (3.0, 7.0), "clamped": (4.0, 14.0)}


def test_f_dpo_counts_what_it_clamps() -> None:
    def two(ratio: float) -> Row:
        return {"logp": [-1.0, -1.0], "ref_logp": [-1.0 - ratio, -1.0]}

    pairs = [
        {"chosen": two(w), "rejected": two(x)}
        for w, x in ((150.0, -90.0), (-150.0, 1.0), (-350.0, 90.0), (-80.0, 80.0))
    ]
    for options, count in (
        ({"divergence": "forward_kl"}, 3),
        ({"divergence": "alpha", "alpha": 0.5, "beta": 0.05}, 1),
        ({"divergence": "chi2_kl"}, 2),
    ):
        assert measured("f_dpo", options, pairs) == {"clamped": (count, 8.0)}, options
    assert not measured("f_dpo", {"divergence": "js"}, pairs)


def test_rrpo_counts_pairs_without_a_marked_scored_token() -> None:
    def one(marked: list[bool], mask: list[bool]) -> Row:
        zeros = [0.0, 0.0]
        return {"logp": [-1.0, -2.0], "ref_logp": [-1.5, -1.0], "marked": marked, "mask": mask, "kl_ref_policy": zeros}

    yes, no = one([True, False], [True, True]), one([False, False], [True, True])
    unscored = one([True, False], [False, True])
    pairs = [
        {"chosen": w, "rejected": x} for w, x in ((yes, no), (no, yes), (no, no), (unscored, unscored), (yes, yes))
    ]
    assert measured("rrpo", {}, pairs) == {"rrpo/pairs_without_segments": (2.0, 5.0)}
    found = terms("rrpo", {}, pairs=pairs)
    assert set(found.counts.values()) == {3.0}


def test_tgdpo_counts_tokens_at_the_floor_of_their_own_side() -> None:
    def one(*rewards: float) -> Row:
        reference = [-1.0] * len(rewards)
        return {"logp": reference, "ref_logp": reference, "anchor": {"guide": [r - 1.0 for r in rewards]}}

    # Factors 1 + 0.5 r: 0.25, 1.5, 0; and 1 - 0.5 r: 0.35, 0.1
    pairs = [{"chosen": one(-1.5, 1.0, -2.0), "rejected": one(1.3, 1.8)}]
    options = {"alpha": 0.5, "beta_guide": 1.0, "floor": 0.3}
    assert measured("tgdpo", options, pairs) == {"tgdpo/tokens_at_floor": (3.0, 5.0)}
    assert measured("tgdpo", {**options, "floor": 0.2}, pairs) == {"tgdpo/tokens_at_floor": (2.0, 5.0)}


STATEFUL = [name for name in METHODS.entries() if METHODS.get(name)().initial_state()]


@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_float64_without_gradient(name: str) -> None:
    method = METHODS.get(name)()
    rows, _ = tracked(random_rows(method, 6, seed=1), torch.float32)
    view = make_bare_view(method.view, rows, state=method.initial_state(), dtype=torch.float32)
    for value in method.observe(view).values():
        assert not value.requires_grad
        assert value.dtype in (torch.float64, torch.long)


@pytest.mark.parametrize("name", ["bco", "beta_dpo"])
def test_running_means_start_by_themselves(name: str) -> None:
    method = METHODS.get(name)()
    rows = random_rows(method, 6, seed=1)
    bare, begun = (
        make_bare_view(method.view, rows, state=state) for state in (dict[str, Any](), method.initial_state())
    )
    assert method.observe(bare) == method.observe(begun)


def keyed(ratio: float, key: int) -> Row:
    return {"chosen": at_h(ratio, key=key), "rejected": at_h(0.0, key=key + 1_000_000)}


class TestBetaDPO:
    def test_running_mean_and_deviation(self) -> None:
        pairs = [keyed(ratio, i) for i, ratio in enumerate((1.0, 2.0, 6.0))]
        after = terms("beta_dpo", {"m": 0.75}, pairs=pairs, state={"M0": 4.0, "S": 2.0}).state
        assert float(after["M0"]) == pytest.approx(0.75 * 4 + 0.25 * 3, abs=1e-12)
        assert float(after["S"]) == pytest.approx(0.75 * 2 + 0.25 * math.sqrt(7), abs=1e-12)
        two = terms("beta_dpo", {"m": 0.75}, pairs=pairs[:2], state={"S": 2.0}).state
        assert float(two["S"]) == pytest.approx(0.75 * 2 + 0.25 * math.sqrt(0.5), abs=1e-12)
        alone = terms("beta_dpo", {"m": 0.75}, pairs=pairs[:1], state={"S": 2.0}).state
        assert float(alone["S"]) == 2.0

    def test_beta_has_no_gradient(self) -> None:
        rows, leaves = tracked([keyed(ratio, i) for i, ratio in enumerate((1.0, 2.0, 6.0))])
        options = {"beta0": 0.3, "a": 0.6, "rho": 1.0, "m": 0.75}
        found = torch.autograd.grad(terms("beta_dpo", options, pairs=rows, state={"S": 2.0}).total(), leaves)
        beta = 0.3 * (1 + 0.6 * (3 - 0.25 * 3))
        slopes = [-beta / (1 + math.exp(beta * ratio)) / 3 for ratio in (1.0, 2.0, 6.0)]
        assert [float(g) for g in found[::2]] == pytest.approx(slopes, abs=1e-12)

    def test_beta_has_a_floor(self) -> None:
        found = terms("beta_dpo", {"a": 5.0, "rho": 1.0, "m": 0.5}, pairs=[keyed(-4.0, 0)], state={"S": 1.0})
        assert np.asarray(found).tolist() == pytest.approx([softplus(4e-3)], abs=1e-12)

    def test_shares_that_floating_point_rounds_down_are_kept_whole(self) -> None:
        assert 0.29 * 100 < 29 and 0.8 * 5 == 4
        for rho, size, count in ((0.29, 100, 29), (0.8, 5, 4), (0.1, 3, 1)):
            pairs = [keyed(0.1 * i, i) for i in range(size)]
            assert terms("beta_dpo", {"rho": rho}, pairs=pairs).counts == {"loss": count}

    def test_equal_margins_are_drawn_by_chance_alone(self) -> None:
        pairs = [keyed(1.0, i) for i in range(40)]
        at_once = np.asarray(terms("beta_dpo", {"rho": 0.5, "m": 0.0}, pairs=pairs)) != 0
        wide = np.asarray(terms("beta_dpo", {"rho": 0.5, "m": 0.9}, pairs=pairs, state={"M0": 1.0, "S": 9.0})) != 0
        assert at_once.tolist() == wide.tolist()
        assert sorted(at_once.tolist(), reverse=True) != at_once.tolist(), "not simply the first"

    def test_pairs_are_drawn_by_their_weight(self) -> None:
        """Few of many: shares of the drawn are those of the weights, and the two kinds are far from equal."""
        half = 3000
        pairs = [keyed(ratio, 2 * i + (ratio > 1)) for ratio in (0.0, 3.0) for i in range(half)]
        found = terms("beta_dpo", {"rho": 0.1, "m": 0.5}, pairs=pairs, state={"M0": 0.5, "S": 2.5})
        centre, deviation = 0.5 * 0.5 + 0.5 * 1.5, 0.5 * 2.5 + 0.5 * 1.5 * math.sqrt(2 * half / (2 * half - 1))
        low, high = (math.exp(-(((ratio - centre) / deviation) ** 2) / 2) for ratio in (0.0, 3.0))
        kept = np.asarray(found) != 0
        assert kept.sum() == found.counts["loss"] == 600
        share, expected = kept[half:].mean() / kept.mean() / 2, high / (low + high)
        assert expected == pytest.approx(0.4073, abs=1e-4)
        assert share == pytest.approx(expected, abs=0.06)  # three deviations of a draw of 600


def orders(scores: list[float]) -> Iterator[tuple[int, ...]]:
    """Every way to sort by falling score in which equal scores may stand in either order: place of each, from 1."""
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            yield tuple(order.index(i) + 1 for i in range(len(scores)))


@pytest.mark.parametrize("ratios", [[0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0, -1.0], [1.0, 1.0, 0.0, 0.0], [0.5, 3.0, 0.5]])
def test_lambda_weights_of_tied_rewards_are_means_over_orders(ratios: list[float]) -> None:
    scores = [(i * 2 % 5) / 5 + 0.1 for i in range(len(ratios))]
    places = list(orders(ratios))
    expected = 0.0
    for i, j in itertools.permutations(range(len(ratios)), 2):
        if scores[i] > scores[j]:
            gaps = [abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j])) for place in places]
            weight = (2 ** scores[i] - 2 ** scores[j]) * sum(gaps) / len(gaps)
            expected += weight * softplus(-0.3 * (ratios[i] - ratios[j]))
    lists = [{"completions": [at_h(ratio) for ratio in ratios], "scores": scores}]
    lists += [{"completions": [at_h(9.0)], "scores": [0.3]}]
    found = np.asarray(terms("lipo_lambda", {"beta": 0.3}, lists=lists))
    assert found.tolist() == pytest.approx([expected, 0.0], abs=1e-12)


def test_probabilities_from_margins_have_a_temperature() -> None:
    pair = {"chosen": at_h(1.0), "rejected": at_h(0.0), "margin": 1.2, "probability": 1.0, "ties": 0}
    pair = {name: value for name, value in pair.items() if name != "ties"}
    p = 1 / (1 + math.exp(-1.2 / 3))
    found = np.asarray(terms("soft_dpo", {"label": "margin", "T": 3.0, "beta": 0.4}, pairs=[pair]))
    assert found.tolist() == pytest.approx([p * softplus(-0.4) + (1 - p) * softplus(0.4)], abs=1e-12)


class TestRobustBT:
    def pairs(self, *probabilities: float) -> list[Row]:
        return [{"chosen": at_h(2.0), "rejected": at_h(0.0), "probability": p} for p in probabilities]

    def test_the_mixture_holds_the_confidence_in_its_range(self) -> None:
        options = {"beta": 0.5, "floor": 0.6, "ceiling": 0.9}
        found = np.asarray(terms("robust_bt", options, pairs=self.pairs(0.1, 0.7, 1.0)))
        s = 1 / (1 + math.exp(-1.0))
        expected = [-math.log(c * s + (1 - c) * (1 - s)) for c in (0.6, 0.7, 0.9)]
        assert found.tolist() == pytest.approx(expected, abs=1e-12)

    def test_debias_refuses_one_half(self) -> None:
        with pytest.raises(DataError, match=r"0\.5 or less"):
            terms("robust_bt", {"kind": "debias"}, pairs=self.pairs(0.9, 0.5))

    def test_bounds(self) -> None:
        for options in ({"floor": 1, "ceiling": 1}, {"floor": 0, "ceiling": 0}):
            make_method("robust_bt", options)
        for name, bad in (("floor", {"floor": 1.5, "ceiling": 2}), ("ceiling", {"ceiling": -0.5})):
            with pytest.raises(ConfigError, match=f"`{name}` is .*, outside its range"):
                make_method("robust_bt", bad)


@pytest.mark.parametrize(("name", "options"), [("chi_po", {"max_exponent": 0.5}), ("spac", {"eta": 0.5})])
def test_small_values_of_a_range_that_starts_at_0_are_admitted(name: str, options: dict[str, Any]) -> None:
    make_method(name, options)


def test_wpo_logs_the_mean_weight() -> None:
    one = {"logp": [-1.0, -2.0], "ref_logp": [-1.0, -2.0], "log_sum_sq": [-0.5, -1.0], "log_max": [0.0, 0.0]}
    pair = {"chosen": one, "rejected": {**one, "log_sum_sq": [-1.0, -1.0]}}
    ((top, count),) = measured("wpo", {}, [pair, pair, pair]).values()
    assert (top, count) == (pytest.approx(3 * math.exp(-0.75 - 0.5)), 3)


def test_sft_fdiv_counts_scored_tokens_that_are_held() -> None:
    row = {"logp": [-3.0, -1.0, -9.0, -9.0], "ref_logp": [-1.0, -1.0, -1.0, -1.0], "mask": [1, 1, 1, 0]}
    assert measured("sft_fdiv", {"kind": "js"}, [row], "demonstrations") == {"sft_fdiv/held": (2.0, 3.0)}
    once = {"logp": [-1.6], "ref_logp": [-1.0]}
    found = measured("sft_fdiv", {"kind": "js", "beta": 0.5, "level": "sequence"}, [row, once], "demonstrations")
    assert found == {"sft_fdiv/held": (1.0, 2.0)}


def test_ps_kd_starts_with_one_epoch_and_logs_its_share() -> None:
    method = METHODS.get("ps_kd")(alpha_T=0.8)
    assert {name: float(value) for name, value in method.initial_state().items()} == {"epoch": 0.0, "epochs": 1.0}
    state = {"epoch": torch.tensor(1.0), "epochs": torch.tensor(4.0)}
    view = make_bare_view("demonstrations", [{"logp": [-1.0], "cross_entropy": [2.0]}], state=state)
    ((share, count),) = method.measure(view).values()
    assert (float(share), count) == (pytest.approx(0.4), 1)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_dro_v_scales_the_policy_at_other_factors_than_its_temperatures(scale: float) -> None:
    rows, leaves = tracked([at_h(0.5, reward=0.9, value=[0.2, 0.0])])
    (slope, *_) = torch.autograd.grad(terms("dro_v", {"policy_grad_scale": scale}, singles=rows).total(), leaves)
    assert float(slope) == pytest.approx(-scale * (0.9 - 0.2 - 0.5), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "warned"),
    [([0.0, 1.0], False), ([0.5, 0.5], False), ([0.0, 1.01], True), ([-0.01, 0.5], True), ([1.5, 1.6], True)],
)
@pytest.mark.parametrize("name", ["lipo_lambda"])
def test_scores_outside_0_to_1_are_warned_about(name: str, scores: list[float], warned: bool) -> None:
    lists = [{"completions": [at_h(0.1), at_h(0.3)], "scores": scores}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        terms(name, {}, lists=lists)
    assert any("outside 0 to 1" in str(one.message) for one in caught) == warned


def test_log1mexp_at_both_ends() -> None:
    x = torch.tensor([-1e-300, -1e-20, -0.5, -2.0, -700.0], dtype=torch.float64, requires_grad=True)
    y = log1mexp(x)
    ends = [math.log(1e-300), math.log(1e-20), math.log(-math.expm1(-0.5)), math.log1p(-math.exp(-2)), -math.exp(-700)]
    assert y.tolist() == pytest.approx(ends, rel=1e-12)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope.tolist() == pytest.approx([-1e300, -1e20, *(1 / -math.expm1(v) for v in (0.5, 2.0, 700.0))], rel=1e-9)


def test_running_numbers_are_float64_of_float32_margins() -> None:
    pairs = [keyed(ratio, i) for i, ratio in enumerate((0.1, 0.2, 0.4, 0.7))]
    view = make_bare_view("pairs", pairs, state=METHODS.get("beta_dpo")().initial_state(), dtype=torch.float32)
    after = METHODS.get("beta_dpo")(m=0.0).observe(view)
    margins = view.delta.double().tolist()
    assert float(after["M0"]) == pytest.approx(sum(margins) / 4, abs=1e-15)
    assert float(after["S"]) == pytest.approx(float(np.std(margins, ddof=1)), abs=1e-15)


def test_the_batch_is_compared_with_itself_in_float64() -> None:
    """All kept and no past: mean - M0 is 0, and beta is beta0; a mean in float32 of margins of 1e4 is 5e-4 off."""
    made = METHODS.get("beta_dpo")(m=0.0, rho=1.0, a=100.0, beta0=0.1)
    pairs = [keyed(-(1e4 + 0.37 * i), i) for i in range(7)]
    view = make_bare_view("pairs", pairs, state=made.initial_state(), dtype=torch.float32)
    found = made.loss(view)["loss"].values
    assert found.tolist() == pytest.approx((-0.1 * view.delta.double()).tolist(), rel=1e-6)


def test_transport_keeps_masses_of_many_float32_elements() -> None:
    drawn = torch.Generator().manual_seed(0)
    first, second, mass = (torch.rand(20_000, generator=drawn) for _ in range(3))
    owner, partner, moved = matched(first, second, mass)
    for index in (owner, partner):
        arrived = torch.zeros(len(mass), dtype=torch.float64).index_add(0, index, moved.double())
        torch.testing.assert_close(arrived, mass.double(), rtol=0, atol=1e-6)


def test_a_margin_at_the_bound_still_pulls_and_is_not_counted() -> None:
    rows, leaves = tracked([{"chosen": at_h(0.3), "rejected": at_h(-0.4)}])
    view = make_bare_view("pairs", rows)
    margin = float(METHODS.get("chi_po")()._margin(view).detach())
    at, beyond = (METHODS.get("chi_po")(R_max=bound) for bound in (margin / 2, margin / 2.0001))
    for made, clipped in ((at, 0.0), (beyond, 1.0)):
        (slope, _) = torch.autograd.grad(finish(made.loss(view), view).total(), leaves, retain_graph=True)
        assert (float(slope) == 0) == bool(clipped)
        assert float(made.measure(view)["clipped"][0]) == clipped


def test_no_lists_have_no_scores_outside() -> None:
    none = Completions(
        mask=torch.zeros(0, 1, dtype=torch.bool), columns={name: torch.zeros(0, 1) for name in ("logp", "ref_logp")}
    )
    empty = Lists(none, group=torch.zeros(0, dtype=torch.long), weight=torch.zeros(0), scores=torch.zeros(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unit_scores(empty, "nothing follows").shape == (0,)
        (term,) = terms_of(METHODS.get("lipo_lambda")(), empty).values()
    assert term.values.shape == (0,)


def test_hypo_says_what_it_wants_drawn() -> None:
    plain, live = HyPO(), HyPO(live=2, max_new_tokens=1)
    assert plain.live_samples() is None and live.live_samples() == Live(2, 1)
    assert "samples" in plain.requires() and "samples" not in live.requires()
    with pytest.raises(ConfigError, match="belongs to live samples"):
        HyPO(max_new_tokens=7)
    assert ["older policy" in said for said in plain.cautions()] == [True] and live.cautions() == ()
    assert ["no others" in said for said in HyPO(live=1).cautions()] == [True]
    assert HyPO(live=1, baseline="zero").cautions() == ()
