"""Which methods train on rows, which sample, and which are fed by rounds; a recipe's text for each kind."""

from __future__ import annotations

from align.core.registry import METHODS

SAMPLES = tuple(name for name in METHODS.entries() if METHODS.get(name)().rollouts() is not None)
ROWS = tuple(name for name in METHODS.entries() if name not in SAMPLES)
ROUNDS = ("alpha_spin", "dno", "dno_prct", "inpo", "sppo")
"""They train on rows that a loop of rounds makes of the policy's own answers; by themselves they claim nothing."""


def for_method(recipe: str, name: str, data: tuple[str, ...] = ("train",)) -> str:
    """The text of a recipe whose streams are `train:`, as a method of this kind needs it: prompts, and a judge."""
    if name not in SAMPLES:
        return recipe
    for key in data:
        recipe = recipe.replace(f"{key}:", "prompts:", 1) if key == "train" else recipe
    return recipe + "\nfeedback: [{kind: function, name: my_file:my_reward}]\n"
