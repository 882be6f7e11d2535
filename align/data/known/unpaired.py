"""Data sets that label single answers, or the steps of one."""

from __future__ import annotations

from typing import Any

from align.data.known.base import Choices, Known, items, need, records, text
from align.data.messages import is_message_list, to_messages
from align.data.rows import Row, RowError


def labelled(row: Row, choices: Choices) -> Row:
    """`completion` may be the whole conversation, with or without a `prompt` beside it."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not is_message_list(completion):
        return {name: row.get(name) for name in ("prompt", "completion", "label")}
    messages = to_messages(completion, "completion")
    if messages[0]["role"] != "assistant" and not is_message_list(prompt):
        prompt, messages = messages[:-1], messages[-1:]
    return {"prompt": prompt, "completion": messages, "label": row.get("label")}


def steps(row: Row, choices: Choices) -> Row:
    parts, marks = items(need(row, "completions"), "completions"), items(need(row, "labels"), "labels")
    return _steps(need(row, "prompt"), parts, marks, "labels")


def _steps(prompt: Any, parts: list[Any], marks: list[Any], column: str) -> Row:
    """One answer; it is right where every step is. The labels of the steps are kept in `meta`."""
    if len(parts) != len(marks) or not parts:
        raise RowError(column, "of another length than the steps")
    if not all(isinstance(part, str) for part in parts) or not all(mark in (0, 1) for mark in marks):
        raise RowError(column, "steps that are no text, or labels that are neither true nor false")
    right = [bool(mark) for mark in marks]
    answer = "\n".join(part.strip("\n") for part in parts)
    meta = {"steps": list(parts), "step_labels": right}
    return {"prompt": prompt, "completion": answer, "label": all(right), "meta": meta}


def math_shepherd(row: Row, choices: Choices) -> Row:
    """`input` marks the end of each step; `label` is the same text with + or - in the marks' places."""
    mark = "\u043a\u0438"
    pieces, marked = text(row, "input").split(mark), text(row, "label")
    parts, marks, place = [], [], 0
    for piece in pieces[:-1]:
        place += len(piece)
        sign = marked[place : place + 1]
        if sign not in ("+", "-"):
            raise RowError("label", "does not follow `input`")
        parts.append(piece)
        marks.append(sign == "+")
        place += 1
    if not parts or "Step 1:" not in parts[0]:
        raise RowError("input", "no steps")
    question, _, first = parts[0].partition("Step 1:")
    parts[0] = f"Step 1:{first}"
    return _steps(question.strip(), [part.strip() for part in parts], marks, "label")


def prm800k(row: Row, choices: Choices) -> Row:
    """The steps that the labellers went on from, up to the first wrong one. Ratings 1 and 0 are right, -1 is wrong."""
    question, label = need(row, "question"), need(row, "label")
    parts, marks = [], []
    for step in records(label.get("steps"), "label"):
        if step.get("human_completion"):
            human = step["human_completion"]
            parts.append(human["text"] if isinstance(human, dict) else human)
            marks.append(True)
            continue
        offered = records(step.get("completions") or [], "label")
        if not offered:
            break
        chosen = step.get("chosen_completion")
        taken = offered[int(chosen) if chosen is not None else 0]
        if taken.get("rating") not in (-1, 0, 1):
            break
        parts.append(text(taken, "text"))
        marks.append(taken["rating"] >= 0)
        if chosen is None:
            break
    return _steps(text(question, "problem"), parts, marks, "label")


def _step_lists(row: Row) -> bool:
    lists = (row.get("completions"), row.get("labels"))
    return all(isinstance(one, (list, tuple)) for one in lists) and all(mark in (0, 1) for mark in row["labels"])


def _marked(row: Row) -> bool:
    return isinstance(row.get("input"), str) and "\u043a\u0438" in row["input"]


def _problem(row: Row) -> bool:
    question, label = row.get("question"), row.get("label")
    return isinstance(question, dict) and "problem" in question and isinstance(label, dict) and "steps" in label


_STEPS = "a label for each step; the answer counts as right where every step is"

UNPAIRED = (
    Known(
        "ultrafeedback_kto",
        ("argilla/ultrafeedback-binarized-preferences-cleaned-kto",),
        frozenset({"prompt", "completion", "label"}),
        labelled,
        "`label` true: desirable",
        unmistakable=False,
        chat=True,
        trap="plain strings, read as a chat",
        checked="code",
    ),
    Known(
        "kto_mix",
        ("argilla/kto-mix-15k", "trl-lib/kto-mix-14k"),
        frozenset({"completion", "label"}),
        labelled,
        "`label` true: desirable",
        unmistakable=False,
        trap="`completion` may hold the whole conversation: the prompt is split off",
    ),
    Known(
        "prm",
        ("trl-lib/prm800k", "trl-lib/math_shepherd"),
        frozenset({"prompt", "completions", "labels"}),
        steps,
        _STEPS,
        fits=_step_lists,
        trap="steps are joined by a newline; their labels are kept in `Group.meta`",
        checked="code",
    ),
    Known(
        "math_shepherd",
        ("peiyi9979/Math-Shepherd",),
        frozenset({"input", "label"}),
        math_shepherd,
        _STEPS,
        fits=_marked,
        trap="steps end in a mark, and `label` repeats the text with + or - in its place",
    ),
    Known(
        "prm800k",
        ("openai/prm800k",),
        frozenset({"question", "label"}),
        prm800k,
        _STEPS,
        fits=_problem,
        trap="several tries a step: the one that was gone on from is taken; a neutral rating is right",
    ),
)
