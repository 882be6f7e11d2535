"""Data sets with a score or a rank for each of several answers."""

from __future__ import annotations

from collections.abc import Mapping
from html.parser import HTMLParser
from statistics import fmean
from typing import Any

from align.data import transcripts as hh
from align.data.known.base import Choices, Known, Named, items, need, number, ordered, records, text
from align.data.known.labelled import extra_id_turns
from align.data.messages import is_message_list, to_messages
from align.data.rows import Row, RowError

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
HELPSTEER_WEIGHTS = {
    "helpfulness": 0.65,
    "correctness": 0.8,
    "coherence": 0.45,
    "complexity": 0.55,
    "verbosity": -0.4,
}
_TOO_FEW = "fewer than two answers with a score"


def ultrafeedback(row: Row, choices: Choices) -> Row:
    answers, scores = [], []
    for completion in records(need(row, "completions"), "completions"):
        score = _ultrafeedback_score(completion, choices.axis)
        if score is not None:
            answers.append(text(completion, "response"))
            scores.append(score)
    if len(answers) < 2:
        raise RowError("completions", _TOO_FEW, dropped=True)
    return {"prompt": need(row, "instruction"), "completions": answers, "scores": scores}


def _ultrafeedback_score(completion: Row, axis: str) -> float | None:
    """The mean of the aspects that were rated (`N/A` is no rating), one aspect, or the faulty overall score."""
    if axis == "overall_score":
        return _rating(completion.get("overall_score"))
    annotations = completion.get("annotations") or {}
    ratings = {aspect: _rating((annotations.get(aspect) or {}).get("Rating")) for aspect in ASPECTS}
    if axis != "fine_grained":
        return ratings[axis]
    rated = [rating for rating in ratings.values() if rating is not None]
    return fmean(rated) if rated else _rating(completion.get("fine-grained_score"))


def _rating(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def on_policy(row: Row, choices: Choices) -> Row:
    """All answers with their scores; `chosen` must be a best one of them."""
    answers = items(need(row, "all_generated_responses"), "all_generated_responses")
    scores = items(need(row, "all_rm_scores"), "all_rm_scores")
    if len(answers) != len(scores) or not answers:
        raise RowError("all_rm_scores", "of another length than `all_generated_responses`")
    scores = [number({"all_rm_scores": score}, "all_rm_scores") for score in scores]
    best = [answer for answer, score in zip(answers, scores, strict=True) if score == max(scores)]
    if row.get("chosen") is not None and _last(row["chosen"]) not in best:
        raise RowError("chosen", "not the answer with the highest of `all_rm_scores`")
    return {"prompt": need(row, "prompt"), "completions": answers, "scores": scores}


def _last(value: Any) -> Any:
    return to_messages(value, "chosen")[-1]["content"] if is_message_list(value) else value


def nectar(row: Row, choices: Choices) -> Row:
    """Seven answers by rank; one that goes on as the human as well is no answer, and is left out."""
    turns = hh.turns_of(text(row, "prompt"), "prompt")
    if turns[-1][0] != "Assistant" or turns[-1][1].strip():
        raise RowError("prompt", "does not end in the assistant's mark")
    answers, ranks = [], []
    for entry in records(need(row, "answers"), "answers"):
        if not hh.has_mark(text(entry, "answer")):
            answers.append(text(entry, "answer").strip())
            ranks.append(number(entry, "rank"))
    if len(answers) < 2:
        raise RowError("answers", "fewer than two answers without a role mark", dropped=True)
    if choices.transcripts == "messages":
        return {"prompt": hh.to_chat(turns[:-1]), "completions": answers, "ranks": ranks}
    return {
        "prompt": hh.prompt_text(turns[:-1]),
        "completions": [f" {answer}" for answer in answers],
        "ranks": ranks,
    }


def stack_exchange(row: Row, choices: Choices) -> Row:
    answers = records(need(row, "answers"), "answers")
    if len(answers) < 2:
        raise RowError("answers", "fewer than two answers", dropped=True)
    return {
        "prompt": plain_text(text(row, "question")),
        "completions": [plain_text(text(answer, "text")) for answer in answers],
        "scores": [number(answer, "pm_score") for answer in answers],
    }


def helpsteer2(row: Row, choices: Choices) -> Row:
    """Two rows, one prompt: see `align.data.grouped`."""
    if "first" not in row or "second" not in row:
        raise RowError("prompt", "the two answers to a prompt lie in two rows, which must be read together")
    first, second = row["first"], row["second"]
    if text(first, "prompt") != text(second, "prompt"):
        raise RowError("prompt", "two rows that belong together have different prompts")
    scores = [_helpsteer_score(one, choices.axis) for one in (first, second)]
    winner = None if scores[0] == scores[1] else int(scores[1] > scores[0])
    return {
        "prompt": extra_id_turns(first["prompt"]),
        **ordered((need(first, "response"), need(second, "response")), winner),
        "margin": abs(scores[0] - scores[1]),
    }


def _helpsteer_score(row: Row, axis: str) -> float:
    if axis != "weighted":
        return number(row, axis)
    return sum(weight * number(row, aspect) for aspect, weight in HELPSTEER_WEIGHTS.items())


def reward_bench_2(row: Row, choices: Choices) -> Row:
    good, bad = items(need(row, "chosen"), "chosen"), items(need(row, "rejected"), "rejected")
    return {
        "prompt": need(row, "prompt"),
        "completions": [*good, *bad],
        "scores": [1.0] * len(good) + [0.0] * len(bad),
    }


class _Plain(HTMLParser):
    """The text of HTML; paragraphs, items and code keep their lines."""

    _BREAKS = frozenset({"p", "pre", "br", "li", "ul", "ol", "div", "blockquote", "h1", "h2", "h3", "h4", "hr", "tr"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.verbatim += tag == "pre"
        if tag == "li":
            self.parts.append("\n- ")
        elif tag in self._BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self._BREAKS and tag != "li":
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.verbatim or data.strip():
            self.parts.append(data if self.verbatim else " ".join(data.split("\n")))


def plain_text(html: str) -> str:
    """The text of HTML, at most one empty line between paragraphs."""
    parser = _Plain()
    parser.feed(html)
    parser.close()
    out: list[str] = []
    for line in "".join(parser.parts).strip().split("\n"):
        if line.strip() or (out and out[-1]):
            out.append(line.rstrip())
    return "\n".join(out)


def _lists(row: Row) -> bool:
    return all(isinstance(row.get(column), (list, tuple)) for column in ("chosen", "rejected"))


def _structures(row: Row) -> bool:
    completions = row.get("completions")
    first = completions[0] if isinstance(completions, (list, tuple)) and completions else completions
    return isinstance(first, Mapping) and "response" in first


_EVALUATION = {"train": "it is a benchmark: a model trained on it cannot be measured with it any more"}

LISTED = (
    Known(
        "ultrafeedback",
        ("openbmb/UltraFeedback",),
        frozenset({"instruction", "completions"}),
        ultrafeedback,
        "scores, higher is better: the mean of the four aspects",
        fits=_structures,
        axes=("fine_grained", *ASPECTS, "overall_score"),
        axis="fine_grained",
        chat=True,
        filters={"source": "!= truthful_qa"},
        trap="`overall_score` of some very bad answers is 10, so the mean of the aspects is used; ratings of `N/A` are "
        "no ratings; answers without any are left out; holds TruthfulQA prompts (`filters: recommended`)",
        checked="code",
    ),
    Known(
        "on_policy_ultrafeedback",
        (
            "princeton-nlp/llama3-ultrafeedback",
            "princeton-nlp/llama3-ultrafeedback-armorm",
            "princeton-nlp/gemma2-ultrafeedback-armorm",
            "princeton-nlp/mistral-instruct-ultrafeedback",
        ),
        frozenset({"prompt", "all_generated_responses", "all_rm_scores", "chosen", "rejected"}),
        on_policy,
        "`all_rm_scores`, higher is better; `chosen` is checked to be a best one",
        unmistakable=False,
        chat=True,
        trap="all answers are there, so lists work too; equal scores are ties",
    ),
    Known(
        "nectar",
        ("berkeley-nest/Nectar",),
        frozenset({"prompt", "answers", "turns", "num_responses", "good_natured"}),
        nectar,
        "`rank` 1 is best",
        trap="prompts are transcripts with a blank at the end, made the same as HH's; answers with a role mark are "
        "left out; pairs by `data.pairs`; its licence forbids competing models",
        checked="card",
    ),
    Known(
        "stack_exchange",
        ("HuggingFaceH4/stack-exchange-preferences",),
        frozenset({"qid", "question", "answers"}),
        stack_exchange,
        "`pm_score`, higher is better",
        chat=True,
        trap="HTML becomes text; equal scores make no pair",
    ),
    Known(
        "helpsteer2",
        ("nvidia/HelpSteer2",),
        frozenset({"prompt", "response", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}),
        helpsteer2,
        "the higher score of two neighbouring rows of one prompt",
        axes=("helpfulness", "correctness", "coherence", "complexity", "verbosity", "weighted"),
        axis="helpfulness",
        chat=True,
        rows_per_prompt=2,
        eval=("validation",),
        trap="two rows are one pair; ties are common; `<extra_id_1>` marks become turns; `axis: weighted` sums all "
        "five with 0.65, 0.8, 0.45, 0.55, -0.4",
        checked="card",
    ),
    Known(
        "reward_bench",
        ("allenai/reward-bench",),
        frozenset({"prompt", "chosen", "rejected", "chosen_model", "rejected_model", "subset"}),
        Named(),
        "winner = column `chosen`",
        chat=True,
        eval=("filtered",),
        refused=_EVALUATION,
        trap="for evaluation only: refused as training data",
    ),
    Known(
        "reward_bench_2",
        ("allenai/reward-bench-2",),
        frozenset({"prompt", "chosen", "rejected", "num_correct", "subset"}),
        reward_bench_2,
        "answers in `chosen` are right, those in `rejected` wrong",
        fits=_lists,
        chat=True,
        eval=("test",),
        refused=_EVALUATION,
        trap="for evaluation only: refused as training data; lists of answers",
    ),
)
