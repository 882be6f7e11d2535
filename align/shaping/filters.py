"""Which completions and groups are trained on; the others keep their place in a group's statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace

from align.shaping.base import Batch, ShapingStage, equal_groups, shaping


@shaping("mask_truncated", paper="2503.14476")
@dataclass(frozen=True, kw_only=True)
class MaskTruncated(ShapingStage):
    """Answers that were cut are not trained on (DAPO's overlong filtering)."""

    def __call__(self, batch: Batch) -> Batch:
        made = replace(batch, train=batch.train & batch.finished)
        return made.with_metrics(truncated_share=float(1.0 - batch.finished.mean())) if len(batch.finished) else made


@shaping("dynamic_sampling", paper="2503.14476")
@dataclass(frozen=True, kw_only=True)
class DynamicSampling(ShapingStage):
    """Groups whose rewards are all equal are not trained on: a baseline leaves them without advantage.

    It judges the rewards as they are where it stands: before a penalty for length, answers of equal correctness go,
    behind it they stay. The paper draws further prompts until the batch is full; here the batch becomes smaller, and
    `groups_kept` tells by how much. A group without any reward goes too.
    """

    def __call__(self, batch: Batch) -> Batch:
        kept = ~equal_groups(batch)
        made = replace(batch, train=batch.train & kept[batch.group])
        return made.with_metrics(groups_kept=float(kept.mean())) if len(kept) else made
