"""Ranges of the options of the pairwise family; see `test_options.py`."""

from __future__ import annotations

from typing import Any

ONLY_BETA = ("cdpo", "rdpo", "dpo_hinge", "cpo", "dpo_norm", "r_dpo", "dpop", "cal_dpo", "aot", "aot_unpaired")
ONLY_BETA += ("apo_zero", "apo_down", "discopop", "infonca", "nca", "soft_dpo", "smpo", "robust_bt")

REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"beta": bad}) for name in ONLY_BETA for bad in (0, -0.1)],
    *[(name, {"eps": bad}) for name in ("cdpo", "rdpo", "aot", "aot_unpaired") for bad in (-0.01, 0.5, 0.7)],
    ("slic", {"delta": -0.1}),
    ("slic", {"lambda": -0.1}),
    ("slic", {"baseline": "samples"}),
    ("cpo", {"lambda": -0.1}),
    ("r_dpo", {"alpha": -0.01}),
    ("dpop", {"lambda": -1}),
    ("cal_dpo", {"c": -0.5}),
    ("beta_dpo", {"beta0": 0}),
    ("beta_dpo", {"a": -0.1}),
    *[("beta_dpo", {"rho": bad}) for bad in (0, 1.01)],
    *[("beta_dpo", {"m": bad}) for bad in (-0.1, 1)],
    *[("discopop", {"tau": bad}) for bad in (0, 1)],
    ("infonca", {"alpha": 0}),
    ("nca", {"alpha": 0}),
    *[(name, {"T": 0}) for name in ("soft_dpo", "smpo")],
    *[(name, {"label": "score"}) for name in ("soft_dpo", "smpo")],
    ("smpo", {"c": 0}),
    ("robust_bt", {"kind": "hard"}),
    *[("robust_bt", {"floor": bad}) for bad in (-0.1, 1.1)],
    *[("robust_bt", {"ceiling": bad}) for bad in (-0.1, 1.1)],
    ("robust_bt", {"ceiling": 0.4, "floor": 0.5}),
    ("robust_bt", {"kind": "debias", "floor": 0.2}),
    ("robust_bt", {"kind": "soft", "ceiling": 0.9}),
]

ADMITTED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"eps": 0}) for name in ("cdpo", "rdpo", "aot", "aot_unpaired")],
    ("slic", {"delta": 0, "lambda": 0}),
    ("cpo", {"lambda": 0}),
    ("r_dpo", {"alpha": 0}),
    ("dpop", {"lambda": 0}),
    ("cal_dpo", {"c": 0}),
    ("beta_dpo", {"a": 0, "rho": 1, "m": 0}),
    ("robust_bt", {"floor": 0, "ceiling": 1}),
    ("robust_bt", {"floor": 0.7, "ceiling": 0.7}),
    ("robust_bt", {"kind": "debias"}),
]

CAUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rdpo", {"eps": 0.401}, {"eps": 0.4}),
    ("dpo_norm", {"beta": 0.999}, {"beta": 1}),
    ("cal_dpo", {"beta": 0.00999}, {"beta": 0.01}),
]
