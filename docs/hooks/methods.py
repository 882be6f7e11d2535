"""The page of a method, made from its file, and the table that compares all of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache

from mkdocs.exceptions import PluginError

from align.core.clashes import METHOD_CLASHES
from align.core.options import declared
from align.core.registry import METHODS
from align.methods.base import Method
from align.methods.claim import START
from align.recipe import extends, library
from align.trainers.config import default_learning_rate
from docs.hooks import curves, facts, formulas
from docs.hooks.text import code, escape, paper_link, prose, table

VIEWS = {
    "pairs": "a prompt, a chosen and a rejected answer",
    "singles": "a prompt, one answer, and a label or a reward",
    "lists": "a prompt and several answers with scores or ranks",
    "groups": "a prompt and several sampled answers with rewards",
    "demonstrations": "a prompt and the answer to imitate",
}
_NEEDS = {
    "ref_logp": "log-probabilities of the reference",
    "label": "a label per answer: desirable or not",
    "reward": "a scalar reward per answer",
    "scores": "a score or rank per answer",
    "probability": "the probability that the pair's label is right",
    "margin": "how much better the chosen answer is, by scores",
    "ties": "rows whose answers are equally good are kept",
    "value": "a value role, trained beside the policy",
    "token_reward": "a reward for each of the assistant's turns",
    "finished": "whether the answer was cut",
    "step": "the turn of each token",
    "key": "a number of each row, which the trainer gives",
    "mismatched": "another row's answer after the same prompt, made at each step",
    "marked": "the tokens in which a pair's answers differ, found by the trainer",
    "scored_prompts": "with `score_prompt_tokens`: the prompts' own tokens, scored",
    "contrasts": "answers after other prompts, from `align.data.constraints`",
    "baseline": "a demonstration per pair",
    "samples": "samples of a policy for each prompt",
    "role": "who wrote each answer: the policy, the reference or their mixture",
    "anchor.previous": "log-probabilities of the policy that the round began with",
    "anchor.guide": "log-probabilities of a policy trained before, the run's `guide_model`",
    "anchor.better": "log-probabilities of the reference after a prompt that asks for better",
    "anchor.worse": "log-probabilities of the reference after a prompt that asks for worse",
    "kl_ref_policy": "KL(reference ‖ policy) over the vocabulary at each token",
    "cross_entropy": "cross-entropy to the reference over the vocabulary at each token",
    "log_sum_sq": "log of the sum of squared probabilities over the vocabulary at each token",
    "log_max": "the largest log-probability at each token",
    "advantage": "what shaping made of the rewards, at each token of a rollout",
    "old_logp": "log-probabilities of the policy that the step, or the batch of rollouts, began with",
    "sampler_logp": "the sampler's own log-probabilities",
    "logit": "the logit of each token",
    "logsumexp": "the log-sum-exp of the logits at each token",
}
_COUPLING = {
    "unit": "that unit alone",
    "batch": "the whole global batch: [two passes](../step.md#two-passes) where it takes several micro-batches",
}
_SOURCE = re.compile(r"\s*\bSource:\s+(.*?)(?=\n\s*\n|\Z)", re.S)


def page(name: str) -> str:
    """The page of a method: what its file says, what was measured of it, and how to ask for it.

    Raises:
        PluginError: the file has no formula, or says not when to pick the method.
    """
    cls = METHODS.get(name)
    if not cls.formula or not cls.when:
        raise PluginError(f"method `{name}` has no `{'when' if cls.formula else 'formula'}`; write it in its file")
    module = importlib.import_module(cls.__module__)
    title = (module.__doc__ or name).strip().partition("\n")[0].rstrip(".")
    summary, _, body = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    said = [part for part in re.split(r"\n\s*\n", _SOURCE.sub("", body).strip("\n")) if part.strip()]
    written = [part for part in said if part.startswith("    ")]
    told = [part for part in said if not part.startswith("    ")]
    sections = {
        "Formula": [
            formulas.display(cls.formula, f"method `{name}`"),
            "What the letters mean: [notation](index.md#notation), and [options](#options). As in the file:",
            prose("\n\n".join(written)),
        ],
        "When to use it": [escape(cls.when), "[Which method?](../which_method.md) compares."],
        "Needs": [needs(cls)],
        "Options": [
            options_table(cls),
            "Defaults are the paper's where it gives one, unless the meaning says otherwise." if cls.paper else "",
        ],
        "Facts and pitfalls": [prose("\n\n".join(told)), warned(cls)],
        "Source": [source(cls, body)],
        "On the world": [curves.section(name, cls.claim, curves.RESULT)],
        "Recipe to start from": [recipe(name, cls)],
        "Other names": [other_names(name)],
    }
    parts = [f"# {title} (`{name}`)", escape(summary)]
    for heading, texts in sections.items():
        parts += [f"## {heading}", *texts] if any(texts) else []
    return "\n\n".join(filter(None, parts)) + "\n"


def needs(cls: type[Method]) -> str:
    """What the method reads, from where, and what its loss depends on."""
    always = cls().requires()
    lines = [f"* **reads** [{cls.view}](../glossary.md#{cls.view}): {VIEWS[cls.view]}"]
    for need in sorted(cls.needs, key=lambda one: (one not in always, one)):
        by_option = "" if need in always else " (with some options)"
        lines.append(f"* {code(need)}: {_NEEDS[need]}{by_option}")
    lines += [f"* {code(taken)}, where the data have it: {_NEEDS[taken]}" for taken in sorted(cls.takes)]
    lines.append(f"* **a unit's loss depends on** {_COUPLING[cls.coupling]}")
    if cls().initial_state():
        lines.append("* **state** that lasts over steps and is saved with checkpoints")
    return "\n".join(lines)


def options_table(cls: type[Method]) -> str:
    rows = []
    for name, field, limits, hint in declared(cls):
        choices = getattr(hint, "__args__", ()) if "Literal" in str(hint) else ()
        allowed = ", ".join(code(str(choice)) for choice in choices) or limits.describe().replace("<", "&lt;")
        latex = formulas.symbol(cls.id, name)
        shown = formulas.inline(latex, name) if latex and formulas.stands_in(cls.formula, latex) else ""
        rows.append([code(name), shown, code(str(field.default)), allowed, escape(limits.doc)])
    return table(["option", "in the formula", "default", "allowed", "meaning"], rows)


def warned(cls: type[Method]) -> str:
    """The sentences of `cautions`, with an ellipsis for what depends on the values."""
    said = sorted({escape(text.removeprefix(f"{cls.id}: ")) for text in _sentences(cls)})
    return "Warned of when a run starts:\n\n" + "\n".join(f"* {text}" for text in said) if said else ""


def _sentences(cls: type[Method]) -> Iterator[str]:
    if cls.cautions is Method.cautions:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls.cautions)))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and id(node) not in inside and str(node.value).startswith(f"{cls.id}: "):
            yield str(node.value)


def source(cls: type[Method], body: str) -> str:
    named = _SOURCE.search(body)
    text = escape(" ".join(named[1].split())) if named else "No paper."
    return f"{text}\n\n" + (f"Paper: {paper_link(cls.paper)}. " if cls.paper else "") + f"File: {code(_file(cls))}."


def _file(cls: type[Method]) -> str:
    return cls.__module__.replace(".", "/") + ".py"


def recipe(name: str, cls: type[Method]) -> str:
    """The recipe of the demo in full, recipes with published numbers, rates for real models, and the method alone."""
    full, adapter = (f"{default_learning_rate(name, adapter):g}".replace("e-0", "e-") for adapter in (False, True))
    parts = []
    shipped = {one.name: one for one in library.shipped()}
    own = shipped.get(f"demo/{name}")
    if own:
        parts += [f"```sh\n{_demo(name, cls)}\n```", f"runs this recipe, {code(own.name)}, on a tiny model:"]
        parts.append(f"```yaml\n{own.text.strip()}\n```")
    others = [code(one) for one in recipes_by_method().get(name, ()) if not one.startswith("demo/")]
    if others:
        parts.append(f"For real models, with [published numbers](../recipes.md): {', '.join(others)}.")
    parts.append(
        f"A real model needs another learning rate than the demo's. If none is given it is {full} for full fine-tuning "
        f"and {adapter} for an adapter."
    )
    return "\n\n".join([*parts, use(name, cls)])


def _demo(name: str, cls: type[Method]) -> str:
    """The demo on the world of the claim, beside the method that it is compared with."""
    claim = cls.claim
    world = f" --world {claim.world}" if claim is not None and claim.world != "style" else ""
    against = f" {claim.against}" if claim is not None and claim.against != START else ""
    return f"align demo{world} --methods{against} {name}"


@cache
def recipes_by_method() -> dict[str, list[str]]:
    """Method -> the shipped recipes that train by it, with what they extend."""
    found: dict[str, list[str]] = {}
    for one in library.shipped():
        asked = extends.read(one.path).value["method"].value["name"].value
        found.setdefault(asked, []).append(one.name)
    return found


def use(name: str, cls: type[Method]) -> str:
    """A recipe's section and the same in Python, with the first option at its default."""
    first = next(((key, field.default) for key, field, *_ in declared(cls) if isinstance(field.default, float)), None)
    option = f", {first[0]}: {first[1]:g}" if first else ""
    python = f"{first[0]}{'_' if first[0] == 'lambda' else ''}={first[1]:g}" if first else ""
    return (
        f"In a recipe of your own, and in Python:\n\n```yaml\nmethod: {{name: {name}{option}}}\n```\n\n"
        f"```python\nfrom {cls.__module__} import {cls.__name__}\n\nmethod = {cls.__name__}({python})\n```"
    )


def other_names(name: str) -> str:
    clashes = [(theirs, clash) for theirs, clash in METHOD_CLASHES.items() if clash.ours == name]
    rows = [[code(theirs), escape(clash.sentence)] for theirs, clash in clashes]
    return table(["written elsewhere", "here"], rows) if rows else ""


def compared() -> str:
    """One row a method, by what it reads."""
    columns = ["id", "data", "reference", "over tokens", "differences only", "bounded", "coupled", "state"]
    columns += ["needs beside", "own samples", "scale", "paper", "measured"]
    order = list(VIEWS)
    names = sorted(METHODS.entries(), key=lambda name: (order.index(METHODS.entries()[name].view), name))
    return table(columns, [_row(name) for name in names])


def _row(name: str) -> list[str]:
    cls = METHODS.get(name)
    told = facts.facts(cls)
    return [
        f"[`{name}`](../methods/{name}.md)",
        cls.view,
        told.reference,
        told.tokens,
        told.difference,
        told.bounded,
        told.coupled,
        told.state,
        ", ".join(code(need) for need in told.extra) or "–",
        told.samples,
        told.option or "–",
        f"{paper_link(cls.paper).replace('arXiv ', '')} ({_year(cls)})" if cls.paper else "–",
        curves.verdict(name, curves.RESULT),
    ]


def _year(cls: type[Method]) -> str:
    """arXiv numbers begin with year and month."""
    return f"20{cls.paper[:2]}"


def of_view(view: str) -> str:
    entries = {name: entry for name, entry in METHODS.entries().items() if entry.view == view}
    rows = [
        [f"[`{name}`](../methods/{name}.md)", escape(entry.summary), escape(METHODS.get(name).when)]
        for name, entry in entries.items()
    ]
    return table(["id", "", "when"], rows)


def notation() -> str:
    rows = [[formulas.inline(latex, "notation"), escape(words)] for latex, words in formulas.NOTATION.items()]
    return table(["", "stands for"], rows)
