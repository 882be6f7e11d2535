"""One tiny row for each known data set, in its own columns, and what must be read from it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


@dataclass(frozen=True)
class Case:
    """`winner`, `loser`: texts of the better and the worse (or worst) answer; `prompt` as `Group.prompt`."""

    name: str
    row: Row
    prompt: Any
    winner: str
    loser: str = ""
    margin: float | None = None
    tie: Row | None = None
    options: Row = field(default_factory=dict)
    by_columns: bool = True
    hub: str = ""


def whole(answer: str) -> list[Row]:
    return [user("q"), assistant(answer)]


CHAT = (user("q"),)
FLAGS = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
PKU_ROW = {
    "prompt": "q",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 1,
    "safer_response_id": 0,
}
HELPSTEER_ROW = {
    "prompt": "q",
    "response": "good",
    "helpfulness": 4,
    "correctness": 4,
    "coherence": 4,
    "complexity": 1,
    "verbosity": 1,
}
HELPSTEER_LOW = {**HELPSTEER_ROW, "response": "bad", "helpfulness": 1}
HELPSTEER_TWIN = {**HELPSTEER_ROW, "response": "as good"}
HELPSTEER_PAIR = {"first": HELPSTEER_LOW, "second": HELPSTEER_ROW}


def rated(response: str, ratings: list[str], overall: float) -> Row:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {aspect: {"Rating": rating} for aspect, rating in zip(aspects, ratings, strict=True)}
    return {"model": "m", "response": response, "annotations": annotations, "overall_score": overall}


ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "q",
    "models": ["m"],
    # the faulty overall score of the worst answer is the highest
    "completions": [
        rated("mid", ["3", "N/A", "3", "4"], 6.0),
        rated("worst", ["1", "1", "1", "1"], 10.0),
        rated("best", ["5", "5", "4", "5"], 8.5),
    ],
}
H4 = {
    "prompt": "q",
    "prompt_id": "i",
    "chosen": whole("good"),
    "rejected": whole("bad"),
    "messages": whole("good"),
    "score_chosen": 8.0,
    "score_rejected": 6.5,
}
NECTAR = {
    "prompt": "\n\nHuman: q\n\nAssistant: ",
    "answers": [
        {"answer": "third", "model": "a", "rank": 3.0},
        {"answer": "first", "model": "b", "rank": 1.0},
        {"answer": "second", "model": "c", "rank": 2.0},
    ],
    "turns": 1,
    "num_responses": 3,
    "source": ["s"],
    "good_natured": True,
}
SHP = {
    "post_id": "p",
    "domain": "d",
    "history": "q",
    "human_ref_A": "A",
    "human_ref_B": "B",
    "score_A": 9,
    "score_B": 2,
    "labels": 1,
    "score_ratio": 4.5,
}
ON_POLICY = {
    "prompt_id": "i",
    "prompt": "q",
    "all_generated_responses": ["mid", "good", "bad"],
    "all_rm_scores": [0.2, 0.3, 0.1],
    "chosen": whole("good"),
    "rejected": whole("bad"),
}
ARENA_140K = {
    "model_a": "x",
    "model_b": "y",
    "winner": "model_b",
    "conversation_a": [
        {"role": "user", "content": [{"type": "text", "text": "q", "image": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a", "image": None}]},
    ],
    "conversation_b": [
        {"role": "user", "content": [{"type": "text", "text": "q", "image": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b", "image": None}]},
    ],
}
HS2_PREFERENCE = {
    "split": "train",
    "prompt": "one<extra_id_1>Assistant\ntwo\n<extra_id_1>User\nthree",
    "response_1": "first",
    "response_2": "second",
    "preference_strength": -2,
    "preference_statement": "s",
}
HS3 = {
    "domain": "code",
    "language": "python",
    "context": [user("q")],
    "response1": "first",
    "response2": "second",
    "overall_preference": 3,
    "individual_preference": [{"score": 3}],
}
SUMMARIZE = {
    "info": {"id": "i", "post": "long", "title": "T", "subreddit": "s"},
    "summaries": [{"text": " short", "policy": "p"}, {"text": " other", "policy": "p"}],
    "choice": 1,
    "worker": "w",
}
STACK = {
    "qid": 1,
    "question": "<p>q</p>",
    "answers": [
        {"answer_id": 1, "text": "<p>bad</p>", "pm_score": 1, "selected": False},
        {"answer_id": 2, "text": "<p>use <code>x &lt; 1</code></p>", "pm_score": 3, "selected": True},
    ],
}
ORCA_DISTILABEL = {
    "system": "s",
    "input": "q",
    "chosen": "good",
    "rejected": "bad",
    "status": "swapped",
    "chosen_score": 9.0,
    "in_gsm8k_train": False,
}
JSON_TURNS = {
    "id": 1,
    "model_a": "x",
    "model_b": "y",
    "prompt": json.dumps(["q", "r"]),
    "response_a": json.dumps(["a1", "a2"]),
    "response_b": json.dumps(["b1", "b2"]),
    **FLAGS,
}
SYSTEM_CHAT = ({"role": "system", "content": "s"}, user("q"))
TLDR = "SUBREDDIT: r/s\n\nTITLE: T\n\nPOST: long\n\nTL;DR:"

PAIRS = [
    Case("ultrafeedback_binarized", H4, CHAT, "good", "bad", 1.5, {**H4, "score_rejected": 8.0}),
    Case(
        "ultrafeedback_binarized_trl",
        {name: H4[name] for name in ("chosen", "rejected", "score_chosen", "score_rejected")},
        CHAT,
        "good",
        "bad",
        1.5,
    ),
    Case(
        "argilla_ultrafeedback",
        {
            "source": "x",
            "instruction": "q",
            "chosen_response": "good",
            "rejected_response": "bad",
            "chosen_avg_rating": 4.5,
            "rejected_avg_rating": 2.5,
            "chosen_model": "m",
        },
        CHAT,
        "good",
        "bad",
        2.0,
    ),
    Case(
        "argilla_ultrafeedback_cleaned",
        {
            "source": "x",
            "prompt": "q",
            "chosen": whole("good"),
            "rejected": whole("bad"),
            "chosen-rating": 5.0,
            "rejected-rating": 3.0,
            "chosen-model": "m",
            "rejected-model": "n",
        },
        CHAT,
        "good",
        "bad",
        2.0,
    ),
    Case(
        "hh_rlhf",
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
        "\n\nHuman: q\n\nAssistant:",
        " good",
        " bad",
        by_columns=False,
    ),
    Case(
        "hh_rlhf_trl",
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        CHAT,
        "good",
        "bad",
        by_columns=False,
    ),
    Case(
        "skywork",
        {"chosen": whole("good"), "rejected": whole("bad"), "source": "x"},
        CHAT,
        "good",
        "bad",
        by_columns=False,
    ),
    Case("orca_distilabel", ORCA_DISTILABEL, SYSTEM_CHAT, "good", "bad", None, {**ORCA_DISTILABEL, "status": "tie"}),
    Case("orca", {"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, SYSTEM_CHAT, "good", "bad"),
    Case("orca_h4", {"chosen": whole("good"), "rejected": whole("bad")}, CHAT, "good", "bad", by_columns=False),
    Case(
        "stack_exchange_paired",
        {"qid": 1, "question": "q", "date": "d", "metadata": ["m"], "response_j": "good", "response_k": "bad"},
        CHAT,
        "good",
        "bad",
    ),
    Case(
        "dpo_mix_7k",
        {
            "dataset": "d",
            "chosen": [*whole("a"), user("r"), assistant("good")],
            "rejected": [*whole("a"), user("r"), assistant("bad")],
            "chosen_rating": 5.0,
            "rejected_rating": 4.0,
        },
        (*whole("a"), user("r")),
        "good",
        "bad",
        1.0,
    ),
    Case(
        "capybara",
        {
            "source": "s",
            "prompt": "q",
            "chosen": [*whole("a"), user("r"), assistant("good")],
            "rejected": [*whole("a"), user("r"), assistant("bad")],
            "rating_chosen": 5,
            "rating_rejected": 2,
            "chosen_model": "m",
            "rejected_model": "n",
        },
        (*whole("a"), user("r")),
        "good",
        "bad",
        3.0,
    ),
    Case(
        "orpo_dpo_mix",
        {"source": "s", "chosen": whole("good"), "rejected": whole("bad"), "prompt": "q", "question": "q"},
        CHAT,
        "good",
        "bad",
    ),
    Case(
        "tulu3",
        {
            "id": "1",
            "source": "s",
            "prompt": "q",
            "chosen": [*whole("a"), user("r"), assistant("good")],
            "rejected": [*whole("a"), user("r"), assistant("bad")],
        },
        (*whole("a"), user("r")),
        "good",
        "bad",
        by_columns=False,
    ),
    Case(
        "snorkel",
        {**ON_POLICY, "all_rm_scores": [9.0, 1.0, 2.0]},
        CHAT,
        "good",
        "bad",
        by_columns=False,
    ),
    Case(
        "summarize_carper",
        {"prompt": "POST: long", "chosen": "TL;DR: good", "rejected": "TL;DR: bad"},
        "POST: long\n\nTL;DR:",
        " good",
        " bad",
        by_columns=False,
    ),
    Case(
        "tldr_preference",
        {"prompt": "POST: long\n\nTL;DR:", "chosen": " good", "rejected": " bad"},
        "POST: long\n\nTL;DR:",
        " good",
        " bad",
        by_columns=False,
    ),
    Case(
        "truthy_dpo",
        {"id": "1", "source": "s", "system": "", "prompt": "q", "chosen": "good", "rejected": "bad"},
        CHAT,
        "good",
        "bad",
        by_columns=False,
    ),
    Case(
        "gutenberg_dpo",
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        CHAT,
        "good",
        "bad",
        by_columns=False,
    ),
    Case(
        "code_preference_pairs",
        {"input": "q", "accepted": "good", "rejected": "bad", "ID": 1},
        CHAT,
        "good",
        "bad",
        by_columns=False,
    ),
    Case(
        "step_dpo",
        {
            "dataset": "d",
            "prompt": "q",
            "initial_reason_steps": "Step 1: x\n",
            "chosen": "Step 2: good",
            "rejected": "Step 2: bad",
            "full_chosen": "Step 2: good\nStep 3: y",
            "full_rejected": "Step 2: bad\nStep 3: y",
            "answer": "4",
        },
        "q\nStep 1: x\n",
        "Step 2: good",
        "Step 2: bad",
    ),
    Case(
        "helpsteer2_preference",
        HS2_PREFERENCE,
        (user("one"), assistant("two"), user("three")),
        "first",
        "second",
        2.0,
        {**HS2_PREFERENCE, "preference_strength": 0},
    ),
    Case("helpsteer3", HS3, CHAT, "second", "first", 3.0, {**HS3, "overall_preference": 0}),
    Case("helpsteer3", {**HS3, "overall_preference": -1}, CHAT, "first", "second", 1.0),
    Case("helpsteer2", HELPSTEER_PAIR, CHAT, "good", "bad", 3.0, {"first": HELPSTEER_ROW, "second": HELPSTEER_TWIN}),
    Case("pku_saferlhf", PKU_ROW, CHAT, "one", "zero", options={"axis": "helpful"}),
    Case("pku_saferlhf", PKU_ROW, CHAT, "zero", "one", options={"axis": "safer"}),
    Case("pku_saferlhf", PKU_ROW, CHAT, "zero", "one", options={"axis": "safer_then_better"}),
    Case(
        "pku_saferlhf",
        {**PKU_ROW, "is_response_1_safe": True},
        CHAT,
        "one",
        "zero",
        options={"axis": "safer_then_better"},
    ),
    Case(
        "pku_single",
        {"prompt": "q", "response_0": "zero", "response_1": "one", "better_response_id": 0},
        CHAT,
        "zero",
        "one",
        by_columns=False,
    ),
    Case("shp", SHP, CHAT, "A", "B"),
    Case("shp", {**SHP, "labels": 0}, CHAT, "B", "A", hub="stanfordnlp/SHP-2"),
    Case("arena", ARENA_140K, CHAT, "b", "a", None, {**ARENA_140K, "winner": "both_bad"}),
    Case("arena", {**ARENA_140K, "winner": "model_a"}, CHAT, "a", "b", None, {**ARENA_140K, "winner": "tie"}),
    Case(
        "arena",
        {"conversation_a": whole("a"), "conversation_b": whole("b"), "winner": "model_a", "turn": 1},
        CHAT,
        "a",
        "b",
        None,
        {"conversation_a": whole("a"), "conversation_b": whole("b"), "winner": "tie (bothbad)"},
        hub="lmsys/chatbot_arena_conversations",
    ),
    Case(
        "arena_flags",
        JSON_TURNS,
        CHAT,
        "b1rb2",
        "a1ra2",
        None,
        {**JSON_TURNS, "winner_model_b": 0, "winner_tie": 1},
    ),
    Case("summarize_feedback", SUMMARIZE, TLDR, " other", " short"),
]
LISTS = [
    Case("ultrafeedback", ULTRAFEEDBACK, CHAT, "best", "worst"),
    Case("on_policy_ultrafeedback", ON_POLICY, CHAT, "good", "bad", by_columns=False),
    Case("nectar", NECTAR, "\n\nHuman: q\n\nAssistant:", " first", " third"),
    Case("nectar", NECTAR, CHAT, "first", "third", options={"transcripts": "messages"}),
    Case("stack_exchange", STACK, CHAT, "use x < 1", "bad"),
    Case(
        "reward_bench_2",
        {
            "id": "1",
            "prompt": "q",
            "chosen": ["good"],
            "rejected": ["bad", "worse"],
            "num_correct": 1,
            "num_incorrect": 2,
            "subset": "Factuality",
        },
        CHAT,
        "good",
        "bad",
        options={"purpose": "eval"},
    ),
]
EVALUATION = [
    Case(
        "reward_bench",
        {
            "id": 1,
            "prompt": "q",
            "chosen": "good",
            "chosen_model": "m",
            "rejected": "bad",
            "rejected_model": "n",
            "subset": "alpacaeval-easy",
        },
        CHAT,
        "good",
        "bad",
        options={"purpose": "eval"},
    )
]
