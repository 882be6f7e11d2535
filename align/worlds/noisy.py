"""World `noisy`: `style`, compared by annotators who flip labels, who prefer length, and who come in groups."""

from __future__ import annotations

from dataclasses import dataclass

from align.core.options import option
from align.core.seeds import generator
from align.worlds.base import Preferred, world
from align.worlds.style import Style


@world("noisy")
@dataclass(frozen=True, kw_only=True)
class Noisy(Style):
    """`style` with annotators of three groups: careful, hasty (flips labels), and fond of long answers."""

    careful: int = option(4, at_least=0, doc="annotators who follow the gold reward")
    hasty: int = option(4, at_least=0, doc="annotators who say the opposite with chance `flip`")
    lengthy: int = option(2, at_least=0, doc="annotators who prefer the answer of more words")
    flip: float = option(0.3, at_least=0, below=1, doc="chance that a hasty annotator says the opposite")

    def compare(self, prompt: str, first: str, second: str, seed: int, row: int) -> Preferred:
        rng = generator(seed, "annotator", self.id, row)
        groups = ("careful",) * self.careful + ("hasty",) * self.hasty + ("lengthy",) * self.lengthy
        truth = super().compare(prompt, first, second, seed, row).first
        if not groups:
            return Preferred(truth, "gold")
        number = int(rng.integers(len(groups)))
        annotator = f"{groups[number]}-{number}"
        said = truth
        if groups[number] == "lengthy":
            more = len(first.split()) - len(second.split())
            said = None if more == 0 else more > 0
        elif groups[number] == "hasty" and truth is not None and rng.random() < self.flip:
            said = not truth
        return Preferred(said, annotator, said is not None and truth is not None and said != truth)


def gold_reward(prompts: list, completions: list, **columns: object) -> list[float]:
    """The gold reward of `style`: the noise is in the annotators, not in what is wanted."""
    from align.worlds import style

    return style.gold_reward(prompts, completions, **columns)
