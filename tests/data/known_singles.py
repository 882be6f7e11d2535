"""Rows of the known data sets that label single answers, or the steps of one."""

from __future__ import annotations

from tests.data.known_rows import CHAT, Case, user, whole

STEPS = {"prompt": "q", "completions": ["one", "two"], "labels": [True, False]}
UNPAIRED = [  # `winner`: the text of a desirable answer; `loser`: that of an undesirable one, of a second row
    (Case("ultrafeedback_kto", {"prompt": "q", "completion": "good", "label": True, "rating": 5}, CHAT, "good"), True),
    (Case("kto_mix", {"prompt": [user("q")], "completion": whole("bad"), "label": False}, CHAT, "bad"), False),
    (Case("kto_mix", {"completion": whole("good"), "label": True}, CHAT, "good"), True),
    (Case("prm", STEPS, "q", "one\ntwo"), False),
    (Case("prm", {**STEPS, "labels": [True, True]}, "q", "one\ntwo"), True),
    (
        Case(
            "math_shepherd",
            {"input": "q Step 1: a \u043a\u0438\nStep 2: b \u043a\u0438", "label": "q Step 1: a +\nStep 2: b -"},
            "q",
            "Step 1: a\nStep 2: b",
        ),
        False,
    ),
    (
        Case(
            "prm800k",
            {
                "question": {"problem": "q"},
                "label": {
                    "steps": [
                        {
                            "completions": [{"text": "x", "rating": -1}, {"text": "one", "rating": 1}],
                            "chosen_completion": 1,
                        },
                        {"completions": [{"text": "two", "rating": 0}], "chosen_completion": 0},
                    ]
                },
            },
            "q",
            "one\ntwo",
        ),
        True,
    ),
]
