"""`OnlineTrainer`: samples, has judged, and trains on what the present policy writes."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from align.core.errors import ConfigError, DataError, suggestion
from align.core.seeds import derive
from align.data.groups import Preference, TokenCompletion, TokenGroup
from align.data.rollouts import RolloutGroup
from align.data.stream import GlobalBatch, collate
from align.feedback.accounts import Account
from align.feedback.base import Feedback
from align.methods.base import Method, Rollouts
from align.sampling.parity import compare
from align.shaping import ShapingStage, run
from align.shaping.base import make
from align.trainers import checkpoints, rollouts
from align.trainers.collect import Collector
from align.trainers.data import DataSide
from align.trainers.engine import Engine
from align.trainers.health import Health, HealthOptions
from align.trainers.online_checks import (
    check_arguments,
    check_feedback,
    check_shaping,
    check_stages,
    of_the_policy,
    say_kinds,
    say_unread,
    still,
)
from align.trainers.online_config import OnlineConfig
from align.trainers.preference import PreferenceTrainer
from align.trainers.rollout_log import RolloutLog
from align.trainers.rollout_metrics import by_the_policy, measured, mismatch
from align.trainers.samplers import Samplers, open_samplers, tell
from align.trainers.silence import Silence

logger = logging.getLogger(__name__)
_FIXED = (
    "rollout_epochs",
    "rollout_minibatches",
    "max_redraws",
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "shaping",
)
"""Arguments that a resumed run may not change. Who samples it may: the distribution is the same."""
PARITY_PROMPTS = 4
"""Prompts whose greedy completions are compared at the start of a launch, where another engine samples."""


@dataclass(eq=False)
class _Collected:
    """What the draws of one batch of rollouts came to: judged groups, what of them may be trained on, why others not,
    and what is told of them."""

    judged: list[RolloutGroup] = field(default_factory=list)
    groups: list[TokenGroup] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    account: Account = field(default_factory=Account)
    scored: dict[str, list[float]] = field(default_factory=dict)


class OnlineTrainer(PreferenceTrainer):
    """Trains a policy on its own samples: before a step, completions of the prompts are drawn and judged.

    A batch of `rollout_prompts` prompts feeds `rollout_epochs * rollout_minibatches` optimiser steps of
    `global_batch_size` prompts each. Selection and shaping see the whole batch, gathered over ranks.

    Args:
        model, processing_class, peft_config, callbacks, optimizers, quantization_config: as `PreferenceTrainer`.
        method: an online method: its `rollouts()` says what it wants.
        args: an `OnlineConfig`.
        train_dataset: rows with prompts; their other columns reach reward functions.
        eval_dataset: the same, held out: their answers are judged, not trained on.
        feedback: what judges, one or several; `reward_weights` of the arguments weigh rewards by name.
        eval_feedback: judges of the held-out answers beside these: what training does not see.
    """

    args: OnlineConfig

    def __init__(
        self,
        model: str | nn.Module,
        method: str | Method = "online_dpo",
        args: OnlineConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        *,
        feedback: Feedback | Sequence[Feedback] = (),
        eval_feedback: Sequence[Feedback] = (),
        health: HealthOptions | None = None,
    ) -> None:
        args = OnlineConfig(output_dir="runs/align") if args is None else args
        self.feedbacks = list(feedback) if isinstance(feedback, Sequence) else [feedback]
        self.eval_feedbacks = list(eval_feedback)
        check_feedback([*self.feedbacks, *self.eval_feedbacks])
        check_arguments(args)
        self.model_name = model if isinstance(model, str) else str(getattr(model, "name_or_path", "") or "")
        super().__init__(
            model,
            method,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            callbacks,
            optimizers,
            quantization_config,
        )
        self.asked = asked = self._asked()
        check_shaping(self.method.id, asked, args)
        args.check_sampling(self.method.id, asked.ratio)
        self.reward_weights = self._weights()
        say_kinds(self.method.id, asked, self.feedbacks)
        stages = [*args.shaping_stages(), *((stage.id, stage.options) for stage in asked.shaping)]
        self.stages: list[ShapingStage] = [make(id_, options) for id_, options in stages]
        check_stages(self.method, self.stages)
        say_unread(self.method.id, self.data.train.dataset, self.stages, args.max_new_tokens)
        self.health = Health(health or HealthOptions())
        self.silence = Silence()
        self.health.trained |= {one.name for one in self.feedbacks}
        self.buffer: list[TokenGroup] = []
        self.shaping_state: dict[str, np.ndarray] = {}
        self.rollout_log = RolloutLog(self.args.output_dir, args.rollout_keep, self.args.should_save)
        self._samplers: Samplers | None = None
        self._parity_told = False
        self._dummy: TokenGroup | None = None

    def _weights(self) -> dict[str, float]:
        """The weight of every reward that is trained on, by name."""
        names = [one.name for one in self.feedbacks if one.gives == "reward"]
        given = dict(self.args.reward_weights or {})
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise ConfigError(f"`reward_weights` names `{unknown[0]}`", mend=suggestion(unknown[0], names))
        return {name: given.get(name, 1.0) for name in names}

    def _asked(self) -> Rollouts:
        asked = self.method.rollouts()
        if asked is None:
            raise ConfigError(f"method `{self.method.id}` samples nothing")
        return asked

    def _refuse_other_kind(self, method: Method) -> None:
        if method.rollouts() is None:
            raise ConfigError(f"method `{method.id}` trains on data that are there", mend="use PreferenceTrainer")

    def build_engine(self, module: Any) -> Engine:
        engine = super().build_engine(module)
        engine.temperature = self.args.temperature
        return engine

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As `AlignTrainer.train`; samplers that hold an engine or a connection are closed at its end."""
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            if self._samplers is not None:
                self._samplers.close()
                self._samplers = None

    # -- data -------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> int:
        """Optimiser steps that one batch of rollouts feeds."""
        return self.args.rollout_epochs * self.args.rollout_minibatches

    def get_train_dataloader(self) -> DataLoader:
        return self.data.train.loader(self.args, self.args.shuffle, self.args.prompts, self.parts)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.get_train_dataloader())

    def dummy(self) -> TokenGroup:
        """A prompt seen so far with one token after it, for a step that has nothing to train on."""
        if self._dummy is None:
            prompt, end = self.data.dummy(), np.array([int(self.tokenizer.eos_token_id)])
            columns = {name: np.zeros(1) for name in (rollouts.ADVANTAGE, rollouts.SAMPLER)}
            one = TokenCompletion(end, np.array([True]), np.array([0]), reward=0.0, columns=columns)
            pair, wrote = self.asked.select == "pair", [draw.origin for draw in self.asked.draws]
            # Who wrote an answer is read by some losses (xpo), also by one times zero.
            two = (replace(one, role=wrote[0]), replace(one, role=wrote[-1]))
            completions = two[:1] if self.asked.select == "first" else two
            self._dummy = TokenGroup(
                prompt.row, prompt.prompt, completions, (Preference(0, 1, margin=0.0),) if pair else ()
            )
        return self._dummy

    def groups_of(self, engine: Engine, inputs: GlobalBatch, seed: int) -> list[TokenGroup]:
        """The part of the batch of rollouts that this step trains on; at the first part the batch is made."""
        number, part = divmod(self.state.global_step, self.parts)
        if part == 0:
            self.data.note(inputs)
            self.buffer = self.collect(engine, inputs.groups, number)
        chosen = rollouts.part_of(
            self.buffer, part, self.args.rollout_minibatches, derive(self.args.seed, "parts", number)
        )
        return engine.ready(chosen, seed)

    # -- rollouts ---------------------------------------------------------------------------------------------------

    def samplers(self, engine: Engine) -> Samplers:
        if self._samplers is None:
            reference = None if self.reference is None else self.column
            self._samplers = open_samplers(
                self.args, self.asked, engine, self.tokenizer, reference, self.model_name, self.accelerator
            )
        return self._samplers

    def collect(self, engine: Engine, prompts: Sequence[TokenGroup], number: int) -> list[TokenGroup]:
        """Sample, judge, select and shape one batch of rollouts; draws again where whole groups carry no signal.

        Shaping sees all groups of all draws as one batch, and a controller moves once for it.
        """
        wanted, held, trained = len(prompts), _Collected(), list[TokenGroup]()
        state, told = self.shaping_state, dict[str, float]()
        for attempt in range(self.args.max_redraws + 1):
            seed = derive(self.args.seed, "rollouts", number, attempt)
            self._once(engine, prompts, seed, number, held)
            trained = held.groups
            if self.asked.select == "group" and held.groups:
                batch = run(self.stages, rollouts.batch_of(held.groups, self.shaping_state))
                trained, state, told = rollouts.shaped(held.groups, batch), dict(batch.state), dict(batch.metrics)
            missing = wanted - len(trained)
            if missing <= 0 or attempt == self.args.max_redraws:
                break
            prompts = self._more_prompts(missing, derive(seed, "more"))
        self.shaping_state = state
        if len(trained) < wanted:
            logger.info("step %d: %d of %d prompts are trained on", self.state.global_step, len(trained), wanted)
        if held.judged:
            self.rollout_log.write(held.judged, number, held.account.extras)
            shaping = {f"shaping/{name}": value for name, value in told.items()}
            self._tell(self._measured(held, len(trained)) | shaping)
        return trained[:wanted]

    def _once(self, engine: Engine, prompts: Sequence[TokenGroup], seed: int, number: int, held: _Collected) -> None:
        """One draw for some prompts, judged and selected, added to what there is."""
        if not prompts:
            return
        with self.samplers(engine).ready(self.state.global_step) as samplers:
            collect = Collector(
                self.asked, samplers, self.feedbacks, self.args.sampling(), self.rank, self.world, self._models()
            )
            judged, account = collect(prompts, seed, number)
        if _missing(account):
            logger.warning("step %d: %s", self.state.global_step, account)
        self.silence.hear(account)
        selected = rollouts.select(self.asked, judged, seed, self.reward_weights)
        groups, scored = self._scored(engine, selected.groups)
        held.judged += judged
        held.groups += groups
        held.left_out.update(selected.left_out)
        held.account = held.account + account
        for name, value in scored.items():
            held.scored.setdefault(name, []).append(value)

    def _measured(self, held: _Collected, trained: int) -> dict[str, float]:
        """What is told of a batch of rollouts; of several draws the mean, and of a largest difference the largest."""
        found = measured(held.judged, held.left_out, self.reward_weights)
        found |= {f"rollout/{name}": value for name, value in held.account.means.items()}
        found |= {name: float((np.max if "largest" in name else np.mean)(held.scored[name])) for name in held.scored}
        return found | {"rollout/trained_share": trained / len(held.judged)}

    def look(self, engine: Engine, prompts: Sequence[TokenGroup]) -> dict[str, Any]:
        """Sample for a few prompts, ask nobody, and score: what a check can say of a run that samples."""
        with self.samplers(engine).ready(self.state.global_step) as samplers:
            asked = of_the_policy(self.asked)
            collect = Collector(asked, samplers, self.feedbacks, self.args.sampling(), models=self._models())
            drawn = [_of_policy(group) for group in collect.draw(prompts, derive(self.args.seed, "look"), 0)]
        groups = [rollouts.token_group(group) for group in drawn]
        found = self._columns(engine, groups, counted=False)
        said = mismatch(groups, found["logp"].double().cpu().numpy())
        answers = [one for group in drawn for one in group.answers]
        return {
            "prompts": len(drawn),
            "answers": len(answers),
            "tokens": float(np.mean([len(one) for one in answers])),
            "truncated": float(np.mean([not one.finished for one in answers])),
            "largest_difference": said["sampler/largest_difference"],
        }

    def _scored(self, engine: Engine, groups: list[TokenGroup]) -> tuple[list[TokenGroup], dict[str, float]]:
        """The groups with `old_logp` and `ref_logp`, and how far the sampler is from the trainer. One pass without
        gradient, where something reads it: several steps, a reference in the rewards, the first batch of a launch."""
        reads = self.parts > 1 or any(stage.needs_reference for stage in self.stages)
        if not groups or not (reads or not self._parity_told):
            return groups, {}
        found = self._columns(engine, groups)
        tables = {rollouts.OLD: found["logp"].double().cpu().numpy()}
        whole = self.args.top_p == 1 and not self.args.top_k
        said = mismatch(groups, tables[rollouts.OLD]) if whole else {}
        told: dict[str, float] = {}
        if rollouts.REF in found:
            tables[rollouts.REF] = found[rollouts.REF].double().cpu().numpy()
            own = np.array([one.role == "policy" for group in groups for one in group.completions])
            if own.any():  # of another's answers the log-ratios are no estimate of it
                told["rollout/kl"] = float((tables[rollouts.OLD] - tables[rollouts.REF])[own].sum(1).mean())
        if not self._parity_told:
            self._parity_told = True
            if whole:
                with still(engine):
                    self._tell_parity(engine, groups, tables[rollouts.OLD])
            else:
                logger.info("sampler and trainer are not compared: `top_p` or `top_k` cut what is sampled from")
        return (rollouts.with_columns(groups, tables) if reads else groups), said | told

    def _columns(self, engine: Engine, groups: Sequence[TokenGroup], counted: bool = True) -> dict[str, Tensor]:
        """The engine's outputs for all completions, name -> [N, T], without gradient; where memory runs out, again with
        half the budget. As sampled, without an adapter's dropout, which would also draw from the random state that a
        resume restores."""
        while True:
            try:
                share = engine.share(groups, counted=counted)
                with torch.no_grad(), still(engine):
                    return engine.gather(share, [engine.outputs(micro) for micro in share.micros])
            except torch.OutOfMemoryError as error:
                self._take_less(engine, groups, error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _tell_parity(self, engine: Engine, groups: Sequence[TokenGroup], logp: np.ndarray) -> None:
        """How far the sampler is from the trainer, once a launch; of another engine, its greedy tokens too."""
        own = by_the_policy(groups, logp)
        if not own:
            return
        greedy = None
        if self.args.sampler.kind != "hf":
            prefixes = [group.prompt.tolist() for group in groups[:PARITY_PROMPTS]]
            with self.samplers(engine).ready(self.state.global_step):
                greedy = self.samplers(engine).greedy(prefixes, self.args.max_new_tokens)
        tell(compare([one.columns[rollouts.SAMPLER] for _, one in own], [row for row, _ in own], greedy))

    def _more_prompts(self, count: int, seed: int) -> list[TokenGroup]:
        """Prompts in the place of others, drawn as an epoch draws its rows; what is bad among them is counted."""
        train = self.data.train
        batch = collate(train.dataset.__getitems__(train.prepared.sampler(count, seed).batch(0)))
        self.data.note(batch)
        return list(batch.groups)

    def _models(self) -> dict[str, str]:
        return {"policy": f"{self.model_name or 'policy'}@{self.state.global_step}", "reference": self.model_name}

    def _tell(self, metrics: Mapping[str, float]) -> None:
        """To the log, and to those who watch over the run."""
        self.meter.add(
            {name: (torch.tensor(float(value), dtype=torch.float64), 1.0) for name, value in metrics.items()}
        )
        self._watch(metrics)

    def _watch(self, metrics: Mapping[str, float]) -> None:
        for finding in self.health.observe(self.state.global_step, metrics):
            stops = finding.severity == "stop"
            logger.warning("health%s: %s", " stops the run" if stops else "", finding.sentence)
            if stops:
                self.control.should_save = self.control.should_training_stop = True

    # -- evaluation -------------------------------------------------------------------------------------------------

    def held_out(self, engine: Engine, data: DataSide) -> dict[str, float]:
        """Answers to the held-out prompts, judged by the feedback and by `eval_feedback`: means, lengths, KL."""
        found = self._judged_answers(engine, data)
        self._watch({f"eval_{name}": value for name, value in found.items()})
        return found

    def _judged_answers(self, engine: Engine, data: DataSide) -> dict[str, float]:
        batches = data.loader(self.args, False, self.args.prompts)
        prompts = list(itertools.islice((one for batch in batches for one in batch.groups), self.args.eval_prompts))
        if not prompts:
            raise DataError("no held-out row gives a prompt", mend="look at the rows of `data.eval`")
        with self.samplers(engine).ready(self.state.global_step) as samplers:
            collect = Collector(
                of_the_policy(self.asked),
                samplers,
                self.feedbacks,
                self.args.sampling(),
                self.rank,
                self.world,
                self._models(),
                self.eval_feedbacks,
            )
            judged, account = collect(prompts, derive(self.args.seed, "evaluate"), self.state.global_step)
        if _missing(account):
            logger.warning("evaluation: %s", account)
        found = measured(judged, {}, self.reward_weights)
        found = {name.removeprefix("rollout/"): value for name, value in found.items()} | account.means
        return found | self._kl(engine, [_of_policy(group) for group in judged])

    def _kl(self, engine: Engine, own: Sequence[RolloutGroup]) -> dict[str, float]:
        """KL to the reference in nats an answer, by the answers' own log-ratios; nothing without a reference."""
        if self.column is None or "ref_logp" not in engine.needed.reference:
            return {}
        groups = [rollouts.token_group(group) for group in own if len(group)]
        found = self._columns(engine, groups, counted=False)
        ratio = (found["logp"] - found["ref_logp"]).double().sum(1)
        return {"kl": float(ratio.mean())}

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        own: dict[str, Any] = {name: getattr(self.args, name) for name in _FIXED}
        own |= {"reward_weights": self.reward_weights, "feedback": {one.name: one.gives for one in self.feedbacks}}
        return super()._identity() | json.loads(json.dumps(own, default=str))

    def _own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        numbers, tensors = super()._own_state()
        numbers["health"] = self.health.state_dict()
        tensors |= {f"shaping.{name}": torch.as_tensor(value) for name, value in self.shaping_state.items()}
        if self.buffer and self.state.global_step % self.parts:
            numbers["rollouts"], held = rollouts.to_tensors(self.buffer)
            tensors |= {f"rollouts.{name}": value for name, value in held.items()}
        return numbers, tensors

    def restore_own_state(self, folder: Path) -> None:
        super().restore_own_state(folder)
        numbers, tensors = checkpoints.load_state(folder)
        self.health.load_state_dict(numbers["health"])
        self.shaping_state = {name: value.numpy() for name, value in _under("shaping.", tensors).items()}
        if "rollouts" in numbers:
            self.buffer = rollouts.from_tensors(numbers["rollouts"], _under("rollouts.", tensors))


def _missing(account: Account) -> bool:
    return any(count.missing for count in account.counts.values())


def _of_policy(group: RolloutGroup) -> RolloutGroup:
    """The group with the policy's own answers only."""
    places = [place for place, one in enumerate(group.answers) if one.origin == "policy"]
    wins = None if group.wins is None or len(places) < 2 else group.wins[np.ix_(places, places)]
    return replace(group, answers=tuple(group.answers[place] for place in places), wins=wins)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
