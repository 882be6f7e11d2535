"""Ranges of policy gradients on rollouts: see `test_options.py`."""

from __future__ import annotations

from typing import Any

Case = tuple[str, dict[str, Any]]

GRPO_LIKE = ("grpo", "dr_grpo", "dapo", "gspo")
REINFORCE = ("reinforce_pp", "reinforce_pp_baseline")

_OF_GRPO: list[dict[str, Any]] = [
    {"num_generations": 1},
    {"beta": -0.01},
    {"epsilon": 0},
    {"epsilon": 1},
    {"epsilon_high": 0},
    {"delta": 1},
    {"aggregation": "mean"},
    {"max_completion_length": 0},
    {"importance_level": "answer"},
    {"kl_estimator": "k4"},
    {"scale": "global"},
    {"ddof": 2},
    {"std_eps": 0},
    {"dynamic_sampling": "no"},
    {"mask_truncated": 1},
    {"overlong_cache": -1},
    {"max_completion_length": 10, "overlong_cache": 11},
    {"sampler_correction": "truncate"},
    {"sampler_cap": 1},
    {"epsilon_high": 0.5, "delta": 1.5},
]
_OF_REINFORCE: list[dict[str, Any]] = [
    {"beta": -0.01},
    *({"gamma": bad} for bad in (0, 1.01)),
    *({"epsilon": bad} for bad in (0, 1)),
    {"whiten_ddof": 2},
    {"no_std_norm": 0},
    {"missing_eos_penalty": -1},
    {"reward_clip": 0},
    {"kl_target": 0},
    {"kl_horizon": 0},
    {"sampler_correction": "none"},
    {"sampler_cap": 1},
]

REFUSED: list[Case] = [
    *((name, options) for name in GRPO_LIKE for options in _OF_GRPO),
    ("dapo", {"overlong_cache": 0, "max_completion_length": 0}),
    ("rloo", {"num_generations": 1}),
    ("rloo", {"beta": -0.01}),
    ("rloo", {"ratio": "token"}),
    *[("rloo", {"epsilon": bad}) for bad in (0, 1)],
    ("rloo", {"missing_eos_penalty": -1}),
    ("rloo", {"reward_clip": 0}),
    ("rloo", {"kl_target": 0}),
    ("rloo", {"kl_horizon": 0}),
    ("reinforce_pp", {"num_generations": 0}),
    ("reinforce_pp_baseline", {"num_generations": 1}),
    *((name, options) for name in REINFORCE for options in _OF_REINFORCE),
]

ADMITTED: list[Case] = [
    *[(name, {"beta": 0, "num_generations": 2}) for name in (*GRPO_LIKE, "rloo", "reinforce_pp_baseline")],
    *[(name, {"max_completion_length": 10, "overlong_cache": 10}) for name in GRPO_LIKE],
    ("grpo", {"epsilon": 0.2, "delta": 1.21}),
    ("grpo", {"max_completion_length": 1}),
    ("rloo", {"reward_clip": 0.5, "kl_target": 0.5}),
    ("reinforce_pp", {"reward_clip": 0.5, "kl_target": 0.5, "kl_horizon": 1}),
    ("dapo", {"overlong_cache": 0, "max_completion_length": 1}),
    ("rloo", {"missing_eos_penalty": 0, "kl_horizon": 1, "kl_target": 0.1}),
    ("reinforce_pp", {"num_generations": 1, "gamma": 1, "kl_target": 6, "kl_horizon": 100}),
]

CAUTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("grpo", {"kl_estimator": "k1"}, {"kl_estimator": "k2"}),
    ("grpo", {"kl_estimator": "k1"}, {"kl_estimator": "k1", "beta": 0}),
    ("grpo", {"importance_level": "sequence"}, {"importance_level": "sequence", "epsilon": 0.05}),
    ("gspo", {"epsilon_high": 0.051}, {"epsilon_high": 0.05}),
    ("gspo", {"epsilon": 0.2, "epsilon_high": None}, {"epsilon": 0.2}),
    ("grpo", {"max_completion_length": 512}, {"max_completion_length": 512, "aggregation": "const"}),
    ("grpo", {"max_completion_length": 512}, {"max_completion_length": 512, "overlong_cache": 8}),
    ("dapo", {"max_completion_length": 512, "overlong_cache": 0}, {"max_completion_length": 5120}),
    ("dr_grpo", {"max_completion_length": 512, "aggregation": "tok"}, {"max_completion_length": 512}),
    ("grpo", {"sampler_cap": 2}, {"sampler_cap": 2, "sampler_correction": "token_mask"}),
    ("rloo", {"ratio": "none", "epsilon": 0.1}, {"ratio": "sequence", "epsilon": 0.1}),
    ("rloo", {"ratio": "none", "epsilon": 0.1}, {"ratio": "none"}),
    ("rloo", {"kl_horizon": 100}, {"kl_horizon": 100, "kl_target": 6}),
    ("rloo", {"kl_target": 6, "beta": 0}, {"kl_target": 6}),
    *[(name, {"gamma": 0.99}, {"gamma": 1}) for name in REINFORCE],
    ("reinforce_pp", {"kl_horizon": 100}, {"kl_horizon": 100, "kl_target": 6}),
    ("reinforce_pp", {"kl_target": 6, "beta": 0}, {"kl_target": 6}),
    ("reinforce_pp", {"sampler_cap": 2}, {"sampler_cap": 2, "sampler_correction": "sequence_mask"}),
]
