"""Order, batches, holes, the account of what was left out, and partners: functions of seeds and rows, nothing else."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.core.errors import ConfigError, DataError
from align.data.groups import RowId, TokenCompletion, TokenGroup
from align.data.partners import add_mismatched
from align.data.prepare import SourceSpec, prepare_data
from align.data.rejected import RejectedLog
from align.data.stream import BLOCK, WINDOW, GlobalBatch, GlobalBatchSampler, Hole, collate, epoch_order
from align.data.tokenise import Tokeniser
from align.testing.tiny import random_pairs

SIZES = st.one_of(st.integers(0, 50), st.integers(BLOCK - 2, BLOCK + 2), st.integers(15 * BLOCK, 17 * BLOCK + 5))


@settings(max_examples=30, deadline=None)
@given(n_rows=SIZES, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_is_a_permutation(n_rows: int, seed: int, epoch: int) -> None:
    order = list(epoch_order(n_rows, seed, epoch))
    assert len(order) == n_rows
    assert sorted(order) == list(range(n_rows))


@settings(max_examples=30, deadline=None)
@given(n_rows=SIZES.filter(bool), seed=st.integers(0, 5), cuts=st.lists(st.floats(0, 1), max_size=6), data=st.data())
def test_the_order_is_the_same_however_it_is_read(n_rows: int, seed: int, cuts: list[float], data: Any) -> None:
    whole = list(epoch_order(n_rows, seed, 1))
    edges = sorted({0, n_rows, *(int(cut * n_rows) for cut in cuts)})
    pieces = list(itertools.pairwise(edges))
    lazy = epoch_order(n_rows, seed, 1)
    for start, stop in data.draw(st.permutations(pieces)):
        assert lazy.rows(start, stop) == whole[start:stop]
    place = data.draw(st.integers(0, n_rows - 1))
    assert epoch_order(n_rows, seed, 1)[place] == whole[place]


def test_blocks_are_mixed_within_windows_and_only_there() -> None:
    n_rows = 40 * BLOCK
    order = np.array(epoch_order(n_rows, 0, 0))
    window = order[: WINDOW * BLOCK] // BLOCK
    assert len(set(window.tolist())) == WINDOW
    assert len(set(window[:100].tolist())) > 8
    assert not np.array_equal(order, np.arange(n_rows))


def test_seed_and_epoch_change_the_order_and_file_order_is_the_files() -> None:
    orders = {(seed, epoch): tuple(epoch_order(300, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert list(epoch_order(300, 0, 1, shuffle=False)) == list(range(300))
    assert epoch_order(300, 0, 0)[5:9] == list(epoch_order(300, 0, 0))[5:9]


def test_two_windows_at_most_are_held() -> None:
    order = epoch_order(10_000_000, 0, 0)
    for place in range(0, 10_000_000, 500_000):
        _ = order[place]
    assert sum(rows.nbytes for rows in order._made.values()) <= 2 * WINDOW * BLOCK * 8


def test_batches_cover_the_epoch_and_the_last_may_be_smaller() -> None:
    sampler = GlobalBatchSampler(103, 8, seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 13
    assert [len(batch) for batch in first] == [8] * 12 + [7]
    assert [row for batch in first for row in batch] == list(epoch_order(103, 1, 0))
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    sampler.start = 5
    assert list(sampler) == first[5:]
    assert list(sampler) == first  # `start` holds once
    assert sampler.batch(7) == first[7]
    assert list(GlobalBatchSampler(3, 8, 0, shuffle=False)) == [[0, 1, 2]]


def rows_with(bad: dict[int, Any], count: int = 40) -> list[Any]:
    rows: list[Any] = random_pairs(count, seed=1)
    return [bad.get(index, row) for index, row in enumerate(rows)]


def prepared(tokenizer: Any, rows: Any, fraction: float = 1.0, **options: Any) -> Any:
    return prepare_data([rows], Tokeniser(tokenizer, "pairs"), rejected=RejectedLog(None, fraction), **options)


def test_a_hole_moves_nothing_up(with_bos: Any) -> None:
    sound = prepared(with_bos, rows_with({}))
    holed = prepared(with_bos, rows_with({3: {"prompt": "x"}, 17: 5}))
    for step, rows in enumerate(sound.sampler(8, seed=2)):
        assert holed.sampler(8, seed=2).batch(step) == rows
        full = collate(sound.dataset.__getitems__(rows))
        batch = collate(holed.dataset.__getitems__(rows))
        assert batch.rows == full.rows
        assert [group.row for group in batch.groups] == [g.row for g in full.groups if g.row.row not in (3, 17)]
        assert [hole.index for hole in batch.holes] == [row for row in rows if row in (3, 17)]
    assert holed.dataset[3] == Hole(RowId("rows", 3), 3, "chosen", "missing")
    assert holed.dataset[17] == Hole(RowId("rows", 17), 17, "", "not an object but int")
    assert holed.report["kept"] == 38


def test_sources_lie_end_to_end(with_bos: Any) -> None:
    data = prepare_data([random_pairs(5), random_pairs(7, seed=9)], Tokeniser(with_bos, "pairs"))
    assert len(data) == 12
    items = data.dataset.__getitems__([11, 0, 5])
    assert [str(item.row) for item in items] == ["rows#2 row 6", "rows row 0", "rows#2 row 0"]
    with pytest.raises(IndexError):
        _ = data.dataset[12]


def test_a_dataset_travels_to_a_worker(with_bos: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, random_pairs(6))))
    data = prepared(with_bos, path)
    twin = pickle.loads(pickle.dumps(data.dataset))  # noqa: S301
    assert twin[4].prompt.tolist() == data.dataset[4].prompt.tolist()


@pytest.mark.parametrize("rows", [40, 10_000, 12_000])
def test_at_most_ten_thousand_rows_are_parsed_before_training(rows: int, with_bos: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n") * rows)
    other = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 30
    data = prepare_data([path, other], Tokeniser(with_bos, "pairs"))
    assert data.rows_parsed == data.report["looked"] <= 10_000
    assert data.rows_parsed >= min(rows + 30, 9_990)
    assert len(data) == rows + 30
    data.dataset.__getitems__(data.sampler(32, 0).batch(0))
    assert data.rows_parsed <= 10_032


def test_the_report_counts_and_names_rows(with_bos: Any) -> None:
    bad = {index: {"prompt": "q", "chosen": "", "rejected": "b"} for index in (2, 4, 6, 8)}
    bad[1] = {"prompt": "q", "chosen": "a", "rejected": "b " * 3000}
    report = prepared(with_bos, rows_with(bad)).report
    assert (report["rows"], report["looked"], report["kept"], report["bad"], report["dropped"]) == (40, 40, 35, 4, 1)
    assert report["reasons"] == {
        "`chosen`: empty": {"count": 4, "rows": ["rows row 2", "rows row 4", "rows row 6"]},
        "too long for `max_length`": {"count": 1, "rows": ["rows row 1"]},
    }
    assert report["read_as"] == {"rows": "read as: pairs, prompt = column `prompt`, winner = column `chosen`"}
    assert report["tokens"]["prompt"]["max"] > report["tokens"]["prompt"]["p50"] > 0


def test_too_many_bad_rows_stop_before_training(with_bos: Any, tmp_path: Path) -> None:
    bad = {index: {"prompt": "q", "chosen": " ", "rejected": "b"} for index in (2, 4)}
    log = RejectedLog(tmp_path / "rejected.jsonl", 0.04)
    with pytest.raises(DataError, match=r"2 of 40 rows are bad(.|\n)*2 x `chosen`: empty \(rows row 2, rows row 4\)"):
        prepare_data([rows_with(bad)], Tokeniser(with_bos, "pairs"), rejected=log)
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert lines == [
        {"file": "rows", "row": row, "field": "chosen", "reason": "empty", "kind": "bad"} for row in (2, 4)
    ]
    assert prepared(with_bos, rows_with(bad), fraction=0.05).report["bad"] == 2


def test_dropped_rows_alone_do_not_stop_but_no_row_left_does(with_bos: Any) -> None:
    tie = {"prompt": "q", "chosen": "a", "rejected": "b", "tie": True}
    assert prepared(with_bos, [tie, {**tie, "tie": False}], fraction=0.0).report["dropped"] == 1
    with pytest.raises(DataError, match=r"none of the 2 rows(.|\n)*2 x a tie"):
        prepared(with_bos, [tie, tie])


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "no data source is given"),
        ([SourceSpec([{"prompt": "q"}])], "which of two answers is better"),
        ([[3, 4]], "none of the first 2 rows can be read"),
        ([{"name": [{"prompt": "q", "x_0": "a", "x_1": "b"}]}], "no name tells which wins"),
    ],
)
def test_data_that_cannot_be_trained_on(sources: Any, words: str, with_bos: Any) -> None:
    with pytest.raises(DataError, match=words):
        prepare_data(sources, Tokeniser(with_bos, "pairs"))


def test_the_fingerprint_is_of_rows_reading_and_tokens(with_bos: Any) -> None:
    rows = random_pairs(5)
    marks = {
        prepared(with_bos, rows).fingerprint,
        prepared(with_bos, rows[:4]).fingerprint,
        prepared(with_bos, [{**row, "x": 1} for row in rows]).fingerprint,
        prepare_data([rows], Tokeniser(with_bos, "singles")).fingerprint,
    }
    assert len(marks) == 4
    assert prepared(with_bos, random_pairs(5)).fingerprint in marks


# --- rejected.jsonl


def batch(*rows: int, bad: tuple[int, ...] = (), dropped: tuple[int, ...] = ()) -> GlobalBatch:
    ids = tuple(RowId("f", row) for row in rows)
    holes = [Hole(RowId("f", row), row, "x", "wrong") for row in bad]
    holes += [Hole(RowId("f", row), row, "", "a tie", True) for row in dropped]
    return GlobalBatch((), tuple(holes), ids)


def lines_of(path: Path) -> list[int]:
    return [json.loads(line)["row"] for line in path.read_text().splitlines()]


def test_each_row_once_over_epochs_and_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "out" / "rejected.jsonl"
    log = RejectedLog(path, 1.0)
    log.total = 8
    log.record(batch(0, 1, 2, 3, bad=(1,), dropped=(3,)))
    state = json.loads(json.dumps(log.state_dict()))
    log.record(batch(4, 5, 6, 7, bad=(5,)))
    log.record(batch(0, 1, 2, 3, bad=(1,), dropped=(3,)))  # the next epoch
    assert (log.seen, log.bad, log.dropped, lines_of(path)) == (8, 2, 1, [1, 3, 5])
    with open(path, "a") as file:
        file.write('{"file": "f", "ro')  # the kill came here
    again = RejectedLog(path, 1.0, resume=True)
    again.total = 8
    again.load_state_dict(state)
    assert (again.seen, again.bad, again.dropped) == (4, 1, 1)
    again.record(batch(4, 5, 6, 7, bad=(5, 6)))
    assert (again.bad, again.report()["reasons"]["`x`: wrong"]["count"], lines_of(path)) == (3, 3, [1, 3, 5, 6])
    assert not RejectedLog(path, 1.0).path.exists()  # type: ignore[union-attr]


def test_rows_of_text_files_are_written_by_their_lines_and_once(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    rows = [RowId("a.jsonl", 3, line=4), RowId("b.jsonl:prompt", 1, line=3, file="b.jsonl"), RowId("c.parquet", 3)]
    assert [str(row) for row in rows] == ["a.jsonl:4", "b.jsonl:3", "c.parquet row 3"]
    holes = tuple(Hole(row, number, "x", "wrong") for number, row in enumerate(rows))
    for resume in (False, True):
        RejectedLog(path, 1.0, resume).record(GlobalBatch((), holes, tuple(rows)))
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(one["file"], one.get("line"), one.get("row")) for one in entries] == [
            ("a.jsonl", 4, None),
            ("b.jsonl", 3, None),
            ("c.parquet", None, 3),
        ]


def test_the_running_fraction_stops_and_looked_rows_count_once() -> None:
    log = RejectedLog(None, 0.05)
    log.looked("f", 100, [Hole(RowId("f", row), row, "x", "wrong") for row in range(5)])
    log.check()
    log.record(batch(*range(4), bad=(0, 1, 2, 3)))  # seen in the look already
    assert (log.seen, log.bad) == (100, 5)
    with pytest.raises(DataError, match=r"6 of 102 rows are bad \(5.9%; `max_bad_fraction` is 5.0%\)"):
        log.record(batch(200, 201, bad=(201,)))
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        RejectedLog(None, 1.5)


# --- partners


def group(row: int, prompt: int, answers: int = 1) -> TokenGroup:
    def completion(answer: int) -> TokenCompletion:
        ids = np.array([row, answer])
        return TokenCompletion(ids=ids, mask=np.ones(2, bool), step=np.zeros(2, np.int64))

    return TokenGroup(RowId("f", row), np.array([prompt]), tuple(map(completion, range(answers))))


def partners(groups: list[TokenGroup], seed: int) -> dict[int, list[tuple[int, ...]]]:
    return {g.row.row: [tuple(c.ids.tolist()) for c in g.mismatched] for g in add_mismatched(groups, seed)}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3)), min_size=2, max_size=12),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_partners_are_a_function_of_seed_and_rows(shape: list[tuple[int, int]], seed: int, data: Any) -> None:
    groups = [group(row, prompt, answers) for row, (prompt, answers) in enumerate(shape)]
    found = partners(groups, seed)
    shuffled = data.draw(st.permutations(groups))
    assert partners(shuffled, seed) == found
    prompts = [prompt for prompt, _ in shape]
    if len(set(prompts)) < 2:
        assert all(taken == [] for taken in found.values())
        return
    for row, taken in found.items():
        assert len(taken) == shape[row][1]
        assert len({owner for owner, _ in taken}) == 1
        assert all(prompts[owner] != prompts[row] for owner, _ in taken)


def test_partners_change_with_the_seed_and_keep_the_order_of_groups() -> None:
    groups = [group(row, row) for row in range(20)]
    assert partners(groups, 1) != partners(groups, 2)
    assert [g.row.row for g in add_mismatched(groups, 1)] == list(range(20))
    taken = [owner for answers in partners(groups, 1).values() for owner, _ in answers]
    assert sorted(taken) == list(range(20))  # each is a partner once


def test_equal_prompts_have_no_partners(caplog: pytest.LogCaptureFixture) -> None:
    assert partners([group(0, 1), group(1, 1)], 0) == {0: [], 1: []}
    assert partners([group(0, 1)], 0) == {0: []}
    assert add_mismatched([], 0) == []
