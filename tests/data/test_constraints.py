"""Prompt contrasts: what the builder promises of every row, and how such rows are read and tokenised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from align.core.errors import ConfigError, DataError
from align.data.constraints import Constraint, as_pairs, candidates, contrasts_of, satisfied, with_contrasts
from align.data.groups import Group, RowId
from align.data.prepare import prepare_data
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from align.testing.tiny import random_pairs, tiny_tokenizer

ROWS = [{name: text.strip() for name, text in row.items()} for row in random_pairs(60, seed=2)]
MADE = list(with_contrasts(ROWS, seed=1))


def stated(row: dict[str, Any], asked: str) -> list[Constraint]:
    """The constraints that a prompt states after the row's own prompt."""
    assert asked.startswith(row["prompt"] + " ")
    rest = asked.removeprefix(row["prompt"])
    found = [one for one in candidates([row["chosen"], row["rejected"]]) if f" {one.text}" in rest]
    assert sum(len(one.text) + 1 for one in found) == len(rest)
    return found


def test_every_intra_contrast_holds_by_check_and_has_equally_many_constraints() -> None:
    answers = {"chosen": 0, "rejected": 0}
    for row in MADE:
        for contrast in row["contrasts"]:
            if contrast["kind"] == "intra":
                y = contrast["completion"]
                answers["chosen" if y == row["chosen"] else "rejected"] += 1
                better, worse = (stated(row, contrast[side]) for side in ("better", "worse"))
                assert satisfied(y, better)
                assert not satisfied(y, worse)
                assert 1 <= len(better) == len(worse) <= 4
    assert answers == {"chosen": 60, "rejected": 60}


def test_every_inter_contrast_strengthens_and_weakens() -> None:
    count = reverse = 0
    for row in MADE:
        for contrast in row["contrasts"]:
            if contrast["kind"] == "inter":
                count += 1
                stronger, weaker = (stated(row, contrast[side]) for side in ("better", "worse"))
                assert all(one.check(row["chosen"]) and not one.check(row["rejected"]) for one in stronger)
                assert all(one.check(row["rejected"]) or not one.check(row["chosen"]) for one in weaker)
                assert len(stronger) == len(weaker)
                reverse += all(one.check(row["rejected"]) and not one.check(row["chosen"]) for one in weaker)
    assert count == 60
    assert reverse > 30


def test_drawn_by_seed_and_texts_not_by_place() -> None:
    again = list(with_contrasts(ROWS[::-1], seed=1))[::-1]
    assert again == MADE
    assert list(with_contrasts(ROWS, seed=2)) != MADE
    assert {len(stated(row, c["better"])) for row in with_contrasts(ROWS, most=1) for c in row["contrasts"]} == {1}


def test_only_plain_texts_and_at_least_one_constraint() -> None:
    with pytest.raises(ConfigError, match="plain texts"):
        list(with_contrasts([{"prompt": [{"role": "user", "content": "p"}], "chosen": "a", "rejected": "b"}]))
    with pytest.raises(ConfigError, match="most"):
        list(with_contrasts(ROWS, most=0))


def test_inter_contrasts_as_plain_pairs() -> None:
    for row in MADE:
        found = list(as_pairs(row))
        (inter,) = (contrast for contrast in row["contrasts"] if contrast["kind"] == "inter")
        assert found[0] == {"prompt": inter["better"], "chosen": row["chosen"], "rejected": row["rejected"]}
        for swapped in found[1:]:
            assert swapped == {"prompt": inter["worse"], "chosen": row["rejected"], "rejected": row["chosen"]}
            assert satisfied(row["rejected"], stated(row, inter["worse"]))
    assert max(len(list(as_pairs(row))) for row in MADE) == 2


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("Write a bulleted list.", "- a\n- b", "a - b"),
        ("Do not use bullet points.", "a", "* a"),
        ("Answer in a single line.", "a b\n", "a\nb"),
        ("Write several paragraphs.", "a\n\nb", "a\nb"),
        ("Include a number in digits.", "7 days", "seven days"),
        ("Do not use digits.", "seven", "7"),
        ("End with a question.", "Why? Is it?", "Why? No."),
        ("Do not use commas.", "a b", "a, b"),
        ("Use at most 3 words.", "one two three", "one two three four"),
        ("Use at least 4 words.", "one two three four", "one two three"),
        ("Use at most 1 sentences.", "One. ", "One. Two!"),
        ('Use the word "three".', "one two Three", "one two"),
        ('Do not use the word "three".', "one two threes", "one two three"),
        ('Begin with "one".', "one two", "two one"),
    ],
)
def test_checks(text: str, yes: str, no: str) -> None:
    (one,) = (one for one in candidates(["one two three", "one. two three, four."]) if one.text == text)
    assert one.check(yes)
    assert not one.check(no)


def tokenised(row: dict[str, Any]) -> Any:
    reader = reader_for([row]).reading({"contrasts"})
    return Tokeniser(tiny_tokenizer(), "pairs", needs={"contrasts"})(reader(row, RowId("a", 0)))


def test_answers_after_several_prompts_are_the_whole_sequences_and_score_the_answer_alone() -> None:
    tokenizer = tiny_tokenizer()
    for row in MADE[:8]:
        made = tokenised(row)
        whole = [[*made.prompt.tolist(), *one.ids.tolist()] for one in made.completions]
        asked = [(row["prompt"], row["chosen"], ""), (row["prompt"], row["rejected"], "")]
        numbers = {"intra": 0, "inter": 0}
        for contrast in row["contrasts"]:
            kind = contrast["kind"]
            answers = [(contrast.get("completion"), 1)]
            if kind == "inter":
                answers = [(row["chosen"], 1), (row["rejected"], -1)]
            for side, way in (("better", 1), ("worse", -1)):
                for answer, sign in answers:
                    role = f"{kind}:{numbers[kind]}:{'+' if sign * way > 0 else '-'}"
                    asked.append((contrast[side], answer, role))
            numbers[kind] += 1
        assert [one.role for one in made.completions] == [role for _, _, role in asked]
        for ids, one, (prompt, answer, _) in zip(whole, made.completions, asked, strict=True):
            plain = Tokeniser(tokenizer, "pairs")
            group = reader_for([ROWS[0]])({"prompt": prompt, "chosen": answer, "rejected": "x"}, RowId("a", 0))
            alone = plain(group)
            assert ids == [*alone.prompt.tolist(), *alone.completions[0].ids.tolist()]
            assert ids[-int(one.mask.sum()) :] == alone.completions[0].ids.tolist()
            assert not one.mask[: -len(alone.completions[0].ids)].any()
        assert [(p.winner, p.loser) for p in made.preferences] == [(0, 1)]


def test_a_method_that_needs_the_column_says_so_and_others_leave_it() -> None:
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", needs={"contrasts"})
    with pytest.raises(DataError, match=r"needs `contrasts`.*no such column"):
        prepare_data([ROWS], tokenise)
    assert len(prepare_data([MADE], tokenise).dataset[0].completions) > 2
    plain = prepare_data([MADE], Tokeniser(tiny_tokenizer(), "pairs"))
    assert len(plain.dataset[0].completions) == 2


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "no list of contrasts"),
        ([{"kind": "outer"}], "`kind`"),
        ([{"kind": "intra", "completion": "a", "better": "p"}], "worse"),
        ([{"kind": "intra", "better": "p", "worse": "q"}], "not text"),
    ],
)
def test_bad_contrasts_are_bad_rows(value: Any, said: str) -> None:
    row = {**ROWS[0], "contrasts": value}
    with pytest.raises(RowError, match=said):
        reader_for([row]).reading({"contrasts"})(row, RowId("a", 0))


def test_nothing_to_draw_from_is_no_contrast() -> None:
    found = contrasts_of("p", "same words here", "same words here", np.random.default_rng(0))
    assert {contrast["kind"] for contrast in found} == {"intra"}


@pytest.mark.parametrize("view", ["pairs", "singles"])
def test_samples_and_baselines_are_read_where_asked_for(view: str) -> None:
    row = {**ROWS[0], "samples": ["one.", ROWS[0]["rejected"]], "baseline": "two."}
    for needs, roles in (
        ({"samples"}, ["sample"] * (2 if view == "pairs" else 1)),
        ({"baseline"}, ["demonstration"]),
        (set(), []),
    ):
        reader = reader_for([row]).reading(needs)
        made = Tokeniser(tiny_tokenizer(), view, needs=needs)(reader(row, RowId("a", 0)))
        assert [one.role for one in made.completions] == ["", "", *roles]
    assert "not used: `samples`, `baseline`" in reader_for([row]).description
    only = {**row, "samples": [ROWS[0]["rejected"]]}
    if view == "singles":
        with pytest.raises(RowError, match="all equal the undesirable"):
            Tokeniser(tiny_tokenizer(), view)(reader_for([only]).reading({"samples"})(only, RowId("a", 0)))


@pytest.mark.parametrize(
    ("value", "said"), [("text", "no list"), ([], "no list"), ([None], "missing"), ([" "], "empty")]
)
def test_bad_samples_are_bad_rows(value: Any, said: str) -> None:
    row = {**ROWS[0], "samples": value}
    with pytest.raises(RowError, match=said):
        reader_for([row]).reading({"samples"})(row, RowId("a", 0))


def test_of_a_scored_list_pairs_are_made_of_the_judged_answers() -> None:
    row = {"prompt": "p", "completions": ["a a", "b b", "c c"], "scores": [1, 3, 2], "samples": ["d d"]}
    reader = reader_for([row]).reading({"samples"})
    group = reader(row, RowId("a", 0))
    assert isinstance(group, Group)
    made = Tokeniser(tiny_tokenizer(), "pairs", needs={"samples"})(group)
    assert [(p.winner, p.loser) for p in made.preferences] == [(1, 0)]
    assert [one.role for one in made.completions] == ["", "", "sample"]
