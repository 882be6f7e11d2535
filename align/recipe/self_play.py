"""`SelfPlayTrainer`: the rounds of a recipe, in six lines of Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.core.files import atomic_write
from align.recipe import loop, loop_run
from align.recipe.document import Item
from align.recipe.loop import LoopRecipe

ROWS = ".prompts.jsonl"


class SelfPlayTrainer:
    """Rounds of sampling, judging, pairing and training, all in this process.

    It is `align loop --in-process` without a file: the sections are those of a recipe, and so are the artefacts.

        trainer = SelfPlayTrainer(
            model="runs/sft/policy",
            preset="iterative_dpo",
            train_dataset=prompts,
            feedback="my_rewards:polite",
            output_dir="runs/loop",
            loop={"reference": "previous", "prompts": 2000},
            train={"max_steps": 200},
        )
        trainer.train()

    Args:
        model: folder or hub id that the loop starts from, or the whole section.
        preset: id of a loop, or `my_pkg.my_file:MyLoop`.
        train_dataset: prompts, or demonstrations where the loop plays against them: a file, folder or hub id, a list of
            streams, or a list of rows.
        feedback: name of a reward function, or entries of the section; None: the preset's.
        output_dir: folder of the loop.
        loop, sections: further options of `loop`, and further sections (`sample`, `pairs`, `method`, `train`, ...).

    Raises:
        ConfigError: something that cannot be used as given; several faults come as one `ErrorList`.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        preset: str,
        train_dataset: Any,
        output_dir: str | Path,
        feedback: str | Sequence[Mapping[str, Any]] | None = None,
        loop: Mapping[str, Any] | None = None,
        **sections: Mapping[str, Any],
    ) -> None:
        self.rows = _rows(train_dataset)
        prompts = [str(Path(output_dir) / ROWS)] if self.rows is not None else train_dataset
        plain: dict[str, Any] = {
            "model": {"name": model} if isinstance(model, str) else dict(model),
            "data": {**sections.pop("data", {}), "prompts": prompts},
            "output_dir": str(output_dir),
            "loop": {"preset": preset, **(loop or {})},
            "train": {},
            **sections,
        }
        if feedback is not None:
            plain["feedback"] = [{"name": feedback}] if isinstance(feedback, str) else list(feedback)
        self.recipe = _build(plain)

    def train(self, say: Callable[[str], None] = lambda line: None) -> Path | None:
        """Run the loop, or what is left of it; the policy that was taken last, None where no round was.

        Args:
            say: told in a line of every round and decision.

        Raises:
            AlignError: whatever stops a stage.
        """
        loop_run.claim(self.recipe)
        if self.rows is not None:
            text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in self.rows)
            atomic_write(self.recipe.output / ROWS, text)
        return loop_run.run(self.recipe, say=say)


def _rows(given: Any) -> list[Mapping[str, Any]] | None:
    """Rows, where they are given as such and not by name. A stream is a mapping with a `name` and no prompt."""
    if isinstance(given, str):
        return None
    rows = list(given)
    named = all(
        isinstance(one, str) or ("name" in one and "prompt" not in one and "messages" not in one) for one in rows
    )
    return None if named else rows


def _build(plain: Mapping[str, Any]) -> LoopRecipe:
    def item(value: Any, where: str) -> Item:
        if isinstance(value, Mapping):
            return Item({key: item(below, f"{where}.{key}".lstrip(".")) for key, below in value.items()}, where)
        if isinstance(value, (list, tuple)):
            return Item([item(below, f"{where}.{number}") for number, below in enumerate(value)], where)
        return Item(value, where)

    return loop.build(item(plain, ""))
