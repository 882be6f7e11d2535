"""Every known data set: which answer wins, the prompt, margin and ties, how it is recognised, what is refused."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from align.core.errors import DataError
from align.data.groups import Group, RowId
from align.data.known import KNOWN, find, hub_id
from align.data.known.table import markdown
from align.data.prepare import SourceSpec, open_sources, prepare_data
from align.data.readers import reader_for
from align.data.rejected import RejectedLog
from align.data.rows import RowError
from align.data.stream import Hole
from align.data.tokenise import Tokeniser
from align.data.views import select
from tests.data.known_rows import (
    CHAT,
    EVALUATION,
    H4,
    HELPSTEER_LOW,
    HELPSTEER_ROW,
    HS2_PREFERENCE,
    LISTS,
    NECTAR,
    ON_POLICY,
    PAIRS,
    PKU_ROW,
    SHP,
    STACK,
    ULTRAFEEDBACK,
    Case,
    assistant,
    user,
    whole,
)
from tests.data.known_singles import UNPAIRED

ROW = RowId("rows", 0)
BY_NAME = {known.name: known for known in KNOWN}


def options_of(case: Case) -> dict[str, Any]:
    return {} if case.by_columns else {"format": case.name}


def read(case: Case, row: dict[str, Any]) -> Group:
    before = copy.deepcopy(row)
    # the two rows of HelpSteer2 come joined from their source: see `test_two_rows_are_one_pair`
    options = {"known": BY_NAME[case.name]} if case.name == "helpsteer2" else options_of(case)
    reader = reader_for([row], **{**options, **case.options})
    assert f"`{case.name}`" in reader.description
    group = pickle.loads(pickle.dumps(reader))(row, ROW)  # noqa: S301 - readers travel to loader workers
    assert row == before  # a reader does not change what it reads
    return group


def as_text(group: Group, place: int) -> str:
    return group.completions[place].text


@pytest.mark.parametrize("case", [*PAIRS, *EVALUATION], ids=lambda case: case.name)
def test_pairs(case: Case) -> None:
    group = read(case, case.row)
    (pair,) = group.preferences
    assert (as_text(group, pair.winner), as_text(group, pair.loser)) == (case.winner, case.loser)
    assert group.prompt == case.prompt
    assert pair.margin == case.margin
    assert not pair.tie
    if case.tie is not None:
        tied = read(case, case.tie)
        assert [one.tie for one in tied.preferences] == [True]
        with pytest.raises(RowError, match="a tie") as caught:
            select(tied, "pairs", "best_worst", ties=False, reward=False)
        assert caught.value.dropped


@pytest.mark.parametrize("case", LISTS, ids=lambda case: case.name)
def test_lists(case: Case) -> None:
    group = read(case, case.row)
    chosen = select(group, "pairs", "best_worst", ties=False, reward=False)
    (pair,) = chosen.preferences
    texts = [completion.text for completion in chosen.completions]
    assert (texts[pair.winner], texts[pair.loser]) == (case.winner, case.loser) or (
        case.name == "reward_bench_2" and texts[pair.winner] == case.winner
    )
    assert group.prompt == case.prompt
    assert len(select(group, "lists", "all", ties=False, reward=False).completions) == len(group.completions)


@pytest.mark.parametrize(("case", "label"), UNPAIRED, ids=lambda value: getattr(value, "name", str(value)))
def test_single_answers(case: Case, label: bool) -> None:
    options = {} if BY_NAME[case.name].unmistakable else {"format": case.name}
    group = reader_for([case.row], **options)(case.row, ROW)
    (answer,) = group.completions
    assert (answer.text, answer.label, group.prompt) == (case.winner, label, case.prompt)


def test_every_data_set_of_the_table_has_a_row() -> None:
    tried = {case.name for case in (*PAIRS, *LISTS, *EVALUATION)} | {case.name for case, _ in UNPAIRED}
    assert tried == set(BY_NAME) - {"hh_red_team"}
    assert len(BY_NAME) == len(KNOWN)


def test_the_page_shows_the_table(root: Path) -> None:
    assert markdown() in (root / "docs" / "data_sets.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", [*PAIRS, *LISTS], ids=lambda case: case.name)
def test_recognised_by_hub_id_local_copy_columns_or_name(case: Case) -> None:
    known = BY_NAME[case.name]
    if case.name == "helpsteer2" or case.name.startswith("reward_bench"):
        return
    for hub in known.hub[:1] if not case.hub else (case.hub,):
        owner, name = hub.split("/")
        for written in (hub, hub.upper(), f"/data/{hub}", f"/c/datasets--{owner}--{name}/snapshots/0"):
            assert find(written, [case.row]) is known
        assert find("elsewhere", [case.row], stated=hub) is known
    assert (find("elsewhere.jsonl", [case.row]) is known) == case.by_columns
    assert find(known.hub[0], [case.row], stated="columns") is None
    with pytest.raises(DataError, match=r"the rows are not those of(.|\n)*there are `foo`"):
        find(known.hub[0], [{"foo": 1}])
    assert hub_id("my/data") is None


@pytest.mark.parametrize("case", [*PAIRS, *LISTS], ids=lambda case: case.name)
def test_the_same_through_parquet(case: Case, tmp_path: Path) -> None:
    """Arrow gives every object the keys of all, with None where one had none."""
    if case.name == "helpsteer2":
        return
    folder = tmp_path / "set"
    folder.mkdir()
    Dataset.from_list([case.row]).to_parquet(str(folder / "rows.parquet"))
    options = {**options_of(case), **case.options}
    purpose = options.pop("purpose", "train")
    (opened,) = open_sources([SourceSpec(folder, **options)], purpose=purpose)
    (row,) = opened.source.read([0])
    stored, direct = opened.reader(row, ROW), read(case, case.row)  # type: ignore[arg-type]
    assert (stored.prompt, stored.completions, stored.preferences) == (
        direct.prompt,
        direct.completions,
        direct.preferences,
    )


# --- what stands in more than a row's columns


def test_two_rows_are_one_pair(with_bos: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    tied = [{**HELPSTEER_ROW, "prompt": "r", "response": text} for text in "xy"]
    rows = [HELPSTEER_LOW, HELPSTEER_ROW, *tied, {**HELPSTEER_ROW, "prompt": "lonely"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    log = RejectedLog(tmp_path / "rejected.jsonl", 0.5)
    data = prepare_data([path], Tokeniser(with_bos, "pairs"), rejected=log)
    assert (len(data), data.report["kept"], data.report["bad"], data.report["dropped"]) == (3, 1, 1, 1)
    assert data.report["reasons"] == {
        "a tie": {"count": 1, "rows": [f"{path}:3"]},
        "the last row has no partner": {"count": 1, "rows": [f"{path}:5"]},
    }
    (opened,) = open_sources([{"name": path, "axis": "verbosity"}])
    assert len(opened.source) == 3
    assert opened.source.read([0]) == [{"first": HELPSTEER_LOW, "second": HELPSTEER_ROW}]
    mixed = [HELPSTEER_ROW, {**HELPSTEER_ROW, "prompt": "another"}] * 2
    with pytest.raises(DataError, match="two rows that belong together have different prompts"):
        prepare_data([mixed], Tokeniser(with_bos, "pairs"))


def test_weighted_helpsteer_scores() -> None:
    low = {**HELPSTEER_ROW, "response": "low", "helpfulness": 3, "correctness": 2, "verbosity": 4}
    row = {"first": low, "second": HELPSTEER_ROW}
    known = BY_NAME["helpsteer2"]
    group = reader_for([row], known=known, axis="weighted")(row, ROW)
    (pair,) = group.preferences
    assert as_text(group, pair.winner) == "good"
    assert pair.margin == pytest.approx(0.65 * 1 + 0.8 * 2 + 0.4 * 3)


def test_the_official_split_is_never_mixed_in(with_bos: Any) -> None:
    held_out = {**HS2_PREFERENCE, "split": "validation"}
    rows = [HS2_PREFERENCE, held_out, {**held_out, "response_1": "other"}]
    for purpose, kept in (("train", [0]), ("eval", [1, 2])):
        data = prepare_data([rows], Tokeniser(with_bos, "pairs"), purpose=purpose)  # type: ignore[arg-type]
        items = data.dataset.__getitems__(range(3))
        assert [item.row.row for item in items if not isinstance(item, Hole)] == kept
        assert data.report["dropped"] == 3 - len(kept)


def test_axes_are_asked_for_and_checked() -> None:
    with pytest.raises(DataError, match=r"`axis` does not say which(.|\n)*helpful, safer, safer_then_better"):
        reader_for([PKU_ROW], where="rows.jsonl")
    with pytest.raises(DataError, match=r"no axis `safest`(.|\n)*did you mean `safer`"):
        reader_for([PKU_ROW], axis="safest")
    with pytest.raises(DataError, match="can be compared in one way only"):
        reader_for([SHP], axis="helpful")
    with pytest.raises(DataError, match="needs the column `is_response_0_safe`"):
        reader_for([{k: v for k, v in PKU_ROW.items() if "_safe" not in k}], axis="safer_then_better")
    honest = reader_for([ULTRAFEEDBACK], axis="honesty")(ULTRAFEEDBACK, ROW)
    assert [(c.text, c.reward) for c in honest.completions] == [("worst", 1.0), ("best", 5.0)]  # N/A is no rating
    faulty = reader_for([ULTRAFEEDBACK], axis="overall_score")(ULTRAFEEDBACK, ROW)
    assert max(faulty.completions, key=lambda c: c.reward or 0).text == "worst"
    mean = reader_for([ULTRAFEEDBACK])(ULTRAFEEDBACK, ROW)
    assert [c.reward for c in mean.completions] == pytest.approx([10 / 3, 1.0, 4.75])


def test_benchmarks_are_refused_as_training_data() -> None:
    for case in (*EVALUATION, LISTS[-1]):
        for options in ({}, {"format": "columns"}, {"winner": {"chosen": "chosen", "rejected": "rejected"}}):
            with pytest.raises(DataError, match="refused as training data"):
                reader_for([case.row], **options)
    red = {"transcript": "x", "task_description": "t", "rating": 1, "min_harmlessness_score_transcript": 0.1}
    with pytest.raises(DataError, match="single transcripts"):
        reader_for([red], name="Anthropic/hh-rlhf")


def test_warned_about_the_version_that_overlaps(with_bos: Any, tmp_path: Path, caplog: Any) -> None:
    for version, warned in (("v0.1", True), ("v0.2", False)):
        caplog.clear()
        folder = tmp_path / "Skywork" / f"Skywork-Reward-Preference-80K-{version}"
        folder.mkdir(parents=True)
        row = {"chosen": whole("good"), "rejected": whole("bad"), "source": "x"}
        (folder / "train.jsonl").write_text(json.dumps(row) + "\n")
        with caplog.at_level(logging.WARNING, logger="align"):
            open_sources([folder], "pairs")
        assert any("RewardBench" in record.message for record in caplog.records) == warned


def test_recommended_filters_and_stated_ones() -> None:
    reader = reader_for([SHP], filters="recommended")
    assert reader(SHP, ROW).preferences
    with pytest.raises(RowError, match="filtered out: not >= 2") as caught:
        reader({**SHP, "score_ratio": 1.9}, ROW)
    assert caught.value.dropped
    assert "rows with `score_ratio` >= 2" in reader.description
    assert reader_for([SHP])({**SHP, "score_ratio": 1.1}, ROW).preferences  # none is applied unasked
    plain = {"prompt": "q", "chosen": "a", "rejected": "b", "lang": "en", "n": 3, "ok": False, "info": {"site": "x"}}
    for filters, kept in (
        ({"lang": "en"}, True),
        ({"lang": ["de", "fr"]}, False),
        ({"lang": "!= en"}, False),
        ({"n": "> 3"}, False),
        ({"n": ">= 3", "ok": "false"}, True),
        ({"ok": True}, False),
        ({"info.site": "x"}, True),
        ({"info.site": "== y"}, False),
    ):
        reader = reader_for([plain], filters=filters)
        if kept:
            reader(plain, ROW)
        else:
            with pytest.raises(RowError, match="filtered out"):
                reader(plain, ROW)
    for filters, words in (
        ({"lnag": "en"}, "did you mean `lang`"),
        ({"n": ">= many"}, "the condition of `n`"),
        ({"n": {"a": 1}}, "the condition of `n`"),
        ("recommended", "no known data set"),
        ("all", "`filters` is 'all'"),
    ):
        with pytest.raises(DataError, match=words):
            reader_for([plain], filters=filters)  # type: ignore[arg-type]
    with pytest.raises(RowError, match="not a number but str") as caught:
        reader_for([plain], filters={"n": "> 1"})({**plain, "n": "many"}, ROW)
    assert not caught.value.dropped


def test_plain_rows_with_the_columns_of_a_conversational_set_keep_their_prompt() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 3, "score_rejected": 1}
    group = reader_for([row])(row, ROW)
    assert (group.prompt, as_text(group, 0), group.preferences[0].margin) == ("q", "a", 2.0)
    mixed = {"source": "s", "question": "q?", "prompt": "q", "chosen": "a", "rejected": "b"}
    assert reader_for([mixed])(mixed, ROW).prompt == "q"


def test_contradicting_scores_and_chosen_are_not_trusted() -> None:
    with pytest.raises(RowError, match="contradict which answer won") as caught:
        reader_for([H4])({**H4, "score_chosen": 1.0}, ROW)
    assert caught.value.dropped
    reader = reader_for([ON_POLICY], format="on_policy_ultrafeedback")
    with pytest.raises(RowError, match="not the answer with the highest"):
        reader({**ON_POLICY, "chosen": whole("bad")}, ROW)


def test_rows_of_another_form_are_bad_rows_not_crashes() -> None:
    for row, change in (
        (ULTRAFEEDBACK, {"completions": [{"response": "x", "annotations": "none"}]}),
        (NECTAR, {"answers": [1, 2]}),
        (NECTAR, {"prompt": "no transcript"}),
        (STACK, {"answers": None}),
        (PKU_ROW, {"better_response_id": 2}),
        (SHP, {"labels": None}),
        (SHP, {"labels": 0.5}),
    ):
        reader = reader_for([row], **({"axis": "helpful"} if row is PKU_ROW else {}))
        with pytest.raises(RowError) as caught:
            reader({**row, **change}, ROW)
        assert not caught.value.dropped


def test_a_system_column_opens_the_conversation() -> None:
    row = {"system": "be kind", "prompt": "q", "chosen": "a", "rejected": "b"}
    reader = reader_for([row])
    assert reader(row, ROW).prompt == ({"role": "system", "content": "be kind"}, user("q"))
    assert reader({**row, "system": " "}, ROW).prompt == CHAT
    assert reader({**row, "system": None}, ROW).prompt == CHAT
    assert reader_for([row], chat=False)(row, ROW).prompt == "q"
    assert "not used: `system`" in reader_for([row], chat=False).description
    talk = {"system": "be kind", "chosen": whole("a"), "rejected": whole("b")}
    assert reader_for([talk])(talk, ROW).prompt == ({"role": "system", "content": "be kind"}, user("q"))
    own = {**talk, **{n: [{"role": "system", "content": "else"}, *talk[n]] for n in ("chosen", "rejected")}}
    with pytest.raises(RowError, match="differs from the system turn"):
        reader_for([own])(own, ROW)
    mapped = {"persona": "be kind", "prompt": "q", "completion": "a", "label": True}
    assert reader_for([mapped], columns={"system": "persona"})(mapped, ROW).prompt[0]["content"] == "be kind"
    transcript = {"system": "x", **{n: f"\n\nHuman: q\n\nAssistant: {n}" for n in ("chosen", "rejected")}}
    with pytest.raises(DataError, match="write `transcripts: messages`"):
        reader_for([transcript])
    assert len(reader_for([transcript], transcripts="messages")(transcript, ROW).prompt) == 2


def test_plain_prompts_as_a_chat() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert reader_for([row])(row, ROW).prompt == "q"
    group = reader_for([row], chat=True)(row, ROW)
    assert (group.prompt, group.completions[0].segments[0].message) == (CHAT, assistant("a"))
    implicit = {"chosen": "why so blue", "rejected": "why so red"}
    group = reader_for([implicit], chat=True)(implicit, ROW)
    assert (group.prompt, as_text(group, 0), as_text(group, 1)) == ((user("why so"),), "blue", "red")


def test_formats_that_are_not_there_or_do_not_fit(with_bos: Any) -> None:
    with pytest.raises(DataError, match=r"no data format `nectr`(.|\n)*did you mean `nectar`"):
        reader_for([NECTAR], format="nectr")
    with pytest.raises(DataError, match="`format: shp` and `winner` are both stated"):
        reader_for([SHP], format="shp", winner="human_ref_A")
    # what the user says goes before what is recognised
    group = reader_for([SHP], winner={"chosen": "human_ref_B", "rejected": "human_ref_A"})(SHP, ROW)
    assert as_text(group, 0) == "B"
    with pytest.raises(DataError, match="no name tells which wins"):
        reader_for([SHP], format="columns")
    with pytest.raises(DataError, match=r"r.yaml:4: rows: (.|\n)*and the method reads no ties"):
        prepare_data([SourceSpec([SHP], ties="keep", where="r.yaml:4")], Tokeniser(with_bos, "pairs"))
