"""What the columns of a data set mean: found by their names and the types of their values, or stated by the user."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from align.core.errors import DataError, suggestion
from align.data.messages import is_message_list, to_messages
from align.data.rows import Row, RowError
from align.data.transcripts import is_transcript

Format = Literal["pairs", "unpaired", "scored", "rated", "demonstrations", "messages", "text", "prompts"]
Winner = str | Mapping[str, Any]

PROMPTS = ("prompt", "instruction", "input", "question", "query", "history", "context", "post")
COMPLETIONS = ("completion", "response", "output", "answer")
CHOSEN = (
    "chosen",
    "accepted",
    "preferred",
    "winner",
    "better_response",
    "better",
    "chosen_response",
    "response_j",
    "positive",
)
REJECTED = (
    "rejected",
    "dispreferred",
    "loser",
    "worse_response",
    "worse",
    "rejected_response",
    "response_k",
    "negative",
)
"""Names that tell which of two wins (j over k is the notation of the field). `response_0`, `response_1` do not."""
LISTS = ("completions", "responses")
PAIR_FEEDBACK = ("probability", "margin")
"""Numbers of a pair that some methods are about: what lacks them is no data for these."""
STEP_REWARDS = ("chosen_step_rewards", "rejected_step_rewards")
ANSWER_REWARDS = ("chosen_reward", "rejected_reward")
"""A number for each answer of a pair, its reward or win rate; the difference is the margin where none is given."""
OPTIONAL = (*PAIR_FEEDBACK, "weight", "tie", "annotator", "tools", *STEP_REWARDS, *ANSWER_REWARDS)
EXTRAS = ("samples", "baseline", "contrasts")
"""Further answers, read where a method asks for them: a list of samples, a demonstration, contrasts of prompts."""
PARTS = (
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "completions",
    "label",
    "reward",
    "scores",
    "ranks",
    "messages",
    "text",
    "system",
    *OPTIONAL,
    *EXTRAS,
)
_HAVE_PROMPTS = ("pairs", "unpaired", "scored", "rated", "demonstrations", "messages", "prompts")
_TWIN = re.compile(r"^(.+?)([_-][a-zA-Z0-9]|[0-9])$")


@dataclass(frozen=True)
class Choice:
    """The winner by a label: its value names the column of the winning answer, or a tie."""

    column: str
    answers: tuple[tuple[Any, str], ...]
    ties: tuple[Any, ...] = ()

    def winner(self, value: Any) -> str | None:
        """The winning column, "" for a tie, None for a value that the rule does not name."""
        if any(_same(value, tie) for tie in self.ties):
            return ""
        return next((answer for label, answer in self.answers if _same(value, label)), None)


@dataclass(frozen=True)
class Layout:
    """A format, and part -> column.

    Attributes:
        transcript: the answers are whole HH transcripts.
        implicit_prompt: the prompt is what both answers begin with.
        unused: columns that nothing reads.
        optional: feedback beside the answers, part -> column.
        system: the column of system texts; None where there is none.
        extras: columns that could be read beside, part of `EXTRAS` -> column.
    """

    format: Format
    columns: Mapping[str, str]
    choice: Choice | None = None
    transcript: bool = False
    implicit_prompt: bool = False
    unused: tuple[str, ...] = ()
    optional: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    extras: Mapping[str, str] = field(default_factory=dict)

    def reading(self, parts: Collection[str]) -> Layout:
        """The layout with the columns of these `EXTRAS` read; without a column for one of them, it stays out."""
        asked = {part: column for part, column in self.extras.items() if part in parts}
        unused = tuple(name for name in self.unused if name not in asked.values())
        return replace(self, optional={**self.optional, **asked}, unused=unused)

    def describe(self) -> str:
        """One line for the log: what was decided, and what is ignored."""
        parts = [f"read as: {self.format}"]
        if self.format == "pairs":
            parts.append("HH transcripts" if self.transcript else "")
            parts.append("implicit prompt" if self.implicit_prompt else f"prompt = column `{self.columns['prompt']}`")
            winner = f"by column `{self.choice.column}`" if self.choice else f"= column `{self.columns['chosen']}`"
            parts.append(f"winner {winner}")
        else:
            parts += [f"{part} = column `{column}`" for part, column in self.columns.items()]
        parts.append(f"system = column `{self.system}`" if self.system else "")
        parts += [f"with `{column}`" for column in self.optional.values()]
        text = ", ".join(part for part in parts if part)
        return text + (f"; not used: {', '.join(f'`{name}`' for name in self.unused)}" if self.unused else "")


def find_layout(
    sample: Sequence[Row], winner: Winner | None = None, columns: Mapping[str, str] | None = None, where: str = ""
) -> Layout:
    """Decide what the columns mean.

    Args:
        sample: rows to look at.
        winner: which answer wins: a column that holds the winning text, `{"chosen": column, "rejected": column}`, or
            `{"column": label, "values": {value: answer column}, "tie": [values]}`.
        columns: part -> column, over what the names tell (`{"prompt": "task"}`).

    Raises:
        DataError: the columns tell no format, or not which answer wins.
    """
    if not sample:
        raise DataError("no row could be read", where=where, mend="look at the file: is it of the kind its name says?")
    finder = _Finder(sample, dict(columns or {}), where)
    layout = finder.by_winner(winner) if winner is not None else finder.by_names()
    used = set(layout.columns.values()) | ({layout.choice.column} if layout.choice else set())
    system = finder.columns.get("system", "system")
    system = system if system in finder.names and system not in used and layout.format in _HAVE_PROMPTS else ""
    optional = {part: finder.columns.get(part, part) for part in OPTIONAL}
    optional = {part: name for part, name in optional.items() if name in finder.names and name not in used}
    left = [name for name in finder.names if name not in used | {system} | set(optional.values())]
    extras = {part: name for part in EXTRAS if (name := finder.columns.get(part, part)) in left}
    return replace(layout, unused=tuple(left), optional=optional, system=system or None, extras=extras)


class _Finder:
    def __init__(self, sample: Sequence[Row], columns: dict[str, str], where: str) -> None:
        self.sample, self.columns, self.where = sample, columns, where
        self.names = list(dict.fromkeys(name for row in sample for name in row))
        unknown = [part for part in columns if part not in PARTS]
        if unknown:
            raise self.error(f"`columns` names the part `{unknown[0]}`", suggestion(unknown[0], PARTS))
        missing = [column for column in columns.values() if column not in self.names]
        if missing:
            raise self.error(f"there is no column `{missing[0]}`", "correct `columns`")

    def by_winner(self, winner: Winner) -> Layout:
        if isinstance(winner, str):
            self.must_have(winner)
            return self.pairs(winner, self.sibling(winner))
        keys = set(winner)
        if keys == {"chosen", "rejected"}:
            self.must_have(winner["chosen"], winner["rejected"])
            return self.pairs(winner["chosen"], winner["rejected"])
        values = winner.get("values")
        if not {"column", "values"} <= keys <= {"column", "values", "tie"} or not isinstance(values, Mapping):
            raise self.error("`winner` is not understood", _WINNER_FORMS)
        answers = list(dict.fromkeys(values.values()))
        self.must_have(winner["column"], *answers)
        if len(answers) != 2:
            raise self.error(f"`winner` names {len(answers)} answer columns, not two", _WINNER_FORMS)
        ties = winner.get("tie", ())
        tied = tuple(ties) if isinstance(ties, (list, tuple)) else (ties,)
        choice = Choice(winner["column"], tuple(values.items()), tied)
        return self.pairs(answers[0], answers[1], choice)

    def by_names(self) -> Layout:
        if found := self.named_winner():
            return self.pairs(*found)
        prompt = self.prompt()
        listed = self.one("completions", LISTS)
        if listed and prompt:
            return self.listed(prompt, listed)
        completion = self.one("completion", COMPLETIONS)
        if prompt and completion:
            return self.single(prompt, completion)
        self.refuse_two_answers()
        for name in ("messages", "conversations"):
            column = self.columns.get("messages", name)
            if column in self.names:
                return Layout("messages", {"messages": column})
        if (text := self.columns.get("text", "text")) in self.names:
            return Layout("text", {"text": text})
        if prompt:
            return Layout("prompts", {"prompt": prompt})
        raise self.error("the columns tell no format that is read", _FORMATS)

    def named_winner(self) -> tuple[str, str] | None:
        """The columns of the winning and the losing answer by their names, or as mapped.

        Raises:
            DataError: several could be either.
        """
        sides = []
        for part, names in (("chosen", CHOSEN), ("rejected", REJECTED)):
            mapped = [self.columns[part]] if part in self.columns else []
            there = [name for name in names if name in self.names]
            sides.append(mapped or [name for name in there if name == names[0] or self.is_answer(name)])
        chosen, rejected = sides
        if not chosen or not rejected:
            return None
        for found, part, names in ((chosen, "chosen", CHOSEN), (rejected, "rejected", REJECTED)):
            if len(found) > 1 and found[0] != names[0]:
                raise self.error(
                    f"several columns may be the {part} answer: " + ", ".join(f"`{name}`" for name in found),
                    f"say which: columns: {{{part}: {found[0]}}}",
                )
        return chosen[0], rejected[0]

    def pairs(self, chosen: str, rejected: str, choice: Choice | None = None) -> Layout:
        values = [row.get(chosen) for row in self.sample]
        transcript = sum(map(is_transcript, values)) * 2 > len(values)
        conversational = sum(map(is_message_list, values)) * 2 > len(values)
        prompt = self.prompt(besides={chosen, rejected})
        starts_with_answer = conversational and self.starts_with_assistant(values)
        implicit = transcript or (conversational and not starts_with_answer) or (prompt is None)
        columns = {"chosen": chosen, "rejected": rejected}
        return Layout(
            "pairs", columns if implicit else {"prompt": str(prompt), **columns}, choice, transcript, implicit
        )

    def starts_with_assistant(self, values: Sequence[Any]) -> bool:
        for value in values:
            try:
                return bool(to_messages(value, "")[0]["role"] == "assistant")
            except RowError:
                continue
        return False

    def listed(self, prompt: str, completions: str) -> Layout:
        parts = {"prompt": prompt, "completions": completions}
        for part in ("scores", "ranks"):
            column = self.columns.get(part, part)
            if column in self.names:
                return Layout("scored", {**parts, part: column})
        raise self.error(
            f"column `{completions}` holds lists of answers, and nothing tells which are better",
            "add a column `scores` (higher is better) or `ranks` (1 is best), or name it: columns: {scores: COLUMN}",
        )

    def single(self, prompt: str, completion: str) -> Layout:
        parts = {"prompt": prompt, "completion": completion}
        if label := self.one("label", ("label", "kto_tag", "thumbs")):
            values = {row[label] for row in self.sample if isinstance(row.get(label), (bool, int, float, str))}
            if not values <= {True, False}:
                shown = ", ".join(sorted(map(repr, values))[:6])
                raise self.error(
                    f"column `{label}` is no yes or no: {shown}",
                    "make it true (desirable) or false, or rename a numeric rating to `reward` (higher is better)",
                )
            return Layout("unpaired", {**parts, "label": label})
        for part in ("reward", "score"):
            column = self.columns.get("reward", part)
            if column in self.names:
                return Layout("rated", {**parts, "reward": column})
        return Layout("demonstrations", parts)

    def prompt(self, besides: Collection[str] = ()) -> str | None:
        return self.one("prompt", PROMPTS, besides)

    def one(self, part: str, names: Sequence[str], besides: Collection[str] = ()) -> str | None:
        """The column of a part: stated, of the part's own name, or the only synonym there is."""
        if part in self.columns:
            return self.columns[part]
        found = [name for name in names if name in self.names and name not in besides]
        if not found or found[0] == names[0] or len(found) == 1:
            return found[0] if found else None
        raise self.error(
            f"several columns may be the {part}: " + ", ".join(f"`{name}`" for name in found),
            f"say which: columns: {{{part}: {found[0]}}}",
        )

    def refuse_two_answers(self) -> None:
        """Two answers side by side, and no name that tells which wins."""
        answers = [name for name in self.names if self.sibling_of(name) and self.is_answer(name)]
        if len(answers) >= 2:
            raise self.error(
                "there are several answers ("
                + ", ".join(f"`{name}`" for name in answers)
                + ") and no name tells which wins",
                _WINNER_FORMS,
            )

    def is_answer(self, name: str) -> bool:
        values = [row.get(name) for row in self.sample[:20]]
        return any(isinstance(value, (str, list)) for value in values)

    def sibling_of(self, name: str) -> str | None:
        match = _TWIN.match(name)
        if not match:
            return None
        near = [
            other
            for other in self.names
            if other != name
            and (twin := _TWIN.match(other))
            and twin.group(1) == match.group(1)
            and len(other) == len(name)
        ]
        return near[0] if len(near) == 1 else None

    def sibling(self, winner: str) -> str:
        named = [name for name in REJECTED if name in self.names] if winner in CHOSEN else []
        loser = named[0] if len(named) == 1 else self.sibling_of(winner)
        if loser is None:
            raise self.error(
                f"`winner` is column `{winner}`, and the losing answer is not plain",
                f"winner: {{chosen: {winner}, rejected: COLUMN}}",
            )
        return loser

    def must_have(self, *names: Any) -> None:
        for name in names:
            if name not in self.names:
                raise self.error(f"`winner` names the column `{name}`, which is not there", _WINNER_FORMS)

    def error(self, what: str, mend: str) -> DataError:
        row = max(self.sample, key=len)
        shown = [f"  {name}: {_short(row.get(name))}" for name in self.names]
        return DataError(what, where=self.where, why="the columns are\n" + "\n".join(shown), mend=mend)


_WINNER_FORMS = (
    "state it: winner: COLUMN (the column of the winning answer), winner: {chosen: COLUMN, rejected: COLUMN}, or "
    "winner: {column: LABEL, values: {VALUE: ANSWER COLUMN, VALUE: ANSWER COLUMN}, tie: [VALUE]}"
)
_FORMATS = (
    "rename the columns, or map them with `columns:`; read are chosen/rejected (with or without prompt), "
    "prompt/completion/label, prompt/completion/reward, prompt/completions/scores or ranks, prompt/completion, "
    "messages, text, prompt"
)


def _same(value: Any, label: Any) -> bool:
    """Equal as values or as written: a recipe's keys are text (`true`, `1`), a row's values may be no text."""
    if value == label or str(value) == str(label):
        return True
    if isinstance(value, bool):
        return str(value).lower() == str(label).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value)) == str(label)
    return False


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
