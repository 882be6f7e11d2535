"""Failures seen in other projects' loaders, each as a test that the same rows are read right here."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from align.core.errors import DataError
from align.data import transcripts as hh
from align.data.groups import Group, RowId
from align.data.prepare import prepare_data
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.sources import open_source
from align.data.tokenise import Tokeniser
from align.data.views import PairRule, Selection, select
from align.testing.tiny import random_pairs
from tests.data.known_rows import NECTAR, ON_POLICY, STACK, assistant, user, whole

ROW = RowId("rows", 0)
RULES: tuple[PairRule, ...] = ("best_worst", "all", "adjacent")


def read(row: dict[str, Any], **options: Any) -> Group:
    return reader_for([row], **options)(row, ROW)


def pairs_of(group: Group, rule: PairRule = "best_worst") -> Selection:
    return select(group, "pairs", rule, ties=False, reward=False)


def texts(made: Selection) -> list[tuple[str, str]]:
    return [(made.completions[p.winner].text.strip(), made.completions[p.loser].text.strip()) for p in made.preferences]


def nectar(ranks: list[int]) -> dict[str, Any]:
    return {**NECTAR, "answers": [{"answer": f"rank {rank}", "model": "m", "rank": float(rank)} for rank in ranks]}


def test_a1_nectar_is_not_trained_towards_the_worst_answer() -> None:
    """One loader sorts by rank upwards and takes the last two: chosen is the worst of seven."""
    group = read(nectar([4, 7, 1, 6, 2, 5, 3]))
    assert texts(pairs_of(group)) == [("rank 1", "rank 7")]


@pytest.mark.parametrize("rule", RULES)
def test_a2_no_pair_of_nectar_is_flipped(rule: PairRule) -> None:
    """One loader draws the loser from all that are not the winner: a quarter of its pairs are flipped."""
    rng = random.Random(0)
    for _ in range(50):
        ranks = rng.sample(range(1, 8), 7)
        found = texts(pairs_of(read(nectar(ranks)), rule))
        assert len(found) == {"best_worst": 1, "all": 21, "adjacent": 6}[rule]
        assert all(int(winner[-1]) < int(loser[-1]) for winner, loser in found)


def test_a2_the_prompt_of_nectar_keeps_no_role_marks() -> None:
    """And its cleaner misses the two newlines at the start, so that the marks stay inside the prompt."""
    row = {**nectar([1, 2]), "prompt": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "}
    group = read(row, transcripts="messages")
    assert group.prompt == (user("q"), assistant("a"), user("r"))
    plain = read(row)
    assert (
        plain.prompt == "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    )  # no blank that tokens would merge with
    assert [answer.text for answer in plain.completions] == [" rank 1", " rank 2"]
    marked = {**row, "answers": [*row["answers"], {"answer": "x\n\nHuman: y", "model": "m", "rank": 3.0}]}
    assert [answer.text for answer in read(marked).completions] == [" rank 1", " rank 2"]
    reader = reader_for([row])
    with pytest.raises(RowError, match="fewer than two answers without a role mark"):
        reader({**row, "answers": marked["answers"][1:]}, ROW)


SEVERAL_TURNS = {
    "chosen": [*whole("shared"), user("r"), assistant("good")],
    "rejected": [*whole("shared"), user("r"), assistant("bad")],
}
SYSTEM = {
    name: [{"role": "system", "content": "s"}, user("q"), assistant(text)]
    for name, text in (("chosen", "good"), ("rejected", "bad"))
}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (SEVERAL_TURNS, (*whole("shared"), user("r"))),
        (SYSTEM, ({"role": "system", "content": "s"}, user("q"))),
    ],
    ids=["several turns", "system turn"],
)
@pytest.mark.parametrize("extra", [{}, {"id": "1", "source": "s", "prompt": "q"}], ids=["A3 argilla", "A4 tulu"])
def test_a3_a4_answers_are_the_last_turns_not_message_one(
    row: dict[str, Any], prompt: Any, extra: dict[str, Any]
) -> None:
    """Two loaders take message 1: equal answers after several turns, the user's text after a system turn."""
    group = read({**extra, **row})
    assert texts(pairs_of(group)) == [("good", "bad")]
    assert group.prompt == prompt


def test_a5_the_word_human_in_an_answer_starts_no_turn() -> None:
    """One parser splits at `Human:` anywhere."""
    answer = " Dear Human: you said\nAssistant: no. Human: yes"
    row = {"chosen": f"\n\nHuman: q\n\nAssistant:{answer}", "rejected": "\n\nHuman: q\n\nAssistant: bad"}
    group = read(row)
    assert [[segment.text for segment in c.segments] for c in group.completions] == [[answer], [" bad"]]
    chat = read(row, transcripts="messages")
    assert chat.prompt == (user("q"),)
    assert chat.completions[0].text == answer.strip()
    assert len(hh.turns_of(row["chosen"], "chosen")) == 2


def stack(*scores: int) -> dict[str, Any]:
    return {**STACK, "answers": [{"text": f"<p>a{n} {score}</p>", "pm_score": score} for n, score in enumerate(scores)]}


def test_a6_equal_scores_of_stack_exchange_make_no_pair() -> None:
    """The first DPO loader makes the pair (j, i) of equal scores."""
    assert texts(pairs_of(read(stack(2, 5, 2)), "all")) == [("a1 5", "a0 2"), ("a1 5", "a2 2")]
    with pytest.raises(RowError, match="a tie") as caught:
        pairs_of(read(stack(3, 3)))
    assert caught.value.dropped


def test_a7_equal_rewards_make_no_identical_pair_and_the_scored_rows_stay() -> None:
    """One annotation script takes argmax and argmin of equal scores, and writes over the scored file."""
    row = {**ON_POLICY, "all_rm_scores": [1.0, 1.0, 1.0]}
    before = copy.deepcopy(row)
    group = read(row, format="on_policy_ultrafeedback")
    with pytest.raises(RowError, match="a tie"):
        pairs_of(group)
    assert row == before
    with pytest.raises(RowError, match="identical"):
        reader_for([ON_POLICY])({**ON_POLICY, "rejected": ON_POLICY["chosen"]}, ROW)


@pytest.mark.parametrize("chat", [True, False])
def test_a8_the_scored_tokens_are_the_answer_and_its_end(chat: bool, with_bos: Any) -> None:
    """One trainer counts the bare answer's tokens and scores as many from the end of the templated text."""
    row = {"prompt": "say it", "chosen": "HELLO", "rejected": "no"}
    reader, tokenise = reader_for([row], chat=chat), Tokeniser(with_bos, "pairs")
    for completion, text in zip(tokenise(reader(row, ROW)).completions, ("HELLO", "no"), strict=True):
        scored = completion.ids[completion.mask]
        assert with_bos.decode(scored[:-1]) == text
        assert scored[-1] in with_bos.all_special_ids
        assert with_bos.decode(completion.ids).count(text) == 1
        assert not completion.mask[len(scored) :].any()


def test_a9_the_first_rows_of_a_local_json_list(tmp_path: Path, with_bos: Any) -> None:
    """One trainer asks the list of a local JSON file for `select`."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(random_pairs(5)))
    source = open_source(path, max_rows=3)
    assert source.read(range(3)) == random_pairs(5)[:3]
    assert len(prepare_data([{"name": path, "max_rows": 3}], Tokeniser(with_bos, "pairs"))) == 3


def test_a13_the_official_test_pairs_are_not_trained_on(tmp_path: Path) -> None:
    """One handbook joins train_prefs and test_prefs, shuffles, and splits anew."""
    splits = {
        name: Dataset.from_list([{"prompt": name, "chosen": "a", "rejected": "b"}] * count)
        for name, count in (("train_prefs", 3), ("test_prefs", 2))
    }
    DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    files = tmp_path / "files"
    files.mkdir()
    for name, rows in splits.items():
        rows.to_parquet(str(files / f"{name}-00000-of-00001.parquet"))
    for place in (tmp_path / "saved", files, DatasetDict(splits)):
        for purpose, name, count in (("train", "train_prefs", 3), ("eval", "test_prefs", 2)):
            source = open_source(place, purpose=purpose)  # type: ignore[arg-type]
            rows: list[Any] = source.read(range(len(source)))
            assert [row["prompt"] for row in rows] == [name] * count
    with pytest.raises(DataError, match="there is no split `train`"):
        open_source(DatasetDict({"test_prefs": splits["test_prefs"]}))
