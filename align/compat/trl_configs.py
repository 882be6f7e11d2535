"""The options of TRL's configuration classes and their defaults, read from the installed TRL. Checked with 1.16.0."""

from __future__ import annotations

import dataclasses
import importlib
import os
from typing import Any

_TRAINERS = {
    "dpo": ("trl", "DPOConfig"),
    "kto": ("trl", "KTOConfig"),
    "sft": ("trl", "SFTConfig"),
    "cpo": ("trl.experimental.cpo", "CPOConfig"),
    "orpo": ("trl.experimental.orpo", "ORPOConfig"),
}
_BCO = {
    "learning_rate": 5e-7,
    "beta": 0.1,
    "loss_type": "bco",
    "max_length": 1024,
    "max_prompt_length": 512,
    "max_completion_length": None,
    "prompt_sample_size": 1024,
    "min_density_ratio": 0.5,
    "max_density_ratio": 10.0,
    "precompute_ref_log_probs": False,
}
"""BCOConfig left TRL before 1.16; its own options as they were, over those of KTOConfig."""


def options_of(trainer: str) -> dict[str, Any]:
    """Option -> default of a trainer's configuration, `ModelConfig` and `ScriptArguments`, as TRL's scripts take them.

    A default made by a factory is what the factory makes; an option without a default is None.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    importlib.import_module("align.compat.bitsandbytes")  # quiets what TRL's import of peft would print
    module, name = _TRAINERS["kto" if trainer == "bco" else trainer]
    classes = [getattr(importlib.import_module(module), name)]
    trl = importlib.import_module("trl")
    classes += [trl.ModelConfig, trl.ScriptArguments, trl.DatasetMixtureConfig]
    found: dict[str, Any] = {}
    for cls in reversed(classes):  # the trainer's own default counts where two share a name
        for field in dataclasses.fields(cls):
            if field.default_factory is not dataclasses.MISSING:
                found[field.name] = field.default_factory()
            else:
                default = None if field.default is dataclasses.MISSING else field.default
                found[field.name] = getattr(default, "value", default)
    return {**found, **_BCO} if trainer == "bco" else found
