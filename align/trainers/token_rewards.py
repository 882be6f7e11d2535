"""A few held-out answers token by token with the implicit reward of each, for the page of a run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from align.core.files import atomic_write
from align.core.seeds import derive
from align.data.encode import Encoder
from align.data.groups import TokenGroup
from align.data.stream import Hole
from align.scoring.token_view import SHOWN, token_rewards, told
from align.scoring.views import Completions

TOKENS_FILE = "token_rewards.jsonl"
_TRIES = 64
"""Rows looked through for usable ones."""


class TokenRewardsLog(TrainerCallback):
    """Writes `output_dir/token_rewards.jsonl` at each evaluation and at the end: a line a step.

    The lines that are kept are the newest and those of steps that have a checkpoint, so that the policy of the best
    evaluation has its own. Methods without a reference have none. Every rank takes part: scoring is a collective.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._groups: list[TokenGroup] | None = None
        self._at = -1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A finished run that is started again has trained nothing and has no engine.
        if self.trainer.engine is not None and self._at != state.global_step and not self.trainer.stopped_by_signal:
            self._write(state)

    def _write(self, state: Any) -> None:
        self._at = state.global_step
        if self.trainer.method.rollouts() is not None:  # held-out rows are prompts, without answers to look at
            return
        entry = look(self.trainer, self._rows())
        if entry is None or not state.is_world_process_zero:
            return
        folder = Path(self.trainer.args.output_dir)
        path = folder / TOKENS_FILE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _stands(line, folder, state.global_step)]
        new = json.dumps({"step": state.global_step, **entry}, ensure_ascii=False)
        atomic_write(path, "".join(f"{line}\n" for line in [*kept, new]))

    def _rows(self) -> list[TokenGroup]:
        """The first usable rows of the evaluation data, the same in every evaluation."""
        if self._groups is None:
            data = self.trainer.data.eval
            items = (data.dataset[row] for row in range(min(_TRIES, len(data.dataset)))) if data is not None else ()
            usable = (item for item in items if not isinstance(item, Hole))
            self._groups = list(itertools.islice(usable, SHOWN))
        return self._groups


def look(trainer: Any, groups: list[TokenGroup]) -> dict[str, Any] | None:
    """`{"beta", "own_reward", "rows": [...]}` of the policy as it is; None without rows or without a reference.

    `rows` are as `told` gives them, in units of `beta` times nats. `own_reward` is true where the method's logged
    rewards are another function of the log-ratios than this sum. A collective.
    """
    method, engine = trainer.method, trainer.engine_for(trainer.scored_module)
    if not groups or "ref_logp" not in engine.needed.outputs:
        return None
    beta = float(getattr(method, "beta", 1.0))
    training = trainer.model.training
    trainer.model.eval()
    share = engine.share(engine.ready(groups, derive(trainer.args.seed, "evaluate")))
    with torch.no_grad():
        table = engine.gather(share, [engine.outputs(micro) for micro in share.micros])
    trainer.model.train(training)
    encoder, rows, at = Encoder(trainer.tokenizer), [], 0
    for group in share.groups:
        columns = {name: table[name][at : at + len(group.completions)].double() for name in ("logp", "ref_logp")}
        mask = torch.zeros_like(columns["logp"], dtype=torch.bool)
        for place, one in enumerate(group.completions):
            mask[place, : len(one)] = torch.from_numpy(one.mask)
        rewards = token_rewards(Completions(mask, columns), beta).reward.cpu().numpy()
        rows.append(told(group, list(rewards), encoder))
        at += len(group.completions) + len(group.mismatched)
    return {"beta": beta, "own_reward": hasattr(method, "implicit_reward"), "rows": rows}


def _stands(line: str, folder: Path, step: int) -> bool:
    try:
        written = int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return False
    return written < step and (folder / f"checkpoint-{written}").is_dir()
