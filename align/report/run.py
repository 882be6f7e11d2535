"""A page from what a finished run leaves in its folder."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from align.core.errors import CheckpointError
from align.report.page import write_page
from align.report.rollouts import rollouts_section
from align.report.sections import Cell, Code, Curve, DataReport, Part, Section, Table, TokenValues, Verdict

LOG, RECIPE, PROVENANCE, REJECTED = "log.jsonl", "recipe.yaml", "provenance.json", "rejected.jsonl"
TOKENS = "token_rewards.jsonl"
PAGE = "report.html"
_EVAL = "eval_"
_CURVES: dict[str, tuple[str, str, dict[str, str]]] = {
    "rollout/reward": ("Reward of the policy's answers", "reward", {"rollout/reward": ""}),
    "rollout/kl": ("Distance to the reference", "KL in nats an answer", {"rollout/kl": ""}),
    "rollout/length": ("Length of the answers", "tokens", {"rollout/length": ""}),
    "rollout/entropy": ("Entropy of the sampler", "nats a token", {"rollout/entropy": ""}),
    "loss": ("Loss", "loss", {"loss": ""}),
    "rewards/accuracies": ("Reward accuracy", "share of pairs, chosen above rejected", {"rewards/accuracies": ""}),
    "rewards/margins": ("Reward margin", "implicit reward, chosen minus rejected", {"rewards/margins": ""}),
    "rewards/chosen": ("Rewards", "implicit reward", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
    "log_ratio/chosen": (
        "Log-ratio to the reference",
        "nats per answer",
        {"log_ratio/chosen": "chosen", "log_ratio/rejected": "rejected"},
    ),
    "log_ratio/first_token_margin": (
        "Where the margin comes from",
        "log-ratio, chosen minus rejected, in nats",
        {"log_ratio/first_token_margin": "first token", "log_ratio/later_tokens_margin": "later tokens"},
    ),
    "grad_norm": ("Gradient norm", "norm before clipping", {"grad_norm": ""}),
    "learning_rate": ("Learning rate", "learning rate", {"learning_rate": ""}),
}
"""First metric of a curve -> title, y label, and its metrics with their names in the legend. In the page's order."""
_ROLLOUT = "rollout/"
"""Before the metrics of training's samples, whose evaluations have none: `kl` in training is a method's, by token."""
_NOT_CURVES = {"step", "epoch", "train_runtime", "total_flos", "train_loss"}
_EXAMPLES = 3


def data_page(report: Mapping[str, Any], path: str | Path, title: str = "Data report") -> Path:
    """Write a data report (`align data --json`) as a page.

    Raises:
        AlignError: see `write_page`.
    """
    return write_page(path, title, [DataReport(report)])


def run_page(output_dir: str | Path, path: str | Path | None = None) -> Path:
    """Write the page of a run, by default `report.html` in its folder; one process calls it.

    Raises:
        CheckpointError: the folder has no `log.jsonl`, or the page cannot be written.
        AlignError: see `write_page`.
    """
    folder = Path(output_dir).expanduser()
    sections = run_sections(folder)
    method = _method_and_model(folder)
    return write_page(path or folder / PAGE, "Run " + "/".join(folder.resolve().parts[-2:]), sections, subtitle=method)


def run_sections(output_dir: str | Path) -> list[Section | Part]:
    """The sections of a run's page, for a page of one's own.

    Raises:
        CheckpointError: the folder has no `log.jsonl`.
    """
    folder = Path(output_dir).expanduser()
    log, torn = _lines(folder / LOG)
    steps = [entry for entry in log if "train_runtime" not in entry and "policy_of" not in entry]
    chosen = next((entry for entry in reversed(log) if "policy_of" in entry), None)
    summary = next((entry for entry in reversed(log) if "train_runtime" in entry), None)
    evaluations = [entry for entry in steps if any(key.startswith(_EVAL) for key in entry)]
    curves, more = _curves(steps)
    note = f"{torn} lines of {LOG} could not be read." if torn else ""
    found: list[Section | Part] = [_verdict(steps, evaluations, summary, chosen)]
    if curves or note:
        found.append(Section("Curves", curves, note))
    if evaluations:
        found.append(_evaluation_table(evaluations))
    if (folder / TOKENS).is_file():
        found += _token_rewards(folder / TOKENS, chosen)
    found += rollouts_section(folder)
    rejected = folder / REJECTED
    if rejected.is_file():
        found.append(_rejected(rejected))
    if more:
        found.append(Section("More curves", more, folded=True))
    return [*found, *_records(folder, summary)]


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries of a JSONL file, and how many lines are none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(
            f"`{path.name}` cannot be read",
            where=str(path),
            why=f"{error.strerror}: the folder is not that of a run that has logged",
            mend="name the `train.output_dir` of a run",
        ) from error
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries, len(lines) - len(entries)


def _curves(steps: list[dict[str, Any]]) -> tuple[list[Part], list[Part]]:
    """The curves that matter, and all others."""
    keys = list(dict.fromkeys(key for entry in steps for key in entry))
    names = list(dict.fromkeys(key.removeprefix(_EVAL) for key in keys if key not in _NOT_CURVES))
    first: list[Part] = []
    shown: set[str] = set()
    told: set[str] = set()
    for title, label, metrics in _CURVES.values():
        held_out = {name.removeprefix(_ROLLOUT): legend for name, legend in metrics.items()}
        if held_out.keys() != metrics.keys() and not metrics.keys() & set(keys):
            continue  # not a run that samples
        curve = _curve(title, label, metrics, steps, held_out)
        if curve.series:
            first.append(curve)
            shown |= metrics.keys()
            told |= held_out.keys()
    more: list[Part] = []
    for name in names:
        if name in shown:
            continue
        stem = name.rpartition("/")[0]
        together = [other for other in names if stem and other.rpartition("/")[0] == stem and other not in shown] or [
            name
        ]
        shown |= set(together)
        metrics = {metric: metric.removeprefix(f"{stem}/") if stem else "" for metric in together}
        label = _words(stem or name)
        held_out = {metric: legend for metric, legend in metrics.items() if metric not in told}
        curve = _curve(label[:1].upper() + label[1:], label, metrics, steps, held_out)
        if curve.series:
            more.append(curve)
    return first, more


def _curve(
    title: str,
    label: str,
    metrics: Mapping[str, str],
    steps: Iterable[Mapping[str, Any]],
    held_out: Mapping[str, str],
) -> Curve:
    series: dict[str, list[tuple[int, float]]] = {}
    for prefix, when, named in (("", "training", metrics), (_EVAL, "evaluation", held_out)):
        for metric, legend in named.items():
            key = prefix + metric
            points = _points(steps, key)
            if points:
                series[f"{legend}, {when}" if legend else when] = points
    return Curve(title, "optimiser step", label, series)


def _verdict(
    steps: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    summary: Mapping[str, Any] | None,
    chosen: Mapping[str, Any] | None = None,
) -> Verdict:
    last = steps[-1]["step"] if steps else 0
    end = (
        ""
        if summary
        else f" The run has no end in its log: it was stopped, or goes on. The last logged step is {last}."
    )
    if chosen:
        end += (
            f" The saved policy is that of {chosen['policy_of']}, the best by {chosen['best_metric']} "
            f"({float(chosen['best']):.4g}), which need not be the last."
        )
    losses = _points(evaluations, "eval_loss")
    rewards = _points(steps, "rollout/reward")
    if rewards:
        return _online_verdict(rewards, steps, evaluations, end)
    if not losses:
        trained = _points(steps, "loss")
        text = f"The training loss went {_way(trained)}." if trained else "No loss was logged."
        return Verdict(f"{text} There was no evaluation, so nothing is known of other data.{end}")
    if not math.isfinite(losses[-1][1]):
        return Verdict(f"The loss on evaluation data is not a finite number at step {losses[-1][0]}.{end}", good=False)
    accuracy = _points(evaluations, "eval_rewards/accuracies")
    text = f"On evaluation data the loss went {_way(losses)}"
    text += f", the accuracy {_way(accuracy)}." if accuracy else "."
    good = None if len(losses) == 1 else losses[-1][1] < losses[0][1]
    return Verdict(text + end, good=good)


def _online_verdict(
    rewards: list[tuple[int, float]], steps: list[dict[str, Any]], evaluations: list[dict[str, Any]], end: str
) -> Verdict:
    """Of a run that samples: what its own answers and those to held-out prompts earned, and what they cost."""
    held = _points(evaluations, "eval_reward")
    if held:
        text = f"On held-out prompts the reward of the policy's answers went {_way(held)}"
    else:
        text = f"The reward of the policy's own answers went {_way(rewards)}"
    kl = _points(evaluations, "eval_kl") or _points(steps, "rollout/kl")
    text += f", at {kl[-1][1]:.4g} nats from the reference." if kl else "."
    if not held:
        text += " There was no evaluation, so nothing is known of other prompts."
    shown = held or rewards
    return Verdict(text + end, good=None if len(shown) == 1 else shown[-1][1] > shown[0][1])


def _points(steps: Iterable[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(entry["step"], entry[key]) for entry in steps if _is_number(entry.get(key)) and "step" in entry]


def _way(values: list[tuple[int, float]]) -> str:
    (first_step, first), (last_step, last) = values[0], values[-1]
    if len(values) == 1:
        return f"to {first:.4g} at step {first_step}"
    return f"from {first:.4g} at step {first_step} to {last:.4g} at step {last_step}"


def _evaluation_table(evaluations: list[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(key for entry in evaluations for key in entry if key.startswith(_EVAL)))
    rows: list[list[Cell]] = []
    for name in names:
        values = [entry[name] for entry in evaluations if _is_number(entry.get(name))]
        if values:
            rows.append([name.removeprefix(_EVAL), values[0], values[-1], values[-1] - values[0]])
    first, last = evaluations[0].get("step"), evaluations[-1].get("step")
    columns = ["measure", f"first, step {first}", f"last, step {last}", "change"]
    return Table("Evaluation", columns, rows, "The first evaluation is not the model before training.")


def _token_rewards(path: Path, chosen: Mapping[str, Any] | None) -> list[Section]:
    """The newest line, or that of the step whose policy was saved."""
    entries, torn = _lines(path)
    if chosen:
        entries = [one for one in entries if chosen["policy_of"] == f"checkpoint-{one.get('step')}"]
    if not entries:
        return []
    entry = entries[-1]
    beta = f"{entry['beta']:g}"
    text = (
        f"Step {entry['step']}. Each token by what the method pays it, {beta} times the log-ratio of the policy to the "
        "reference: blue where the policy finds it likelier, orange where less likely. It is an advantage (a "
        "reward and the change of the value), not a value. The number of an answer is the sum over its tokens, its "
        "implicit reward."
    )
    if entry.get("own_reward"):
        text += " The rewards in the curves are another function of the same log-ratios, which this method has."
    if torn:
        text += f" {torn} lines of {TOKENS} could not be read."
    part = TokenValues("Held-out answers, token by token", entry["rows"], "reward")
    return [Section("Token rewards", [part], text)]


def _rejected(path: Path) -> Table:
    entries, torn = _lines(path)
    kinds = [
        (str(entry.get("kind")), f"{entry.get('field') or ''}: {entry.get('reason')}".removeprefix(": "))
        for entry in entries
    ]
    places: dict[tuple[str, str], list[str]] = {}
    for kind, entry in zip(kinds, entries, strict=True):
        file = Path(str(entry.get("file"))).name
        places.setdefault(kind, []).append(
            f"{file}:{entry['line']}" if "line" in entry else f"{file} row {entry.get('row')}"
        )
    rows: list[list[Cell]] = [
        [reason, kind, count, ", ".join(places[kind, reason][:_EXAMPLES])]
        for (kind, reason), count in Counter(kinds).most_common()
    ]
    note = f"{torn} lines of {REJECTED} could not be read." if torn else ""
    return Table("Rows left out", ["reason", "kind", "rows", "for example"], rows, note)


def _records(folder: Path, summary: Mapping[str, Any] | None) -> list[Section]:
    parts: list[Part] = []
    if summary:
        parts.append(
            Table("End of training", ["name", "value"], _facts({k: v for k, v in summary.items() if k != "step"}))
        )
    record = _read(folder / PROVENANCE)
    if record:
        try:
            parts.append(Table("Provenance", ["name", "value"], _facts(json.loads(record))))
        except ValueError:
            parts.append(Code("Provenance", record, "text"))
    recipe = _read(folder / RECIPE)
    found = [Section("Recipe", [Code("Recipe", recipe, "yaml")])] if recipe else []
    return [*found, Section("Record", parts)] if parts else found


def _facts(value: Any, path: tuple[str, ...] = ()) -> list[list[Cell]]:
    """A nested record as (name, value) rows."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _facts(item, (*path, _words(str(key))))]
    if isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return [[", ".join(path), value]]


def _method_and_model(folder: Path) -> str:
    """The line under the title: method and model, where the recipe can be read."""
    import yaml

    try:
        recipe = yaml.safe_load(_read(folder / RECIPE) or "")
        return f"{recipe['method']['name']}, {recipe['model']['name']}"
    except (yaml.YAMLError, KeyError, TypeError):
        return ""


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _words(key: str) -> str:
    return " ".join("KL" if word == "kl" else word for word in key.split("_"))
