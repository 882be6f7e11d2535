"""Every preset runs two rounds on a world, and its roles, pairs and labels are what it declares."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from align.core.errors import AlignError, ConfigError
from align.core.registry import LOOPS
from align.evaluate.sides import load_side
from align.loops.sera import pair_margins
from align.recipe import loop
from tests.loops.loop_parts import (
    GOLD,
    PREFERENCE,
    groups,
    losses,
    record,
    rows,
    run,
    start,
    summed,
    tau_b,
    training,
    write,
)

BY_REWARD: dict[str, Any] = {"feedback": [{"kind": "function", "name": GOLD}]}
BY_WINS: dict[str, Any] = {"feedback": [{"kind": "pairwise_function", "name": PREFERENCE}]}
LOG_2 = math.log(2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return start(tmp_path_factory.mktemp("models"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source_rows(folder: Path) -> set[int]:
    return {group.row.row for group in groups(folder)}


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_iterative_dpo_compares_with_whom_it_is_told(models: Any, here: Path, reference: str) -> None:
    said: list[str] = []
    file = write(here, models[0], "out", {"preset": "iterative_dpo", "reference": reference}, **BY_REWARD)
    _, policy = run(file, say=said.append)
    one, two = here / "out" / "round-1", here / "out" / "round-2"
    assert policy == Path("out/round-2/train/policy")
    assert (here / "out" / "policy" / "config.json").is_file()
    assert losses(one)[0] == pytest.approx(LOG_2, abs=1e-6)
    if reference == "previous":
        assert losses(two)[0] == pytest.approx(LOG_2, abs=1e-6)
        assert training(two)["reference"].get("model") is None
    else:
        assert abs(losses(two)[0] - LOG_2) > 1e-3
        assert training(two)["reference"]["model"] == str(models[0])
    assert training(two)["model"]["name"] == "out/round-1/train/policy"
    assert "round 2 of 2: sampling from round-1/train/policy" in said
    # Who wrote the pairs: the sampler's own log-probs are those of the policy of round 1, not of the initial model.
    sides = [load_side(str(folder), "float32", "cpu") for folder in (one / "train" / "policy", models[0])]
    seen = groups(two / "samples")
    assert len(seen) == 8 and all(len(group) == 8 and group.iteration == 2 for group in seen)
    gaps = [
        max(np.abs(summed(side, group) - [float(one.logp.sum()) for one in group.answers]).max() for group in seen)
        for side in sides
    ]
    assert gaps[0] < 1e-3 < 0.1 < gaps[1]
    assert not source_rows(one / "samples") & source_rows(two / "samples"), "prompts are disjoint"
    for row in rows(two / "pairs"):
        assert row["chosen_reward"] > row["rejected_reward"], "ties are no pairs"


def test_sppo_regresses_to_win_rates(models: Any, here: Path) -> None:
    """Its loss where pi = pi_t is known: 1/2 sum (eta (P - 1/2))^2 over both answers of each pair of the batch."""
    file = write(here, models[0], "out", {"preset": "sppo"}, train={"global_batch_size": 64}, **BY_WINS)
    run(file, ["sample.top_p=1.0", "method.eta=10"])
    for number in (1, 2):
        pairs = rows(here / "out" / f"round-{number}" / "pairs")
        assert all(row["provenance"]["chosen"]["temperature"] == 0.7 for row in pairs)
        targets = [10 * (row[side] - 0.5) for row in pairs for side in ("chosen_reward", "rejected_reward")]
        wanted = 0.5 * sum(target**2 for target in targets) / len(pairs)
        assert losses(here / "out" / f"round-{number}")[0] == pytest.approx(wanted, rel=1e-5)
    for group, rates in ((group, group.wins.mean(1)) for group in groups(here / "out" / "round-1" / "judged")):
        assert len(group) == 5
        assert rates.mean() == pytest.approx(0.5), "an answer meets itself with 1/2"


def test_rebel_regresses_to_reward_differences(models: Any, here: Path) -> None:
    """Where pi is the policy that sampled, its loss is the mean of (eta (r_w - r_l))^2 over the round's pairs."""
    file = write(here, models[0], "out", {"preset": "rebel"}, train={"global_batch_size": 64}, **BY_REWARD)
    run(file, ["method.eta=3"])
    for number in (1, 2):
        folder = here / "out" / f"round-{number}"
        pairs = rows(folder / "pairs")
        gaps = [row["chosen_reward"] - row["rejected_reward"] for row in pairs]
        assert pairs and [row["margin"] for row in pairs] == pytest.approx(gaps)
        assert losses(folder)[0] == pytest.approx(np.mean([(3 * gap) ** 2 for gap in gaps]), rel=1e-4)


def test_inpo_has_two_anchors(models: Any, here: Path) -> None:
    """At pi = pi_t its margin h is tau / eta * (margin of log pi_t - log ref), which is 0 in round 1 only."""
    file = write(here, models[0], "out", {"preset": "inpo"}, train={"global_batch_size": 64}, **BY_WINS)
    run(file, ["method.eta=0.5", "method.tau=0.25", "sample.n=4"])
    one, two = here / "out" / "round-1", here / "out" / "round-2"
    assert losses(one)[0] == pytest.approx(1.0, abs=1e-5)
    assert training(two)["reference"]["model"] == str(models[0])
    previous, initial = (load_side(str(folder), "float32", "cpu") for folder in (one / "train" / "policy", models[0]))
    ratios = pair_margins(rows(two / "pairs"), previous, initial).values()
    wanted = [(0.5 * ratio - 1.0) ** 2 for ratio in ratios]
    # pi/pi_t and pi/ref both enter with their weights: at pi = pi_t the first is 0.
    assert wanted and losses(two)[0] == pytest.approx(np.mean(wanted), rel=1e-5)
    assert abs(losses(two)[0] - 1.0) > 1e-3


def test_dno_mixes_in_a_share_of_the_rounds_before(models: Any, here: Path) -> None:
    points = ["pairs.margin=0.01", "pairs.own_margin=0.01", "pairs.least_score=-9", "loop.rounds=3"]
    run(write(here, models[0], "out", {"preset": "dno_prct"}, **BY_REWARD), points)
    kept = [rows(here / "out" / f"round-{number}" / "pairs") for number in (1, 2, 3)]
    mixed = rows(here / "out" / "round-3" / "data")
    counts = [sum(row["provenance"]["iteration"] == number for row in mixed) for number in (1, 2, 3)]
    assert counts == [round(0.15 * len(kept[0])), round(0.3 * len(kept[1])), len(kept[2])]
    assert counts[0] + counts[1] > 0
    assert all(row in kept[0] + kept[1] + kept[2] for row in mixed)
    assert record(here / "out" / "round-3")["counts"]["data"]["rows"]["earlier"] == counts[0] + counts[1]
    assert not (here / "out" / "round-1" / "data").exists()
    assert any(row["provenance"]["chosen"]["origin"] == "data" for row in kept[0]), "the teacher is a candidate"


def test_spin_plays_demonstrations_against_own_answers(models: Any, here: Path) -> None:
    run(write(here, models[0], "out", {"preset": "spin", "prompts": 8}))
    one, two = here / "out" / "round-1", here / "out" / "round-2"
    assert source_rows(one / "samples") == source_rows(two / "samples"), "the same prompts"
    assert not (one / "judged").exists()
    for row in rows(one / "pairs"):
        assert row["provenance"]["chosen"]["origin"] == "data"
        assert row["provenance"]["rejected"]["origin"] == "policy"
    assert losses(one)[0] == pytest.approx(LOG_2, abs=1e-6)
    assert losses(two)[0] == pytest.approx(LOG_2, abs=1e-6), "the reference is the policy that sampled"
    both = rows(one / "pairs") + rows(two / "pairs")
    data = rows(two / "data")
    assert len(data) == len(both) and all(row in both for row in data)
    assert rows(one / "pairs") != rows(two / "pairs")


def test_alpha_spin_leans_on_the_initial_model(models: Any, here: Path) -> None:
    file = write(here, models[0], "out", {"preset": "alpha_spin", "prompts": 8}, train={"global_batch_size": 64})
    run(file)
    one, two = here / "out" / "round-1", here / "out" / "round-2"
    assert losses(one)[0] == pytest.approx(LOG_2, abs=1e-6)
    previous, initial = (load_side(str(folder), "float32", "cpu") for folder in (one / "train" / "policy", models[0]))
    ratios = pair_margins(rows(two / "pairs"), previous, initial).values()
    wanted = [math.log1p(math.exp(-0.1 * 0.5 * ratio)) for ratio in ratios]
    assert losses(two)[0] == pytest.approx(np.mean(wanted), rel=1e-6)
    assert abs(losses(two)[0] - LOG_2) > 1e-4


def test_raft_imitates_the_best_of_each_prompt(models: Any, here: Path) -> None:
    run(write(here, models[0], "out", {"preset": "raft"}, **BY_REWARD))
    for number in (1, 2):
        judged = {group.row.row: group for group in groups(here / "out" / f"round-{number}" / "judged")}
        found = rows(here / "out" / f"round-{number}" / "pairs")
        assert len(found) == len(judged) == 8
        for row in found:
            group = judged[row["provenance"]["row"]]
            best = int(np.argmax(group.rewards()))
            assert row["completion"][0]["content"] == group.answers[best].text
    assert "reference" not in training(here / "out" / "round-2")


def test_self_rewarding_ranks_by_its_own_log_ratio(models: Any, here: Path) -> None:
    given = {"feedback": [{"kind": "implicit", "name": "own", "model": "policy", "reference": "base"}]}
    run(write(here, models[0], "out", {"preset": "self_rewarding", "base": str(models[1])}, **given))
    one, two = here / "out" / "round-1", here / "out" / "round-2"
    base = load_side(str(models[1]), "float32", "cpu")
    for folder, policy in ((one, models[0]), (two, one / "train" / "policy")):
        side = load_side(str(policy), "float32", "cpu")
        for group in groups(folder / "judged"):
            wanted = 0.1 * (summed(side, group) - summed(base, group))
            np.testing.assert_allclose(group.rewards(), wanted, atol=1e-4)
        assert losses(folder)[0] == pytest.approx(LOG_2, abs=1e-6)


@pytest.mark.parametrize("trust", ["avg", "dyn"])
def test_cream_trusts_labels_as_two_iterates_agree(models: Any, here: Path, trust: str) -> None:
    section = {"preset": "cream", "base": str(models[1]), "consistency": trust}
    run(write(here, models[0], "out", section))
    base = load_side(str(models[1]), "float32", "cpu")
    initial = load_side(str(models[0]), "float32", "cpu")
    for number in (1, 2):
        folder = here / "out" / f"round-{number}"
        policy = models[0] if number == 1 else here / "out" / "round-1" / "train" / "policy"
        side, each = load_side(str(policy), "float32", "cpu"), {}
        for group in groups(folder / "judged"):
            before = 0.1 * (summed(initial, group) - summed(base, group))
            if number == 1:
                before = summed(initial, group) / [len(answer) for answer in group.answers]
            ours, theirs = ([answer.rewards[name] for answer in group.answers] for name in ("policy", "before"))
            np.testing.assert_allclose(ours, 0.1 * (summed(side, group) - summed(base, group)), atol=1e-4)
            np.testing.assert_allclose(theirs, before, atol=1e-4)
            each[group.row.row] = (tau_b(ours, theirs) + 1) / 2
        mean = float(np.nanmean(list(each.values())))
        data = rows(folder / "data")
        wanted = [mean if trust == "avg" else each[row["provenance"]["row"]] for row in data]
        assert data and [row["probability"] for row in data] == pytest.approx(wanted, abs=1e-9)
        assert 0 < mean < 1
        assert record(folder)["metrics"]["consistency"] == pytest.approx(mean)
        assert losses(folder)[0] == pytest.approx(LOG_2, abs=1e-6), "at M = 0 whatever C is"
        for row in data:
            assert row["chosen_reward"] > row["rejected_reward"], "the present iterate's ranking, of weight 1, decides"


def test_rounds_that_gain_too_little_are_rolled_back(models: Any, here: Path) -> None:
    said: list[str] = []
    section = {
        "preset": "iterative_dpo",
        "reference": "previous",
        "rounds": 3,
        "evaluation": {"world": "style", "max_prompts": 8, "max_new_tokens": 24},
        "accept": {"metric": "reward", "min_gain": 5.0, "patience": 2},
    }
    file = write(here, models[0], "out", section, **BY_REWARD)
    _, policy = run(file, say=said.append)
    assert policy is None and not (here / "out" / "policy").exists()
    assert sum("rolled back" in line for line in said) == 3 and "2 rounds in a row" in said[-1]
    two = here / "out" / "round-2"
    assert training(two)["model"]["name"] == str(models[0])
    assert record(two)["roles"]["policy"] == str(models[0])
    assert not (here / "out" / "round-3").exists()
    metrics = record(two)["metrics"]
    assert metrics["kl"] is not None and metrics["tokens"] > 1 and metrics["reward"] <= 1
    # The same folder under another rule is refused, and what is decided stays decided.
    with pytest.raises(ConfigError, match=r"loop\.accept\.min_gain"):
        run(file, ["loop.accept.min_gain=-5"])


def test_an_extrapolated_round_moves_on_from_what_was_trained(models: Any, here: Path) -> None:
    section = {"preset": "iterative_dpo", "reference": "previous", "extrapolate": 0.5}
    run(write(here, models[0], "out", section, **BY_REWARD))

    def weights(folder: Path) -> dict[str, Any]:
        return load_file(folder / "model.safetensors")

    hats = [weights(models[0]), *(weights(here / "out" / f"round-{n}" / "train" / "policy") for n in (1, 2))]
    for number in (1, 2):
        made = weights(here / "out" / f"round-{number}" / "policy")
        for name, weight in made.items():
            wanted = hats[number][name] + 0.5 * (hats[number][name] - hats[number - 1][name])
            np.testing.assert_allclose(weight, wanted, atol=1e-6)
    assert training(here / "out" / "round-2")["model"]["name"] == "out/round-1/policy"
    assert losses(here / "out" / "round-2")[0] == pytest.approx(LOG_2, abs=1e-6)


def test_adapters_are_merged_between_rounds(models: Any, here: Path) -> None:
    file = write(here, models[0], "out", {"preset": "iterative_dpo", "reference": "previous"}, **BY_REWARD)
    run(file, ["model.peft={r: 4, lora_alpha: 8}"])
    two = here / "out" / "round-2"
    assert (two / "train" / "policy" / "adapter_config.json").is_file()
    assert (two / "policy" / "model.safetensors").is_file()
    assert training(two)["model"]["name"] == "out/round-1/policy"
    assert losses(two)[0] == pytest.approx(LOG_2, abs=1e-6)


FAULTS = [
    ({"preset": "iterative_dpo"}, {}, "loop.reference"),
    ({"preset": "cream"}, {}, "loop.base"),
    ({"preset": "inpoo"}, {}, "did you mean `inpo`"),
    ({"preset": "sppo", "wrong": 1}, {}, "no option `wrong`"),
    ({"preset": "raft", "reference": "initial"}, BY_REWARD, "loop.reference"),
    ({"preset": "sppo"}, {}, "feedback"),
    ({"preset": "sppo", "accept": {"metric": "reward"}}, BY_WINS, "loop.evaluation"),
    ({"preset": "sppo", "evaluation": {"reward": GOLD}}, BY_WINS, "held-out rows"),
    ({"preset": "dno_prct", "earlier": [1.5]}, BY_REWARD, "loop.earlier"),
    ({"preset": "sppo"}, {**BY_WINS, "rounds": {"count": 2}}, "unknown section `rounds`"),
    ({"preset": "sppo"}, {**BY_WINS, "train": {"output_dir": "x"}}, "train.output_dir"),
    ({"preset": "sppo"}, {**BY_WINS, "method": {"name": "grpo"}}, "grpo"),
    ({"preset": "sppo"}, {**BY_WINS, "sample": {"temperature": -1}}, "temperature"),
]


@pytest.mark.parametrize(("section", "sections", "said"), FAULTS)
def test_faults_of_a_recipe_are_named(here: Path, section: Any, sections: Any, said: str) -> None:
    file = write(here, Path("some-org/some-model"), "out", section, **dict(sections))
    with pytest.raises(AlignError) as caught:
        loop.read(file)
    assert said in str(caught.value)
    assert not (here / "out").exists()


def test_a_preset_lies_below_the_recipe(here: Path) -> None:
    own = {"sample": {"n": 3}, "pairs": {"rule": "random"}, "method": {"name": "ipo", "tau": 0.5}}
    file = write(here, Path("some-org/some-model"), "out", {"preset": "sppo"}, **BY_WINS, **own)
    made = loop.read(file)
    assert (made.collect.sample.n, made.collect.sample.temperature) == (3, LOOPS.get("sppo").sample["temperature"])
    assert made.collect.pairs is not None
    assert (made.collect.pairs.rule, made.collect.pairs.reward) == ("random", "score"), "another rule, other options"
    assert (made.train.method.name, made.train.method.options["tau"]) == ("ipo", 0.5)
    again = here / "again.yaml"
    again.write_text(made.yaml())
    assert loop.read(again) == made, "the recipe that a loop keeps says the same"


def test_a_self_rewarding_policy_judges_with_points(here: Path) -> None:
    made = loop.read(write(here, Path("some-org/some-model"), "out", {"preset": "self_rewarding"}))
    (judge,) = made.collect.feedback
    assert (judge.kind, judge.file, judge.samples, judge.model) == ("judge", "points", 3, None), "no model: the policy"


def test_prompts_that_do_not_suffice_are_counted(models: Any, here: Path) -> None:
    file = write(here, models[0], "out", {"preset": "sppo", "prompts": 20}, **BY_WINS)
    with pytest.raises(AlignError, match="there are 24 rows"):
        run(file)
    shutil.rmtree(here / "out")
