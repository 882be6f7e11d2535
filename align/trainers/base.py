"""`AlignTrainer`: the packed step on `transformers.Trainer`, with exact denominators and exact resume."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from align.compat.accelerate import backward, synchronising
from align.core.errors import ConfigError, TrainingError
from align.core.files import verify_manifest
from align.core.seeds import derive
from align.data.groups import TokenGroup
from align.data.stream import GlobalBatch
from align.methods.base import Method
from align.reference.columns import Column
from align.trainers import checkpoints, optimiser
from align.trainers.callbacks import POLICY_OF, AfterStep, JsonlLog, Patience, RestoreLogState, append_log
from align.trainers.config import AlignConfig, higher_is_better, metric_name
from align.trainers.data import DataSide, RunData
from align.trainers.engine import Engine
from align.trainers.evaluation import evaluate_batches
from align.trainers.guards import SignalGuard, StopOnSignal, check_deepspeed, check_step_zero
from align.trainers.loading import first_line
from align.trainers.metrics import Meter
from align.trainers.roles import RoleModule
from align.trainers.step import PackedStep, StepResult
from align.trainers.token_rewards import TokenRewardsLog

logger = logging.getLogger(__name__)

CPU_BUDGET, GPU_BUDGET = 1024, 16384
_FIXED = (
    "global_batch_size",
    "seed",
    "shuffle",
    "learning_rate",
    "weight_decay",
    "dtype",
    "reference",
    "reference_model",
    "guide_model",
    "previous_model",
)


class AlignTrainer(Trainer):
    """Trains the roles of a module by a method's loss. Subclasses say where data, models and the reference come from.

    One item of the training loader is a whole global batch; one call of `training_step` is one optimiser step.
    """

    args: AlignConfig

    def __init__(
        self,
        roles: RoleModule,
        method: Method,
        args: AlignConfig,
        data: RunData,
        tokenizer: Any,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.method, self.data, self.tokenizer = method, data, tokenizer
        if data.eval is None and args.eval_every is not None:
            raise ConfigError("`eval_every` without evaluation data", mend="give eval_dataset, or `data.eval`")
        self.meter = Meter()
        self.method_state: dict[str, Tensor] = method.initial_state()
        self.column: Column | None = None
        self.expect_equal = False
        if args.best_metric is not None:
            args.metric_for_best_model = metric_name(args.best_metric)
            if args.greater_is_better is None:
                args.greater_is_better = higher_is_better(args.best_metric)
        if data.eval is not None:
            data.eval.rows_per_step(args.global_batch_size)
        super().__init__(
            model=roles,
            args=args,
            train_dataset=data.train.dataset,  # type: ignore[arg-type]
            eval_dataset=None if data.eval is None else data.eval.dataset,  # type: ignore[arg-type]
            callbacks=callbacks,
            optimizers=optimizers,
            data_collator=lambda items: items,
        )
        self.model_accepts_loss_kwargs = False
        if self.is_deepspeed_enabled:
            check_deepspeed(self.accelerator.state.deepspeed_plugin.deepspeed_config, args.max_grad_norm)
        if self.args.device.type == "cpu":
            # Several CPU processes get `cpu:0`, which torch.load cannot map an optimiser to (transformers 5.17).
            self.args.__dict__["_setup_devices"] = torch.device("cpu")
        self.guard = SignalGuard()
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self._restore = RestoreLogState(self)
        for callback in (JsonlLog(), AfterStep(self), self._restore, TokenRewardsLog(self)):
            self.add_callback(callback)
        self.add_callback(StopOnSignal(self.guard, self.world, self.args.device))
        if args.patience is not None:
            self.add_callback(Patience(early_stopping_patience=args.patience))
        self.engine: Engine | None = None
        self._last_log = (0.0, 0)
        self._saved_at = -1

    # -- what a run is made of ------------------------------------------------------------------------------------

    def build_engine(self, module: Any) -> Engine:
        """The engine around the wrapped module; subclasses give the reference. Called once, at the first step."""
        raise NotImplementedError

    def budget(self) -> int:
        """Tokens per micro-batch."""
        return budget_of(self.args)

    def engine_for(self, module: Any) -> Engine:
        if self.engine is None:
            self.engine = self.build_engine(module)
        self.engine.module = module
        return self.engine

    @property
    def stopped_by_signal(self) -> bool:
        return self.guard.agreed

    @property
    def scored_module(self) -> Any:
        """What is called to score without training it."""
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    # -- Trainer's hooks ------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, resuming as `args.resume` says; afterwards each role stands in `output_dir/<role>`.

        Raises:
            CheckpointError: the checkpoint to resume from is not whole.
        """
        start = self._resume_folder(resume_from_checkpoint)
        self._restore.folder = None if start is None else Path(start)
        if start is not None:
            logger.info("continuing from %s", start)
        with self.guard:
            result = super().train(resume_from_checkpoint=start, **kwargs)
        if start is not None and self.state.global_step == checkpoints.step_of(Path(start)):
            logger.info("nothing was left to train: the run has its %d steps", self.state.global_step)
        best = self.state.best_model_checkpoint
        if self.stopped_by_signal:
            return result
        if self.args.best_metric is None or best is None:
            self.save_model()
        elif self.args.should_save:
            logger.info("the policy is that of %s, the best by %s", best, self.args.best_metric)
            checkpoints.copy_roles(self.accelerator.unwrap_model(self.model), Path(best), Path(self.args.output_dir))
            end = {POLICY_OF: Path(best).name, "best_metric": self.args.best_metric, "best": self.state.best_metric}
            append_log(self.args.output_dir, {"step": self.state.global_step, **end})
        return result

    def _resume_folder(self, given: str | bool | None) -> str | None:
        asked = given if isinstance(given, str) else self.args.resume
        if self.args.should_save:
            checkpoints.clean(self.args.output_dir)
        self.accelerator.wait_for_everyone()
        if asked == "never" or given is False:
            if checkpoints.checkpoint_folders(self.args.output_dir):
                raise ConfigError(
                    "resume is `never`, and the output folder holds checkpoints",
                    where=str(self.args.output_dir),
                    mend="use resume=auto, or another output_dir",
                )
            return None
        if asked == "auto":
            found = checkpoints.newest_checkpoint(self.args.output_dir)
            return None if found is None else self._same_run(found)
        checkpoints.verify_checkpoint(asked)
        return self._same_run(Path(asked))

    def _identity(self) -> dict[str, Any]:
        """What a resumed run may not change; ranks, token budget, length and logging it may."""
        args, data = self.args, self.data.train.prepared.fingerprint
        own = {"method": self.method.id, "options": self.method.describe(), "data": data}
        own |= {name: getattr(args, name) for name in _FIXED}
        return json.loads(json.dumps(own, default=str))

    def _same_run(self, folder: Path) -> str:
        there, here = verify_manifest(folder, hashes=False).get("run", {}), self._identity()
        changed = [
            f"{name}: {there.get(name)!r} there, {value!r} now"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if changed:
            raise ConfigError(
                "the output folder holds another run",
                where=str(folder),
                why="; ".join(changed),
                mend="name another output_dir, or start from a checkpoint's `policy` folder as the model",
            )
        return str(folder)

    def training_step(self, model: Any, inputs: GlobalBatch, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        engine = self.engine_for(model)
        seed = derive(self.args.seed, "step", self.state.global_step)
        groups = self.groups_of(engine, inputs, seed)
        if not groups:
            logger.warning("step %d has no usable row, so no gradient", self.state.global_step)
            return self._empty_step(engine, seed)
        if self.state.global_step == 0:
            self._check_step_zero(engine, groups)
        self._tell_epoch()
        result = self._step(engine, groups, seed)
        self.method_state = result.state
        self.meter.add({"micro_batches": (torch.tensor(float(result.micro_batches)), 1.0)})
        return result.loss

    def groups_of(self, engine: Engine, inputs: GlobalBatch, seed: int) -> list[TokenGroup]:
        """What a step trains on, out of an item of the loader. A collective."""
        self.data.note(inputs)
        return engine.ready(inputs.groups, seed)

    def dummy(self) -> TokenGroup:
        """What a step without rows runs times zero."""
        return self.data.dummy()

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train.loader(self.args, self.args.shuffle))

    def _tell_epoch(self) -> None:
        """Write `epoch` and `epochs` into the state of a method that reads them."""
        if "epoch" not in self.method_state:
            return
        epochs = math.ceil(self.state.max_steps / self.steps_per_epoch)
        if epochs < 2 and self.state.global_step == 0:
            logger.warning("%s acts from the second epoch on, and this run has one", self.method.id)
        told = {"epoch": self.state.global_step // self.steps_per_epoch, "epochs": epochs}
        self.method_state |= {name: torch.tensor(float(told[name]), dtype=torch.float64) for name in told}

    def _step(self, engine: Engine, groups: list[TokenGroup], seed: int) -> StepResult:
        """The step; where memory runs out, again with half the budget. Numbers do not depend on the budget."""
        while True:
            held = self.meter.copy()
            try:
                return PackedStep(engine, self.accelerator, self.meter).run(groups, self.method_state, seed)
            except torch.OutOfMemoryError as error:
                self._take_less(engine, groups, error)
            self.meter.sums = held
            self.model.zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _take_less(self, engine: Engine, groups: Sequence[TokenGroup], error: torch.OutOfMemoryError) -> None:
        """Half the budget, down to the largest group.

        Raises:
            TrainingError: it is that already; or other ranks wait in a collective that this one has left, so that only
                a single process can try again.
        """
        smallest = max(group.tokens for group in groups)
        if self.world > 1 or engine.budget <= smallest:
            raise TrainingError(
                f"out of memory at {engine.budget} tokens a micro-batch",
                why=first_line(error),
                mend=f"set `tokens_per_micro_batch` to {max(smallest, engine.budget // 2)} or less, use "
                "gradient_checkpointing, or shard the model",
            ) from error
        engine.budget = max(engine.budget // 2, smallest)
        logger.warning("out of memory: going on with %d tokens a micro-batch", engine.budget)

    def _empty_step(self, engine: Engine, seed: int) -> Tensor:
        groups = engine.ready([self.dummy()], seed)
        share = engine.share(groups)
        with synchronising(self.accelerator, engine.module, last=True):
            outputs = engine.outputs(share.micros[-1])
            loss = torch.stack([value.sum() * 0.0 for value in outputs.values()]).sum()
            backward(self.accelerator, loss)
        return loss.detach()

    def _check_step_zero(self, engine: Engine, groups: Any) -> None:
        if self.column is None or "ref_logp" not in engine.needed.reference:
            return
        micro = engine.share(groups).micros[0]
        with torch.no_grad():
            outputs = engine.outputs(micro)
        view = engine.view(micro.groups, outputs, self.method_state, 0)
        mask = torch.cat([part.mask for part in engine.completions_of(view)])
        table = {
            name: torch.cat([part.column(name) for part in engine.completions_of(view)])
            for name in ("logp", "ref_logp")
        }
        check_step_zero(table, mask, engine.roles.dtype, self.expect_equal)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Nothing beyond `max_steps`: Trainer would train one step more where a finished run is started again."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With `save_total_limit` 1 Trainer deletes here every checkpoint but the best: the one to resume from.
        keep, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = keep

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Trainer would count labels; our counts are per term and exact already."""

    def get_train_dataloader(self) -> DataLoader:
        return self.data.train.loader(self.args, shuffle=self.args.shuffle)

    def get_total_train_batch_size(self, args: Any) -> int:
        return self.args.global_batch_size

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, None)
            decayed = set(self.get_decay_parameter_names(self.model))
            self.optimizer = kind(optimiser.groups(self.model, self.args, decayed), **settings)
        return self.optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = optimiser.clip(self.accelerator, self.model, self.args)
        if norm is not None and not math.isfinite(float(norm)):
            raise TrainingError(
                f"the gradient's norm is {float(norm)}",
                where=f"step {self.state.global_step}",
                why="the loss is finite and its gradient is not: a square root or a logarithm at 0, or an overflow",
                mend="look at the method's loss at these values; the last checkpoint is good",
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A collective for training logs: metrics are reduced over ranks here, once."""
        if "loss" in logs:
            logs.update(self.meter.drain(self.world))
            now, steps = time.monotonic(), self.state.global_step
            before, last = self._last_log
            if before and steps > last:
                logs["units_per_second"] = (steps - last) * self.args.global_batch_size / (now - before)
            self._last_log = (now, steps)
        super().log(logs, start_time)

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The numbers of `held_out`, logged under `metric_key_prefix`; the same for any number of ranks."""
        data = self.data.eval
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            raise ConfigError("`evaluate` takes the data the trainer was made with", mend="give it as `eval_dataset`")
        if data is None:
            raise ConfigError("there is no evaluation data", mend="give eval_dataset, or `data.eval` in the recipe")
        engine = self.engine_for(self.scored_module)
        training = self.model.training
        self.model.eval()
        measured = self.held_out(engine, data)
        self.model.train(training)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def held_out(self, engine: Engine, data: DataSide) -> dict[str, float]:
        """What an evaluation measures: here means over the held-out set by the packed path. A collective."""
        seed = derive(self.args.seed, "evaluate")
        return evaluate_batches(engine, data.loader(self.args, shuffle=False), self.method_state, seed)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = f"eval_{self.args.metric_for_best_model}"
        if self.args.best_metric is not None and name not in metrics:
            raise ConfigError(
                f"`best_metric` is `{self.args.best_metric}`, which evaluation does not give",
                mend="use one of " + ", ".join(sorted(key.removeprefix("eval_") for key in metrics)),
            )
        # Of two that are equally good the later is kept: it has seen more data.
        tie = self.args.best_metric is not None and metrics[name] == self.state.best_metric
        better = super()._determine_best_metric(metrics, trial) or tie
        if better and self.args.best_metric is not None:
            self.state.best_global_step = self.state.global_step
            self.control.should_save = True
        return better

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self._saved_at == self.state.global_step:
            return
        self._saved_at = self.state.global_step
        main = self.args.should_save
        info = {"step": self.state.global_step, "epoch": self.state.epoch}
        info |= {"data": self.data.describe(), "run": self._identity()}
        numbers, tensors = self._own_state()
        with checkpoints.staged(path, main, self.accelerator.wait_for_everyone, info) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_rng_state(str(folder))
            self._name_best(path)  # on every rank: `train` decides by it whether to enter a collective
            if main:
                checkpoints.save_state(folder, numbers, tensors)
                self._save_trainer_state(folder)
        if main:
            checkpoints.prune(self.args.output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _name_best(self, path: Path) -> None:
        if self.state.best_global_step:
            best = path.with_name(f"checkpoint-{self.state.best_global_step}")
            if best == path or best.is_dir():
                self.state.best_model_checkpoint = str(best)

    def _save_trainer_state(self, folder: Path) -> None:
        from transformers.trainer_callback import ExportableState

        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        self.state.save_to_json(str(folder / checkpoints.TRAINER_STATE))

    def _own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A collective: what is summed on the ranks is saved as one."""
        mean_loss = self.accelerator.gather(self._tr_loss.reshape(1)).mean()
        tensors = {f"method.{name}": value for name, value in self.method_state.items()}
        numbers: dict[str, Any] = {
            "meter": self.meter.reduced(self.world),
            "loss_since_log": float(mean_loss),
            "loss_total": float(self._total_loss_scalar),
            "last_logged_step": self._globalstep_last_logged,
            "rejected": self.data.state_dict(),
        }
        if hasattr(self.column, "state_dict"):
            held = self.column.state_dict()  # type: ignore[union-attr]
            numbers["reference_steps"] = held["steps"]
            tensors |= {f"reference.{name}": value for name, value in held["weights"].items()}
        return numbers, tensors

    def restore_own_state(self, folder: Path) -> None:
        """What `_save_checkpoint` wrote beyond Trainer's own; called when training begins after a resume."""
        numbers, tensors = checkpoints.load_state(folder)
        self.method_state = _under("method.", tensors)
        self.meter.load_state_dict(numbers["meter"] if self.rank == 0 else {})
        self._tr_loss.fill_(numbers["loss_since_log"])
        self._total_loss_scalar = numbers["loss_total"]
        self._globalstep_last_logged = numbers["last_logged_step"]
        self.data.load_state_dict(numbers["rejected"])
        held = self.state.stateful_callbacks.get("Patience")
        for callback in self.callback_handler.callbacks:
            if held and isinstance(callback, Patience):
                counter = held["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = counter
        if "reference_steps" in numbers:
            self.engine_for(self.model_wrapped)  # builds the column, which is made at the first step otherwise
            held = {"steps": numbers["reference_steps"], "weights": _under("reference.", tensors)}
            self.column.load_state_dict(held)  # type: ignore[union-attr]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.load_roles(self.model, Path(resume_from_checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Each role in its own folder, which `from_pretrained` loads."""
        folder = Path(output_dir or self.args.output_dir)
        state = None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            state = self.accelerator.get_state_dict(self.model_wrapped)
        if self.args.should_save:
            roles = self.accelerator.unwrap_model(self.model)
            checkpoints.save_roles(roles, folder, state, self.tokenizer)


def budget_of(args: AlignConfig) -> int:
    """Tokens per micro-batch that a run with these arguments starts with."""
    given = args.tokens_per_micro_batch
    return given if given is not None else (GPU_BUDGET if args.device.type == "cuda" else CPU_BUDGET)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
