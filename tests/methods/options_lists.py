"""Ranges of divergences and lists: see `test_options.py`."""

from __future__ import annotations

from typing import Any

Case = tuple[str, dict[str, Any]]

REFUSED: list[Case] = [
    ("f_dpo", {"beta": 0}),
    *[("f_dpo", {"divergence": bad}) for bad in ("chi2", "js_divergence", "hellinger", "tv")],
    *[("f_dpo", {"alpha": bad}) for bad in (-0.1, 0, 1, 1.1)],
    ("chi_po", {"beta": 0}),
    ("chi_po", {"R_max": 0}),
    *[("chi_po", {"gamma": bad}) for bad in (0, 1.001)],
    *[("chi_po", {"max_exponent": bad}) for bad in (0, 80.1)],
    ("exo_pref", {"beta_pi": 0}),
    *[("exo_pref", {"eps": bad}) for bad in (0, 0.5)],
    ("exo_rw", {"beta_pi": 0}),
    ("exo_rw", {"beta_r": 0}),
    ("list_hinge", {"beta": 0}),
    ("list_hinge", {"reduction": "none"}),
    ("lipo_lambda", {"beta": 0}),
    ("lipo_lambda", {"reduction": "none"}),
    ("list_softmax", {"beta": 0}),
    ("pl_dpo", {"beta": 0}),
    ("brain", {"T": 0}),
    ("brain", {"goodness": "argmax"}),
    ("brain", {"proposal": "policy"}),
]

ADMITTED: list[Case] = [
    *[("f_dpo", {"divergence": "alpha", "beta": 0.01, "alpha": good}) for good in (1e-6, 1 - 1e-6)],
    ("chi_po", {"gamma": 1, "max_exponent": 80}),
    ("exo_pref", {"eps": 0.499}),
]

CAUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("f_dpo", {"divergence": "forward_kl"}, {"divergence": "forward_kl", "beta": 0.01}),
    ("f_dpo", {"divergence": "alpha", "beta": 0.1}, {"divergence": "alpha", "beta": 0.099}),
    ("f_dpo", {"alpha": 0.3}, {"divergence": "alpha", "beta": 0.01, "alpha": 0.3}),
]
