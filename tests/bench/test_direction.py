"""Claims and their measurement: the metrics against another way to compute them, the verdicts from made-up runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from align.cli.demo_steps import Demo, kinds
from align.core.errors import ConfigError
from align.evaluate import load_side
from align.methods import METHODS
from align.methods.claim import METRICS, START, Claim
from align.recipe import extends, library
from align.scoring.layout import Tree
from align.worlds import WORLDS
from align.worlds.rows import KINDS
from align.worlds.start import Start
from align.worlds.style import Style
from bench import direction
from bench.direction_measure import measure, measured_on
from bench.direction_reports import REPORTS, report
from tests.kinds import ROUNDS, SAMPLES

CLAIMS = {name: METHODS.get(name).claim for name in direction.claiming()}


def test_every_method_claims_something_that_can_be_measured() -> None:
    assert set(METHODS.entries()) - set(CLAIMS) == {*SAMPLES, *ROUNDS}
    for name, claim in CLAIMS.items():
        assert claim is not None, name
        assert claim.world in WORLDS.entries() and claim.metric in METRICS
        assert claim.against == START or claim.against in METHODS.entries()
        assert extends.read(library.find(f"demo/{name}").path).plain()["method"]["name"] == name
        assert set(kinds(name)) | set(kinds(name, "eval")) <= set(KINDS)


def test_claims_are_checked() -> None:
    with pytest.raises(ConfigError, match="no metric `gold`"):
        Claim("gold", "up", "style")
    with pytest.raises(ConfigError, match="up or down"):
        Claim("kl", "less", "style")
    assert Claim("kl", "down", "style").holds(-2.0, -0.1) and not Claim("kl", "down", "style").holds(-2.0, 0.1)
    assert Claim("kl", "up", "style").holds(0.1, 2.0) and not Claim("kl", "up", "style").holds(-0.1, 2.0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("direction")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALIGN_CACHE", str(folder / "cache"))
        start = Start(demonstrations=256, epochs=1, batch=32, layers=1, width=32)
        demo = Demo(Style(), folder, 1, 40, lambda *words: direction._no_bar(*words), print, start)
        folder.mkdir(exist_ok=True)
        made = demo.make()
        output, _ = demo.train("dpo", made, ["train.learning_rate=0.01", "train.save_steps=0.5"])
    return demo, made, measured_on(demo, made, answers=64), output


def test_metrics_are_those_of_the_scoring_engine(small) -> None:
    _, made, held, output = small
    found = measure(output / "policy", made.model, held)
    policy, start = (load_side(str(path), "float32", "cpu") for path in (output / "policy", made.model))

    def sums(side, sequences):
        trees = [
            Tree(np.array(prompt), (np.array(answer),), (np.ones(len(answer), dtype=bool),))
            for prompt, answer in sequences
        ]
        return np.array([rows[0].sum() for rows in side.logp(trees)])

    better, worse = sums(policy, held.better), sums(policy, held.worse)
    margin = better - sums(start, held.better) - worse + sums(start, held.worse)
    assert found["chosen_logp"] == pytest.approx(better.mean(), abs=1e-4)
    assert found["rejected_logp"] == pytest.approx(worse.mean(), abs=1e-4)
    assert found["demo_logp"] == pytest.approx(sums(policy, held.shown).mean(), abs=1e-4)
    assert found["margin"] == pytest.approx(margin.mean(), abs=1e-4) and found["margin"] > 0.01
    assert found["accuracy"] == pytest.approx((margin > 0).mean(), abs=0.02)
    # On the policy's own answers the expectation of log pi is the entropy, and that of the log-ratio the KL.
    from bench.direction_measure import _drawn

    drawn = _drawn(policy, held)
    own, away = sums(policy, drawn), sums(policy, drawn) - sums(start, drawn)
    for name, values in (("entropy", -own), ("kl", away)):
        error = values.std() / len(values) ** 0.5
        assert abs(found[name] - values.mean()) < 4 * error, name
    assert found["length"] == np.mean([len(answer) for _, answer in drawn])


def test_the_start_has_not_moved(small) -> None:
    _, made, held, _ = small
    found = measure(made.model, made.model, held)
    assert (found["kl"], found["margin"], found["accuracy"]) == (0.0, 0.0, 0.5)
    torch.manual_seed(1)
    assert measure(made.model, made.model, held) == found


def test_pairs_are_ordered_by_gold_and_prompts_are_held_out(small) -> None:
    demo, made, held, _ = small
    trained = set(made.answers["train"][0])
    assert not trained & set(held.prompts) and not set(made.answers["held_out"][0]) & set(held.prompts)
    tokenizer = load_side(str(made.model), "float32", "cpu").tokenizer
    for (prompt, better), (_, worse) in zip(held.better, held.worse, strict=True):
        asked = tokenizer.decode(prompt, skip_special_tokens=True)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (better, worse)]
        assert demo.world.reward(asked, texts[0]) > demo.world.reward(asked, texts[1])
        assert better[-1] == worse[-1] == tokenizer.eos_token_id


def test_a_curve_goes_from_the_start_to_the_end(small) -> None:
    _, made, held, output = small
    curve = direction._curve(output, made.model, held, "chosen_logp")
    assert curve["step"][0] == 0 and len(curve["step"]) == 3
    assert curve["values"][0] == measure(made.model, made.model, held)["chosen_logp"]
    assert curve["values"][-1] == pytest.approx(measure(output / "policy", made.model, held)["chosen_logp"], abs=1e-6)


def made_up(tmp_path, gain: float, noise: float) -> None:
    """Runs of all claims and reports in which every first side has `gain` more of everything."""
    for seed in direction.SEEDS:
        lines = []
        for name in direction.claiming():
            for job, more in zip(direction.jobs_of(name), (gain, 0.0), strict=True):
                value = more + noise * (-1) ** seed * (more != 0) + seed
                lines.append({"key": job.key, "metrics": dict.fromkeys(METRICS, value)})
        (tmp_path / f"seed-{seed}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines) + '{"key": "cut'
        )


def test_verdicts_follow_the_paired_differences(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(direction, "TRIED", tmp_path / "none.json")
    made_up(tmp_path, 0.5, 0.1)
    found = direction.collect(tmp_path)
    # dpo stands on both sides of claims, as itself and as what others are compared with: the last line of a key counts.
    entry = found["methods"]["ipo"]
    differences = [0.5 + 0.1 * (-1) ** seed for seed in direction.SEEDS]
    half = 2.776445 * np.std(differences, ddof=1) / 5**0.5
    assert entry["difference"]["value"] == pytest.approx(np.mean(differences))
    assert entry["difference"]["low"] == pytest.approx(np.mean(differences) - half, abs=1e-6)
    for name, claim in CLAIMS.items():
        if claim.against == START and name not in {other.against for other in CLAIMS.values()}:
            assert found["methods"][name]["holds"] is (claim.sign == "up"), name
    assert any("holds" in line for line in direction.lines(found))
    made_up(tmp_path, 0.5, 3.0)
    assert not direction.collect(tmp_path)["methods"]["ipo"]["holds"]
    (tmp_path / "seed-3.jsonl").write_text("")
    assert direction.collect(tmp_path)["methods"] == {}


def test_a_comparison_at_equal_reward() -> None:
    one = REPORTS["diversity: f_dpo"]

    def runs(lift: float) -> dict:
        found = {}
        for more, jobs in ((lift, one.ours), (0.0, one.theirs)):
            for place, job in enumerate(jobs):
                reward = 0.2 + 0.1 * place + (0.05 if more else 0.0)
                found[job.key] = {"gold_reward": reward, "entropy": 30 - 40 * reward + more, "kl": 1.0, "length": 9.0}
        return found

    found = report("diversity: f_dpo", {seed: runs(1.5 + 0.1 * seed) for seed in range(5)})
    assert found["by_seed"] == pytest.approx([1.5 + 0.1 * seed for seed in range(5)])
    assert len(found["runs"]["ours"]) == 3
    assert report("diversity: f_dpo", {0: {}}) is None


def test_a_run_is_kept_and_not_repeated(small, tmp_path, monkeypatch) -> None:
    demo, made, held, _ = small
    seed = direction.Seed(1, tmp_path)
    seed._worlds["style"] = demo, made, held
    job = direction.Job("style", "rdpo", data="soft_dpo")
    first = seed.run(job)
    assert set(first["metrics"]) == set(METRICS)
    recipe = (demo.folder / "style,rdpo,data:soft_dpo" / "recipe.yaml").read_text()
    assert "voted.jsonl" in recipe and "held_out" not in recipe
    monkeypatch.setattr(demo.__class__, "train", lambda *a, **k: pytest.fail("trained again"))
    assert direction.Seed(1, tmp_path).run(job) == first
