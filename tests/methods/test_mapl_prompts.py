"""mapl with scored prompts, from a row to the loss, against plain forwards of prompt and answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from align.data.groups import RowId
from align.data.readers import reader_for
from align.data.tokenise import Tokeniser
from align.methods import METHODS
from align.methods.base import terms_of
from align.testing.steps import engine_for, role_module
from align.testing.tiny import tiny_model, tiny_tokenizer
from tests.methods.loops import softplus

ROW = {
    "prompt": "Name a colour.",
    "chosen": " Blue.",
    "rejected": " A dog is no colour, is it?",
    "contrasts": [
        {
            "kind": "intra",
            "completion": " Blue.",
            "better": "Name a colour. Be brief.",
            "worse": "Name a colour in verse.",
        },
        {"kind": "inter", "better": "Name a colour. Be brief.", "worse": "Name a colour at length, please."},
    ],
}
BETA = 0.3


def whole(models: list[Any], prompt: str, answer: str, joint: bool) -> float:
    """h of the answer, or of prompt and answer after BOS, by one forward of each model."""
    tokenizer = tiny_tokenizer()
    start = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([[*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]])
    sums = []
    for model in models:
        logp = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        sums.append(float(logp[0 if joint else len(start) - 1 :].sum()))
    return sums[0] - sums[1]


@pytest.mark.parametrize("joint", [False, True])
def test_intra_is_of_prompt_and_answer_and_nothing_else_changes(joint: bool) -> None:
    method = METHODS.get("mapl")(beta=BETA, score_prompt_tokens=joint)
    models = [tiny_model("qwen3", seed=seed) for seed in (1, 2)]
    engine = engine_for(method, role_module(models[0], method), models[1], 1 << 20)
    tokenise = Tokeniser(tiny_tokenizer(), "pairs", needs=method.requires())
    group = tokenise(reader_for([ROW], where="made").reading(method.requires())(ROW, RowId("made", 0)))
    with torch.no_grad():
        (micro,) = engine.share([group]).micros
        view = engine.view(micro.groups, engine.outputs(micro), {}, 0)
        found = {name: float(term.values) for name, term in terms_of(method, view).items()}
        plain = [tiny_model("qwen3", seed=seed) for seed in (1, 2)]
        intra, inter = ROW["contrasts"]
        h = {name: whole(plain, intra[name], intra["completion"], joint) for name in ("better", "worse")}
        pair = {side: whole(plain, ROW["prompt"], ROW[side], False) for side in ("chosen", "rejected")}
        margin = {
            name: whole(plain, inter[name], ROW["chosen"], joint) - whole(plain, inter[name], ROW["rejected"], joint)
            for name in ("better", "worse")
        }
    assert found["intra"] == pytest.approx(softplus(-BETA * (h["better"] - h["worse"])), abs=1e-4)
    assert found["inter"] == pytest.approx(softplus(-BETA * (margin["better"] - margin["worse"])), abs=1e-4)
    assert found["preference"] == pytest.approx(softplus(-BETA * (pair["chosen"] - pair["rejected"])), abs=1e-4)
    answers = [int(one.mask.sum()) for one in group.completions if not one.role]
    assert answers == [
        len(tiny_tokenizer()(ROW["prompt"] + ROW[side])["input_ids"])
        - len(tiny_tokenizer()(ROW["prompt"])["input_ids"])
        + 1
        for side in ("chosen", "rejected")
    ]


def test_a_caution_where_it_changes_nothing() -> None:
    assert METHODS.get("mapl")(score_prompt_tokens=True).cautions() == ()
    assert "lambda_1" in METHODS.get("mapl")(score_prompt_tokens=True, lambda_1=0.0).cautions()[0]
