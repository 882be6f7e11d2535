"""Means over a held-out set, by the same plan, packing and loss as training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from align.data.stream import GlobalBatch
from align.methods.base import terms_of
from align.trainers.engine import Engine, Share
from align.trainers.metrics import Meter, measure


def evaluate_batches(
    engine: Engine, batches: Iterable[GlobalBatch], state: Mapping[str, Tensor], seed: int
) -> dict[str, float]:
    """Metric -> mean over all units of all batches; `loss` is the sum of the means of its terms.

    A batch-coupled loss is that of each batch as a global batch, averaged with the batches' sizes. A collective.
    """
    meter = Meter()
    terms: set[str] = set()
    with torch.no_grad():
        for batch in batches:
            groups = engine.ready(batch.groups, seed)
            if groups:
                terms |= _evaluate(engine, engine.share(groups), meter, state, seed)
    means = meter.drain(engine.world)
    parts = {name: means.pop(f"term:{name}") for name in sorted(terms) if f"term:{name}" in means}
    if parts:
        means["loss"] = sum(parts.values())
    if len(parts) > 1:
        means |= {f"terms/{name}": value for name, value in parts.items()}
    if "rewards/accuracies" in means:
        means["accuracy"] = means["rewards/accuracies"]
    return means


def _evaluate(engine: Engine, share: Share, meter: Meter, state: Mapping[str, Tensor], seed: int) -> set[str]:
    coupled = engine.method.coupling == "batch"
    parts, names = [], set(share.counts)
    zero = torch.zeros(())
    for micro in share.micros:
        outputs = engine.outputs(micro)
        parts.append(outputs)
        if micro.dummy:
            continue
        view = engine.view(micro.groups, outputs, state, seed)
        meter.add(measure(engine.method, view))
        if not coupled:
            found = terms_of(engine.method, view)
            meter.add({f"term:{name}": (term.scale * term.values.sum(), 0.0) for name, term in found.items()})
    if coupled:
        view = engine.view(share.groups, engine.gather(share, parts), state, seed)
        found = terms_of(engine.method, view)
        if engine.rank == 0:
            meter.add({f"term:{name}": (term.scale * term.values.sum(), 0.0) for name, term in found.items()})
    if engine.rank == 0:
        # Counts are of the whole batch, known to every rank: one of them adds them.
        meter.add({f"term:{name}": (zero, count) for name, count in share.counts.items()})
    return names
