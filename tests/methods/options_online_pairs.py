"""Ranges of the options of the online methods on pairs and of those of rounds; see `test_options.py`."""

from __future__ import annotations

from typing import Any

REFUSED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"beta": bad}) for name in ("online_dpo", "xpo", "alpha_spin") for bad in (0, -0.1)],
    *[(name, {"eta": bad}) for name in ("rebel", "sppo", "inpo", "dno", "dno_prct") for bad in (0, -1.0)],
    ("online_dpo", {"loss": "logistic"}),
    *[(name, {"label": "soft"}) for name in ("online_dpo", "online_ipo")],
    ("rebel", {"anchor": "previous"}),
    ("online_ipo", {"tau": 0}),
    *[(name, {"mix": bad}) for name in ("online_ipo", "nash_md") for bad in (-0.01, 1.01)],
    ("xpo", {"alpha": -1e-9}),
    ("nash_md", {"tau": -1e-9}),
    ("inpo", {"tau": -1e-9}),
    ("inpo", {"eta": 0.01, "tau": 0.01}),
    ("inpo", {"eta": 0.01, "tau": 0.02}),
    ("dno_prct", {"sft_weight": -1e-9}),
    *[("alpha_spin", {"alpha": bad}) for bad in (-0.01, 1.01)],
]

ADMITTED: list[tuple[str, dict[str, Any]]] = [
    *[(name, {"mix": good}) for name in ("online_ipo", "nash_md") for good in (0, 1)],
    ("rebel", {"anchor": "reference"}),
    ("xpo", {"alpha": 0}),
    ("nash_md", {"tau": 0}),
    ("inpo", {"tau": 0}),
    ("inpo", {"eta": 0.01, "tau": 0.00999}),
    ("dno_prct", {"sft_weight": 0}),
    *[("alpha_spin", {"alpha": good}) for good in (0, 1)],
]

CAUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("online_dpo", {"beta": 1.001}, {"beta": 1}),
    ("online_dpo", {"beta": 5.0}, {"beta": 5.0, "loss": "ipo"}),
    ("online_ipo", {"label": "hard"}, {"label": "prob"}),
    ("nash_md", {"tau": 0}, {"tau": 1e-9}),
]
