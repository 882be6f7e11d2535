"""Ranges of the options of the one-sided and regularised methods; see `test_options.py`."""

from __future__ import annotations

from typing import Any

REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("d2o", {"alpha": 0}),
    ("d2o", {"beta": 0}),
    ("spin", {"lambda": 0}),
    ("seppo", {"beta": 0}),
    ("vpo", {"alpha": -0.1}),
    ("vpo", {"beta": 0}),
    ("vpo", {"sign": 0}),
    ("vpo", {"baseline": "rejected"}),
    ("flex_dpo", {"beta_w": 0}),
    ("flex_dpo", {"beta_l": -0.1}),
    ("flex_dpo", {"gamma": -0.1}),
    ("flex_dpo", {"sft_reduction": "mean"}),
    ("hypo", {"lambda": -0.1}),
    ("hypo", {"beta": 0}),
    ("hypo", {"baseline": "mean"}),
    ("hypo", {"live": -1}),
    ("hypo", {"live": 2, "max_new_tokens": 0}),
    ("spac", {"eta": 0}),
    ("spac", {"rho": -0.1}),
    ("spac", {"kind": "hinge"}),
    ("demo_reg", {"beta": 0}),
    ("demo_reg", {"mu": -0.1}),
    ("demo_reg", {"sft_reduction": "mean"}),
    ("mapl", {"beta": 0}),
    ("mapl", {"lambda_1": -0.1}),
    ("mapl", {"lambda_2": -0.1}),
    ("mapl", {"score_prompt_tokens": "yes"}),
]

ADMITTED: list[tuple[str, dict[str, Any]]] = [
    ("vpo", {"alpha": 0, "sign": 1}),
    ("flex_dpo", {"beta_l": 0, "gamma": 0}),
    ("hypo", {"lambda": 0}),
    ("spac", {"rho": 0}),
    ("demo_reg", {"mu": 0}),
    ("mapl", {"lambda_1": 0, "lambda_2": 0}),
]

CAUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("vpo", {"alpha": 0.101}, {"alpha": 0.1}),
    ("vpo", {"sign": 1}, {"sign": -1}),
    ("flex_dpo", {"beta_l": 0.101}, {"beta_l": 0.1}),
    ("spac", {"kind": "linear"}, {"kind": "linear", "rho": 0}),
]
