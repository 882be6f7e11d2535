"""Which methods train on rows, which sample, and which are fed by rounds; a recipe's text for each kind."""

from __future__ import annotations

from align.core.registry import METHODS

SAMPLES = tuple(name for name in METHODS.entries() if METHODS.get(name)().rollouts() is not None)
ROWS = tuple(name for name in METHODS.entries() if name not in SAMPLES)
ROUNDS = ("alpha_spin", "dno", "dno_prct", "inpo", "sppo")
"""They train on rows that a loop of rounds makes of the policy's own answers; by themselves they claim nothing."""


def for_method(recipe: str, name: str) -> str:
    """The text of a recipe of a method on rows as one that samples needs it: prompts, a judge, reward as metric."""
    if name not in SAMPLES:
        return recipe
    asked = recipe.replace("train:", "prompts:", 1).replace("best: loss", "best: reward")
    return asked + "\nfeedback: [{kind: function, name: my_file:my_reward}]\n"
