"""The data report's numbers against a recount in plain Python, and its tokens against the tokenizer by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from align.core.errors import ConfigError, DataError
from align.data.doctor import Limits, Plan, bad_share, crossed, examine, judge
from align.data.doctor.benchmarks import Benchmarks
from align.data.doctor.numbers import evenly, histogram, mean, quantiles, share
from align.data.doctor.texts import language, refuses
from align.data.doctor.tokens import measure
from align.data.encode import Encoder, pieces
from align.data.groups import RowId
from align.data.readers import reader_for
from align.data.rows import RowError
from align.data.tokenise import Tokeniser
from align.testing.tiny import random_pairs, tiny_tokenizer

REFUSAL = " I'm sorry, but I can't help with that."


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def faulty_rows() -> list[Any]:
    """300 pairs with faults that the tests count by their places."""
    rows: list[Any] = random_pairs(300, seed=1)
    for place, row in enumerate(rows):
        row["prompt"] = f"[{place}] {row['prompt']}"
        row["annotator"] = "ab"[place % 3 == 0]
        row["source"] = "truthful_qa" if place in (100, 101) else "chat"
        row["margin"] = place / 100
        row["tie"] = place in (50, 51, 52)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["chosen"] = "  \n"
    rows[6]["rejected"] = ""
    del rows[9]["chosen"]
    rows[10]["rejected"] = 7
    rows[20] = "{broken"
    rows[21] = "[1, 2]"
    rows[31] = dict(rows[30])
    rows[33] = {**rows[32], "prompt": rows[32]["prompt"].upper() + "  "}
    rows[41] = {**rows[40], "chosen": rows[40]["rejected"], "rejected": rows[40]["chosen"]}
    rows[60]["chosen"], rows[61]["rejected"] = REFUSAL, REFUSAL
    rows[62]["rejected"] = " As an AI, I have no opinion."
    return rows


KEPT = [place for place in range(300) if place not in (3, 5, 6, 9, 10, 20, 21, 50, 51, 52)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = write(tmp_path_factory.mktemp("doctor") / "faulty.jsonl", faulty_rows())
    return examine({"train": [path]}, Plan()).report["streams"]["train"]


def test_rows_and_reasons(report: dict[str, Any]) -> None:
    assert report["rows"] == {
        "total": 300,
        "read": 300,
        "all_read": True,
        "readable": len(KEPT),
        "kept": len(KEPT),
        "bad": 7,
        "dropped": 3,
        "bad_share": 7 / 300,
    }
    reasons = {one["reason"]: one for one in report["reasons"]}
    counts = {reason: (one["kind"], one["count"]) for reason, one in reasons.items()}
    assert counts == {
        "`chosen`: chosen and rejected are identical": ("bad", 1),
        "`chosen`: empty": ("bad", 1),
        "`rejected`: empty": ("bad", 1),
        "`chosen`: missing": ("bad", 1),
        "`rejected`: not text but int": ("bad", 1),
        "not valid JSON": ("bad", 1),
        "not an object but list": ("bad", 1),
        "a tie": ("dropped", 3),
    }
    places = [int(example["row"].rpartition(":")[2]) for example in reasons["a tie"]["examples"]]
    assert places == [51, 52, 53]
    assert reasons["`rejected`: not text but int"]["examples"][0]["text"] == "7"
    assert report["identical"]["count"] == 1
    assert report["empty"]["count"] == 2
    assert report["ties"] == {"dropped": 3, "kept": 0, "share": 3 / (len(KEPT) + 3)}


def test_duplicates_and_contradictions(report: dict[str, Any]) -> None:
    seen, rows = report["duplicates"], faulty_rows()
    prompts = [" ".join(rows[place]["prompt"].lower().split()) for place in KEPT]
    assert seen["prompts"]["count"] == len(prompts) - len(set(prompts)) == 3
    # Line 34 differs from line 33 in the case and white space of its prompt alone.
    assert seen["rows"]["count"] == 2
    names = [[int(name.rpartition(":")[2]) for name in pair] for pair in seen["rows"]["examples"]]
    assert names == [[31, 32], [33, 34]]
    assert seen["contradictions"]["count"] == 1
    assert [name.rpartition(":")[2] for name in seen["contradictions"]["examples"][0]] == ["41", "42"]


def test_refusals_annotators_margins_and_origins(report: dict[str, Any]) -> None:
    roles = report["refusals"]["roles"]
    assert (roles["winner"]["count"], roles["loser"]["count"]) == (1, 2)
    rows = faulty_rows()
    assert report["annotators"]["rows"] == dict(Counter(rows[place]["annotator"] for place in KEPT))
    assert report["score_gap"]["mean"] == pytest.approx(
        sum(rows[place]["margin"] for place in KEPT) / len(KEPT), abs=1e-3
    )
    (named,) = report["benchmarks"]["named"]
    assert (named["name"], named["count"]) == ("TruthfulQA", 2)
    assert report["labels"] is None
    assert report["rewards"] is None


def test_characters_words_and_length_bias(report: dict[str, Any]) -> None:
    rows = [faulty_rows()[place] for place in KEPT]
    for role, column in (("prompt", "prompt"), ("winner", "chosen"), ("loser", "rejected")):
        assert report["characters"][role] == pytest.approx(
            plain_quantiles([len(row[column]) for row in rows]), abs=2e-3
        )
        words = [len(row[column].split()) for row in rows]
        assert report["lengths"][role] == pytest.approx(plain_quantiles(words), abs=2e-3)
    gaps = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    bias = report["length_bias"]
    assert bias["winner_longer"]["count"] == sum(gap > 0 for gap in gaps)
    assert bias["equal"] == sum(gap == 0 for gap in gaps)
    middle = sum(gaps) / len(gaps)
    error = math.sqrt(sum((gap - middle) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
    assert bias["difference"]["mean"] == pytest.approx(middle, abs=1e-3)
    assert bias["difference"]["high"] == pytest.approx(middle + 1.959964 * error, abs=1e-3)


def plain_quantiles(values: list[int]) -> dict[str, float]:
    ordered = sorted(values)

    def at(level: float) -> float:
        place = level * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    found = {"count": len(values), "mean": sum(values) / len(values), "min": ordered[0], "max": ordered[-1]}
    return found | {f"p{level}": at(level / 100) for level in (5, 25, 50, 75, 95, 99)}


def test_intervals() -> None:
    for count, of in ((0, 40), (7, 40), (40, 40), (500, 1000)):
        found = share(count, of)
        for end in (found["low"], found["high"]):
            if 0 < end < 1:  # an end is the share that the count is 1.96 standard errors away from
                assert abs(count / of - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / of), rel=2e-3)
    assert share(0, 0)["share"] is None
    assert mean([])["mean"] is None
    assert mean([3])["low"] is None
    assert quantiles([]) == {}


def test_even_spacing_and_histogram() -> None:
    assert evenly(5, 9) == [0, 1, 2, 3, 4]
    spaced = evenly(1000, 7)
    assert len(set(spaced)) == 7
    assert {after - before for before, after in itertools.pairwise(spaced)} <= {142, 143}
    values = [0, 1, 1, 19, 20, 500]
    found = histogram(values, bins=4)
    width = found["edges"][1]
    assert found["counts"] == [sum(min(value // width, 3) == place for value in values) for place in range(4)]
    assert sum(found["counts"]) == len(values)


# -- tokens -----------------------------------------------------------------------------------------------------------


def by_hand(row: dict[str, str], tokenizer: Any) -> tuple[int, int, int]:
    """Tokens of prompt (with BOS), chosen and rejected (with EOS), by the joint encoding."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    rest = [len(tokenizer(row["prompt"] + row[name])["input_ids"]) - len(prompt) + 1 for name in ("chosen", "rejected")]
    return len(prompt), rest[0], rest[1]


@pytest.mark.parametrize("truncation", ["drop", "cut_prompt", "cut_completion"])
def test_lengths_in_tokens_and_truncation(truncation: Any) -> None:
    tokenizer, limit = tiny_tokenizer(), 110
    rows = random_pairs(120, seed=3)
    rows[4]["chosen"] = " word" * 200
    tokenise = Tokeniser(tokenizer, "pairs", limit, truncation=truncation)
    found = examine({"train": [rows]}, Plan(tokenise=tokenise))
    lengths = found.report["streams"]["train"]["lengths"]
    hand = [by_hand(row, tokenizer) for row in rows]
    assert lengths["unit"] == "tokens"
    for role, place in (("prompt", 0), ("winner", 1), ("loser", 2)):
        assert lengths[role] == pytest.approx(plain_quantiles([row[place] for row in hand]), abs=2e-3)
    too_long = [row for row in hand if row[0] + max(row[1:]) > limit]
    assert 5 < len(too_long) < 60
    truncated = lengths["truncation"]
    assert truncated["too_long"]["count"] == len(too_long)
    alone = sum(max(row[1:]) > limit for row in too_long)
    expected = {
        "drop": (len(too_long), 0, 0),
        "cut_prompt": (alone, len(too_long) - alone, 0),
        "cut_completion": (0, 0, len(too_long)),
    }[truncation]
    assert (truncated["dropped"], truncated["cut_prompt"], truncated["cut_completion"]) == expected
    assert len(found.shapes["train"]) == len(rows) - expected[0]
    assert max(prompt + max(answers) for prompt, answers in found.shapes["train"]) <= limit


@pytest.mark.parametrize("conversational", [False, True])
def test_batched_encoding_changes_nothing(conversational: bool) -> None:
    rows = random_pairs(300, seed=5, conversational=conversational)
    reader = reader_for(rows)
    groups = [reader(row, RowId("rows", place)) for place, row in enumerate(rows)]
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", 90)
    shapes, dropped = [], 0
    for group in groups:
        try:
            made = Tokeniser.__call__(tokenise, group)
            shapes.append((len(made.prompt), tuple(len(one) for one in made.completions)))
        except RowError:
            dropped += 1
    found = measure(groups, tokenise)
    assert found.shapes == shapes
    assert found.dropped == dropped > 0


def test_rendered_rows_mark_what_is_scored() -> None:
    tokenizer = tiny_tokenizer()
    rows = random_pairs(40, seed=6)
    tokenise = Tokeniser(tokenizer, "pairs", 512)
    samples = examine({"train": [rows]}, Plan(tokenise=tokenise)).report["streams"]["train"]["samples"]
    places = [int(sample["row"].removeprefix("rows row ")) for sample in samples]
    assert places == [0, 8, 16, 24, 32]
    for place, sample in zip(places, samples, strict=True):
        row = rows[place]
        assert "".join(token["text"] for token in sample["prompt"]) == "<s>" + row["prompt"]
        assert not any(token["scored"] for token in sample["prompt"])
        for answer, column in zip(sample["completions"], ("chosen", "rejected"), strict=True):
            assert answer["role"] == {"chosen": "winner", "rejected": "loser"}[column]
            assert "".join(token["text"] for token in answer["tokens"]) == row[column] + "</s>"
            assert len(answer["tokens"]) == by_hand(row, tokenizer)[1 + (column == "rejected")]
            assert all(token["scored"] for token in answer["tokens"])  # the end token too


def test_turns_of_others_are_not_marked() -> None:
    def turns(last: str) -> list[dict[str, str]]:
        roles = ("assistant", "user", "assistant")
        return [{"role": r, "content": c} for r, c in zip(roles, ("first", "and then", last), strict=True)]

    rows = [
        {"prompt": [{"role": "user", "content": f"question {n}"}], "chosen": turns("good"), "rejected": turns("bad")}
        for n in range(5)
    ]
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", 512)
    sample = examine({"train": [rows]}, Plan(tokenise=tokenise)).report["streams"]["train"]["samples"][0]
    winner = sample["completions"][0]["tokens"]
    assert "".join(token["text"] for token in winner if token["scored"]) == "good</s>"
    unscored = "".join(token["text"] for token in winner if not token["scored"])
    assert unscored == "first</s><|user|>and then<|assistant|>"


def test_long_texts_lose_their_middle_and_say_so() -> None:
    rows = [{"prompt": "Say words.", "chosen": " one two" * 400, "rejected": " no"} for _ in range(5)]
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", None)
    sample = examine({"train": [rows]}, Plan(tokenise=tokenise)).report["streams"]["train"]["samples"][0]
    tokens = sample["completions"][0]["tokens"]
    (gap,) = [token for token in tokens if "left_out" in token]
    assert len(tokens) - 1 + gap["left_out"] == by_hand(rows[0], tiny_tokenizer())[1]
    assert tokens[-1]["text"] == "</s>"


@pytest.mark.parametrize("kind", ["byte_level", "with_bos", "dummy_prefix", "prepending"])
def test_pieces_join_to_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = Encoder(request.getfixturevalue(kind))
    for text in ("plain words", "caf\u00e9 \U0001f600\U0001f600 \u65e5\u672c\u8a9e end", "two  blanks, a river", "a"):
        ids = encoder.ids(text * 3)
        found = pieces(encoder, ids)
        assert len(found) == len(ids)
        assert "".join(found) == encoder.decode(ids)
        assert not any("\ufffd" in piece for piece in found)


# -- other views, samples, several sources ----------------------------------------------------------------------------


def test_labels_balance_and_contradiction() -> None:
    rows = [{"prompt": f"p{n}", "completion": f" answer {n}", "label": n % 4 == 0} for n in range(100)]
    rows.append({**rows[1], "label": True})
    found = examine({"train": [rows]}, Plan()).report
    stream = found["streams"]["train"]
    assert found["view"] == "singles"
    assert (stream["labels"]["desirable"]["count"], stream["labels"]["undesirable"]["count"]) == (26, 75)
    assert stream["refusals"]["roles"].keys() == {"desirable", "undesirable"}
    assert stream["duplicates"]["contradictions"]["count"] == 1
    assert stream["duplicates"]["rows"]["count"] == 0


def test_scores_of_lists_and_rewards() -> None:
    drawn = random.Random(0)
    rows = []
    for number in range(50):
        answers = [f" {'long ' * drawn.randint(1, 9)}{number}" for _ in range(4)]
        rows.append({"prompt": f"p{number}", "completions": answers, "scores": [drawn.random() for _ in answers]})
    pairs = examine({"train": [rows]}, Plan()).report["streams"]["train"]
    gaps = [max(row["scores"]) - min(row["scores"]) for row in rows]
    assert pairs["score_gap"]["mean"] == pytest.approx(sum(gaps) / 50, abs=1e-3)
    lists = examine({"train": [rows]}, Plan(view="lists")).report["streams"]["train"]
    assert lists["score_gap"]["mean"] == pairs["score_gap"]["mean"]
    assert lists["length_bias"] == pairs["length_bias"]
    assert lists["rewards"]["count"] == 200
    assert pairs["length_bias"]["winner_longer"]["count"] == sum(
        len(row["completions"][row["scores"].index(max(row["scores"]))])
        > len(row["completions"][row["scores"].index(min(row["scores"]))])
        for row in rows
    )
    rated = [{"prompt": f"p{n}", "completion": f" a{n}", "reward": n / 10} for n in range(20)]
    found = examine({"train": [rated]}, Plan()).report
    assert (found["view"], found["streams"]["train"]["rewards"]["mean"]) == ("singles", 0.95)


def test_demonstrations_and_prompts() -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a b"}]} for n in range(9)
    ]
    tokenise = Tokeniser(tiny_tokenizer(), "demonstrations", 64)
    found = examine({"train": [rows]}, Plan(tokenise=tokenise)).report
    assert found["view"] == "demonstrations"
    assert found["streams"]["train"]["lengths"]["answer"]["count"] == 9
    prompts = examine({"train": [[{"prompt": "q"}, {"prompt": "q"}]]}, Plan()).report
    assert prompts["view"] == "prompts"
    assert prompts["streams"]["train"]["duplicates"]["prompts"]["count"] == 1
    assert prompts["streams"]["train"]["length_bias"] is None


def test_a_limit_reads_evenly_over_all_sources() -> None:
    first, second = random_pairs(300, seed=1), random_pairs(100, seed=2)
    found = examine({"train": [first, second]}, Plan(limit=40, sample=10)).report["streams"]["train"]
    assert (found["rows"]["read"], found["rows"]["total"], found["rows"]["all_read"]) == (40, 400, False)
    assert (found["lengths"]["looked"], found["lengths"]["of"], found["lengths"]["all"]) == (10, 40, False)
    kept = [first[place] for place in range(0, 300, 10)] + [second[place] for place in range(0, 100, 10)]
    characters = plain_quantiles([len(row["chosen"]) for row in kept])
    assert found["characters"]["winner"] == pytest.approx(characters, abs=2e-3)
    assert [source["rows"] for source in found["sources"]] == [300, 100]


def test_overlap_with_eval_and_benchmarks(tmp_path: Path) -> None:
    train, held_out = random_pairs(50, seed=1), random_pairs(10, seed=9)
    held_out += [{**train[7], "prompt": "  " + train[7]["prompt"].lower()}, train[8], train[8]]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in train]
    asked_before = [{"question": train[place]["prompt"], "answer": "x"} for place in (1, 2)]
    benchmark = write(tmp_path / "bench.jsonl", [*asked_before, {"question": "new", "answer": "y"}])
    known = {" ".join(row["prompt"].lower().split()) for row in train}
    asked = {" ".join(row["prompt"].lower().split()) for row in held_out}
    report = examine({"train": [train], "eval": [held_out]}, Plan(benchmarks=[benchmark])).report
    assert (report["overlap"]["count"], report["overlap"]["of"]) == (len(known & asked), len(asked))
    places = [tuple(int(name.rpartition(" ")[2]) for name in pair) for pair in report["overlap"]["examples"]]
    same = [(train[first]["prompt"], held_out[second]["prompt"]) for first, second in places]
    assert len(same) == min(3, len(known & asked))
    assert all(" ".join(one.lower().split()) == " ".join(other.lower().split()) for one, other in same)
    assert (report["benchmarks"][0]["count"], report["benchmarks"][0]["of"]) == (2, 3)
    # The question of a conversation is its last user turn.
    assert examine({"train": [chats]}, Plan(benchmarks=[benchmark])).report["benchmarks"][0]["count"] == 2


def test_named_benchmarks() -> None:
    found = Benchmarks()
    for place, row in enumerate(
        [
            {"source": "truthful_qa"},
            {"source": ["lmsys", "TruthfulQA"]},
            {"subset": "alpacaeval-easy"},
            {"source": "ultrachat"},
        ]
    ):
        found.row(row, RowId("r", place))
    found.row({"in_gsm8k_train": True}, RowId("r", 4))
    found.row({"in_gsm8k_train": False}, RowId("r", 5))
    named = {one["name"]: one["count"] for one in found.report(6)["named"]}
    assert named == {"TruthfulQA": 2, "AlpacaEval": 1, "GSM8K (its train split)": 1}


# -- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("As an AI language model, I have no feelings.", True),
        ("Unfortunately I cannot provide that.", True),
        ("I am unable to say.", True),
        ("I'm sorry to hear about your cat. Here is what to do:", False),
        ("I can't wait to tell you! First, boil water.", False),
        ("Sure. " + "Words. " * 40 + "I cannot help with more.", False),
        ("", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert refuses(text) is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat sat on the mat and it was happy with the result.", "English"),
        ("Der Hund ist nicht im Haus, und das ist f\u00fcr mich ein Problem.", "German"),
        ("Le chat est dans la maison et les enfants ne sont pas l\u00e0.", "French"),
        ("El perro est\u00e1 en la casa, pero los ni\u00f1os no lo saben.", "Spanish"),
        ("\u041a\u043e\u0448\u043a\u0430 \u0441\u0438\u0434\u0438\u0442 \u0434\u043e\u043c\u0430", "Cyrillic script"),
        ("\u732b\u306f\u5bb6\u306b\u3044\u307e\u3059", "Japanese"),
        ("\u732b\u5728\u5bb6\u91cc", "Chinese"),
        ("\uace0\uc591\uc774\uac00 \uc9d1\uc5d0 \uc788\ub2e4", "Korean"),
        ("12 + 30 = 42", "no letters"),
        ("foo bar qux", "Latin script, unclear"),
    ],
)
def test_language(text: str, expected: str) -> None:
    assert language(text) == expected


# -- limits and errors ------------------------------------------------------------------------------------------------


def test_limits() -> None:
    rows = faulty_rows()
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", 110)
    held_out = [rows[0], random_pairs(1, seed=77)[0]]
    objects = [row for row in rows if not isinstance(row, str)]
    report = examine({"train": [objects], "eval": [held_out]}, Plan(tokenise=tokenise)).report
    judged = {
        (one["name"], one["stream"]): one for one in judge(report, Limits(longer=0.5, refusals=0.0, benchmarks=0.0))
    }
    train = report["streams"]["train"]
    assert judged["bad", "train"]["value"] == bad_share(train) == pytest.approx(5 / 298)
    assert judged["bad", "train"]["crossed"]
    assert not judged["bad", "eval"]["crossed"]
    assert judged["overlap", "eval"]["value"] == 0.5
    assert judged["truncated", "train"]["value"] == train["lengths"]["truncation"]["too_long"]["share"] > 0.05
    assert judged["longer", "train"]["crossed"]
    assert judged["refusals", "train"]["crossed"]
    assert judged["benchmarks", "train"]["value"] == pytest.approx(2 / 298)
    lines = crossed(list(judged.values()))
    assert any(line.startswith("train: 1.68% of the rows are bad; the limit `bad` is 1.00%") for line in lines)
    loose = Limits(bad=0.02, duplicates=0.5, overlap=None, truncated=1.0)
    assert crossed(judge(report, loose)) == []
    assert not any(one["name"] == "overlap" for one in judge(report, loose))
    with pytest.raises(ConfigError, match="share between 0 and 1"):
        Limits(bad=2)


def test_rows_whose_tokens_are_bad_count_as_bad() -> None:
    rows = random_pairs(20, seed=4)
    rows[3] = {"prompt": "q", "chosen": " yes</s>", "rejected": " yes"}  # equal once the end token is taken off
    report = examine({"train": [rows]}, Plan(tokenise=Tokeniser(tiny_tokenizer(), "pairs", 200))).report
    train = report["streams"]["train"]
    assert (train["rows"]["readable"], train["rows"]["kept"]) == (20, 19)
    assert (train["rows"]["bad"], train["lengths"]["bad"]) == (1, 1)
    assert bad_share(train) == pytest.approx(1 / 20)
    assert judge(report, Limits())[0]["value"] == pytest.approx(1 / 20)


def test_without_tokens_truncation_is_not_known() -> None:
    judged = {one["name"]: one for one in judge(examine({"train": [random_pairs(5)]}, Plan()).report, Limits())}
    assert judged["truncated"]["value"] is None
    assert not judged["truncated"]["crossed"]


def test_errors() -> None:
    with pytest.raises(DataError, match="no such file"):
        examine({"train": ["./nowhere.jsonl"]}, Plan())
    with pytest.raises(DataError, match="the method needs"):
        examine({"train": [[{"prompt": "p", "completion": "c", "label": True}]]}, Plan(view="pairs"))
