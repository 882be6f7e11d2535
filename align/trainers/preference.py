"""`PreferenceTrainer`: offline preference training on a fixed data set."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from align.core.errors import ConfigError, ModelError
from align.methods import METHODS
from align.methods.base import Method
from align.sampling.prompts import stop_at_end_of_turn
from align.scoring.backends import prepare
from align.scoring.facts import language_model
from align.scoring.value import ValueModel
from align.trainers.base import AlignTrainer
from align.trainers.config import AlignConfig, default_learning_rate
from align.trainers.data import RunData
from align.trainers.engine import VALUE, Engine
from align.trainers.live import live_samples
from align.trainers.loading import (
    DTYPES,
    check_quantization,
    disable_dropout,
    load_model,
    load_tokenizer,
    refuse_config,
    trainable_in_float32,
)
from align.trainers.references import Reference, build_column, check_guide, choose, guides, previous
from align.trainers.roles import RoleModule

logger = logging.getLogger(__name__)


class PreferenceTrainer(AlignTrainer):
    """Trains a policy on preferences, labels, lists or demonstrations.

    Args:
        model: folder or hub id, or a loaded causal LM.
        method: an id such as `simpo`, or an instance such as `SimPO(beta=2.5)`.
        args: the run's arguments.
        train_dataset: path or hub id, list of rows, `datasets.Dataset`, a list of `{name, split, winner, max_rows}`, or
            `RunData` that was prepared before (with its evaluation data).
        eval_dataset: the same, held out.
        processing_class: the tokenizer; that of `model` by default.
        peft_config: a `peft` configuration; the policy is then the adapter alone.
        quantization_config: a `BitsAndBytesConfig` of 4 bits for the frozen weights under an adapter (QLoRA).
        callbacks, optimizers: as in `transformers.Trainer`.
    """

    def __init__(
        self,
        model: str | nn.Module,
        method: str | Method = "dpo",
        args: AlignConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
    ) -> None:
        if args is not None and not isinstance(args, AlignConfig):
            raise ConfigError(f"`args` is a {type(args).__name__}", mend="give an `AlignConfig`, with the same names")
        args = AlignConfig(output_dir="runs/align") if args is None else copy.copy(args)
        chosen = resolve_method(method)
        if train_dataset is None:
            raise ConfigError("there is no training data", mend="give train_dataset")
        self._refuse_other_kind(chosen)
        _refuse_quantization(model, quantization_config, peft_config, DTYPES[args.dtype])
        name = model if isinstance(model, str) else getattr(model, "name_or_path", "") or ""
        set_seed(args.seed)  # an adapter is drawn before Trainer seeds
        tokenizer = processing_class or load_tokenizer(name, args.trust_remote_code)
        if args.learning_rate is None:
            adapter = peft_config is not None or hasattr(model, "peft_config")
            args.learning_rate = default_learning_rate(chosen.id, adapter)
        for caution in chosen.cautions():
            logger.warning("%s", caution)
        data = train_dataset
        if not isinstance(data, RunData):
            data = RunData.prepare(train_dataset, eval_dataset, tokenizer, chosen, args)
        roles: dict[str, nn.Module] = {}
        _refuse_value_options(chosen, args)
        check_guide(chosen, args)
        if VALUE in chosen.requires():
            roles[VALUE] = _value(model, args)
        policy = roles["policy"] = _policy(model, args, peft_config, quantization_config)
        added = stop_at_end_of_turn(language_model(policy), tokenizer, args.chat_template)
        if added:
            logger.info(
                "`generate` of the saved model stops at `%s` too, which ends a turn in the chat template", added
            )
        source = model if isinstance(model, str) else None
        self.reference: Reference | None = choose(chosen, args, policy, source)
        self._previous = previous(chosen, args, policy, source)
        module = RoleModule(roles, DTYPES[args.dtype])
        super().__init__(module, chosen, args, data, tokenizer, callbacks, optimizers)
        self.expect_equal = self.reference is not None and self.reference.starts_equal

    def _refuse_other_kind(self, method: Method) -> None:
        if method.rollouts() is not None:
            raise ConfigError(
                f"method `{method.id}` trains on what the policy samples before each step",
                mend="train it with OnlineTrainer",
            )

    def build_engine(self, module: Any) -> Engine:
        roles = self.accelerator.unwrap_model(self.model)
        sharded = any(hasattr(parameter, "ds_id") for parameter in roles.parameters())
        backend = prepare(roles.policy, self.args.backend, probe=not sharded)  # type: ignore[arg-type]
        if VALUE in roles.roles:
            prepare(roles.roles[VALUE], backend.name, probe=False)
        live = None
        if self.reference is not None:
            self.column = build_column(
                self.reference, self.args, roles, backend, self.accelerator, self._any_rank, self.steps_per_epoch
            )
            live = self.column.model
        engine = Engine(
            module, roles, self.method, backend, self.args.device, self.budget(), self.rank, self.world, self.column
        )
        if engine.needed.live_reference:
            if sharded:
                raise ConfigError(
                    f"method `{self.method.id}` compares whole vocabularies, which ZeRO-3 does not allow here",
                    mend="use ZeRO-2 or plain data parallelism",
                )
            engine.live = live
        engine.live_samples = live_samples(
            self.method.live_samples(), roles, self.tokenizer, self.args, self.rank, self.world
        )
        engine.guides = guides(self.args, backend, self.accelerator, self._previous)
        return engine

    def _any_rank(self, here: bool) -> bool:
        if self.world == 1:
            return here
        flag = torch.tensor([float(here)], device=self.args.device)
        torch.distributed.all_reduce(flag)
        return bool(flag.item())


def resolve_method(method: str | Method) -> Method:
    """A method from its id (built in, or `my_pkg.my_file:MyMethod`), or the instance itself."""
    if isinstance(method, str):
        return METHODS.get(method)()
    if isinstance(method, Method):
        return method
    raise ConfigError(
        f"`method` is a {type(method).__name__}", mend="give an id such as 'dpo' or an instance DPO(beta=0.1)"
    )


def _refuse_quantization(model: str | nn.Module, quantization: Any, peft_config: Any, dtype: torch.dtype) -> None:
    """Before data are read."""
    if quantization is None:
        return
    if not isinstance(model, str):
        raise ConfigError("`quantization_config` for a model that is loaded", mend="give its folder or hub id instead")
    if peft_config is None:
        raise ConfigError(
            "`quantization_config` without `peft_config`", why="4-bit weights have no gradient", mend="give peft_config"
        )
    check_quantization(quantization, dtype)


def _policy(model: str | nn.Module, args: AlignConfig, peft_config: Any, quantization: Any = None) -> nn.Module:
    dtype = DTYPES[args.dtype]
    if isinstance(model, str):
        # What is trained is float32 whatever the compute dtype; what an adapter leaves frozen takes the compute dtype.
        kept = dtype if peft_config is not None else torch.float32
        policy: Any = load_model(model, kept, args.trust_remote_code, quantization, args.device)
    else:
        policy = model
        refuse_config(policy.config, str(getattr(policy, "name_or_path", "model")))
    disable_dropout(policy)
    if peft_config is not None:
        if hasattr(policy, "peft_config"):
            raise ModelError("`peft_config` for a model that has an adapter", mend="give one or the other")
        from peft import get_peft_model

        policy = get_peft_model(policy, peft_config)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise ModelError("nothing in the model requires a gradient", mend="unfreeze it, or give peft_config")
    trainable_in_float32(policy)
    policy.config.use_cache = False
    return policy


def _refuse_value_options(method: Method, args: AlignConfig) -> None:
    given = [name for name in ("value_learning_rate", "value_max_grad_norm") if getattr(args, name) is not None]
    if given and VALUE not in method.requires():
        raise ConfigError(f"`{given[0]}` is set, and method `{method.id}` has no value role", mend="remove it")
    if "value_max_grad_norm" in given and args.deepspeed_plugin is not None:
        raise ConfigError("`value_max_grad_norm` under DeepSpeed, which clips all roles as one", mend="remove it")


def _value(model: str | nn.Module, args: AlignConfig) -> nn.Module:
    """A value role on a trunk of its own, from the policy's starting weights; made before an adapter changes them."""
    trunk = load_model(model, torch.float32, args.trust_remote_code) if isinstance(model, str) else copy.deepcopy(model)
    disable_dropout(trunk)
    return ValueModel(trunk)
