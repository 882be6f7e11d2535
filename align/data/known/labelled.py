"""Data sets that show two answers side by side, and tell the winner by a label."""

from __future__ import annotations

from typing import Any

from align.data.known.base import Choices, Known, by_strength, index, items, need, number, ordered, records, text
from align.data.rows import Row, RowError


def helpsteer2_preference(row: Row, choices: Choices) -> Row:
    split, wanted = row.get("split"), ("train",) if choices.purpose == "train" else ("validation", "val", "test")
    if split is not None and split not in wanted:
        raise RowError("split", f"a row of the split `{split}`", dropped=True)
    return {
        "prompt": extra_id_turns(text(row, "prompt")),
        **by_strength(row, "response_1", "response_2", "preference_strength"),
    }


def extra_id_turns(prompt: str) -> Any:
    """A prompt with `<extra_id_1>User` and `<extra_id_1>Assistant` marks as messages; without them, as it is."""
    if "<extra_id_1>" not in prompt:
        return prompt
    first, *rest = prompt.split("<extra_id_1>")
    messages = [{"role": "user", "content": first.strip()}] if first.strip() else []
    for piece in rest:
        role, _, content = piece.partition("\n")
        name = role.strip().lower()
        if name not in ("user", "assistant"):
            raise RowError("prompt", f"unknown role `{role.strip()[:20]}` after `<extra_id_1>`")
        messages.append({"role": name, "content": content.strip()})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def helpsteer3(row: Row, choices: Choices) -> Row:
    made = {"prompt": need(row, "context"), **by_strength(row, "response1", "response2", "overall_preference")}
    return made | {"meta": {"individual_preference": row.get("individual_preference")}}


def pku(row: Row, choices: Choices) -> Row:
    answers = need(row, "response_0"), need(row, "response_1")
    if choices.axis == "helpful":
        winner = index(row, "better_response_id")
    elif choices.axis == "safer":
        winner = index(row, "safer_response_id")
    else:
        safe = [need(row, f"is_response_{place}_safe") for place in (0, 1)]
        winner = int(bool(safe[1])) if bool(safe[0]) != bool(safe[1]) else index(row, "better_response_id")
    return {"prompt": need(row, "prompt"), **ordered(answers, winner)}


def shp(row: Row, choices: Choices) -> Row:
    winner = 1 - index(row, "labels")
    return {"prompt": need(row, "history"), **ordered((need(row, "human_ref_A"), need(row, "human_ref_B")), winner)}


_WINNERS: dict[str, int | None] = {
    "model_a": 0,
    "model_b": 1,
    "tie": None,
    "both_bad": None,
    "tie (bothbad)": None,
    "tie(bothbad)": None,
}


def arena(row: Row, choices: Choices) -> Row:
    winner = text(row, "winner").strip().lower()
    if winner not in _WINNERS:
        raise RowError("winner", f"unknown winner `{winner[:30]}`")
    talks = [need(row, column) for column in ("conversation_a", "conversation_b")]
    for column, talk in zip(("conversation_a", "conversation_b"), talks, strict=True):
        if any(_pictured(message) for message in records(talk, column)):
            raise RowError(column, "holds an image", dropped=True)
    return {**ordered(talks, _WINNERS[winner]), "meta": {"winner": winner}}


def _pictured(message: Row) -> bool:
    content = message.get("content")
    return isinstance(content, (list, tuple)) and any(
        isinstance(part, dict) and part.get("type", "text") != "text" for part in content
    )


def arena_flags(row: Row, choices: Choices) -> Row:
    flags = [number(row, column) for column in ("winner_model_a", "winner_model_b", "winner_tie")]
    if sorted(flags) != [0, 0, 1]:
        raise RowError("winner_model_a", "the three flags do not name one outcome")
    said = items(need(row, "prompt"), "prompt")
    talks = [_talk(said, items(need(row, column), column), column) for column in ("response_a", "response_b")]
    return ordered(talks, (0, 1, None)[flags.index(1)])


def _talk(said: list[Any], answers: list[Any], column: str) -> list[Row]:
    if len(said) != len(answers):
        raise RowError(column, "of another length than `prompt`")
    messages: list[Row] = []
    for question, answer in zip(said, answers, strict=True):
        if not isinstance(question, str) or not isinstance(answer, str):
            raise RowError(column, "a turn is missing")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def summarize(row: Row, choices: Choices) -> Row:
    info = need(row, "info")
    summaries = records(need(row, "summaries"), "summaries")
    if len(summaries) != 2:
        raise RowError("summaries", f"{len(summaries)} summaries, not two")
    answers = [" " + text(summary, "text").lstrip() for summary in summaries]
    if info.get("post") is not None:
        prompt = f"SUBREDDIT: r/{info.get('subreddit')}\n\nTITLE: {info.get('title')}\n\nPOST: {info['post']}"
    elif info.get("article") is not None:
        prompt = f"Article: {info['article']}"
    else:
        raise RowError("info", "neither `post` nor `article`")
    made = {"prompt": f"{prompt}\n\nTL;DR:", **ordered(answers, index(row, "choice"))}
    return made | {"annotator": str(row.get("worker") or "")}


LABELLED = (
    Known(
        "helpsteer2_preference",
        ("nvidia/HelpSteer2",),
        frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
        helpsteer2_preference,
        "`preference_strength` below 0: `response_1` is better; 0 is a tie; its size is the margin",
        chat=True,
        trap="train and validation lie in one file (`data_dir: preference`), told apart by the column `split`",
        checked="card",
    ),
    Known(
        "helpsteer3",
        ("nvidia/HelpSteer3",),
        frozenset({"context", "response1", "response2", "overall_preference"}),
        helpsteer3,
        "`overall_preference` below 0: `response1` is better; 0 is a tie; its size is the margin",
        chat=True,
        trap="the sign looks the wrong way round",
        checked="card",
    ),
    Known(
        "pku_saferlhf",
        ("PKU-Alignment/PKU-SafeRLHF", "PKU-Alignment/PKU-SafeRLHF-30K", "PKU-Alignment/PKU-SafeRLHF-10K"),
        frozenset({"prompt", "response_0", "response_1", "better_response_id", "safer_response_id"}),
        pku,
        "`axis: helpful` by `better_response_id`, `safer` by `safer_response_id`, `safer_then_better`: the only safe "
        "answer, else the better",
        axes=("helpful", "safer", "safer_then_better"),
        axis_columns={"safer_then_better": "is_response_0_safe"},
        chat=True,
        trap="the two labels disagree, and the better answer may be unsafe: `axis` must be stated",
        checked="card",
    ),
    Known(
        "pku_single",
        ("PKU-Alignment/PKU-SafeRLHF-single-dimension",),
        frozenset({"prompt", "response_0", "response_1", "better_response_id"}),
        pku,
        "`better_response_id`",
        unmistakable=False,
        axes=("helpful",),
        axis="helpful",
        chat=True,
        trap="one label only: it is not the better of the two-label set",
    ),
    Known(
        "shp",
        ("stanfordnlp/SHP", "stanfordnlp/SHP-2"),
        frozenset({"history", "human_ref_A", "human_ref_B", "labels"}),
        shp,
        "`labels` 1: `human_ref_A` is better, 0: `human_ref_B`",
        chat=True,
        filters={"score_ratio": ">= 2"},
        trap="1 is the first answer; the authors keep `score_ratio` of 2 or more: `filters: recommended`",
    ),
    Known(
        "arena",
        ("lmarena-ai/arena-human-preference-140k", "lmsys/chatbot_arena_conversations"),
        frozenset({"conversation_a", "conversation_b", "winner"}),
        arena,
        "`winner`: model_a, model_b; tie and both_bad are ties",
        trap="the dialogues part after the first turn; rows with images are dropped",
        checked="code",
    ),
    Known(
        "arena_flags",
        ("lmarena-ai/arena-human-preference-55k", "lmsys/lmsys-arena-human-preference-55k"),
        frozenset({"prompt", "response_a", "response_b", "winner_model_a", "winner_model_b", "winner_tie"}),
        arena_flags,
        "the flag that is 1: `winner_model_a`, `winner_model_b`, `winner_tie`",
        trap="`prompt` and the answers are lists written as JSON, one entry a turn",
    ),
    Known(
        "summarize_feedback",
        ("openai/summarize_from_feedback",),
        frozenset({"info", "summaries", "choice"}),
        summarize,
        "`choice` 0 or 1 is the place of the winner in `summaries`",
        train=("train",),
        eval=("validation",),
        trap="text to be continued: prompts end in `TL;DR:`, answers start with a blank; `config: comparisons`",
    ),
)
