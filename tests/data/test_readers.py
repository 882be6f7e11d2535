"""Readers: what is recognised and how it is described, whose direction is asked for, and every way a row can be bad."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import DataError
from align.data import transcripts as hh
from align.data.groups import Group, RowId
from align.data.reader import Reader
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.sources import open_source

ROW = RowId("rows.jsonl", 7)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def texts(group: Group) -> list[str]:
    return [completion.text for completion in group.completions]


def read(row: dict[str, Any], **options: Any) -> Group:
    return reader_for([row], **options)(row, ROW)


FORMATS: list[tuple[dict[str, Any], dict[str, Any], str, Any, list[str]]] = [
    (
        {"prompt": "p", "chosen": " a", "rejected": " b", "source": "x"},
        {},
        "read as: pairs, prompt = column `prompt`, winner = column `chosen`; not used: `source`",
        "p",
        [" a", " b"],
    ),
    (
        {"chosen": "The sky is blue today", "rejected": "The sky is bold now"},
        {},
        "read as: pairs, implicit prompt, winner = column `chosen`",
        "The sky is",
        [" blue today", " bold now"],
    ),
    (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {},
        "read as: pairs, implicit prompt, winner = column `chosen`",
        (user("q"),),
        ["a", "b"],
    ),
    (
        {"prompt": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {},
        "read as: pairs, implicit prompt, winner = column `chosen`; not used: `prompt`",
        (user("q"),),
        ["a", "b"],
    ),
    (
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "ref_chosen_logps": -1.0},
        {},
        "read as: pairs, prompt = column `prompt`, winner = column `chosen`; not used: `ref_chosen_logps`",
        (user("q"),),
        ["a", "b"],
    ),
    (
        {"question": "q", "accepted": "a", "rejected": "b"},
        {},
        "read as: pairs, prompt = column `question`, winner = column `accepted`",
        "q",
        ["a", "b"],
    ),
    (
        {
            "chosen": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]),
            "rejected": json.dumps([{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}]),
        },
        {},
        "read as: pairs, implicit prompt, winner = column `chosen`",
        (user("q"),),
        ["a", "b"],
    ),
    (
        {"prompt": "q", "response_j": "a", "response_k": "b"},
        {"winner": "response_j"},
        "read as: pairs, prompt = column `prompt`, winner = column `response_j`",
        "q",
        ["a", "b"],
    ),
    (
        {"prompt": "q", "response_0": "a", "response_1": "b", "better": 1},
        {"winner": {"column": "better", "values": {0: "response_0", 1: "response_1"}}},
        "read as: pairs, prompt = column `prompt`, winner by column `better`",
        "q",
        ["b", "a"],
    ),
    (
        {"task": "q", "good": "a", "bad": "b"},
        {"winner": {"chosen": "good", "rejected": "bad"}, "columns": {"prompt": "task"}},
        "read as: pairs, prompt = column `task`, winner = column `good`",
        "q",
        ["a", "b"],
    ),
    (
        {"prompt": "q", "completion": "a", "label": True},
        {},
        "read as: unpaired, prompt = column `prompt`, completion = column `completion`, label = column `label`",
        "q",
        ["a"],
    ),
    (
        {"prompt": [user("q")], "completion": [assistant("a")], "label": 0},
        {},
        "read as: unpaired, prompt = column `prompt`, completion = column `completion`, label = column `label`",
        (user("q"),),
        ["a"],
    ),
    (
        {"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3.5, 2]},
        {},
        "read as: scored, prompt = column `prompt`, completions = column `responses`, scores = column `scores`",
        "q",
        ["a", "b", "c"],
    ),
    (
        {"prompt": [user("q")], "completions": [[assistant("a")], [assistant("b")]], "ranks": [2, 1]},
        {},
        "read as: scored, prompt = column `prompt`, completions = column `completions`, ranks = column `ranks`",
        (user("q"),),
        ["a", "b"],
    ),
    (
        {"prompt": "q", "completion": "a", "reward": 0.25, "weight": 2},
        {},
        "read as: rated, prompt = column `prompt`, completion = column `completion`, reward = column `reward`, "
        "with `weight`",
        "q",
        ["a"],
    ),
    (
        {"prompt": "q", "completion": "a"},
        {},
        "read as: demonstrations, prompt = column `prompt`, completion = column `completion`",
        "q",
        ["a"],
    ),
    (
        {"question": "q", "answer": "a"},
        {},
        "read as: demonstrations, prompt = column `question`, completion = column `answer`",
        "q",
        ["a"],
    ),
    (
        {"messages": [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r"), assistant("b")]},
        {},
        "read as: messages, messages = column `messages`",
        ({"role": "system", "content": "s"}, user("q")),
        ["arb"],
    ),
    ({"text": "all of it"}, {}, "read as: text, text = column `text`", "", ["all of it"]),
    ({"prompt": "q"}, {}, "read as: prompts, prompt = column `prompt`", "q", []),
]


@pytest.mark.parametrize(("row", "options", "description", "prompt", "answers"), FORMATS)
def test_formats(
    row: dict[str, Any], options: dict[str, Any], description: str, prompt: Any, answers: list[str]
) -> None:
    reader = reader_for([row], **options)
    assert reader.description == description
    group = reader(row, ROW)
    assert (group.prompt, texts(group), group.row) == (prompt, answers, ROW)


def test_feedback_lands_where_it_belongs() -> None:
    pair = read({"prompt": "q", "chosen": "a", "rejected": "b", "probability": 0.7, "margin": 2, "weight": 0.5})
    (preference,) = pair.preferences
    assert (preference.winner, preference.loser) == (0, 1)
    assert (preference.probability, preference.margin, preference.weight, preference.tie) == (0.7, 2.0, 0.5, False)
    (tied,) = read({"prompt": "q", "chosen": "a", "rejected": "b", "tie": True}).preferences
    assert (tied.tie, tied.probability) == (True, 0.5)
    assert [c.label for c in read({"prompt": "q", "completion": "a", "label": False}).completions] == [False]
    assert [c.reward for c in read({"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}).completions] == [1, 2]
    assert [c.rank for c in read({"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}).completions] == [1, 2]
    rated = read({"prompt": "q", "completion": "a", "score": -0.5, "weight": 3, "annotator": "n1"})
    assert (rated.completions[0].reward, rated.completions[0].weight, rated.annotator) == (-0.5, 3.0, "n1")
    tools = read({"prompt": [user("q")], "completion": [assistant("a")], "tools": '[{"name": "f"}]'}).tools
    assert tools == [{"name": "f"}]


@pytest.mark.parametrize(
    ("value", "winner", "loser", "tie"), [("a", "x", "y", False), ("b", "y", "x", False), ("tie", "x", "y", True)]
)
def test_a_label_decides_the_winner(value: str, winner: str, loser: str, tie: bool) -> None:
    row = {"prompt": "q", "answer_a": "x", "answer_b": "y", "label": value}
    rule = {"column": "label", "values": {"a": "answer_a", "b": "answer_b"}, "tie": ["tie"]}
    group = read(row, winner=rule)
    (pair,) = group.preferences
    assert (texts(group)[pair.winner], texts(group)[pair.loser], pair.tie) == (winner, loser, tie)


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"prompt": "q", "response_0": "a", "response_1": "b", "pref": 1}, {}, "no name tells which wins"),
        ({"prompt": "q", "answer_a": "a", "answer_b": "b", "label": 1}, {}, "no name tells which wins"),
        ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "score_A": 1}, {}, "no name tells which wins"),
        ({"prompt": "q", "completion": "a", "label": 4}, {}, "is no yes or no: 4"),
        ({"prompt": "q", "completions": ["a", "b"], "quality": [1, 2]}, {}, "nothing tells which are better"),
        ({"instruction": "q", "input": "x", "output": "a"}, {}, "several columns may be the prompt"),
        ({"foo": "q", "bar": "a"}, {}, "the columns tell no format"),
        ({"prompt": "q", "good": "a", "bad": "b"}, {"winner": "best"}, "the column `best`, which is not there"),
        ({"prompt": "q", "good": "a", "bad": "b"}, {"winner": "good"}, "the losing answer is not plain"),
        ({"prompt": "q", "good": "a", "bad": "b"}, {"winner": {"column": "good"}}, "`winner` is not understood"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"columns": {"promt": "prompt"}}, "did you mean `prompt`"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"columns": {"prompt": "task"}}, "no column `task`"),
    ],
)
def test_what_is_not_guessed_is_asked_for_with_the_columns(
    row: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError) as caught:
        reader_for([row], where="rows.jsonl", **options)
    message = str(caught.value)
    assert words in message
    assert message.startswith("rows.jsonl: ")
    assert all(f"  {name}: {type(value).__name__}" in message for name, value in row.items())


PLAIN = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
WHOLE = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
LABEL = {"prompt": "q", "completion": "a", "label": True}
LIST = {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2]}
RANKS = {"prompt": "q", "completions": ["a", "b"], "ranks": [1, 2]}
TURNS = {"messages": [user("q"), assistant("a")]}
HH = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
CHOICE = {"prompt": "q", "answer_a": "x", "answer_b": "y", "label": "a"}
RULE = {"column": "label", "values": {"a": "answer_a", "b": "answer_b"}}

BAD: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (PLAIN, {"chosen": None}, "`chosen`: missing"),
    (PLAIN, {"prompt": None}, "`prompt`: missing"),
    (PLAIN, {"prompt": "  \n"}, "`prompt`: empty"),
    (PLAIN, {"chosen": ""}, "`chosen`: empty"),
    (PLAIN, {"rejected": " \n\t"}, "`rejected`: empty"),
    (PLAIN, {"chosen": "b"}, "`chosen`: chosen and rejected are identical"),
    (PLAIN, {"chosen": 3}, "`chosen`: not text but int"),
    (PLAIN, {"prompt": {"a": 1}}, "`prompt`: neither text nor messages but dict"),
    (PLAIN, {"chosen": "a\n\nHuman: more\n\nAssistant: b"}, "`chosen`: holds the role mark of a transcript"),
    ({**PLAIN, "probability": 0.5}, {"probability": 1.5}, "`probability`: not between 0 and 1"),
    ({**PLAIN, "margin": 0.5}, {"margin": math.inf}, "`margin`: not a finite number"),
    ({**PLAIN, "margin": 0.5}, {"margin": "big"}, "`margin`: not a number but str"),
    ({**PLAIN, "weight": 1}, {"weight": -1}, "`weight`: negative"),
    ({**PLAIN, "tie": True}, {"tie": "yes"}, "`tie`: neither true nor false"),
    ({"chosen": "same a", "rejected": "same b"}, {"chosen": "x y"}, "`chosen`: chosen and rejected share no prompt"),
    (
        CHAT,
        {"prompt": [user("q"), assistant("a")]},
        "`prompt`: wrong role order: the prompt ends in a turn of the assis",
    ),
    (CHAT, {"prompt": [assistant("a"), user("q")]}, "`prompt`: wrong role order: an assistant turn before any user"),
    (CHAT, {"prompt": []}, "`prompt`: an empty list of messages"),
    (CHAT, {"prompt": [{"content": "q"}]}, "`prompt`: a message without a role"),
    (CHAT, {"prompt": [{"role": "narrator", "content": "q"}]}, "`prompt`: unknown role `narrator`"),
    (CHAT, {"prompt": [{"role": "user"}]}, "`prompt`: a message without content"),
    (CHAT, {"prompt": [user(3)]}, "`prompt`: content is not text but int"),  # type: ignore[arg-type]
    (
        CHAT,
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        "`prompt`: content holds a part that is not text but image",
    ),
    (CHAT, {"chosen": [user("a")]}, "`chosen`: wrong role order: the answer starts with a turn of the user"),
    (CHAT, {"chosen": [assistant("a"), user("q")]}, "`chosen`: wrong role order: the last turn is not the assistant"),
    (CHAT, {"chosen": [assistant("a"), assistant("b")]}, "`chosen`: wrong role order: two assistant turns in a row"),
    (CHAT, {"chosen": [assistant(" ")]}, "`chosen`: empty"),
    (CHAT, {"chosen": [assistant("b")]}, "`chosen`: chosen and rejected are identical"),
    (WHOLE, {"chosen": [user("other"), assistant("a")]}, "`chosen`: chosen and rejected share no prompt"),
    (WHOLE, {"chosen": "text"}, "`chosen`: not a list of messages but str"),
    (LABEL, {"label": 2}, "`label`: neither true nor false"),
    (LABEL, {"label": None}, "`label`: missing"),
    (LIST, {"scores": [1]}, "`scores`: of another length than the completions"),
    (LIST, {"scores": [1, math.nan]}, "`scores`: not a finite number"),
    (LIST, {"scores": [1, "N/A"]}, "`scores`: not a number but str"),
    (LIST, {"scores": 3}, "`scores`: not a list but int"),
    (LIST, {"completions": [], "scores": []}, "`completions`: an empty list"),
    (LIST, {"completions": ["a", ""]}, "`completions`: empty"),
    (RANKS, {"ranks": [0, 1]}, "`ranks`: not a whole number from 1"),
    (TURNS, {"messages": [user("q")]}, "`messages`: no assistant turn"),
    (TURNS, {"messages": [user("q"), assistant("a"), user("r")]}, "`messages`: wrong role order: the last turn"),
    (TURNS, {"messages": [user("q"), assistant("a"), {"role": "system", "content": "s"}]}, "`messages`: wrong role"),
    (TURNS, {"messages": [user("q"), {"role": "tool", "content": "t"}, assistant("a")]}, "`messages`: wrong role ord"),
    (HH, {"chosen": "\n\nHuman: q\n\nAssistant:"}, "`chosen`: empty"),
    (HH, {"chosen": "Human: q\n\nAssistant: a"}, "`chosen`: not a transcript"),
    (HH, {"chosen": "\n\nHuman: r\n\nAssistant: a"}, "`chosen`: chosen and rejected share no prompt"),
    (HH, {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r"}, "`chosen`: the last turn is not the assistant's"),
    (HH, {"chosen": 5}, "`chosen`: not text but int"),
    (CHOICE, {"label": "c"}, "`label`: `winner` says nothing of the value 'c'"),
    (CHOICE, {"label": None}, "`label`: missing"),
    ({"text": "t"}, {"text": " "}, "`text`: empty"),
]


@pytest.mark.parametrize(("row", "change", "words"), BAD, ids=[words for _, _, words in BAD])
def test_bad_rows_are_refused_with_field_and_reason(row: dict[str, Any], change: dict[str, Any], words: str) -> None:
    reader = reader_for([row], RULE if row is CHOICE else None)
    reader(row, ROW)  # sound without the change
    with pytest.raises(RowError) as caught:
        reader({**row, **change}, ROW)
    assert str(caught.value).startswith(words)
    assert not caught.value.dropped


def hh_reader(mode: str = "text") -> Reader:
    return reader_for([HH], transcripts=mode)  # type: ignore[arg-type]


TRANSCRIPTS = [
    (  # the ordinary case: prompt up to and with the last common mark
        "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x",
        "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: y",
        "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:",
        [[(" x", True)], [(" y", True)]],
    ),
    (  # the words of a mark inside a text
        "\n\nHuman: say Human: hi\nAssistant: no\n\nAssistant: x",
        "\n\nHuman: say Human: hi\nAssistant: no\n\nAssistant: y",
        "\n\nHuman: say Human: hi\nAssistant: no\n\nAssistant:",
        [[(" x", True)], [(" y", True)]],
    ),
    (  # apart before the last turn
        "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: z",
        "\n\nHuman: q\n\nAssistant: y",
        "\n\nHuman: q\n\nAssistant:",
        [[(" x", True), ("\n\nHuman: r\n\nAssistant:", False), (" z", True)], [(" y", True)]],
    ),
    (  # apart in a human turn: the prompt ends before the answer that both share
        "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x",
        "\n\nHuman: q\n\nAssistant: a\n\nHuman: s\n\nAssistant: y",
        "\n\nHuman: q\n\nAssistant:",
        [
            [(" a", True), ("\n\nHuman: r\n\nAssistant:", False), (" x", True)],
            [(" a", True), ("\n\nHuman: s\n\nAssistant:", False), (" y", True)],
        ],
    ),
    (  # two assistant turns in a row, of which both share the first: a prompt does not end in an answer
        "\n\nHuman: q\n\nAssistant: a\n\nAssistant: x",
        "\n\nHuman: q\n\nAssistant: a\n\nAssistant: y",
        "\n\nHuman: q\n\nAssistant:",
        [
            [(" a", True), ("\n\nAssistant:", False), (" x", True)],
            [(" a", True), ("\n\nAssistant:", False), (" y", True)],
        ],
    ),
    (  # roles that repeat
        "\n\nHuman: q\n\nHuman: r\n\nAssistant: x\n\nAssistant: z",
        "\n\nHuman: q\n\nHuman: r\n\nAssistant: y",
        "\n\nHuman: q\n\nHuman: r\n\nAssistant:",
        [[(" x", True), ("\n\nAssistant:", False), (" z", True)], [(" y", True)]],
    ),
]


@pytest.mark.parametrize(("chosen", "rejected", "prompt", "segments"), TRANSCRIPTS)
def test_transcripts(chosen: str, rejected: str, prompt: str, segments: Any) -> None:
    group = hh_reader()({"chosen": chosen, "rejected": rejected}, ROW)
    assert group.prompt == prompt
    assert [[(s.text, s.scored) for s in completion.segments] for completion in group.completions] == segments
    assert [prompt + text for text in texts(group)] == [chosen, rejected]


def test_transcripts_as_messages() -> None:
    chosen = "\n\nHuman: q\n\nHuman: r\n\nAssistant: x"
    group = hh_reader("messages")({"chosen": chosen, "rejected": chosen + "y"}, ROW)
    assert group.prompt == (user("q\nr"),)
    assert texts(group) == ["x", "xy"]


def test_later_turns_of_a_conversation_stay_and_only_the_assistant_is_scored() -> None:
    start = [user("q")]
    row = {
        "chosen": [*start, assistant("a"), user("r"), assistant("b")],
        "rejected": [*start, assistant("c"), user("s"), assistant("d")],
    }
    group = read(row)
    assert group.prompt == (user("q"),)
    assert [[(s.role, s.text, s.scored, s.step) for s in c.segments] for c in group.completions] == [
        [("assistant", "a", True, 0), ("user", "r", False, 0), ("assistant", "b", True, 1)],
        [("assistant", "c", True, 0), ("user", "s", False, 0), ("assistant", "d", True, 1)],
    ]


def test_a_continuation_that_holds_marks_is_split_into_turns() -> None:
    row = {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a\n\nHuman: r\n\nAssistant: b", "rejected": " c"}
    segments = read(row).completions[0].segments
    assert [(s.text, s.scored) for s in segments] == [(" a", True), ("\n\nHuman: r\n\nAssistant:", False), (" b", True)]


@pytest.mark.parametrize("mode", ["text", "messages"])
def test_the_whole_hh_file_is_kept_or_counted(mode: str, shared_data: Path) -> None:
    path = shared_data / "hh_harmless_base_test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        originals = [json.loads(line) for line in file]
    source = open_source(path)
    rows = source.read(range(len(source)))
    assert rows == originals
    reader = reader_for(rows[:100], transcripts=mode)  # type: ignore[arg-type,type-var]
    kept, reasons = 0, Counter[str]()
    for index, row in enumerate(rows):
        try:
            group = reader(row, source.row_id(index))  # type: ignore[arg-type]
        except RowError as error:
            reasons[str(error)] += 1
            continue
        kept += 1
        answers = [s.text for c in group.completions for s in c.segments if s.role == "assistant"]
        assert not any(hh.has_mark(text) for text in answers)
        if mode == "text":
            whole = [group.prompt + text for text in texts(group)]  # type: ignore[operator]
            assert whole == [originals[index]["chosen"], originals[index]["rejected"]]
    assert reasons == {"`chosen`: empty": 4}
    assert kept + reasons.total() == len(source) == 2312
