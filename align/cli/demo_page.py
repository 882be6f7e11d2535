"""The demo's table, and the page that shows the same with curves and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.cli.demo_steps import Made, Outcome
from align.report import Code, Curve, DataReport, Part, Samples, Section, Table, Text, Verdict, write_page

COLUMNS = ("method", "gold reward", "difference", "win rate", "KL", "length", "seconds", "pairs/s")
_CURVES = (
    ("Held-out accuracy", "share of held-out pairs", "eval_rewards/accuracies"),
    ("Held-out margin", "difference of implicit rewards", "eval_rewards/margins"),
    ("Training loss", "loss", "loss"),
)


def measures(outcome: Outcome) -> dict[str, Any]:
    """A row of the table, as plain numbers; intervals are `{value, low, high, n}`."""
    found = outcome.evaluation
    if found.policy.reward is None or found.baseline.reward is None or found.wins is None or found.kl is None:
        raise RuntimeError("an evaluation of the demo has a reward and shares its tokens")
    return {
        "method": outcome.method,
        "reward_before": asdict(found.baseline.reward),
        "reward_after": asdict(found.policy.reward),
        "difference": asdict(found.reward_difference or found.policy.reward),
        "win_rate": asdict(found.wins.rate),
        "kl": asdict(found.kl.k1),
        "length_before": found.baseline.tokens.value,
        "length_after": found.policy.tokens.value,
        "seconds": outcome.seconds,
        "pairs_per_second": outcome.pairs_per_second,
        "folder": str(outcome.folder),
    }


def above(row: Mapping[str, Any]) -> bool:
    """Whether the interval of the reward's difference lies above zero."""
    return bool(row["difference"]["low"] > 0)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table as text."""
    return [
        row["method"],
        f"{row['reward_before']['value']:.2f} → {row['reward_after']['value']:.2f}",
        f"{row['difference']['value']:+.2f} [{row['difference']['low']:+.2f}, {row['difference']['high']:+.2f}]",
        f"{row['win_rate']['value']:.0%} [{row['win_rate']['low']:.0%}, {row['win_rate']['high']:.0%}]",
        f"{row['kl']['value']:.1f}",
        f"{row['length_before']:.1f} → {row['length_after']:.1f}",
        f"{row['seconds']:.0f}",
        f"{row['pairs_per_second']:.0f}",
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """What the table says, in a sentence."""
    better = [row["method"] for row in rows if above(row)]
    rest = [row["method"] for row in rows if not above(row)]
    if not rest:
        return Verdict(f"Every method ({', '.join(better)}) ends above the starting model in gold reward.", True)
    text = f"Not shown to be above the starting model in gold reward: {', '.join(rest)}."
    return Verdict(f"{text} With noisy labels, or few prompts, that may be the truth and no fault.", None)


def write(
    folder: Path, made: Made, outcomes: Sequence[Outcome], rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> Path:
    """Write `report.html` in the demo's folder; `report` is the data report of the pairs."""
    table = Table(
        "Before and after",
        COLUMNS,
        [cells(row) for row in rows],
        note="Held-out prompts, one answer each at temperature 1; intervals of 95 %. The win rate compares gold "
        "rewards, a tie counting half. KL is in nats an answer, estimated on the policy's own answers. Length is in "
        "tokens. Each method has its own learning rate: a row says what these settings do, not which method is best.",
    )
    sections: list[Section | DataReport | Part] = [
        verdict(rows),
        Text("What was done", _story(made, rows)),
        table,
        Section("Curves", [curve for curve in (_curve(*words, outcomes) for words in _CURVES) if curve.series]),
        _samples(outcomes),
        DataReport(report, "The preference pairs"),
        Section("Recipes", [_recipe(outcome) for outcome in outcomes], folded=True),
    ]
    return write_page(folder / "report.html", "align demo", sections, subtitle=str(folder))


def _story(made: Made, rows: Sequence[Mapping[str, Any]]) -> str:
    return (
        "A language model was trained from nothing on made-up demonstrations, written unevenly on purpose. The gold "
        "reward is at most 1: it pays for what was asked, said in the asked tone, and takes off for length and broken "
        "sentences. The model answered "
        f"prompts, the gold reward chose between its answers ({made.counts['pairs']} pairs, {made.counts['ties']} "
        f"ties left out, {made.counts['flipped']} labels against the gold reward), and {len(rows)} methods trained on "
        "these pairs, each from the same starting model. No method saw the gold reward itself."
    )


def _curve(title: str, label: str, metric: str, outcomes: Sequence[Outcome]) -> Curve:
    series = {
        outcome.method: [(entry["step"], entry[metric]) for entry in outcome.log if metric in entry]
        for outcome in outcomes
    }
    note = ""
    if metric.startswith("eval_rewards"):
        note = (
            "By implicit rewards, on pairs that the starting model wrote; the scale is each method's own, and methods "
            "that read answers one by one (kto) have none. What the models write is measured in the table alone."
        )
    return Curve(title, "step", label, {name: points for name, points in series.items() if points}, note)


def _samples(outcomes: Sequence[Outcome]) -> Samples:
    samples = []
    for place, first in enumerate(outcomes[0].evaluation.examples):
        answers, scores = {"before": first["answers"]["baseline"].strip()}, {"before": first["rewards"]["baseline"]}
        for outcome in outcomes:
            example = outcome.evaluation.examples[place]
            answers[outcome.method] = example["answers"]["policy"].strip()
            scores[outcome.method] = example["rewards"]["policy"]
        samples.append({"prompt": first["prompt"][-1]["content"], "answers": answers, "scores": scores})
    return Samples("A dozen prompts, before and after", samples, note="The number beside an answer is its gold reward.")


def _recipe(outcome: Outcome) -> Code:
    return Code(outcome.method, (outcome.folder / "recipe.yaml").read_text(encoding="utf-8"), "yaml")
