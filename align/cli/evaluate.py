"""`align evaluate`: a policy against the model that it started from, with intervals."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.cli import console

if TYPE_CHECKING:
    from align.evaluate import Estimate, Evaluation, Side

_DESCRIPTION = """Sample from a policy and from the model that it started from, on held-out prompts, and compare.

With a reward: win rate (ties count half), win rate at equal length, mean rewards and their paired difference. With or
without: KL of the policy from the model, lengths, share unfinished, distinct tokens; and where the data hold preference
pairs, how often each model finds the chosen answer likelier. All intervals are 95 %, over prompts.

A reward is a function `f(prompts, completions, completion_ids=None, **columns)` that returns one number per completion,
or None where it has none (counted as missing, never as zero): TRL's signature.

Work is kept in the output folder chunk by chunk: the same command after a kill goes on, and gives the same result.
"""
_EXAMPLES = """examples:
  align evaluate runs/my/policy --against MODEL --data held_out.jsonl --reward my_file:my_reward
  align evaluate runs/lora/policy --data held_out.jsonl           against the adapter's base; no reward
  align evaluate runs/demo/policy --against start --world style --html page.html
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    add = parser.add_argument
    add("policy", metavar="POLICY", help="model folder, adapter folder or hub id")
    add("--against", metavar="MODEL", help="the model to compare with; for an adapter, its base by default")
    add("--base", metavar="MODEL", help="an adapter's base, where it is not where the adapter says")
    add("--data", metavar="FILE", help="held-out rows: prompts, or preference pairs in any form that align reads")
    add("--split", help="which split of the data")
    reward = parser.add_mutually_exclusive_group()
    reward.add_argument("--reward", metavar="MODULE:NAME", help="reward function")
    reward.add_argument("--world", metavar="NAME", help="gold reward of a world; its held-out prompts without --data")
    add("--n", type=int, default=1, help="completions of a prompt by each model (default 1)")
    add("--max-prompts", type=int, default=200, help="distinct prompts, drawn by the seed (default 200)")
    add("--temperature", type=float, default=1.0, help="of both models (default 1: KL is exact for no other)")
    add("--max-new-tokens", type=int, default=256, help="tokens of a completion (default 256)")
    add("--seed", type=int, default=0, help="of prompts and draws (default 0)")
    add("--batch-size", type=int, default=64, help="completions at once (default 64)")
    add("--chunk-size", type=int, default=32, help="prompts of a chunk (default 32)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: float32 on CPU, else bfloat16")
    add("--device", help="cpu, cuda, cuda:1, ...; by default the GPU where there is one")
    add("--output", metavar="DIR", help="folder of results and work; by default one under runs/, named by the command")
    add("--restart", action="store_true", help="throw away work of other settings in the output folder")
    add("--max-bad-fraction", type=float, default=0.01, help="unreadable rows above which to stop (default 0.01)")
    add("--html", metavar="FILE", help="write a page too")
    add("--trust-remote-code", action="store_true", help="run code that the models bring")
    add("--json", action="store_true", help="print for machines")


def run(options: argparse.Namespace) -> int:
    with contextlib.redirect_stdout(sys.stderr):  # libraries that print, and users' reward functions
        evaluation, folder = evaluate(options)
    if options.html:
        write_html(evaluation, Path(options.html))
    if options.json:
        console.print_json(evaluation.to_json() | {"output": str(folder)})
        return 0
    print_result(evaluation)
    print(f"completions, rewards and numbers: {folder}")
    if options.html:
        print(f"page: {options.html}")
    return 0


def evaluate(options: argparse.Namespace) -> tuple[Evaluation, Path]:
    """Load, sample, score; the result and the folder that holds it."""
    from align.core.errors import ConfigError
    from align.evaluate import Settings, evaluate_policy, load_reward, load_side, read_held_out, save_result
    from align.sampling.base import SamplingParams

    name = reward_name(options)
    if options.max_prompts < 1:
        raise ConfigError(f"`--max-prompts` is {options.max_prompts}", mend="use 1 or more")
    sampling = SamplingParams(max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed)
    settings = Settings(n=options.n, sampling=sampling, chunk_size=options.chunk_size)
    data, against = data_of(options), against_of(options)
    reward = load_reward(name) if name else None
    console.set_up_logging(quiet=True)
    sides: list[Side] = [
        load_side(one, options.dtype, options.device, options.batch_size, options.trust_remote_code, options.base)
        for one in (options.policy, against)
    ]
    positions = [side.positions for side in sides if side.positions is not None]
    held_out = read_held_out(
        data,
        sides[0].tokenizer,
        max_prompts=options.max_prompts,
        positions=min(positions, default=None),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        split=options.split,
        max_bad_fraction=options.max_bad_fraction,
    )
    folder = Path(options.output).expanduser() if options.output else default_output(options, against, name)
    total = 2 * options.n * len(held_out.prompts)
    with console.progress(total, "sampling", "completions") as progress:
        evaluation = evaluate_policy(
            sides[0],
            sides[1],
            held_out,
            folder,
            reward=reward,
            settings=settings,
            restart=options.restart,
            progress=progress,
        )
    save_result(evaluation, folder)
    return evaluation, folder


def reward_name(options: argparse.Namespace) -> str:
    """The reward function to use, or nothing."""
    if options.world:
        from align.worlds import WORLDS

        if options.world not in WORLDS.entries():
            raise WORLDS.unknown(options.world, "--world")
        return str(WORLDS.get(options.world)().reward_name)
    return options.reward or ""


def data_of(options: argparse.Namespace) -> Any:
    """The held-out rows: as given, or the world's own prompts."""
    from align.core.errors import ConfigError

    if options.data:
        return options.data
    if not options.world:
        raise ConfigError("there is nothing to evaluate on", mend="name held-out rows with --data FILE")
    from align.worlds import WORLDS

    prompts = WORLDS.get(options.world)().prompts(options.max_prompts, "held_out", options.seed)
    return [{"prompt": [{"role": "user", "content": prompt}]} for prompt in prompts]


def against_of(options: argparse.Namespace) -> str:
    """The model to compare with."""
    from align.core.errors import ConfigError
    from align.evaluate import starting_model

    found = options.against or starting_model(options.policy, options.base)
    if not found:
        raise ConfigError(
            "there is nothing to compare with",
            why=f"`{options.policy}` is a whole model, which does not say what it was trained from",
            mend="name the starting model with --against MODEL",
        )
    return str(found)


def default_output(options: argparse.Namespace, against: str, reward: str) -> Path:
    """The same folder for the same command, so that it goes on where it was stopped."""
    from align.core.hashing import digest

    def place(name: str | None) -> str:
        found = os.path.expanduser(name or "")
        return os.path.abspath(found) if os.path.exists(found) else found

    said = [place(options.policy), place(against), place(options.data), options.split, reward, options.n]
    said += [options.max_prompts, options.temperature, options.max_new_tokens, options.seed]
    return Path("runs") / f"evaluate-{digest(said)[:10]}"


def print_result(evaluation: Evaluation) -> None:
    """The verdict, and a table of all measures."""
    print(f"{verdict(evaluation)[0]}\n")
    cells = [[label, *(_text(one) for one in row)] for label, *row in measures(evaluation)]
    console.print_table(("", "policy", "baseline", "policy - baseline"), cells)
    wins = evaluation.wins
    if wins:
        missing = f", {wins.missing} without a reward" if wins.missing else ""
        print(f"{wins.wins} wins, {wins.losses} losses, {wins.ties} ties{missing}")
    if evaluation.pairs:
        print(_counted(evaluation.pairs.pairs, "held-out pair"))
    for line in (*evaluation.notes, *left_out(evaluation)):
        print(f"note: {line}")


def verdict(evaluation: Evaluation) -> tuple[str, bool | None]:
    """(a sentence, whether it is good news)."""
    prompts, answers = _counted(evaluation.prompts, "held-out prompt"), _counted(evaluation.n, "answer")
    against = f"{prompts}, {answers} each"
    if evaluation.wins is None:
        kl = f"KL {evaluation.kl.k1} nats per completion, " if evaluation.kl else ""
        return f"No reward was given: {kl}{against}.", None
    rate = evaluation.wins.rate
    if rate.n == 0:
        return f"The reward function scored no pair of completions; {against}.", False
    if math.isnan(rate.low):
        return f"The policy wins {rate.value:.1%} against its baseline, on one prompt: no interval.", None
    said = f"The policy wins {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}] against its baseline; {against}."
    good = True if rate.low > 0.5 else False if rate.high < 0.5 else None
    return said, good


def measures(evaluation: Evaluation) -> list[tuple[str, Any, Any, Any]]:
    """Rows (measure, policy, baseline, difference): an `Estimate`, a number, or None."""
    ours, theirs, wins, pairs, kl = (
        evaluation.policy,
        evaluation.baseline,
        evaluation.wins,
        evaluation.pairs,
        evaluation.kl,
    )
    rows: list[tuple[str, Any, Any, Any]] = []
    if wins:
        rows += [
            ("win rate", wins.rate, None, None),
            ("win rate at equal length", wins.length_controlled, None, None),
            (f"reward {evaluation.reward}", ours.reward, theirs.reward, evaluation.reward_difference),
        ]
        if ours.missing or theirs.missing:
            rows.append(("completions without a reward", ours.missing, theirs.missing, None))
    if kl:
        rows += [
            ("KL per completion (k1), nats", kl.k1, None, None),
            ("KL per completion (k3), nats", kl.k3, None, None),
            ("KL per token (k3), nats", kl.k3_per_token, None, None),
        ]
    rows += [
        ("tokens of a completion", ours.tokens, theirs.tokens, None),
        ("share unfinished", ours.unfinished, theirs.unfinished, None),
        ("distinct tokens", ours.distinct_1, theirs.distinct_1, None),
        ("distinct pairs of tokens", ours.distinct_2, theirs.distinct_2, None),
    ]
    if pairs:
        rows += [
            ("pairs: chosen is likelier", pairs.accuracy, pairs.baseline_accuracy, None),
            (
                "pairs: chosen is likelier per token",
                pairs.accuracy_per_token,
                pairs.baseline_accuracy_per_token,
                None,
            ),
            ("pairs: implicit reward prefers chosen", pairs.implicit_accuracy, None, None),
            ("pairs: margin of the log-ratio, nats", pairs.margin, None, None),
        ]
    return rows


def left_out(evaluation: Evaluation) -> list[str]:
    """Rows that were not used, by reason."""
    reasons = evaluation.data.get("reasons", {})
    return [f"{one['count']} rows left out: {reason} ({', '.join(one['rows'])})" for reason, one in reasons.items()]


def write_html(evaluation: Evaluation, path: Path) -> None:
    """A page with the verdict, the table, a dozen prompts with both answers, and the settings."""
    from align.report import Code, Samples, Section, Table, Text, Verdict, write_page

    said, good = verdict(evaluation)
    rows = [[label, *(_cell(one) for one in row)] for label, *row in measures(evaluation)]
    parts: list[Any] = [Verdict(said, good), Table("Measures", ("", "policy", "baseline", "policy - baseline"), rows)]
    notes = [*evaluation.notes, *left_out(evaluation)]
    if notes:
        parts.append(Text("Notes", "\n\n".join(notes)))
    samples = [_sample(example) for example in evaluation.examples]
    settings = json.dumps(dict(evaluation.settings), indent=1)
    sections: list[Any] = [
        Section("Result", parts),
        Section("Answers", [Samples("The same prompts, before and after", samples)]),
        *_token_section(evaluation),
        Section("Settings", [Code("What determines the result", settings, "json")], folded=True),
    ]
    subtitle = f"{evaluation.policy.model} against {evaluation.baseline.model}"
    write_page(path, "Evaluation", sections, subtitle)


def _token_section(evaluation: Evaluation) -> list[Any]:
    """A few held-out pairs token by token, where both models read the same tokens."""
    from align.report import Section, TokenValues

    if not evaluation.tokens:
        return []
    text = (
        "Each token of a few held-out pairs by the log-ratio of the policy to its baseline: blue where the policy "
        "finds it likelier, orange where less likely. The number of an answer is the sum over its tokens: its "
        "implicit reward, where the baseline is the reference, in units of beta."
    )
    return [Section("Tokens", [TokenValues("Held-out pairs, token by token", evaluation.tokens, "nats")], text)]


def _sample(example: Any) -> dict[str, Any]:
    prompt = example["prompt"]
    text = prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    order = (("baseline", "before"), ("policy", "after"))
    scores = {label: example["rewards"][side] for side, label in order if example["rewards"][side] is not None}
    return {"prompt": text, "answers": {label: example["answers"][side] for side, label in order}, "scores": scores}


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + ("" if number == 1 else "s")


def _text(value: Estimate | float | int | None) -> str:
    if value is None:
        return ""
    return str(value) if not isinstance(value, float) else f"{value:.3g}"


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, (int, float)):
        return value
    if math.isnan(value.value):
        return None
    return value.value if math.isnan(value.low) else (value.value, value.low, value.high)
