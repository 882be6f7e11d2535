"""Run under torchrun: the gradient of one step of every method over all ranks, against the golden twin on one."""

from __future__ import annotations

import json
import sys

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from align.compat.accelerate import leave
from align.methods import METHODS
from align.scoring.assemble import columns_needed
from align.testing.steps import (
    engine_for,
    golden_step,
    packed_step,
    random_groups,
    relative_difference,
    role_module,
    with_contexts,
)
from align.testing.tiny import tiny_model


def main(out: str) -> None:
    accelerator = Accelerator(cpu=True)
    world, rank = accelerator.num_processes, accelerator.process_index
    model, other = tiny_model("qwen3", seed=1), tiny_model("qwen3", seed=2).eval().requires_grad_(False)
    found = {}
    for name in sorted(METHODS.entries()):
        method = METHODS.get(name)()
        needed = columns_needed(method)
        reference = other if needed.reference or needed.live_reference else None
        roles = role_module(model, method)
        for case, (count, budget) in {
            "even": (11, 60),
            "one_micro": (6, 1 << 20),
            "fewer_groups_than_ranks": (1, 60),
        }.items():
            if case == "fewer_groups_than_ranks" and name == "kto":
                count = 2  # one row has no partner
            groups = with_contexts(random_groups(method.view, count, seed=3, needs=method.requires()), method)
            wanted_loss, wanted = golden_step(method, roles, reference, groups, seed=5)
            wrapped = DistributedDataParallel(roles, find_unused_parameters=True)
            engine = engine_for(method, roles, reference, budget, module=wrapped, world=world, rank=rank)
            loss, gradients, state = packed_step(engine, accelerator, groups, seed=5)
            mean = torch.tensor(loss)
            torch.distributed.all_reduce(mean)
            found[f"{name}/{case}"] = {
                "gradient": relative_difference(gradients, wanted),
                "loss": abs(float(mean) / world - wanted_loss) / max(1.0, abs(wanted_loss)),
                "state": {key: float(value.sum()) for key, value in state.items()},
            }
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, found)
    if rank == 0:
        with open(out, "w") as file:
            json.dump({"world": world, "ranks": everyone}, file)
    leave(accelerator)


if __name__ == "__main__":
    main(sys.argv[1])
