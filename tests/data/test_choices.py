"""What a user may state about a source: ties, answers that part early, names of columns, labels."""

from __future__ import annotations

from typing import Any

import pytest

from align.core.errors import DataError
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from tests.data.known_rows import assistant, user
from tests.data.test_readers import HH, ROW, read, texts


def test_answers_that_part_early_are_kept_or_dropped_as_stated() -> None:
    early = {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: x", "rejected": HH["rejected"]}
    talk = {
        "chosen": [user("q"), assistant("a"), user("r"), assistant("b")],
        "rejected": [user("q"), assistant("c"), user("s"), assistant("d")],
    }
    for row in (early, talk):
        assert read(row).preferences
        reader = reader_for([row], diverging="drop")
        assert "answers that part early are dropped" in reader.description
        with pytest.raises(RowError, match="part before their last turn") as caught:
            reader(row, ROW)
        assert caught.value.dropped
    tool = [assistant("calls"), {"role": "tool", "content": "t"}, assistant("b")]
    used = {"prompt": [user("q")], "chosen": tool, "rejected": [assistant("c")]}
    assert read(used, diverging="drop").preferences  # one answer that used a tool, and no other turn of the user
    assert read(HH, diverging="drop").preferences


@pytest.mark.parametrize(("ties", "needs", "kept"), [(None, set(), 0), (None, {"ties"}, 1), ("drop", {"ties"}, 0)])
def test_ties_are_dropped_unless_the_method_reads_them(ties: Any, needs: set[str], kept: int, with_bos: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True}
    group = reader_for([row], ties=ties)(row, ROW)
    tokenise = Tokeniser(with_bos, "pairs", needs=needs)
    if kept:
        assert [pair.tie for pair in tokenise(group).preferences] == [True]
    else:
        with pytest.raises(RowError, match="a tie") as caught:
            tokenise(group)
        assert caught.value.dropped


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("chosen", "rejected"),
        ("accepted", "rejected"),
        ("preferred", "dispreferred"),
        ("winner", "loser"),
        ("better_response", "worse_response"),
        ("better", "worse"),
        ("chosen_response", "rejected_response"),
        ("response_j", "response_k"),
        ("positive", "negative"),
        ("preferred", "rejected"),
    ],
)
@pytest.mark.parametrize(
    "prompt", ["prompt", "instruction", "input", "question", "query", "history", "context", "post"]
)
def test_synonyms(prompt: str, chosen: str, rejected: str) -> None:
    row = {rejected: "b", chosen: "a", prompt: "q"}
    group = read(row, format="columns")
    assert (group.prompt, texts(group)) == ("q", ["a", "b"])


def test_two_names_for_the_winner_are_asked_about() -> None:
    row = {"prompt": "q", "accepted": "a", "preferred": "b", "rejected": "c"}
    with pytest.raises(DataError, match=r"several columns may be the chosen answer(.|\n)*columns: {chosen: accepted}"):
        reader_for([row])
    assert texts(read(row, columns={"chosen": "preferred"})) == ["b", "c"]


def test_optional_feedback_may_have_other_names() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "gap": 2, "who": 0}
    reader = reader_for([row], columns={"margin": "gap", "annotator": "who"})
    assert reader(row, ROW).preferences[0].margin == 2.0
    assert reader(row, ROW).annotator == "0"
    with pytest.raises(RowError, match="`gap`: not a number but str"):
        reader({**row, "gap": "big"}, ROW)


@pytest.mark.parametrize(
    ("value", "stated"), [(True, "true"), (True, True), (1, "1"), (1.0, "1"), ("a", "a"), (0.0, 0)]
)
def test_labels_are_matched_as_written_in_yaml(value: Any, stated: Any) -> None:
    row = {"prompt": "q", "x": "a", "y": "b", "label": value}
    rule = {"column": "label", "values": {stated: "y", "else": "x"}}
    assert texts(read(row, winner=rule)) == ["b", "a"]


def test_what_changes_reading_is_in_the_description() -> None:
    said = {
        reader_for([HH], **options).description
        for options in ({}, {"transcripts": "messages"}, {"diverging": "drop"}, {"ties": "drop"})
    }
    assert len(said) == 4
